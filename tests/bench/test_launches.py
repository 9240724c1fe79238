"""The launches of a step, which `bench/launches.py` counts and `docs/benchmarks-gpu.md` tells, do not creep up."""

from pathlib import Path

import pytest
from scripts import load_script

TINY = {"width": 2, "blocks": [1, 1, 1, 1]}
LAUNCHES = load_script(Path("bench/launches.py"))
LIMITS = {"cached": (0, 64), "warm": (0, 95), "pgd:10": (123, 200)}


@pytest.mark.parametrize("mode", LIMITS)
def test_launches_outside_of_the_network_stay_few(mode):
    counts = LAUNCHES.count(mode, TINY)
    random, rest = LIMITS[mode]
    assert counts["random numbers"] <= random
    assert counts["metrics"] <= 13
    assert counts["memory of `warm`"] <= (34 if mode == "warm" else 0)
    assert counts["rest"] <= rest
    assert counts["student, forward"] and counts["backward to the weights"]
