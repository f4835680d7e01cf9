"""The one engine of scaling laws: grammar, identification, diagnosis, prescription, what is known of released tools."""
