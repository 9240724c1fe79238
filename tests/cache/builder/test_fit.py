"""Batches that fit a device: measured with a memory that counts the tensors that live on the CPU."""

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from live import CountedMemory, Live
from torch import nn

from darht.attacks.engine import optimize_model
from darht.cache.builder import compute, fit
from darht.cache.builder.compute import Worker
from darht.cache.builder.config import attack_spec
from darht.cache.builder.fit import CPU_BATCH, fitting_batch
from darht.cache.format.layout import layouts
from darht.cache.format.store import Store
from darht.core.errors import CacheError

CPU = torch.device("cpu")
IMAGE = (3, 8, 8)


class Scripted:
    """A memory of so many bytes, of which a pass takes some for each image and some in any case."""

    def __init__(self, total: int, each: int) -> None:
        self.size, self.each, self.images = total, each, 0

    def total(self) -> int:
        return self.size

    def peak(self, run) -> int:
        run()
        return 10**6 + self.each * self.images


def batch_of(total: int, each: int, rows: int) -> int:
    memory = Scripted(total, each)

    class Net(nn.Module):
        def forward(self, x):
            memory.images = len(x)
            return x.flatten(1)

    return fitting_batch([Net()], IMAGE, rows, CPU, memory)


@given(total=st.integers(10**4, 10**11), each=st.integers(0, 10**8), rows=st.integers(1, 5000))
def test_a_shard_is_cut_into_the_fewest_equal_batches_that_fit(total, each, rows):
    size = batch_of(total, each, rows)
    cost = each + fit.ITERATE * 4 * 3 * 8 * 8
    room = max(16, int(fit.SHARE * total) // cost)  # 16 are tried in any case
    assert size % 16 == 0 and 16 <= size <= room and size < rows + 16
    fewer = -(-rows // size) - 1
    assert fewer == 0 or -(-rows // (fewer * 16)) * 16 > room  # in one batch fewer they would not fit


def test_the_greediest_teacher_decides():
    memory = Scripted(10**8, 0)

    class Costs(nn.Module):
        def __init__(self, each: int) -> None:
            super().__init__()
            self.each = each

        def forward(self, x):
            memory.images, memory.each = len(x), self.each
            return x.flatten(1)

    small, large = Costs(1000), Costs(10**6)
    sizes = [fitting_batch(models, IMAGE, 1024, CPU, memory) for models in ([small], [small, large], [])]
    assert sizes == [1024, fitting_batch([large], IMAGE, 1024, CPU, memory), 1024] and sizes[1] < 64


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Workers measure and batch as they do on a GPU, with so many bytes of memory, and attacks ask seldom."""

    monkeypatch.setattr(optimize_model, "keep_memory", lambda: None)  # allocates 31 MiB that it never touches

    def switch(total: int) -> None:
        monkeypatch.setattr(compute, "measures", lambda device: True)
        monkeypatch.setattr(compute, "CudaMemory", lambda device: CountedMemory(total))

    return switch


def worker_of(plan, batch_size: int | None = None) -> Worker:
    return Worker(plan, Store(Path("unused")), CPU, batch_size)


@pytest.mark.parametrize("kind", ["pgd", "apgd", "fab-t", "cw", "square"])
def test_attacks_stay_within_the_memory_that_was_reckoned_with(kind, small, as_on_a_gpu):
    """What lives at once is counted tensor by tensor; what a kernel needs for itself is not, and has the rest."""
    few = {"cw": {"steps": 2, "searches": 1}, "square": {"eps": 8, "queries": 3}, "fab-t": {"eps": 8, "steps": 1}}
    raw = {"kind": kind, "teacher": "cnn", **few.get(kind, {"eps": 8, "steps": 2})}
    plan = small(lambda config: config.update(store={"rows_per_shard": 40, "rows_per_chunk": 8}))
    spec = dataclasses.replace(plan.spec, attacks={"a": attack_spec("a", raw, ("cnn",))})
    plan = dataclasses.replace(plan, spec=spec, arrays=layouts(spec))
    each = fit.bytes_of_an_image(plan.teachers.values(), IMAGE, CPU, CountedMemory(0))
    total = int(32 * each / fit.SHARE) + 100
    as_on_a_gpu(total)
    worker = worker_of(plan)
    assert worker.batch_size == worker.engine.slots == 32
    with Live() as live:
        worker.compute(plan.arrays["delta/a"], 0)
    assert live.most <= total


def test_a_batch_size_that_somebody_chose_stays(small, as_on_a_gpu):
    assert worker_of(small()).batch_size == CPU_BATCH
    as_on_a_gpu(10**5)
    assert worker_of(small()).batch_size == 16
    chosen = worker_of(small(), 40)
    assert (chosen.batch_size, chosen.engine.slots) == (40, 48)


def test_too_little_memory_is_one_line(small, monkeypatch):
    worker = worker_of(small(), 40)

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    monkeypatch.setattr(worker, "_ask", full)
    with pytest.raises(CacheError, match=r"40 images at once are more than cpu has room for: give --batch-size 20"):
        worker.compute(worker.plan.arrays["logits/cnn/clean"], 0)
