"""Open a sealed cache or its export, and stream batches from it. Nothing here knows how caches are built."""
