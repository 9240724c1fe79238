"""The launches of a step, which `bench/launches.py` counts and `docs/benchmarks-gpu.md` tells, do not creep up."""

from pathlib import Path

import pytest
from scripts import load_script

TINY = {"width": 2, "blocks": [1, 1, 1, 1]}
LAUNCHES = load_script(Path("bench/launches.py"))
# Around the student's passes and the optimizer: at most 40, and 10 for each step of PGD.
FUSED = {"cached": 23, "warm": 35, "pgd:10": 74}
PLAIN = {"cached": 82, "warm": 152, "pgd:10": 371}


@pytest.mark.parametrize("mode", FUSED)
def test_launches_around_the_student_and_the_optimizer_stay_few(mode):
    for fused, limit in ((True, FUSED[mode]), (False, PLAIN[mode])):
        counts = LAUNCHES.count(mode, TINY, fused=fused)
        assert LAUNCHES.outside(counts) <= limit
        assert counts["student, forward"] and counts["student, back to the weights"]
        assert bool(counts["student, back to the pixels"]) == (mode != "cached")
        assert counts["random numbers"] == (0 if mode != "pgd:10" else 1 if fused else counts["random numbers"])
