"""The loop that every attack runs in: batching, private copies, precision, and a record per row."""
