"""Batches of several sources: shares, turns and windows, each a pure function of seed and epoch."""

import copy

import numpy as np
import pytest
import torch
import yaml
from built import sealed_cache
from hypothesis import given
from hypothesis import strategies as st

from darht.cache.read.dataset import CacheDataset
from darht.cache.read.draw import choose_views, view_logits
from darht.cache.read.feed_plan import plan_feed
from darht.cache.read.loader import GIB, load_training_set
from darht.cache.read.mixture import Group, interleave, mixed_windows, steps_of, training_groups, window_room
from darht.cache.read.reader import open_cache
from darht.cache.read.sizes import needed_bytes
from darht.cache.read.stream import Feed
from darht.core.errors import ConfigError

CPU = torch.device("cpu")


@st.composite
def cases(draw):
    """Blocks of two or three groups, one group's behind the other, and rows of each to train on."""
    sizes = [draw(st.integers(1, 40)) for _ in range(draw(st.integers(2, 3)))]
    block, blocks, groups, first = draw(st.integers(1, 9)), [], [], 0
    for number, size in enumerate(sizes):
        blocks += [(at, min(at + block, first + size)) for at in range(first, first + size, block)]
        left = draw(st.sets(st.integers(first, first + size - 1), min_size=1))
        groups.append(Group(np.array(sorted(left)), draw(st.integers(1, 4 if number else min(4, len(left))))))
        first += size
    return np.array(blocks), groups


@given(case=cases(), per_window=st.integers(1, 6), seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_windows_hold_whole_batches_of_every_group(case, per_window, seed, epoch):
    blocks, groups = case
    steps, room = steps_of(groups), window_room(blocks, groups, per_window)
    options = {"per_window": per_window, "seed": seed, "epoch": epoch}
    seen, before, size = [], np.empty(0, np.int64), sum(group.per_batch for group in groups)
    for window in mixed_windows(blocks, groups, **options):
        np.testing.assert_array_equal(window.rows[: len(window.carried)], before[window.carried])
        if per_window < len(blocks):
            own = [np.arange(*blocks[block]) for block in window.blocks]
            np.testing.assert_array_equal(window.rows[len(window.carried) :], np.concatenate(own))
            for group, most in zip(groups, room, strict=True):
                ends = int(blocks[:, 1][np.searchsorted(blocks[:, 1], group.rows[-1], "right")])
                assert np.count_nonzero((window.rows >= group.rows[0]) & (window.rows < ends)) <= most
        seen += window.rows[window.order].tolist()
        before = window.rows
    assert len(seen) == steps * size
    for batch in np.reshape(seen, (-1, size)):
        for group in groups:
            assert np.isin(batch, group.rows).sum() == group.per_batch
    first = [row for row in seen if row in groups[0].rows]
    assert len(first) == len(set(first))


@given(counts=st.lists(st.integers(0, 20), min_size=1, max_size=4), parts=st.integers(1, 5))
def test_every_part_of_a_batch_has_a_part_of_each_group(counts, parts):
    order = interleave(counts)
    assert sorted(order.tolist()) == list(range(sum(counts)))
    member = np.repeat(np.arange(len(counts)), counts)[order]
    for part in np.array_split(member, parts):
        for group, count in enumerate(counts):
            assert abs(np.count_nonzero(part == group) - count * len(part) / max(1, sum(counts))) <= len(counts)


def test_rows_with_a_share_come_in_turn_over_epochs():
    groups = [Group(np.arange(6), 2), Group(np.arange(6, 16), 3)]
    blocks, seen = np.array([(0, 6), (6, 16)]), []
    for epoch in range(4):
        (window,) = mixed_windows(blocks, groups, per_window=2, seed=1, epoch=epoch)
        seen += [row for row in window.rows[window.order].tolist() if row >= 6]
    assert len(seen) == 36
    for start in range(0, 30, 10):
        assert sorted(seen[start : start + 10]) == list(range(6, 16))


@pytest.fixture(scope="module")
def cache(blend):
    return open_cache(blend)


def test_what_is_in_memory_is_what_the_cache_holds(cache):
    data = load_training_set(cache, device=CPU, adversarial=True, budget_gib=1)
    held = [*data.tensors(), *(tensor for more in data.more for tensor in (more.slots, more.values))]
    assert sum(t.numel() * t.element_size() for t in held) == needed_bytes(cache, adversarial=True)
    at = torch.tensor([59, 60, 0, 129])
    views = choose_views(data, at, seed=3, epoch=1)
    assert views[1] == views[3] == 0
    for epoch in range(9):
        views = choose_views(data, at, seed=3, epoch=epoch)
        expected = [
            cache.read("logits/cnn/clean")[row, 0]
            if view == 0
            else cache.read("logits/cnn/clean-from-1")[row, view - 1]
            for row, view in zip(at.tolist(), views.tolist(), strict=True)
        ]
        np.testing.assert_array_equal(view_logits(data, at, views)[:, 0], np.stack(expected).astype(np.float32))


def test_a_streamed_cache_gives_what_a_resident_one_holds(cache):
    whole = load_training_set(cache, device=CPU, adversarial=True, budget_gib=1)
    budget = 0.9 * needed_bytes(cache, adversarial=True) / GIB
    plan = plan_feed(cache, device=CPU, adversarial=True, batch=4, budget_gib=budget)
    assert plan.kind == "streamed"
    with Feed(cache, plan, seed=5, epochs=2) as feed:
        held = sum(
            t.numel() * t.element_size()
            for data in feed._windows
            for t in (*data.tensors(), *(tensor for more in data.more for tensor in (more.slots, more.values)))
        )
        assert held <= budget * GIB
        for epoch in range(2):
            batches = 0
            for data, at in feed.batches(epoch):
                batches += 1
                rows = data.rows[at]
                assert int((rows >= 60).sum()) == 2
                views = choose_views(data, at, seed=5, epoch=epoch)
                assert torch.equal(views, choose_views(whole, rows, seed=5, epoch=epoch))
                assert torch.equal(view_logits(data, at, views), view_logits(whole, rows, views))
                assert torch.equal(data.images[at], whole.images[rows])
                assert torch.equal(data.labels[at], whole.labels[rows])
            assert batches == feed.steps == 27


@pytest.mark.parametrize("store", [{"logits": "int8"}, {"logits": "top-k", "top_k": 3, "by_view": True}])
def test_sources_with_the_same_views_may_have_coded_logits_that_lie_apart(blend_config, tmp_path, store):
    config = copy.deepcopy(yaml.safe_load(blend_config.read_text()))
    config["data"][0]["limit"] = 58  # in the middle of a chunk
    del config["data"][1]["views"]
    config["store"] |= store
    cache = open_cache(sealed_cache(config, tmp_path))
    assert cache.manifest.format_version == 2
    said = np.stack([cache.logits("cnn", view=view) for view in range(9)], axis=1).astype(np.float32)
    dataset = CacheDataset(cache, batch_size=4, seed=3, memory_gib=0.97 * needed_bytes(cache, adversarial=False) / GIB)
    assert dataset.plan.kind == "streamed"
    shown = {}
    for batch in dataset:
        assert int((batch.y == -1).sum()) == 2 == int((batch.rows >= 58).sum())
        expected = torch.from_numpy(said[batch.rows, batch.views])
        torch.testing.assert_close(batch.teacher_logits[:, 0], expected, rtol=1e-6, atol=1e-5)
        shown |= dict(zip(batch.rows.tolist(), batch.views.tolist(), strict=True))
    assert len(set(shown.values())) > 1
    if "by_view" in store:
        assert all(shown.get(row // 4 * 4, view) == view for row, view in shown.items())


def test_a_dataset_has_the_shares_too(cache):
    dataset = CacheDataset(cache, batch_size=10, seed=2)
    assert len(dataset) == 10
    for batch in dataset:
        assert batch.x.shape == (10, 3, 8, 8) and int((batch.y == -1).sum()) == 5
    every = CacheDataset(cache, batch_size=130, rows="all")
    assert int((next(iter(every)).y == -1).sum()) == 70


def test_shares_are_those_of_the_batch(cache):
    assert [group.per_batch for group in training_groups(cache, 7)] == [3, 4]
    with pytest.raises(ConfigError, match="no row of one of the sources"):
        cache.excluded = tuple(range(60, 130))
        training_groups(cache, 8)
    cache.excluded = ()
