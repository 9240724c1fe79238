"""The plan for ImageNet counts what a cache of that spec would hold."""

from pathlib import Path

import pytest
from scripts import load_script

PLAN = load_script(Path("bench/imagenet_plan.py"))


def test_bytes_of_arrays_follow_from_the_layout():
    spec = PLAN.imagenet(1000)
    sizes = dict(PLAN.bytes_of_arrays(spec))
    assert spec.format_version == 2 and spec.data.mixed
    assert sizes["logits/convnext_base/clean"] == 1000 * 10 * 1000 * 2
    assert sizes["views/box"] == 1000 * 10 * 5 * 4
    assert sizes["image"] == pytest.approx(115_440_000, rel=1e-3)
