"""Fixtures of the trainer's tests: rows of a made-up cache in memory, and students small enough for plain loops."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from built import sealed_cache
from torch import nn

from darht.cache.format.apply_views import apply_views
from darht.cache.format.views import crop_flip_offsets
from darht.cache.read.reader import Cache, open_cache
from darht.cache.read.training_set import Jacobian, TrainingSet
from darht.trainer.student import checkpoints
from darht.trainer.student.model import StudentOutput

N, SIDE, T, C, ATTACK_VIEWS = 24, 4, 2, 5, 3


@pytest.fixture(autouse=True)
def every_epoch_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, so that callbacks find it on the disk; `student/test_checkpoints.py` has the minute and the thread."""
    begin = checkpoints.Checkpoints._begin

    def begin_and_wait(kept: checkpoints.Checkpoints) -> None:
        begin(kept)
        kept.wait()

    monkeypatch.setattr(checkpoints, "EVERY", 0.0)
    monkeypatch.setattr(checkpoints.Checkpoints, "_begin", begin_and_wait)


class Small(nn.Module):
    """A student that couples rows in train mode (batch norm, dropout) and not in eval mode."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3 * SIDE * SIDE), nn.Linear(3 * SIDE * SIDE, 16))
        self.rest = nn.Sequential(nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, C))

    def forward(self, x):
        logits = self.rest(self.body(x))
        return StudentOutput(logits, logits.new_zeros(len(x), 0, C))


@pytest.fixture(scope="module")
def student() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Small()


@pytest.fixture(scope="session")
def make_data() -> Callable[..., TrainingSet]:
    """`make_data(padding=1)` gives 24 random images with everything that a cache may hold about them.

    Its teachers are `robust` and `vanilla` by role, their logits noise, their Jacobians of all classes.
    """

    def make(padding: int = 1, rows: int = N) -> TrainingSet:
        generator = torch.Generator().manual_seed(1)
        images = torch.randint(0, 256, (rows, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
        offsets = torch.from_numpy(crop_flip_offsets(padding, flip=True))
        deltas = []
        for _ in range(2):
            delta = torch.randint(-16, 17, (rows, ATTACK_VIEWS, 3, SIDE, SIDE), generator=generator)
            for view in range(ATTACK_VIEWS):
                pixels = apply_views(images, offsets[view].expand(rows, 3)).long()
                delta[:, view] = (pixels + delta[:, view]).clamp(0, 255) - pixels
            deltas.append(delta.to(torch.int8))
        slopes = tuple(
            Jacobian(
                values=torch.randint(-127, 128, (rows, C, 3, SIDE, SIDE), generator=generator).to(torch.int8),
                scales=torch.rand(rows, C, generator=generator) * 1e-4,
                classes=torch.arange(C, dtype=torch.int16).expand(rows, C).clone(),
            )
            for _ in range(T)
        )
        return TrainingSet(
            rows=torch.arange(rows),
            keys=torch.arange(rows),
            images=images,
            labels=torch.randint(0, C, (rows,), generator=generator),
            offsets=offsets,
            teachers=("robust", "vanilla"),
            attacks=("first", "second"),
            clean=torch.randn(rows, len(offsets), T, C, generator=generator).half(),
            deltas=tuple(deltas),
            scales=tuple(1.0 for _ in deltas),
            adversarial=tuple(torch.randn(rows, ATTACK_VIEWS, T, C, generator=generator).half() for _ in range(2)),
            jacobians=slopes,
            robust=torch.tensor([True, False]),
            training=np.arange(rows),
            holdout=np.arange(0),
        )

    return make


@pytest.fixture(scope="module")
def data(make_data: Callable[..., TrainingSet]) -> TrainingSet:
    return make_data()


@pytest.fixture(scope="session")
def mixed_cache(tiny_teachers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """60 digits, 7 views with flips, a vanilla ResNet and a robust ViT with their Jacobians, an attack on each."""
    folder = tmp_path_factory.mktemp("mixed")
    attack = {"kind": "pgd", "eps": 32, "step": 8, "steps": 2}
    config = {
        "data": {"source": "digits", "limit": 60, "holdout": 0.2},
        "teachers": {
            "cnn": {"path": str(tiny_teachers["cnn"]), "role": "vanilla"},
            "vit": {"path": str(tiny_teachers["vit"])},
        },
        "attacks": {"pgd-cnn": {**attack, "teacher": "cnn"}, "pgd-vit": {**attack, "teacher": "vit", "views": 2}},
        "views": {"padding": 2, "count": 7},
        "jacobians": {"cnn": {}, "vit": {}},
        "store": {"rows_per_shard": 64, "rows_per_chunk": 16, "logits": "float32"},
    }
    return open_cache(sealed_cache(config, folder))
