"""Decisions without a store: orders, draws, coins."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from darht.cache.read.sampler import coin, draw_choices, epoch_order, epoch_windows, share, steps_in_epoch

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


def cut(rows, shard, size):
    cuts = [
        (a, min(a + size, s + shard, rows)) for s in range(0, rows, shard) for a in range(s, min(s + shard, rows), size)
    ]
    return np.array(cuts, dtype=np.int64)


WINDOWS = st.fixed_dictionaries({
    "rows": st.integers(1, 300),
    "size": st.integers(1, 40),
    "per_shard": st.integers(1, 3),
    "per_window": st.integers(1, 12),
    "batch": st.integers(1, 50),
    "seed": st.integers(0, 9),
    "epoch": st.integers(0, 9),
    "held_out": st.floats(0, 0.5),
})  # fmt: skip


def windows_of(case):
    blocks = cut(case["rows"], case["size"] * case["per_shard"], case["size"])
    kept = np.random.default_rng(case["seed"]).random(case["rows"]) >= case["held_out"]
    kept[0] = True
    training = np.flatnonzero(kept)
    options = {key: case[key] for key in ("per_window", "batch", "seed", "epoch")}
    return blocks, training, list(epoch_windows(blocks, training, **options))


@settings(max_examples=100)
@given(WINDOWS)
def test_an_epoch_in_windows_uses_each_row_once(case):
    blocks, training, windows = windows_of(case)
    used = np.concatenate([window.rows[window.order] for window in windows])
    assert len(set(used)) == len(used) and set(used) <= set(training)
    assert len(used) == (len(training) // case["batch"] * case["batch"] or len(training))
    assert sorted(np.concatenate([window.blocks for window in windows])) == list(range(len(blocks)))
    for window in windows[:-1]:
        assert len(window.order) % case["batch"] == 0


@settings(max_examples=50)
@given(WINDOWS)
def test_an_epoch_that_drops_nothing_ends_with_a_smaller_batch(case):
    blocks, training, windows = windows_of(case)
    options = {key: case[key] for key in ("per_window", "batch", "seed", "epoch")}
    every = list(epoch_windows(blocks, training, drop_last=False, **options))
    used, whole = (np.concatenate([w.rows[w.order] for w in found]) for found in (every, windows))
    assert sorted(used) == sorted(training)
    np.testing.assert_array_equal(used[: len(whole)], whole)
    batches = [
        order for w in every for order in np.array_split(w.order, range(case["batch"], len(w.order), case["batch"]))
    ]
    assert sum(map(bool, map(len, batches))) == steps_in_epoch(len(training), case["batch"], drop_last=False)


@settings(max_examples=100)
@given(WINDOWS)
def test_a_window_holds_its_blocks_and_less_than_a_batch_of_the_window_before(case):
    blocks, _, windows = windows_of(case)
    largest = 0
    for before, window in zip([None, *windows], windows, strict=False):
        own = np.concatenate([np.arange(*blocks[block]) for block in window.blocks])
        left = np.empty(0) if before is None else before.rows[window.carried]
        np.testing.assert_array_equal(window.rows, np.concatenate([left, own]))
        assert len(window.carried) < case["batch"]
        assert before is None or not set(window.carried) & set(before.order)
        assert len(window.blocks) <= case["per_window"] or len(windows) == 1
        largest = max(largest, len(window.blocks))
    assert largest - min(len(window.blocks) for window in windows) <= 1


@given(WINDOWS)
@settings(max_examples=20)
def test_the_same_seed_and_epoch_give_the_same_windows(case):
    one, two, other = windows_of(case)[2], windows_of(case)[2], windows_of({**case, "epoch": case["epoch"] + 1})[2]
    assert [w.rows[w.order].tolist() for w in one] == [w.rows[w.order].tolist() for w in two]
    if case["rows"] > 100 and case["held_out"] < 0.3:
        assert [w.rows.tolist() + w.order.tolist() for w in one] != [w.rows.tolist() + w.order.tolist() for w in other]


def test_one_window_is_the_order_of_the_whole():
    training = np.delete(np.arange(50), [3, 30])
    (window,) = epoch_windows(cut(50, 16, 8), training, per_window=7, batch=10, seed=4, epoch=2)
    np.testing.assert_array_equal(window.rows, np.arange(50))
    np.testing.assert_array_equal(window.order, epoch_order(training, 4, 2)[:40])


def test_rows_of_a_window_are_mixed_across_its_blocks():
    first = next(epoch_windows(cut(4096, 64, 64), np.arange(4096), per_window=16, batch=64, seed=0, epoch=0))
    blocks = first.rows[first.order[:64]] // 64
    assert len(set(blocks)) > 10  # of 16: a batch of 64 misses one with probability 0.016


@given(rows=st.integers(1, 500), batch=st.integers(1, 600), world=st.integers(1, 9), epoch=st.integers(0, 99))
def test_shares_lose_and_repeat_nothing(rows, batch, world, epoch):
    order = torch.from_numpy(epoch_order(np.arange(rows), 0, epoch))
    batches = order.split(batch)
    assert len(batches) == steps_in_epoch(rows, batch, drop_last=False)
    assert steps_in_epoch(rows, batch) == (len(batches) if rows < batch or rows % batch == 0 else len(batches) - 1)
    for at in batches:
        parts = [share(at, rank, world) for rank in range(world)]
        assert torch.equal(torch.cat(parts), at) and max(map(len, parts)) - min(map(len, parts)) <= 1
