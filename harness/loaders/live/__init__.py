"""Live loaders: one file each, which declares itself."""
