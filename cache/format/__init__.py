"""What a cache is on disk: spec, arrays, views, shards, records and manifest. Reader and builder stand on it."""
