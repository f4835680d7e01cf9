"""A new file whose scale readers agree on."""
