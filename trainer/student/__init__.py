"""Train a student: `train.py` is the main path, `losses.py` has the recipes."""
