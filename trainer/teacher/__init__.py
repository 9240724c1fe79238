"""Train and measure teachers."""
