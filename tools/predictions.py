"""What every teacher answers to every clean image and to every stored adversarial example, as classes."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from darht.cache.read.reader import Cache
from darht.tools.vectors import Floats, blocks

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Predicted classes on view 0 of every row that has a label: N of them.

    Attributes:
        labels: int `[N]`.
        teachers: T names.
        attacks: A names.
        sources: the teacher that each attack was crafted on, A names.
        clean: int `[T, N]`, on the clean images.
        adversarial: int `[A, T, N]`, on the stored adversarial images.
    """

    labels: Ints
    teachers: tuple[str, ...]
    attacks: tuple[str, ...]
    sources: tuple[str, ...]
    clean: NDArray[np.int32]
    adversarial: NDArray[np.int32]

    @property
    def right_clean(self) -> Bools:
        """Where a teacher is right on the clean image, `[T, N]`."""
        right: Bools = self.clean == self.labels
        return right

    @property
    def right(self) -> Bools:
        """Where a teacher is right on an adversarial image, `[A, T, N]`."""
        right: Bools = self.adversarial == self.labels
        return right

    def own(self, teacher: str) -> list[int]:
        """The attacks that were crafted on a teacher."""
        return [a for a, source in enumerate(self.sources) if source == teacher]

    def withstood(self, source: str) -> Bools:
        """Where each teacher is right on every example crafted on `source`, `[T, N]`; all true when there are none."""
        right: Bools = np.all(self.right[self.own(source)], axis=0)
        return right


def read_predictions(cache: Cache) -> Predictions:
    """Read them; logits of other views are decoded block by block and let go."""
    attacks, teachers = cache.spec.attacks, tuple(cache.spec.teachers)
    clean = [_classes(cache, teacher, "clean") for teacher in teachers]
    adversarial = [[_classes(cache, teacher, attack) for teacher in teachers] for attack in attacks]
    return Predictions(
        labels=cache.read("label", slice(0, cache.spec.data.labelled)).astype(np.int64),
        teachers=teachers,
        attacks=tuple(attacks),
        sources=tuple(attack.teacher for attack in attacks.values()),
        clean=np.stack(clean),
        adversarial=np.array(adversarial, dtype=np.int32).reshape(
            len(attacks), len(teachers), cache.spec.data.labelled
        ),
    )


def _classes(cache: Cache, teacher: str, about: str) -> NDArray[np.int32]:
    every = blocks(cache, f"logits/{teacher}/{about}", labelled=True)
    parts = [cache.logits(teacher, about, rows=rows).argmax(1) for rows in every]
    return np.concatenate(parts).astype(np.int32)


def softmax(logits: np.ndarray) -> Floats:
    """Probabilities of logits `[..., C]` at temperature 1, float32."""
    values = logits.astype(np.float32)
    powers = np.exp(values - values.max(-1, keepdims=True))
    probabilities: Floats = powers / powers.sum(-1, keepdims=True)
    return probabilities
