"""Thousands of files, one row each."""
