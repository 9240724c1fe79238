"""The projections that minimal-norm attacks stand on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import library

from darht.attacks.hyperplane import to_hyperplane


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), norm=st.sampled_from(["linf", "l2"]), scale=st.floats(0.01, 2.0))
def test_the_projection_closes_the_gap_inside_the_box(seed, norm, scale):
    torch.manual_seed(seed)
    point = torch.rand(5, 3, 4, 4).double()
    normal = torch.randn(5, 3, 4, 4).double()
    normal[:, 0, 0] = 0.0
    gap = torch.randn(5).double() * scale
    step = to_hyperplane(point, normal, gap, norm)
    after = gap + (normal * step).sum((1, 2, 3))
    reach = torch.where(normal * gap.sign()[:, None, None, None] > 0, point, 1 - point)
    possible = (normal.abs() * reach).sum((1, 2, 3)) >= gap.abs()
    assert float(after[possible].abs().max() if bool(possible.any()) else 0.0) < 1e-9
    assert float((point + step).min()) >= -1e-12 and float((point + step).max()) <= 1 + 1e-12


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_projection_equals_the_authors(norm):
    theirs = library("pyautoattack.fab_projections")
    torch.manual_seed(3)
    point, normal = torch.rand(32, 3, 8, 8).double(), torch.randn(32, 3, 8, 8).double()
    offset = (normal * point).sum((1, 2, 3)) + torch.randn(32).double()
    gap = (normal * point).sum((1, 2, 3)) - offset
    project = theirs.projection_linf if norm == "linf" else theirs.projection_l2
    want = project(point.flatten(1), normal.flatten(1), offset).view_as(point)
    ours = to_hyperplane(point, normal, gap, norm)
    size = (
        (lambda d: d.abs().amax((1, 2, 3)))
        if norm == "linf"
        else (lambda d: torch.linalg.vector_norm(d, dim=(1, 2, 3)))
    )
    torch.testing.assert_close(size(ours), size(want), rtol=1e-6, atol=1e-9)
