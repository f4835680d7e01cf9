"""A static site of what loaders do, for any server: a page per loader, finding, format and code."""
