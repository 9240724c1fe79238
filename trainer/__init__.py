"""Train teachers and students, and say how robust they are."""
