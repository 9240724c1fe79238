"""A cache in memory."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from darht.cache.builder.seal import seal
from darht.cache.read.loader import GIB, allocate, fill, load_training_set
from darht.cache.read.reader import open_cache
from darht.cache.read.sizes import needed_bytes, row_bytes
from darht.core.errors import ConfigError, CorruptError

CPU = torch.device("cpu")
OPTIONS = {"device": CPU, "budget_gib": 1.0}


def test_everything_in_memory_is_what_the_cache_holds(tiny_cache: Path):
    cache = open_cache(tiny_cache)
    data = load_training_set(cache, adversarial=True, **OPTIONS)
    assert (data.teachers, data.attacks) == (("cnn", "vit"), ("pgd-cnn", "pgd-vit"))
    np.testing.assert_array_equal(data.rows.numpy(), cache.read("source_index"))
    np.testing.assert_array_equal(data.images.numpy(), cache.read("image"))
    np.testing.assert_array_equal(data.labels.numpy(), cache.read("label"))
    np.testing.assert_array_equal(data.offsets.numpy(), cache.read("views/offset"))
    for t, teacher in enumerate(data.teachers):
        np.testing.assert_array_equal(data.clean[:, :, t].numpy(), cache.read(f"logits/{teacher}/clean"))
        for attack, logits in zip(data.attacks, data.adversarial, strict=True):
            np.testing.assert_array_equal(logits[:, :, t].numpy(), cache.read(f"logits/{teacher}/{attack}"))
    for attack, delta in zip(data.attacks, data.deltas, strict=True):
        np.testing.assert_array_equal(delta.numpy(), cache.read(f"delta/{attack}"))


def test_shapes_and_types(tiny_cache: Path):
    data = load_training_set(open_cache(tiny_cache), adversarial=True, **OPTIONS)
    assert (data.images.shape, data.images.dtype) == ((100, 3, 8, 8), torch.uint8)
    assert (data.labels.shape, data.labels.dtype) == ((100,), torch.int64)
    assert (data.offsets.shape, data.offsets.dtype) == ((9, 3), torch.int8)
    assert (data.clean.shape, data.clean.dtype) == ((100, 9, 2, 10), torch.float16)
    assert [delta.shape for delta in data.deltas] == [(100, 1, 3, 8, 8), (100, 2, 3, 8, 8)]
    assert [logits.shape for logits in data.adversarial] == [(100, 1, 2, 10), (100, 2, 2, 10)]
    assert all(delta.dtype == torch.int8 for delta in data.deltas)
    assert data.robust.tolist() == [True, True]


def test_without_the_perturbations(tiny_cache: Path):
    data = load_training_set(open_cache(tiny_cache), adversarial=False, **OPTIONS)
    assert (data.attacks, data.deltas, data.adversarial) == ((), (), ())
    assert data.clean.shape == (100, 9, 2, 10)


def test_the_holdout_and_the_training_rows_are_all_rows_once(tiny_cache: Path):
    cache = open_cache(tiny_cache)
    data = load_training_set(cache, adversarial=False, **OPTIONS)
    assert data.holdout.tolist() == list(cache.manifest.holdout) and len(data.holdout) == 10
    assert not set(data.holdout) & set(data.training)
    assert sorted([*data.holdout, *data.training]) == list(range(100))
    assert data.training.dtype == data.holdout.dtype == np.int64


def test_a_cache_without_holdout(small, build_into, tmp_path):
    folder = build_into(small(lambda config: config["data"].update(holdout=0)), tmp_path / "cache")
    seal(folder)
    data = load_training_set(open_cache(folder), adversarial=False, **OPTIONS)
    assert len(data.holdout) == 0 and data.training.tolist() == list(range(40))


def test_a_vanilla_teacher_is_marked(copied: Path):
    """A role is no part of any array's fingerprint, so a cache can be sealed again with another one."""
    spec = json.loads((copied / "spec.json").read_text())
    spec["teachers"]["cnn"]["role"] = "vanilla"
    (copied / "spec.json").write_text(json.dumps(spec, sort_keys=True, separators=(",", ":")) + "\n")
    seal(copied)
    data = load_training_set(open_cache(copied), adversarial=False, **OPTIONS)
    assert data.robust.tolist() == [False, True]


@pytest.mark.parametrize("adversarial", [True, False])
def test_the_estimate_is_what_is_held(tiny_cache: Path, adversarial):
    cache = open_cache(tiny_cache)
    data = load_training_set(cache, adversarial=adversarial, **OPTIONS)
    held = sum(tensor.numel() * tensor.element_size() for tensor in data.tensors())
    assert needed_bytes(cache, adversarial=adversarial) == held == 100 * row_bytes(cache, adversarial=adversarial)


def test_a_budget_that_is_too_small(tiny_cache: Path):
    cache = open_cache(tiny_cache)
    needed = needed_bytes(cache, adversarial=False) / GIB
    load_training_set(cache, device=CPU, adversarial=False, budget_gib=needed)
    with pytest.raises(ConfigError) as caught:
        load_training_set(cache, device=CPU, adversarial=True, budget_gib=needed)
    assert str(caught.value) == (
        f"{tiny_cache} needs 0.0 GiB in memory, the budget is {needed:g} GiB: "
        "raise --memory, or build with fewer views (9 now)"
    )


def same(one, other) -> bool:
    return all(torch.equal(*pair) for pair in zip(one.tensors(), other.tensors(), strict=True))


def test_rows_are_filled_in_from_any_place_on(tiny_cache: Path):
    cache = open_cache(tiny_cache)
    whole = load_training_set(cache, adversarial=True, **OPTIONS)
    part = allocate(cache, 60, adversarial=True)
    fill(cache, part, 0, slice(30, 70))
    fill(cache, part, 40, slice(0, 20))
    assert same(part, whole.take(torch.cat([torch.arange(30, 70), torch.arange(20)])))


def test_rows_taken_and_copied_are_those_asked_for(tiny_cache: Path):
    data = load_training_set(open_cache(tiny_cache), adversarial=True, **OPTIONS)
    at = torch.tensor([99, 3, 3, 40])
    taken = data.take(at)
    assert taken.rows.tolist() == at.tolist() and torch.equal(taken.clean, data.clean[at])
    assert taken.offsets is data.offsets and same(data.to(CPU), data)
    other = data.take(torch.arange(10))
    other.copy_from(data, at)
    assert same(other, data.take(torch.cat([at, torch.arange(4, 10)])))


def test_positions_that_were_sent_ahead_are_views_of_what_was_sent(tiny_cache: Path, monkeypatch):
    """A GPU is played by another tensor with the same numbers."""
    data, order = load_training_set(open_cache(tiny_cache), adversarial=False, **OPTIONS), torch.arange(99, -1, -1)
    assert data.ordered(order) is data and data.sent(order) is order
    there = order.clone()
    data = dataclasses.replace(data, order=(order, there))
    for part in (order, order[8:20], order[8:20].tensor_split(5)[1], order[3:]):
        assert torch.equal(data.sent(part), part)
        assert data.sent(part).untyped_storage().data_ptr() == there.untyped_storage().data_ptr()
    for other in (order[8:20][torch.arange(12) % 2 == 0], torch.tensor([5, 2])):
        assert data.sent(other) is other
    assert data.take(order).order is None


def test_a_checksum_that_fails(copied: Path):
    path = copied / "data.zarr/delta/pgd-vit/c/1/0/0/0/0"
    data = path.read_bytes()
    path.write_bytes(data[:40] + bytes([data[40] ^ 8]) + data[41:])
    cache = open_cache(copied)
    load_training_set(cache, adversarial=False, **OPTIONS)
    with pytest.raises(CorruptError):
        load_training_set(cache, adversarial=True, **OPTIONS)
