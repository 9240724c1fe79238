"""How accurate a model is on clean images and under one attack: what training selects by and teachers are checked with.

What people should believe about a model is measured by `darht.trainer.evaluation`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from darht.attacks import FGSM, PGD
from darht.attacks.objectives import Model
from darht.cache.sources.load import Source
from darht.core.config import to_plain
from darht.core.rng import RowRng
from darht.core.stats import wilson

OnBatch = Callable[[str, int], None]
SCHEMA_VERSION = 2  # of `eval.json`
EVERYONE = "all images"  # that an attack was asked about
NORMS = {"linf": "L-inf", "l2": "L2"}


@dataclass(frozen=True)
class Score:
    """One measured accuracy.

    Attributes:
        name: `clean`, `fgsm`, `pgd-20`, `transfer:<teacher>`, `autoattack`, ... or `worst case`.
        correct: images answered rightly.
        count: images asked.
        attack: kind and parameters (pixel levels), the model attacked and the seed; empty for clean.
        family: `white-box`, `transfer`, `adaptive`, `black-box` or `check`; empty for clean and the worst case.
        on: which images were asked, in words.
    """

    name: str
    correct: int
    count: int
    attack: dict[str, Any] = field(default_factory=dict)
    family: str = ""
    on: str = EVERYONE

    @property
    def accuracy(self) -> float:
        """In per cent."""
        return 100 * self.correct / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval in per cent."""
        low, high = wilson(self.correct, self.count)
        return 100 * low, 100 * high

    def record(self) -> dict[str, Any]:
        """The score as it stands in `eval.json`."""
        low, high = self.interval
        rounded = {"accuracy": round(self.accuracy, 4), "interval95": [round(low, 4), round(high, 4)]}
        return {**to_plain(self), **rounded}


@dataclass(frozen=True)
class AttackOn:
    """An attack and the model it works against: the evaluated one when `against` is None, else a transfer source."""

    attack: PGD | FGSM
    against: Model | None = None
    label: str = "the evaluated model"


def correct_rows(
    model: Model,
    source: Source,
    attack: AttackOn | None,
    *,
    device: torch.device,
    seed: int = 0,
    batch_size: int = 250,
    on_batch: Callable[[int], None] = lambda images: None,
) -> np.ndarray:
    """Which images the model answers rightly, bool `[N]`.

    Args:
        model: pixels `[B, 3, H, W]` in [0, 1] to logits `[B, C]`, in eval mode.
        source: images and labels.
        attack: None for clean images.
        device: where the model lies.
        seed: of the attack's random start, keyed by row.
        batch_size: images at a time.
        on_batch: told how many images were done.
    """
    images, labels = torch.from_numpy(source.images), torch.from_numpy(source.labels)
    right: list[Tensor] = []
    for rows in torch.arange(len(images)).split(batch_size):
        x, y = images[rows].to(device).float() / 255, labels[rows].to(device)
        if attack is not None:
            generator = RowRng.create(seed, "evaluate", rows=rows.to(device))
            x = attack.attack(attack.against or model, x, y, generator=generator)
        with torch.no_grad():
            right.append((model(x).argmax(1) == y).cpu())
        on_batch(len(rows))
    return torch.cat(right).numpy()


def quick_attacks(eps: float, teachers: Mapping[str, Model]) -> dict[str, AttackOn]:
    """FGSM and PGD-20 on the model itself, and PGD-20 examples of every teacher, at `eps` levels.

    The step is a quarter of epsilon, at least one level.
    """
    step = float(max(1, round(eps / 4)))
    pgd = PGD(eps=eps, step=step, steps=20)
    attacks = {"fgsm": AttackOn(FGSM(eps=eps)), "pgd-20": AttackOn(pgd)}
    return attacks | {f"transfer:{name}": AttackOn(pgd, model, name) for name, model in teachers.items()}


def evaluate(
    model: Model,
    source: Source,
    attacks: Mapping[str, AttackOn],
    *,
    device: torch.device,
    seed: int = 0,
    on_batch: OnBatch = lambda name, images: None,
) -> list[Score]:
    """Clean accuracy, accuracy under each attack, and the worst case per image over all of them.

    An image counts as robust only when it is answered rightly clean and under every attack.
    """
    scores, worst = [], np.ones(len(source.images), dtype=bool)
    for name, attack in {"clean": None, **attacks}.items():
        right = correct_rows(model, source, attack, device=device, seed=seed, on_batch=partial(on_batch, name))
        worst &= right
        about = {} if attack is None else _describe(attack, seed)
        scores.append(Score(name, int(right.sum()), len(right), about))
    if attacks:
        over = {"over": ["clean", *attacks], "eps": next(iter(attacks.values())).attack.eps}
        scores.append(Score("worst case", int(worst.sum()), len(worst), over))
    return scores


def _describe(attack: AttackOn, seed: int) -> dict[str, Any]:
    kind = type(attack.attack).__name__.lower()
    return {"kind": kind, **to_plain(attack.attack), "against": attack.label, "seed": seed}
