"""Checks: what a load must do and leave alone, one file of `families/` per family of properties."""
