"""One measured accuracy, and the words that all reports use."""

from dataclasses import dataclass, field
from typing import Any

from darht.core.config import to_plain
from darht.core.stats import wilson

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
