"""Batches for one's own loop: those of the trainer, the same bits again, shared by ranks and workers without loss."""

import dataclasses
import json
import pickle
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import CONFIG, changed
from servers import served
from torch.utils.data import DataLoader

from darht.cache.export.webdataset import export_webdataset
from darht.cache.format.apply_views import apply_views
from darht.cache.format.spec import AttackSpec
from darht.cache.read.dataset import Batch, CacheDataset
from darht.cache.read.loader import GIB
from darht.cache.read.reader import Cache, open_cache
from darht.cache.read.sizes import needed_bytes
from darht.cache.read.webdataset import open_shards
from darht.core.errors import ConfigError, SpecMismatchError
from darht.core.storage import open_storage
from darht.trainer.student.inner import Examples
from darht.trainer.student.train import train

CPU = torch.device("cpu")
FORKS = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture(scope="module")
def cache(fine_cache: Path) -> Cache:
    """90 rows to train on, 10 held out, one attack on two views."""
    return open_cache(fine_cache)


@pytest.fixture(scope="module")
def two_attacks(tiny_cache: Path) -> Cache:
    return open_cache(tiny_cache)


def memory(cache: Cache, size: float, *, adversarial: bool = False) -> float:
    """GiB for a share of what the rows need; below 1 they are streamed."""
    return size * needed_bytes(cache, adversarial=adversarial) / GIB


def same(one, other) -> bool:
    """Whether two batches, or lists of batches, are the same in every bit."""
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def drawn(dataset: CacheDataset, epoch: int = 0) -> list[Batch]:
    dataset.set_epoch(epoch)
    return list(dataset)


# What is in a batch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1.0, 0.8])
@pytest.mark.parametrize("adversarial", [None, "pgd-vit"])
def test_a_batch_holds_what_the_cache_says_about_its_rows_in_its_views(cache, size, adversarial):
    budget = memory(cache, size, adversarial=adversarial is not None)
    dataset = CacheDataset(cache, batch_size=16, adversarial=adversarial, memory_gib=budget)
    assert dataset.plan.kind == ("device" if size == 1.0 else "streamed") and len(dataset) == 5
    images, table = torch.from_numpy(cache.read("image")), torch.from_numpy(cache.read("views/offset"))
    clean = np.stack([cache.read(f"logits/{name}/clean") for name in dataset.teachers], 2).astype(np.float32)
    attacked = np.stack([cache.read(f"logits/{name}/pgd-vit") for name in dataset.teachers], 2).astype(np.float32)
    for batch in drawn(dataset, 1):
        rows, views = batch.rows, batch.views
        assert (batch.x.dtype, batch.y.dtype, batch.teacher_logits.dtype) == (torch.uint8, torch.int64, torch.float32)
        assert torch.equal(batch.x, apply_views(images[rows], table[views]))
        assert batch.y.tolist() == cache.read("label")[rows].tolist()
        assert np.array_equal(batch.teacher_logits, clean[rows, views])
        if adversarial is None:
            assert (batch.x_adv, batch.teacher_logits_adv, batch.attack) == (None, None, None)
            continue
        assert int(views.max()) < 2 and dataset.attacks[batch.attack] == "pgd-vit"
        assert np.array_equal(batch.x_adv.short() - batch.x, cache.read("delta/pgd-vit")[rows, views])
        assert np.array_equal(batch.teacher_logits_adv, attacked[rows, views])
    floats = drawn(CacheDataset(cache, batch_size=16, adversarial=adversarial, pixels="float", memory_gib=budget), 1)
    assert torch.equal(floats[-1].x, batch.x.float() / 255)
    assert adversarial is None or torch.equal(floats[-1].x_adv, batch.x_adv.float() / 255)


def test_without_views_rows_come_as_they_are(cache):
    for batch in CacheDataset(cache, views=False, batch_size=20, adversarial="all"):
        assert torch.equal(batch.x, torch.from_numpy(cache.read("image"))[batch.rows]) and not batch.views.any()
        assert np.array_equal(batch.x_adv.short() - batch.x, cache.read("delta/pgd-vit")[batch.rows, 0])


@pytest.mark.parametrize("size", [1.0, 0.8])
def test_without_logits_none_are_read(fine_cache, size, monkeypatch):
    cache, names = open_cache(fine_cache), set[str]()
    read = Cache.read_into
    monkeypatch.setattr(Cache, "read_into", lambda self, out, rows: names.update(out) or read(self, out, rows))
    whole = drawn(CacheDataset(cache, batch_size=16, adversarial="all"))
    assert any(name.startswith("logits/") for name in names)
    names.clear()
    needed = needed_bytes(cache, adversarial=True, logits=False)
    dataset = CacheDataset(cache, batch_size=16, adversarial="all", logits=False, memory_gib=size * needed / GIB)
    found = drawn(dataset)
    assert dataset.plan.needed == needed and dataset.teachers == ()
    assert names == {"label", "image", "delta/pgd-vit", "views/offset"}
    assert all(batch.teacher_logits is None and batch.teacher_logits_adv is None for batch in found)
    if size == 1.0:
        assert same(found, [batch._replace(teacher_logits=None, teacher_logits_adv=None) for batch in whole])


def test_rows_that_are_held_out_are_left_out_unless_they_are_asked_for(fine_cache):
    cache = open_cache(fine_cache)
    held, every = set(cache.manifest.holdout), set(range(100))

    def rows(**options) -> list[int]:
        return torch.cat([batch.rows for batch in CacheDataset(cache, batch_size=8, **options)]).tolist()

    assert len(rows()) == 88 and not held & set(rows())
    for size in (1.0, 0.8):
        options = {"drop_last": False, "memory_gib": memory(cache, size)}
        assert sorted(rows(**options)) == sorted(every - held)
        assert sorted(rows(rows="holdout", **options)) == sorted(held)
        assert sorted(rows(rows="all", **options)) == sorted(every)
    cache.excluded = (next(iter(every - held)),)
    assert sorted(rows(rows="all", drop_last=False)) == sorted(every - set(cache.excluded))


def test_a_batch_goes_to_a_device_and_into_pinned_memory(cache, monkeypatch):
    from torch.utils.data._utils.pin_memory import pin_memory

    batch = next(iter(CacheDataset(cache)))
    moved = batch.to("meta", non_blocking=True)
    assert {value.device.type for value in moved if isinstance(value, torch.Tensor)} == {"meta"}
    assert moved.x_adv is None and (moved.epoch, moved.step) == (0, 0)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, device=None: self.to("meta"))
    pinned = pin_memory(batch)
    assert isinstance(pinned, Batch) and pinned.x.device.type == "meta" and pinned.attack is None


def test_batches_stay_what_they_are_and_nothing_else_is_touched(cache):
    dataset, state = CacheDataset(cache, batch_size=8, memory_gib=memory(cache, 0.8)), torch.get_rng_state()
    kept, copies = [], []
    for batch in dataset:
        kept.append(batch)
        copies.append(batch._replace(x=batch.x.clone(), teacher_logits=batch.teacher_logits.clone()))
    assert same(kept, copies) and torch.equal(state, torch.get_rng_state())


# As the trainer draws ----------------------------------------------------------------------------------------------


@pytest.fixture
def steps_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list]:
    """Every step that the trainer draws: epoch, rows, and the step."""

    def run(config, cache: Cache, budget: float) -> list:
        seen, draw = [], Examples.draw

        def spy(self, student, data, at, *, epoch, **options):
            step = draw(self, student, data, at, epoch=epoch, **options)
            seen.append((epoch, data.rows[at].clone(), step))
            return step

        monkeypatch.setattr(Examples, "draw", spy)
        train(config, cache, tmp_path / "run", device=CPU, memory_gib=budget)
        return seen

    return run


@pytest.mark.parametrize("size", [1.0, 0.8])
def test_clean_batches_are_those_of_the_trainer(cache, size, steps_of):
    budget = memory(cache, size)
    config = changed(recipe="kd", optim={"epochs": 3, "batch_size": 16})
    seen = steps_of(config, cache, budget)
    dataset = CacheDataset(cache, batch_size=16, seed=CONFIG.seed, pixels="float", memory_gib=budget)
    assert dataset.plan.kind == ("device" if size == 1.0 else "streamed")
    found = [batch for epoch in range(3) for batch in drawn(dataset, epoch)]
    assert len(found) == len(seen) == 15
    for batch, (epoch, rows, step) in zip(found, seen, strict=True):
        assert batch.epoch == epoch and torch.equal(batch.rows, rows)
        assert torch.equal(batch.x, step.x) and torch.equal(batch.y, step.y)
        assert torch.equal(batch.teacher_logits, step.targets)


@pytest.mark.parametrize("size", [1.0, 0.85])
def test_stored_adversarial_batches_are_those_of_the_trainer(request, size, steps_of):
    cache = request.getfixturevalue("two_attacks" if size == 1.0 else "cache")
    budget = memory(cache, size, adversarial=True)
    config = changed(recipe="rslad", inner={"kind": "cached"}, optim={"epochs": 3, "batch_size": 16})
    seen = steps_of(config, cache, budget)
    options = {"batch_size": 16, "seed": CONFIG.seed, "pixels": "float", "memory_gib": budget}
    dataset = CacheDataset(cache, adversarial="all", **options)
    assert dataset.plan.kind == ("device" if size == 1.0 else "streamed")
    found = [batch for epoch in range(3) for batch in drawn(dataset, epoch)]
    assert len(found) == len(seen) == 15
    assert {batch.attack for batch in found} == set(range(len(cache.spec.attacks)))
    for batch, (epoch, rows, step) in zip(found, seen, strict=True):
        assert batch.epoch == epoch and torch.equal(batch.rows, rows) and torch.equal(batch.y, step.y)
        assert torch.equal(batch.x, step.clean) and torch.equal(batch.x_adv, step.x)
        assert torch.equal(batch.teacher_logits, step.clean_targets)
        assert torch.equal(batch.teacher_logits_adv, step.targets)


def test_a_named_attack_is_always_that_one(two_attacks):
    for batch in CacheDataset(two_attacks, batch_size=8, adversarial="pgd-vit"):
        assert batch.attack == 1
        found = two_attacks.read("delta/pgd-vit")[batch.rows, batch.views]
        assert np.array_equal(batch.x_adv.short() - batch.x, found)


# Order, resume, ranks ----------------------------------------------------------------------------------------------


def test_the_order_depends_on_seed_and_epoch_alone(cache):
    dataset = CacheDataset(cache, batch_size=8, seed=3)
    first, second = drawn(dataset), drawn(dataset, 1)
    assert same(first, drawn(dataset)) and same(second, drawn(CacheDataset(cache, batch_size=8, seed=3, epoch=1), 1))
    assert not torch.equal(first[0].rows, second[0].rows)
    assert not torch.equal(first[0].rows, drawn(CacheDataset(cache, batch_size=8, seed=4))[0].rows)


@pytest.mark.parametrize("size", [1.0, 0.8])
def test_a_state_goes_on_in_the_middle_of_an_epoch_with_the_same_bits(cache, size):
    options = {"batch_size": 8, "adversarial": "all", "memory_gib": memory(cache, size, adversarial=True)}
    dataset = CacheDataset(cache, **options)
    expected = drawn(dataset, 1), drawn(dataset, 2)
    dataset.set_epoch(1)
    batch = list(islice(dataset, 4))[-1]
    state = json.loads(json.dumps(dataset.state_dict()))
    assert (state["epoch"], state["step"]) == (1, 4) and state == dataset.state_dict(batch)
    other = CacheDataset(cache, **options)
    other.load_state_dict(state)
    found = [drawn(other, epoch) for epoch in range(other.epoch, 3)]
    assert same(found[0], expected[0][4:]) and same(found[1], expected[1])
    assert len(drawn(other, 1)) == len(other) == 11  # an epoch that is chosen again is a whole one


def test_states_of_an_epochs_two_ends(cache):
    dataset = CacheDataset(cache, batch_size=8, epoch=3)
    assert dataset.state_dict()["step"] == 0
    batch = list(dataset)[-1]
    assert (dataset.state_dict()["epoch"], dataset.state_dict()["step"]) == (4, 0)
    dataset.load_state_dict(dataset.state_dict(batch))  # after the last batch, before what a loop does at the end
    assert dataset.epoch == 3 and list(dataset) == []


def test_the_state_of_other_batches_is_refused(cache):
    state = CacheDataset(cache, batch_size=8).state_dict()
    with pytest.raises(SpecMismatchError, match=r"batch_size was 8 and is 16; drop_last was True and is False$"):
        CacheDataset(cache, batch_size=16, drop_last=False).load_state_dict(state)
    with pytest.raises(SpecMismatchError, match="window_rows was None and is"):
        CacheDataset(cache, batch_size=8, memory_gib=memory(cache, 0.8)).load_state_dict(state)
    with pytest.raises(SpecMismatchError, match="a state has epoch, step and dataset; this has nothing"):
        CacheDataset(cache).load_state_dict({})


def test_a_second_pass_ends_the_first(cache):
    dataset = CacheDataset(cache, batch_size=8, memory_gib=memory(cache, 0.8))
    first = iter(dataset)
    next(first)
    assert len(list(dataset)) == 11
    with pytest.raises(ConfigError, match="another pass over this dataset has begun"):
        next(first)


@settings(max_examples=30)
@given(
    batch=st.integers(1, 100),
    world=st.integers(1, 6),
    epoch=st.integers(0, 2**40),
    size=st.sampled_from([1.0, 0.8]),
    drop_last=st.booleans(),
)
def test_ranks_share_the_batches_of_one_process(cache, batch, world, epoch, size, drop_last):
    batch = max(batch, world) if size == 1.0 else min(max(batch, world), 12)
    options = {"batch_size": batch, "epoch": epoch, "drop_last": drop_last, "memory_gib": memory(cache, size)}
    alone = list(CacheDataset(cache, **options))
    ranks = [list(CacheDataset(cache, rank=rank, world=world, **options)) for rank in range(world)]
    assert {len(rank) for rank in ranks} == {len(alone)}
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert max(len(part.y) for part in parts) - min(len(part.y) for part in parts) <= 1
        for name in ("x", "y", "teacher_logits", "rows", "views"):
            assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))


def test_a_state_fits_other_ranks(cache):
    options = {"batch_size": 12, "epoch": 2}
    dataset = CacheDataset(cache, **options)
    whole = list(dataset)
    state = dataset.state_dict(whole[2])
    parts = []
    for rank in range(3):
        dataset = CacheDataset(cache, rank=rank, world=3, **options)
        dataset.load_state_dict(state)
        parts.append(list(dataset))
    assert [torch.cat([batch.rows for batch in step]).tolist() for step in zip(*parts, strict=True)] == [
        batch.rows.tolist() for batch in whole[3:]
    ]


# Workers -----------------------------------------------------------------------------------------------------------


def test_a_loader_without_workers_brings_the_same(cache):
    dataset = CacheDataset(cache, batch_size=8, adversarial="all")
    expected = drawn(dataset)
    loader = DataLoader(dataset, batch_size=None)
    assert len(loader) == 11 and same(list(loader), expected)
    batch = next(iter(loader))
    assert dataset.state_dict() == dataset.state_dict(batch)


@FORKS
@pytest.mark.parametrize("size", [1.0, 0.8])
def test_forked_workers_share_the_batches_in_order(cache, size):
    dataset = CacheDataset(cache, batch_size=8, adversarial="all", memory_gib=memory(cache, size, adversarial=True))
    expected = [drawn(dataset, epoch) for epoch in range(2)]
    iterator = iter(dataset)  # threads of a streamed feed read while this process forks
    next(iterator)
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=120)
    for epoch in range(2):
        dataset.set_epoch(epoch)
        found = list(loader)
        assert same(found, expected[epoch]) and all(isinstance(batch, Batch) for batch in found)
    with pytest.raises(ConfigError, match=r"give the last one that was used, state_dict\(batch\)"):
        dataset.state_dict()
    dataset.load_state_dict(dataset.state_dict(expected[1][2]))
    assert same(list(loader), expected[1][3:])


def test_spawned_workers_that_stay_follow_the_epoch(cache):
    dataset = CacheDataset(cache, batch_size=8, memory_gib=memory(cache, 0.8))
    expected = [drawn(dataset, epoch) for epoch in range(3)]
    options = {"num_workers": 2, "multiprocessing_context": "spawn", "persistent_workers": True, "timeout": 240}
    loader = DataLoader(dataset, batch_size=None, **options)
    dataset.set_epoch(0)
    assert same(list(loader), expected[0])
    dataset.set_epoch(2)
    assert same(list(loader), expected[2])
    dataset.load_state_dict(dataset.state_dict(expected[1][5]))
    assert same(list(loader), expected[1][6:])
    del loader


def test_a_dataset_travels_without_its_rows(cache):
    dataset = CacheDataset(cache, batch_size=8)
    data = pickle.dumps(dataset)
    assert len(data) < dataset.plan.needed / 2
    assert same(drawn(pickle.loads(data), 1), drawn(dataset, 1))


# Where a cache may lie ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["blocks", "samples"])
@pytest.mark.parametrize("size", [1.0, 0.8])
def test_an_export_gives_the_same_batches(cache, tmp_path, layout, size):
    export_webdataset(cache, tmp_path / "out", layout)
    options = {"batch_size": 8, "adversarial": "all", "memory_gib": memory(cache, size, adversarial=True)}
    assert same(drawn(CacheDataset(open_shards(tmp_path / "out"), **options)), drawn(CacheDataset(cache, **options)))


@pytest.mark.parametrize("size", [1.0, 0.8])
def test_a_url_gives_the_same_batches(cache, fine_cache, size):
    options = {"batch_size": 8, "memory_gib": memory(cache, size)}
    with served(fine_cache.parent) as root:
        dataset = CacheDataset(open_shards(f"{root}/{fine_cache.name}"), **options)
        assert same(drawn(dataset), drawn(CacheDataset(cache, **options)))


def test_a_memory_place(cache, fine_cache):
    there = open_storage("memory://dataset/cache")
    for path in sorted(fine_cache.rglob("*")):
        if path.is_file():
            there.write(path.relative_to(fine_cache).as_posix(), path.read_bytes())
    options = {"batch_size": 8, "memory_gib": memory(cache, 0.8)}
    found = CacheDataset(open_shards("memory://dataset/cache"), **options)
    assert same(drawn(found), drawn(CacheDataset(cache, **options)))
    MemoryFileSystem.store.clear()


# Mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1; got 0"),
        ({"batch_size": 2, "world": 3}, "batch_size is that of all 3 processes together; got 2"),
        ({"rank": 2, "world": 2}, "rank must lie in 0..1, for world is 2; got 2"),
        ({"epoch": -1, "seed": 0.5}, "epoch must be .* at least 0; got -1; seed must be a whole number; got 0.5"),
        ({"rows": "test"}, "rows must be one of training, holdout, all; got 'test'"),
        ({"pixels": "uint9"}, "pixels must be one of uint8, float; got 'uint9'"),
        ({"adversarial": "pgd"}, "adversarial must be all, or one of pgd-vit; got 'pgd'"),
        ({"memory_gib": 1e-7}, r"raise --memory \(memory_gib\)$"),
    ],
)
def test_wrong_arguments_are_one_line(cache, options, said):
    with pytest.raises(ConfigError, match=said) as caught:
        CacheDataset(cache, **options)
    assert "\n" not in str(caught.value)


def test_what_a_cache_does_not_have_is_said(cache, fine_cache, monkeypatch):
    bare = open_cache(fine_cache)
    bare.spec = dataclasses.replace(bare.spec, attacks={})
    with pytest.raises(ConfigError, match="adversarial must be None, for the cache has no attack; got 'all'"):
        CacheDataset(bare, adversarial="all")
    bare.manifest = dataclasses.replace(bare.manifest, holdout=())
    with pytest.raises(ConfigError, match="has no holdout rows: choose others of training, holdout, all"):
        CacheDataset(bare, rows="holdout")
    monkeypatch.setattr(AttackSpec, "scale", property(lambda self: 0.25))
    with pytest.raises(ConfigError, match="pgd-vit moves pixels by parts of a level: ask for pixels='float'"):
        CacheDataset(cache, adversarial="all")
    CacheDataset(cache, adversarial="all", pixels="float")
    with pytest.raises(ConfigError, match=r"epoch must be a whole number of at least 0; got 1\.5"):
        CacheDataset(cache).set_epoch(1.5)
    with pytest.raises(ConfigError, match=r"a dataset takes an opened cache: open_cache\('cache'\)"):
        CacheDataset("cache")
