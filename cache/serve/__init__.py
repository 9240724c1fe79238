"""Caches and exports over HTTP, read-only: the same keys that any static server would have."""
