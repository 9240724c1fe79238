"""Images and labels, from whatever files they come."""
