"""Batches of a run: resident or streamed, every row once, the same bits again, within the budget."""

import dataclasses
import math
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from darht.cache.export.webdataset import export_webdataset
from darht.cache.read.draw import adversarial_levels, choose_attack, view_logits, view_pixels
from darht.cache.read.feed_plan import plan_feed
from darht.cache.read.loader import GIB, allocate, load_training_set
from darht.cache.read.reader import Cache, open_cache
from darht.cache.read.sampler import draw_choices, epoch_order
from darht.cache.read.sizes import needed_bytes, row_bytes
from darht.cache.read.stream import Feed, level_counts
from darht.cache.read.webdataset import open_shards
from darht.core.errors import ConfigError, CorruptError

CPU = torch.device("cpu")
BATCH, EPOCHS = 8, 3


@pytest.fixture(scope="module")
def cache(fine_cache: Path) -> Cache:
    return open_cache(fine_cache)


def plan(cache: Cache, share: float, *, adversarial: bool = True, batch: int = BATCH):
    """A plan whose budget is a share of what the cache needs."""
    budget = share * needed_bytes(cache, adversarial=adversarial) / GIB
    planned = plan_feed(cache, device=CPU, adversarial=adversarial, batch=batch, budget_gib=budget)
    return dataclasses.replace(planned, threads=2)


def batches(cache: Cache, planned, first: int = 0, seed: int = 5):
    """Every batch of the epochs from `first` on, with copies of all that is in it."""
    with Feed(cache, planned, seed=seed, epochs=EPOCHS) as feed:
        return [[data.take(at).tensors() for data, at in feed.batches(epoch)] for epoch in range(first, EPOCHS)]


def equal(one, other) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(torch.equal(a, b) for a, b in pairs)


def all_equal(one, other) -> bool:
    assert [len(epoch) for epoch in one] == [len(epoch) for epoch in other]
    return all(equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("share", [1.0, 0.9, 0.7])
def test_an_epoch_brings_every_row_once_with_what_the_cache_holds(cache, share):
    planned = plan(cache, share)
    assert planned.kind == ("device" if share == 1.0 else "streamed")
    whole = load_training_set(cache, device=CPU, adversarial=True, budget_gib=1)
    epochs = batches(cache, planned)
    for epoch in epochs:
        rows = torch.cat([batch[0] for batch in epoch])
        assert len(rows) == len(set(rows.tolist())) == len(whole.training) // BATCH * BATCH
        assert set(rows.tolist()) <= set(whole.training.tolist())
        for batch in epoch:
            assert equal(batch, whole.take(batch[0]).tensors())
    assert not equal(epochs[0][0], epochs[1][0])


def test_a_resident_cache_keeps_the_order_of_the_sampler(cache):
    whole = load_training_set(cache, device=CPU, adversarial=True, budget_gib=1)
    found = batches(cache, plan(cache, 2.0), first=2)[0]
    expected = epoch_order(whole.training, 5, 2)[: len(found) * BATCH]
    assert torch.cat([batch[0] for batch in found]).tolist() == expected.tolist()


def test_a_streamed_run_brings_the_same_bits_again_and_from_any_epoch_on(cache):
    planned = plan(cache, 0.8)
    one = batches(cache, planned)
    assert all_equal(one, batches(cache, planned))
    assert all_equal(one, batches(cache, dataclasses.replace(planned, threads=1)))
    assert all_equal(one[2:], batches(cache, planned, first=2))
    other = batches(cache, planned, seed=6)
    assert [len(epoch) for epoch in other] == [len(epoch) for epoch in one] == [11] * EPOCHS
    assert not all_equal(one, other)


@pytest.mark.parametrize("layout", ["blocks", "samples"])
@pytest.mark.parametrize("adversarial", [True, False])
def test_an_export_streams_the_same_bits_as_its_cache(cache, tmp_path, layout, adversarial):
    export_webdataset(cache, tmp_path / "out", layout)
    planned = plan(cache, 0.8, adversarial=adversarial)
    copy = open_shards(tmp_path / "out")
    assert plan(copy, 0.8, adversarial=adversarial) == planned and planned.kind == "streamed"
    assert all_equal(batches(cache, planned), batches(copy, planned))


@settings(max_examples=40)
@given(share=st.floats(0.05, 1.5), batch=st.integers(1, 40), adversarial=st.booleans())
def test_what_is_held_stays_in_the_budget(cache, share, batch, adversarial):
    budget = int(share * needed_bytes(cache, adversarial=adversarial)) / GIB
    options = {"device": CPU, "adversarial": adversarial, "batch": batch, "budget_gib": budget}
    try:
        planned = plan_feed(cache, **options)
    except ConfigError as error:
        least = float(str(error).split("or ")[1].split(" GiB")[0])
        assert least > budget
        assert plan_feed(cache, **{**options, "budget_gib": least * 1.01}).window_rows
        return
    with Feed(cache, planned, seed=0, epochs=1) as feed:
        sets = feed._windows
        held = sum(t.numel() * t.element_size() for one in sets for t in one.tensors())
        images, _ = feed.fetch(feed.holdout)
        if planned.kind == "streamed":
            held += images.numel() + 8 * len(images)
            assert held <= 7 / 8 * budget * GIB  # the rest is for blocks on their way
            assert planned.threads == 1 or 3 * 16 * row_bytes(cache, adversarial=adversarial) * planned.threads <= (
                budget * GIB / 8
            )
        assert held <= budget * GIB


def test_a_budget_that_does_not_hold_two_windows(cache):
    with pytest.raises(ConfigError, match=r"GiB in memory, or .* GiB to be streamed in batches of 8; .*raise --memory"):
        plan(cache, 0.2)


@pytest.mark.parametrize(
    ("share", "said"), [(2.0, r"resident in memory$"), (0.8, r"do not fit .*, streamed in windows of \d+ rows$")]
)
def test_a_plan_says_what_was_chosen(cache, share, said):
    assert re.search(said, str(plan(cache, share))), str(plan(cache, share))


@pytest.mark.parametrize("share", [2.0, 0.8])
def test_rows_and_counts_of_levels_are_those_of_the_cache(cache, share):
    with Feed(cache, plan(cache, share), seed=0, epochs=1) as feed:
        images, labels = cache.read("image"), cache.read("label")
        rows = np.array([99, 4, 4, 17])
        found = feed.fetch(rows)
        np.testing.assert_array_equal(found[0].numpy(), images[rows])
        assert found[1].tolist() == labels[rows].tolist() and found[1].dtype == torch.int64
        assert torch.equal(feed.pixel_counts(), level_counts(torch.from_numpy(images[feed.training])))
        assert [len(part) for part in feed.fetch(rows[:0])] == [0, 0]


def test_counts_of_levels():
    images = torch.tensor([[[[0, 0, 255]]], [[[7, 0, 7]]]], dtype=torch.uint8)
    counts = level_counts(images)
    assert counts.shape == (1, 256) and counts[0, [0, 7, 255]].tolist() == [3, 2, 1] and int(counts.sum()) == 6


def test_batches_for_another_device_are_cut_in_memory_and_moved(cache):
    planned = dataclasses.replace(plan(cache, 2.0), kind="memory", device=torch.device("meta"))
    with Feed(cache, planned, seed=0, epochs=1) as feed:
        data, at = next(feed.batches(0))
    assert data.images.device.type == data.offsets.device.type == "meta"
    assert at.device.type == data.keys.device.type == "cpu"  # where shapes are decided
    assert data.images.shape == (BATCH, 3, 8, 8) and at.shape == (BATCH,)


def test_only_the_drawn_views_of_the_teachers_answers_are_sent(cache):
    """They are those that a draw on the device shows, of all views and of an attack's fewer ones."""
    planned = dataclasses.replace(plan(cache, 2.0), kind="memory", device=torch.device("meta"))
    counts = (cache.spec.views.count, min(2, cache.spec.views.count))
    with Feed(cache, planned, seed=5, epochs=1, views=counts) as feed:
        found = list(feed.batches(0))
        assert {data.clean.shape[1] for data, _ in found} == {2} and len(found) == feed.steps
        whole, at = feed._windows[0], torch.arange(30, 30 + BATCH)
        feed.plan = dataclasses.replace(planned, device=CPU)
        few, here = feed._gathered(whole, at, 3, number=0), torch.arange(BATCH)
    for count in counts:
        views = draw_choices(whole.rows[at], count, 5, 3, "view")
        assert torch.equal(view_logits(few, here, views), view_logits(whole, at, views))
        assert torch.equal(view_pixels(few, here, views), view_pixels(whole, at, views))


@pytest.mark.parametrize("kind", ["memory", "streamed"])
def test_of_the_perturbations_only_those_of_the_drawn_attack_and_view_are_sent(cache, kind):
    planned = dataclasses.replace(plan(cache, 2.0 if kind == "memory" else 0.8), device=torch.device("meta"))
    planned = dataclasses.replace(planned, kind=kind)
    with Feed(cache, planned, seed=5, epochs=2, views=(2,), perturbations="drawn") as feed:
        found = [data for data, _ in feed.batches(1)]
    for number, data in enumerate(found, start=feed.steps):
        drawn = choose_attack(len(data.attacks), seed=5, number=number)
        views = [int(name == data.attacks[drawn]) for name in data.attacks]
        assert [part.shape[1] for part in data.deltas] == [part.shape[1] for part in data.adversarial] == views
        assert data.shown.shape == (BATCH, 1) and data.images.device.type == data.shown.device.type == "meta"
    assert len(found) == feed.steps


def test_where_rows_start_from_perturbations_their_first_view_is_sent_alone(cache):
    planned = dataclasses.replace(plan(cache, 2.0), kind="memory", device=torch.device("meta"))
    with Feed(cache, planned, seed=5, epochs=1, views=(2,), perturbations="first") as feed:
        data, _ = next(feed.batches(0))
    assert {part.shape[1] for part in data.deltas} == {1} and {part.shape[1] for part in data.adversarial} == {0}


@pytest.mark.parametrize("attack", [0, 1])
def test_what_is_sent_of_an_attack_is_what_the_whole_set_shows(cache, attack):
    whole, at, here = (
        load_training_set(cache, device=CPU, adversarial=True, budget_gib=1),
        torch.arange(40, 48),
        torch.arange(8),
    )
    deltas, answers = whole.deltas[0], whole.adversarial[0]
    whole = dataclasses.replace(
        whole, attacks=("a", "b"), deltas=(deltas, deltas * 2), scales=(1.0, 1.0), adversarial=(answers, answers + 1)
    )
    views = torch.arange(8) % whole.attack_count(attack)
    few = whole.without_attacks().take(at).with_attack(whole, at, attack, views)
    assert [few.attack_count(number) for number in (0, 1)] == [whole.attack_count(number) for number in (0, 1)]
    assert sum(part.numel() for part in few.deltas) == few.images.numel()
    pixels = view_pixels(whole, at, views)
    assert torch.equal(view_logits(few, here, views, attack), view_logits(whole, at, views, attack))
    expected = adversarial_levels(whole, at, views, attack, pixels)
    assert torch.equal(adversarial_levels(few, here, views, attack, pixels), expected)


@pytest.mark.parametrize("kind", ["zarr", "blocks", "samples"])
def test_damage_is_an_error_while_it_streams(fine_cache, cache, tmp_path, kind):
    folder = tmp_path / "cache"
    if kind == "zarr":
        shutil.copytree(fine_cache, folder)
        path = folder / "data.zarr/logits/vit/clean/c/3/0/0"
    else:
        export_webdataset(cache, folder, kind)
        path = folder / "shard-00003.tar"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(CorruptError, match="does not have the sha256"):
        batches(open_shards(folder), plan(cache, 0.8))


@pytest.mark.parametrize("kind", ["zarr", "blocks", "samples"])
def test_damage_that_comes_after_the_hash_was_compared_is_an_error(fine_cache, cache, tmp_path, kind):
    folder = tmp_path / "cache"
    if kind == "zarr":
        shutil.copytree(fine_cache, folder)
        files = sorted((folder / "data.zarr/logits/vit/clean/c").rglob("0"))
    else:
        export_webdataset(cache, folder, kind)
        files = sorted(folder.glob("*.tar"))
    opened = open_shards(folder)
    with Feed(opened, plan(cache, 0.8), seed=0, epochs=2) as feed:
        list(feed.batches(0))
        for path in files:
            if path.is_file():
                data = path.read_bytes()
                path.write_bytes(data[:100] + bytes(byte ^ 1 for byte in data[100:]))
        with pytest.raises(CorruptError, match="does not have the sha256"):
            list(feed.batches(1))


def test_no_thread_stays_that_has_computed(cache):
    """A thread that has run torch keeps OpenMP threads, beside which small operations take three times as long."""
    before = set(threading.enumerate())
    for share in (1.0, 0.7):
        with Feed(cache, plan(cache, share), seed=5, epochs=EPOCHS) as feed:
            feed.pixel_counts()
            feed.fetch(feed.holdout)
            assert set(threading.enumerate()) == before


def test_a_feed_that_is_left_early_ends(cache):
    with Feed(cache, plan(cache, 0.8), seed=0, epochs=5) as feed:
        next(feed.batches(0))
    assert feed._readers._shutdown and feed._ahead._shutdown and feed._sender._shutdown


def test_room_is_not_contents(cache):
    data = allocate(cache, 3, adversarial=False)
    assert data.deltas == data.adversarial == () and data.images.shape == (3, 3, 8, 8)
    assert sorted([*data.training, *data.holdout]) == list(range(100))


@pytest.mark.parametrize("budget", [math.nan, math.inf, 0.0, -1.0])
def test_a_budget_that_is_no_number_of_gib(fine_cache, budget):
    with pytest.raises(ConfigError, match="memory must be a number of GiB above 0"):
        plan_feed(open_cache(fine_cache), device=CPU, adversarial=False, batch=4, budget_gib=budget)
