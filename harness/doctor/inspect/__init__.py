"""What is in one LoRA file."""
