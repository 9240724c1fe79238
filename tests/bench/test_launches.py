"""The launches of a step, which `bench/launches.py` counts and `docs/benchmarks-gpu.md` tells, do not creep up."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import launches

TINY = {"width": 2, "blocks": [1, 1, 1, 1]}
LIMITS = {"cached": (0, 64), "warm": (0, 95), "pgd:10": (123, 200)}


@pytest.mark.parametrize("mode", LIMITS)
def test_launches_outside_of_the_network_stay_few(mode):
    counts = launches.count(mode, TINY)
    random, rest = LIMITS[mode]
    assert counts["random numbers"] <= random
    assert counts["metrics"] <= 13
    assert counts["memory of `warm`"] <= (34 if mode == "warm" else 0)
    assert counts["rest"] <= rest
    assert counts["student, forward"] and counts["backward to the weights"]
