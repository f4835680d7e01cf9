"""The subject under test: the protocol, how a string becomes a loader, the live loaders, and isolation."""
