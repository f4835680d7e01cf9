"""Checks: one module per family of properties, each a plain function from an observation to findings."""
