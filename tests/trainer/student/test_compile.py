"""Training through the real frontend of `torch.compile`: no graph is broken, and none is made after the first epoch."""

from functools import partial

import pytest
import torch
import torch._dynamo
from runs import CPU, changed
from torch._dynamo.utils import counters

from darht.core.fused import compile_function, fusing
from darht.trainer.config import ComputeConfig, StudentConfig, WarmConfig
from darht.trainer.student import gradients
from darht.trainer.student import train as trainer
from darht.trainer.student.model import Student
from darht.trainer.student.train import Callbacks, train

NET = {"width": 2, "blocks": [1, 1, 1, 1]}
ROW = {"clean_share": 0.5, "clean_by": "row"}
PLAIN = changed(
    recipe="at",
    student=StudentConfig(arch="resnet18", kwargs=NET, feature_map=False),
    inner={"eps": 32.0, "steps": 1},
    optim={"epochs": 2, "batch_size": 16},
)
WARM = {"kind": "warm", "step": None, "warm": WarmConfig(check_rows=0)}
CASES = {
    "warm-rows-in-parts": changed(PLAIN, inner=WARM, loss=ROW, compute=ComputeConfig(accumulate=3)),
    "pgd-batches": changed(PLAIN, recipe="trades"),
    "fat": changed(PLAIN, inner={"kind": "fat"}),
    "cached-rows": changed(PLAIN, inner={"kind": "cached"}, loss=ROW),
}


@pytest.fixture(autouse=True)
def frontend(monkeypatch):
    """Traces for real, and runs what was traced without Inductor, whose C++ compiler takes minutes."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_whole_graphs_that_the_first_epoch_has_made(case, mixed_cache, tmp_path):
    counters.clear()
    graphs, losses = [], []

    def note(row):
        graphs.append(counters["stats"]["unique_graphs"])
        losses.append(row["loss"])

    config = CASES[case]
    train(config, mixed_cache, tmp_path / "eager", device=CPU, callbacks=Callbacks(on_epoch=note))
    compiled = changed(config, compute={"compile": True})
    train(compiled, mixed_cache, tmp_path / "compiled", device=CPU, callbacks=Callbacks(on_epoch=note))
    assert not counters["graph_break"]
    assert graphs[:2] == [0, 0]
    assert 0 < graphs[2] == graphs[3] <= 8
    assert losses[2:] == pytest.approx(losses[:2], rel=1e-4)


def test_every_step_tells_cuda_graphs_that_it_begins(mixed_cache, tmp_path, monkeypatch):
    """Of a GPU that is played: before a step's first pass, so that its answers last until its weights have moved."""
    order, begin, forward = [], gradients.begin_step, Student.forward
    monkeypatch.setattr(gradients, "begin_step", lambda device: order.append("begin") or begin(device))
    monkeypatch.setattr(Student, "forward", lambda student, x: order.append("pass") or forward(student, x))
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    monkeypatch.setattr(trainer, "_scores", lambda *_: {})
    config = changed(PLAIN, inner=WARM, optim={"epochs": 1}, compute={"compile": True})
    steps = []
    callbacks = Callbacks(on_step=lambda *_: steps.append(order.count("begin")))
    train(config, mixed_cache, tmp_path, device=CPU, callbacks=callbacks)
    first = order.index("begin")
    assert order[first:] == ["begin", "pass", "pass"] * len(steps) and steps == list(range(1, len(steps) + 1))


SURROUNDED = {
    "pgd": CASES["pgd-batches"],
    "warm": changed(
        PLAIN,
        recipe="darht",
        student=StudentConfig(arch="resnet18", kwargs=NET),
        inner=WARM,
        loss={"clean_share": 0.0, "phases": (0.0, 1.0)},
    ),
}


@pytest.mark.parametrize("case", SURROUNDED)
def test_what_surrounds_the_student_is_whole_graphs_too(case, mixed_cache, tmp_path, monkeypatch):
    """As on a GPU; the student itself is left out, which the tests above compile."""
    compile_function.cache_clear()
    counters.clear()
    graphs, losses = [], []

    def note(row):
        graphs.append(counters["stats"]["unique_graphs"])
        losses.append(row["loss"])

    config = SURROUNDED[case]
    train(config, mixed_cache, tmp_path / "eager", device=CPU, callbacks=Callbacks(on_epoch=note))
    monkeypatch.setattr(trainer, "fusing", lambda kind: fusing("cpu"))
    train(config, mixed_cache, tmp_path / "fused", device=CPU, callbacks=Callbacks(on_epoch=note))
    assert not counters["graph_break"]
    assert graphs[:2] == [0, 0]
    assert 8 < graphs[2] == graphs[3] <= 60
    assert losses[2:] == pytest.approx(losses[:2], rel=1e-4)
    compile_function.cache_clear()
