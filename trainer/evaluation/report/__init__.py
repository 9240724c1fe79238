"""What an evaluation leaves behind, and evaluations side by side."""
