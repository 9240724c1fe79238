"""Decisions without a store: orders, draws, coins."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from darht.cache.sampler import coin, draw_choices, epoch_order

ROWS = st.lists(st.integers(0, 10**6), min_size=1, max_size=50, unique=True).map(np.array)


@given(rows=ROWS, seed=st.integers(0, 99), epoch=st.integers(0, 999))
def test_an_epoch_is_a_permutation(rows, seed, epoch):
    order = epoch_order(rows, seed, epoch)
    np.testing.assert_array_equal(np.sort(order), np.sort(rows))
    np.testing.assert_array_equal(order, epoch_order(rows, seed, epoch))


def test_epochs_and_seeds_differ():
    rows = np.arange(200)
    orders = [epoch_order(rows, seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len({order.tobytes() for order in orders}) == 9
    np.testing.assert_array_equal(rows, np.arange(200))


def test_an_order_is_pinned():
    assert epoch_order(np.arange(8), 0, 0).tolist() == [3, 0, 1, 6, 4, 5, 2, 7]


@settings(max_examples=30)
@given(count=st.integers(1, 200), seed=st.integers(0, 99), epoch=st.integers(0, 99), data=st.data())
def test_choices_belong_to_the_row(count, seed, epoch, data):
    rows = torch.from_numpy(data.draw(ROWS))
    choices = draw_choices(rows, count, seed, epoch, "view")
    assert choices.shape == rows.shape and int(choices.min()) >= 0 and int(choices.max()) < count
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(draw_choices(rows[order], count, seed, epoch, "view"), choices[order])


def test_choices_are_even_and_differ_between_epochs_and_purposes():
    rows = torch.arange(16_200)
    choices = draw_choices(rows, 162, 0, 0, "view")
    counts = torch.bincount(choices, minlength=162)
    # chi-squared with 161 degrees of freedom: 220.6 is its 99.9 % quantile
    assert ((counts - 100.0) ** 2 / 100).sum() < 220.6
    for other in (draw_choices(rows, 162, 0, 1, "view"), draw_choices(rows, 162, 0, 0, "attack")):
        assert (choices == other).float().mean().item() == pytest.approx(1 / 162, abs=0.004)


def test_a_coin_falls_as_often_as_it_should():
    falls = [coin(0.3, 1, step) for step in range(3000)]
    assert np.mean(falls) == pytest.approx(0.3, abs=4 * (0.21 / 3000) ** 0.5)
    assert falls[:50] == [coin(0.3, 1, step) for step in range(50)]
    assert falls[:50] != [coin(0.3, 2, step) for step in range(50)]


@pytest.mark.parametrize("step", range(5))
def test_a_coin_with_one_side(step):
    assert coin(1.0, 0, step) and not coin(0.0, 0, step)
