"""What a teacher's answers to the same or to labelled images say about it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

_TOLERANCE = 2e-2  # half precision: a softmax in bfloat16 sums to 1 within 1e-2
_ENOUGH = 5  # images of a class, before its usual answer is believed


@dataclass(frozen=True)
class Difference:
    """How two answers to the same images differ: most in a row, as a share of its norm, and in how many argmaxes."""

    size: float
    changed: int

    def about(self, count: int) -> str:
        """The numbers in words, of `count` images."""
        return f"by up to {self.size:.2g} of the logits' norm, {self.changed} of {count} answers change"


def compare(first: Tensor, second: Tensor) -> Difference:
    """Two answers `[B, C]` to the same images."""
    return Difference(float(distances(first, second).max()), int((first.argmax(1) != second.argmax(1)).sum()))


def distances(first: Tensor, second: Tensor) -> Tensor:
    """How far apart two answers `[B, C]` are, `[B]`, each as a share of the first's norm; infinite without numbers.

    A constant added to a row's logits, which changes no softmax, does not count.
    """
    one, other = (logits.double() - logits.double().mean(1, keepdim=True) for logits in (first, second))
    apart: Tensor = (one - other).norm(dim=1) / (one.norm(dim=1) + 1e-10)
    return apart.nan_to_num(nan=float("inf"))


def is_distribution(logits: Tensor) -> bool:
    """Whether outputs `[B, C]` look like probabilities or shares, also rounded to half precision.

    All lie in [0, 1] (sigmoid, softmax), or none is negative and all rows have the same sum (percentages).
    """
    low, high, sums = float(logits.min()), float(logits.max()), logits.double().sum(1)
    if low < -_TOLERANCE * min(1.0, high) or high <= 0:
        return False
    spread = float(sums.max() - sums.min()) / float(sums.mean())
    return spread <= _TOLERANCE or (low >= 0 and high <= 1)


def find_cycle(labels: Sequence[int], answers: Sequence[int], classes: int) -> tuple[int, ...]:
    """Classes of which each is mostly answered with the next, and the last with the first; empty when there are none.

    That is how outputs in another order look where most classes are in place; a weak teacher confuses classes one way.
    """
    usual: dict[int, int] = {}
    said, truth = np.asarray(answers), np.asarray(labels)
    for label in range(classes):
        own = said[truth == label].tolist()
        if len(own) >= _ENOUGH and (best := Counter(own).most_common(1)[0])[1] * 2 > len(own):
            usual[label] = best[0]
    for first in usual:
        path = [first]
        while (following := usual.get(path[-1])) is not None and following not in path:
            path.append(following)
        if following == first and len(path) > 1:
            return tuple(path)
    return ()
