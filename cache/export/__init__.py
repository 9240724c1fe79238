"""A sealed cache in other forms: WebDataset tars, and Croissant metadata."""
