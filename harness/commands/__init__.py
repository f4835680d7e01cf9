"""One module per command of `lora-harness`; each imports what it needs when it runs."""
