"""Orthogonal directions: they are orthogonal, aligned, and counted by what they do."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planted import one_hot, write_cache
from torch import Tensor, nn

from darht.cache.read.reader import Cache, open_cache
from darht.tools.gaas import ORDERS, Gaas, aligned_directions, measure_gaas, regular_hadamard


@pytest.mark.parametrize("order", ORDERS)
def test_the_matrix_is_hadamard_and_regular(order: int) -> None:
    H = regular_hadamard(order)
    assert np.array_equal(H @ H.T, order * np.eye(order))
    assert np.array_equal(H.sum(1), np.full(order, np.sqrt(order))) and np.array_equal(H, H.T)


@given(seed=st.integers(0, 10**6), order=st.sampled_from(ORDERS), side=st.sampled_from([6, 8, 9]))
def test_directions_are_orthogonal_and_gain_about_the_same(seed: int, order: int, side: int) -> None:
    gradient = torch.randn(3, side, side, generator=torch.Generator().manual_seed(seed))
    directions = aligned_directions(gradient, order).flatten(1)
    gram = directions @ directions.T
    assert torch.equal(gram, torch.eye(order) * (3 * side * side // order * order))
    used = gradient.abs().flatten().sort(descending=True).values[: 3 * side * side // order * order]
    gains, bound = directions @ gradient.flatten(), float(used.sum()) / np.sqrt(order)
    assert float(gains.mean()) == pytest.approx(bound, rel=1e-3)
    if order <= 16:
        assert float(gains.min()) > 0.6 * bound


class Linear(nn.Module):
    """Class 0 while a weighted sum of pixels stays below what it was on the clean image, plus a margin."""

    def __init__(self, weights: Tensor, images: Tensor, labels: Tensor, margin: float) -> None:
        super().__init__()
        self.weights, self.images, self.labels, self.margin = weights, images, labels, margin

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x.flatten(1).detach(), self.images.flatten(1)).argmin(1)
        rise = ((x - self.images[nearest]) * self.weights).sum((1, 2, 3))
        out = torch.zeros(len(x), 10)
        rows = torch.arange(len(x))
        out[rows, self.labels[nearest]] = 1.0
        return out.index_put((rows, (self.labels[nearest] + 1) % 10), 1 + 50 * (rise - self.margin))


@pytest.mark.parametrize(("share", "expected"), [(0.9, 1), (0.45, 4), (0.22, 16)])
def test_a_linear_model_is_fooled_by_as_many_directions_as_its_margin_allows(
    planted_grey: Cache, share: float, expected: int
) -> None:
    """Direction i of k gains eps |w|_1 / sqrt(k): margins below 1, 1/2, 1/4 of eps |w|_1 allow 1, 4, 16."""
    images = torch.from_numpy(planted_grey.read("image")).float() / 255
    labels = torch.from_numpy(planted_grey.read("label")).long()
    weights = torch.ones(3, 8, 8)
    margin = share * 8 / 255 * float(weights.abs().sum())
    first = Linear(weights, images, labels, margin)
    stranger = Linear(torch.zeros(3, 8, 8), images, labels, 1.0)
    found = measure_gaas(planted_grey, {"first": first, "stranger": stranger}, count=3)
    assert found.dims[0].tolist() == [expected] * 3 and found.dims[1].tolist() == [0] * 3
    assert found.share(0, 0) == 1.0 and found.share(0, 1) == 0.0 and np.isnan(found.share(1, 0))
    assert found.eps == 8


@pytest.fixture
def planted_grey(tmp_path: Path) -> Cache:
    """Images of one grey each, far from black and white, so that nothing is cut off."""
    levels = np.arange(60, 220, 20, dtype=np.uint8)
    images = np.broadcast_to(levels[:, None, None, None], (8, 3, 8, 8)).copy()
    labels = np.arange(8)
    folder = write_cache(
        tmp_path / "grey",
        images=images,
        labels=labels,
        deltas={"t": np.zeros((8, 3, 8, 8), dtype=np.int8)},
        logits={"t": {"clean": one_hot(labels, 10), "pgd-t": one_hot(labels, 10)}},
        rows_per_shard=8,
    )
    return open_cache(folder)


def test_means_and_shares_by_hand() -> None:
    dims = np.array([[4, 0], [16, 16]])
    shared = np.zeros((2, 2, 2), dtype=np.int64)
    shared[0, 1], shared[1, 0] = [1, 0], [8, 0]
    found = Gaas(teachers=("a", "b"), rows=np.array([3, 5]), dims=dims, shared=shared, eps=8.0)
    assert found.mean(0) == pytest.approx((2.0, 1.96 * 2.0))
    assert (found.share(0, 1), found.share(1, 0)) == (0.25, 0.25)
    alone = Gaas(teachers=("a",), rows=np.array([3]), dims=np.array([[0]]), shared=np.zeros((1, 1, 1)), eps=8.0)
    assert np.isnan(alone.share(0, 0)) and np.isnan(alone.mean(0)[1])
