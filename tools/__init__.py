"""Inspect caches, and run whole experiments."""
