"""The thread that writes a unit while the next is computed: order, errors, and what a stop leaves behind."""

import threading
from pathlib import Path

import numpy as np
import pytest

from darht.cache.builder import build as builder
from darht.cache.builder.build import claim_folder
from darht.cache.builder.compute import Worker
from darht.cache.builder.seal import seal
from darht.cache.builder.writer import UnitWriter
from darht.cache.format.commit import State, unit_state
from darht.cache.format.store import Store
from darht.core.storage import open_storage


@pytest.fixture
def claimed(small, tmp_path):
    """A plan, and the store of its empty cache."""
    plan, folder = small(), open_storage(tmp_path / "cache")
    claim_folder(folder, plan)
    return plan, Store(folder)


def values_of(array, shard) -> np.ndarray:
    rows = array.rows(shard)
    return np.ones((rows.stop - rows.start, *array.shape[1:]), dtype=array.dtype)


def test_units_are_told_in_order_in_the_callers_thread(claimed):
    plan, store = claimed
    told, image = [], plan.arrays["image"]
    with UnitWriter(store, {}, lambda *unit: told.append((*unit[:2], threading.current_thread()))) as writer:
        for shard in range(3):
            writer.put(image, shard, values_of(image, shard), 1.0)
            assert len(told) == shard  # the one before is written by now
    assert told == [(image, shard, threading.main_thread()) for shard in range(3)]
    assert all(unit_state(store.storage, image, shard)[0] is State.DONE for shard in range(3))


def test_the_unit_under_way_is_kept_when_computing_the_next_fails(claimed):
    plan, store = claimed
    image = plan.arrays["image"]
    with pytest.raises(KeyboardInterrupt), UnitWriter(store, {}, lambda *unit: None) as writer:
        writer.put(image, 0, values_of(image, 0), 1.0)
        raise KeyboardInterrupt
    assert unit_state(store.storage, image, 0)[0] is State.DONE


def test_what_went_wrong_in_the_thread_is_raised_by_the_next_call(claimed, monkeypatch):
    plan, store = claimed
    image = plan.arrays["image"]

    def full(*_):
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"), UnitWriter(store, {}, lambda *unit: None) as writer:
        monkeypatch.setattr(store, "write", full)
        writer.put(image, 0, values_of(image, 0), 1.0)
        monkeypatch.undo()
        writer.put(image, 1, values_of(image, 1), 1.0)
    assert [unit_state(store.storage, image, shard)[0] for shard in (0, 1)] == [State.MISSING] * 2


def test_it_waits_for_the_array_that_is_asked_for_alone(claimed, monkeypatch):
    plan, store = claimed
    image, may_write, write = plan.arrays["image"], threading.Event(), store.write

    def slow(*unit):
        may_write.wait()
        return write(*unit)

    monkeypatch.setattr(store, "write", slow)
    told = []
    with UnitWriter(store, {}, lambda array, *_: told.append(array.name)) as writer:
        writer.put(image, 0, values_of(image, 0), 1.0)
        writer.wait("label")
        assert told == []
        may_write.set()
        writer.wait("image")
        assert told == ["image"]


def test_a_unit_is_computed_while_the_one_before_is_written(small, build_into, tmp_path, monkeypatch):
    """The next unit's computation begins although nobody has finished writing; the bytes are those of taking turns."""
    plan, begun, compute, write = small(), threading.Event(), Worker.compute, Store.write
    whole = build_into(plan, tmp_path / "whole")

    def computing(worker, array, shard):
        if array.name == "label":
            begun.set()
        return compute(worker, array, shard)

    def writing(store, array, shard, values):
        assert array.name != "source_index" or begun.wait(60)
        return write(store, array, shard, values)

    monkeypatch.setattr(builder.Worker, "compute", computing)
    monkeypatch.setattr(Store, "write", writing)
    assert seal(build_into(plan, tmp_path / "beside")).root_hash == seal(Path(whole)).root_hash
