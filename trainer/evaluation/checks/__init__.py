"""What else an evaluation asks: masked gradients, calibration, corruptions, leakage."""
