"""The arrays a trainer needs, resident on its device as tensors."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from darht.cache.reader import Cache
from darht.core.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class TrainingSet:
    """A cache in memory.

    Attributes:
        images: uint8 `[N, 3, H, W]`.
        labels: int64 `[N]`.
        offsets: int8 `[V, 3]`.
        teachers: the names on axis T.
        attacks: the names of `deltas` and `adversarial`, in order.
        clean: float `[N, V, T, C]`, every teacher's logits on every view.
        deltas: by attack, int8 `[N, Va, 3, H, W]`.
        units: by attack, pixel levels for each unit of `deltas`.
        adversarial: by attack, float `[N, Va, T, C]`, every teacher's logits on the stored adversarial images.
        robust: bool `[T]`, false for teachers whose role is `vanilla`.
        training: int64, rows to train on.
        holdout: int64, rows kept for selection.
    """

    images: Tensor
    labels: Tensor
    offsets: Tensor
    teachers: tuple[str, ...]
    attacks: tuple[str, ...]
    clean: Tensor
    deltas: tuple[Tensor, ...]
    units: tuple[float, ...]
    adversarial: tuple[Tensor, ...]
    robust: Tensor
    training: np.ndarray
    holdout: np.ndarray


def needed_bytes(cache: Cache, *, adversarial: bool) -> int:
    """What `load_training_set` will hold in memory."""
    names = [name for name in cache.arrays if adversarial or not _is_adversarial(name, cache)]
    return sum(int(np.prod(cache.arrays[n].shape)) * np.dtype(cache.arrays[n].dtype).itemsize for n in names)


def _is_adversarial(name: str, cache: Cache) -> bool:
    return name.startswith("delta/") or name.rsplit("/", 1)[-1] in cache.spec.attacks


def load_training_set(cache: Cache, *, device: torch.device, adversarial: bool, budget_gib: float) -> TrainingSet:
    """Read a sealed cache into tensors on `device`.

    Args:
        cache: opened by `open_cache`.
        device: where the tensors go.
        adversarial: whether the stored perturbations and the teachers' answers to them are needed.
        budget_gib: the most that may be held.

    Raises:
        ConfigError: it does not fit the budget.
        CorruptError: a checksum fails.
    """
    needed = needed_bytes(cache, adversarial=adversarial)
    if needed > budget_gib * GIB:
        raise ConfigError(
            f"{cache.folder} needs {needed / GIB:.1f} GiB in memory, the budget is {budget_gib:g} GiB: "
            f"raise --memory, or build with fewer views ({cache.spec.views.count} now)"
        )
    teachers, attacks = tuple(cache.spec.teachers), tuple(cache.spec.attacks) if adversarial else ()

    def stack(kind: str) -> Tensor:
        first = torch.from_numpy(cache.read(f"logits/{teachers[0]}/{kind}"))
        out = torch.empty(*first.shape[:2], len(teachers), first.shape[2], dtype=first.dtype)
        out[:, :, 0] = first
        for t, teacher in enumerate(teachers[1:], start=1):
            out[:, :, t] = torch.from_numpy(cache.read(f"logits/{teacher}/{kind}"))
        return out.to(device)

    kept = np.array(cache.manifest.holdout, dtype=np.int64)
    return TrainingSet(
        images=torch.from_numpy(cache.read("image")).to(device),
        labels=torch.from_numpy(cache.read("label")).long().to(device),
        offsets=torch.from_numpy(cache.read("views/offset")).to(device),
        teachers=teachers,
        attacks=attacks,
        clean=stack("clean"),
        deltas=tuple(torch.from_numpy(cache.read(f"delta/{name}")).to(device) for name in attacks),
        units=tuple(cache.spec.attacks[name].unit for name in attacks),
        adversarial=tuple(stack(name) for name in attacks),
        robust=torch.tensor([teacher.role == "robust" for teacher in cache.spec.teachers.values()], device=device),
        training=np.setdiff1d(np.arange(cache.rows), [*kept, *cache.excluded]),
        holdout=kept,
    )
