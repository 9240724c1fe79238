"""Which attacks an evaluation runs, by tier."""
