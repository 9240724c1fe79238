"""Evaluation that a reviewer would accept: `darht-eval`.

`run.py` is the main path from a model's name to a report; `measure.py` holds the one loop that every attack runs in.
"""
