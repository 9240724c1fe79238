"""What is counted and shown while something trains."""
