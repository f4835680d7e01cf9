"""What a merge really did."""
