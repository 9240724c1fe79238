"""Training on torch's `meta` device: nothing in a step may ask for a value, for that is what would wait for a GPU.

A tensor on `meta` has a shape and no data, so whatever needs a number fails, and so does mixing with the CPU. What a
run asks for outside of its steps is replaced here by name, with the reason.
"""

import dataclasses
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from runs import changed

import darht.cache.read.training_set as training_set
import darht.trainer.student.setup as setup
import darht.trainer.student.train as trainer
import darht.trainer.student.twin as twin
from darht.cache.read.reader import open_cache
from darht.cache.read.stream import Feed
from darht.cache.sources.load import Source
from darht.trainer.config import (
    AverageConfig,
    ComputeConfig,
    StudentConfig,
    TrainConfig,
    WarmConfig,
)
from darht.trainer.progress.metrics import Metrics, Reading
from darht.trainer.student.losses import RECIPES
from darht.trainer.student.model import Student
from darht.trainer.teacher.config import load_teaching
from darht.trainer.teacher.train import source_cache

BUDGET = 9e-5  # GiB: holds some of the rows of `fine_cache`
META = torch.device("meta")
TINY = StudentConfig(arch="resnet18", kwargs={"width": 2, "blocks": [1, 1, 1, 1]}, feature_map=False)
PLAIN = changed(recipe="at", student=TINY, inner={"steps": 1}, optim={"epochs": 1, "batch_size": 40, "clip_norm": None})
WARM = {"kind": "warm", "eps": 8.0, "step": None}


@pytest.fixture(autouse=True)
def outside_of_the_steps(monkeypatch):
    """What a run asks for before its first step and between two epochs."""

    def fetch(feed, rows):  # held-out rows and the probe's, once in a run
        images, labels = (torch.from_numpy(feed.cache.read(name)[rows]) for name in ("image", "label"))
        return images, labels.long()

    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows nothing of `meta`
    monkeypatch.setattr(Feed, "fetch", fetch)
    monkeypatch.setattr(Feed, "pixel_counts", lambda feed: torch.ones(3, 256))  # mean and deviation, once in a run
    monkeypatch.setattr(setup, "check_folds", lambda student, pixels: None)  # compares two answers, once in a run
    monkeypatch.setattr(twin, "_agrees", lambda student, pixels: True)  # compares two answers too, once in a run
    monkeypatch.setattr(setup, "to_channels_last", lambda net, pixels: net.to(memory_format=torch.channels_last))  # so
    monkeypatch.setattr(Metrics, "reading", lambda metrics: Reading(0.0, None, None))  # once in an epoch
    monkeypatch.setattr(trainer, "_scores", lambda *_: {})  # between two epochs: a program of its own
    monkeypatch.setattr(trainer.Checkpoints, "add", lambda *_, **__: None)  # weights to the disk, between two epochs


def run(config: TrainConfig, cache, out, **more) -> int:
    """Train on `meta`; how many steps were taken."""
    steps = []
    callbacks = trainer.Callbacks(on_step=lambda number, *_: steps.append(number))
    trainer.train(config, cache, out, device=META, callbacks=callbacks, **more)
    return len(steps)


def recipe(name: str, **changes) -> TrainConfig:
    if name == "darht":
        changes.setdefault("loss", {"phases": (0.0, 1.0), "clean_share": 0.0})
    if name == "saad":
        changes.setdefault("targets", "first-order")  # compares two points of an image
    if RECIPES[name].uses_average:
        changes.setdefault("average", AverageConfig(kind="ema"))
    student = dataclasses.replace(TINY, feature_map=RECIPES[name].needs_feature_map)
    return changed(PLAIN, recipe=name, student=changes.pop("student", student), **changes)


ROWS = {"clean_share": 0.5, "clean_by": "row"}
CASES = {
    **{f"{name}-pgd": recipe(name) for name in RECIPES},
    **{f"{name}-warm": recipe(name, inner=WARM) for name in ("darht", "trades")},
    "adr-warm": recipe("adr", inner=WARM),
    "label": recipe("at", inner=WARM | {"warm": WarmConfig(start="label")}),
    "n-fgsm": recipe("at", inner={"kind": "n-fgsm", "eps": 8.0, "step": None}),
    "awp": recipe("trades", loss={"awp": 0.01, "smoothing": 0.1}, inner=WARM),
    "saad-beta": recipe("saad", loss={"beta": 1.0}, compute=ComputeConfig(channels_last=True)),
    "gradient": recipe("adaad", loss={"gradient": 1.0}, targets="first-order"),
    "warm-noise": recipe("at", inner=WARM | {"warm": WarmConfig(start="noise")}),
    **{f"{name}-cached": recipe(name, inner={"kind": "cached", "eps": 32.0}) for name in ("mtard", "at")},
    **{f"adaad-{targets}": recipe("adaad", targets=targets) for targets in ("nearest", "first-order")},
    **{f"rows-{kind}": recipe("at", loss=ROWS, inner={"kind": kind, "eps": 32.0}) for kind in ("warm", "cached")},
    "igdm-live": recipe("adaad", loss={"igdm": 1.0, "alpha": 0.5}, teachers="live"),
    "everything": recipe(
        "darht",
        inner=WARM,
        loss={"kd": "mse", "weights": "row", "phases": (0.0, 1.0)} | ROWS,
        student=dataclasses.replace(TINY, feature_map=True, mc_dropout=0.2),
        average=AverageConfig(kind="ema"),
        compute=ComputeConfig(precision="bf16", channels_last=True, accumulate=3),
        optim={"optimizer": "adamw", "lr": 1e-3, "clip_norm": 1.0, "epochs": 2},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_of_every_recipe_asks_for_no_value(case, mixed_cache, tmp_path):
    assert run(CASES[case], mixed_cache, tmp_path) == CASES[case].optim.epochs


@pytest.mark.parametrize("inner", [WARM, {"kind": "cached", "eps": 32.0}], ids=["warm", "cached"])
def test_rows_that_are_streamed_are_sent_and_never_asked_for(inner, fine_cache, tmp_path):
    config = recipe("at", loss=ROWS, inner=inner, optim={"batch_size": 12})
    streamed = []
    note = trainer.Callbacks(on_note=streamed.append)
    trainer.train(config, open_cache(fine_cache), tmp_path, device=META, memory_gib=BUDGET, callbacks=note)
    assert "streamed" in streamed[0]


@pytest.mark.parametrize("kind", ["warm", "pgd", "cached"])
def test_pixels_lie_as_the_weights_do_and_coins_of_rows_send_nothing(kind, mixed_cache, tmp_path, monkeypatch):
    """Positions go to the device once in an epoch, however a step's rows are parted."""
    forward, send = Student.forward, training_set.send
    last, sent = [], []

    def noted(student, x):
        last.append(x.is_contiguous(memory_format=torch.channels_last))
        return forward(student, x)

    monkeypatch.setattr(Student, "forward", noted)

    def counted(tensor, device):
        sent.extend([len(tensor)] if tensor.device.type == "cpu" else [])
        return send(tensor, device)

    monkeypatch.setattr(training_set, "send", counted)
    inner = {"kind": kind, "eps": 32.0, "step": None}
    compute = ComputeConfig(channels_last=True, accumulate=2)
    config = recipe("at", loss=ROWS, inner=inner, compute=compute, optim={"epochs": 2, "batch_size": 16})
    steps = run(config, mixed_cache, tmp_path)
    assert len(sent) == 2 and sum(sent) == 16 * steps
    assert all(last[2:]) and len(last) > 2 * steps


def test_a_step_that_asks_is_found(mixed_cache, tmp_path, monkeypatch):
    """What all of this rests on."""
    monkeypatch.setattr(trainer, "take_step", lambda model, *_: bool(next(model.parameters()).sum() > 0))
    with pytest.raises(RuntimeError, match="meta"):
        run(PLAIN, mixed_cache, tmp_path)


@pytest.mark.parametrize("algorithm", ["standard", "fat"])
def test_a_step_of_a_teacher_asks_for_no_value(algorithm, tmp_path):
    source = Source("none", "train", np.zeros((24, 3, 8, 8), np.uint8), np.arange(24) % 2, ("a", "b"), "")
    settings = ("optim.epochs=1", "optim.batch_size=8", "optim.clip_norm=1", "inner.steps=2", "views.padding=1")
    config = load_teaching({"algorithm": algorithm}, settings)
    assert run(config.recipe(TINY), source_cache(config, source), tmp_path) == 3
