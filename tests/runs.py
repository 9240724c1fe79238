"""Short training runs for tests: a recipe, an interruption at a chosen moment, and the comparison of two runs' bits."""

import dataclasses
import json

import torch

from darht.core.preprocessing import Preprocessing
from darht.trainer.config import AverageConfig, InnerConfig, OptimConfig, StudentConfig, TrainConfig, WarmConfig
from darht.trainer.state.checkpoint import BEST, CHECKPOINT, LAST, StudentCard, save_student
from darht.trainer.student.losses import RECIPES
from darht.trainer.student.model import Student

CPU = torch.device("cpu")
NETWORK = {"arch": "resnet18", "kwargs": {"width": 2, "blocks": [1, 1, 1, 1]}}
TIMINGS = ("seconds", "cpu_seconds", "images_per_second")
CONFIG = TrainConfig(
    student=StudentConfig(arch="resnet18", kwargs={"width": 4, "blocks": [1, 1, 1, 1]}),
    inner=InnerConfig(eps=32, step=8, steps=2),
    optim=OptimConfig(epochs=3, batch_size=32, lr=0.05, warmup=0.2, schedule="cosine", clip_norm=5.0),
    loss={"phases": (0.2, 0.6)},
    average=AverageConfig(kind="none"),  # what a run leaves is then what it trained
    seed=7,
)


def changed(config=CONFIG, **changes):
    """The recipe with changes, those of `optim` and `inner` given as dictionaries; another recipe drops its `loss`."""
    if changes.get("recipe", config.recipe) != config.recipe:
        changes.setdefault("loss", {})
        if RECIPES[changes["recipe"]].uses_average:
            changes.setdefault("average", None)
    nested = {
        key: dataclasses.replace(getattr(config, key), **value) if isinstance(value, dict) and key != "loss" else value
        for key, value in changes.items()
    }
    return dataclasses.replace(config, **nested)


# As much state as a run can have: memory with momentum, an average of the weights, dropout that draws.
STATEFUL = changed(
    student=dataclasses.replace(CONFIG.student, mc_dropout=0.2, mc_samples=2),
    inner={"kind": "warm", "eps": 32.0, "step": 8.0, "warm": WarmConfig(momentum=0.5, check_rows=16)},
    average=AverageConfig(kind="ema", decay=0.9),
    optim={"epochs": 4, "batch_size": 16},
)


def log(out):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def leaves(value, where=""):
    """Every tensor and number of a nested checkpoint, by its path."""
    if isinstance(value, dict):
        return {path: leaf for key, item in value.items() for path, leaf in leaves(item, f"{where}/{key}").items()}
    if isinstance(value, list | tuple):
        return {path: leaf for i, item in enumerate(value) for path, leaf in leaves(item, f"{where}/{i}").items()}
    return {where: value}


def read_checkpoint(out):
    """What a run's checkpoint holds, and the memory that lies beside it."""
    kept = torch.load(out / CHECKPOINT, map_location="cpu", weights_only=True)
    if isinstance(kept["memory"], str):
        assert [path.name for path in out.glob("memory-*")] == [kept["memory"]]
        kept["memory"] = torch.load(out / kept["memory"], map_location="cpu", weights_only=True)
    return kept


def assert_same_bits(one, other):
    assert log(one) == log(other)
    for folder in (BEST, LAST):
        for name in ("model.safetensors", "config.json"):
            assert (one / folder / name).read_bytes() == (other / folder / name).read_bytes(), f"{folder}/{name}"
    found, expected = (leaves(read_checkpoint(out)) for out in (one, other))
    assert found.keys() == expected.keys()
    for path, value in found.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, expected[path]), path
        elif not path.endswith(TIMINGS):
            assert value == expected[path], path


def write_student(folder, teachers):
    """A student that nobody trained, in `folder`, with a map for so many teachers."""
    said = Preprocessing(mean=(0.3, 0.4, 0.5), std=(0.2, 0.2, 0.3))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = Student(**NETWORK, teachers=teachers, num_classes=10, preprocessing=said)
    names = tuple(f"t{number}" for number in range(teachers))
    card = StudentCard(
        **NETWORK,
        teachers=names,
        num_classes=10,
        preprocessing=said,
        classes=tuple("0123456789"),
        cache_root_hash="c",
        recipe={"recipe": "at"},
        epoch=1,
    )
    save_student(folder, student, card)
    return folder


class Stopped(Exception):
    pass


def stop_after(count):
    seen = []

    def hook(*_):
        seen.append(0)
        if len(seen) == count:
            raise Stopped("stopped")

    return hook
