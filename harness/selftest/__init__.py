"""Proof of power: loaders that are wrong in one known way, loaders that are right, and what the checks say of them."""
