"""What `darht-eval` measures, as data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from darht.attacks import AutoAttack
from darht.attacks.threat import Norm
from darht.core.errors import ConfigError
from darht.core.keys import check_seed
from darht.trainer.evaluation.attacks.substitute import Substitution
from darht.trainer.evaluation.target import ModelOptions
from darht.trainer.state.checkpoint import BEST

Tier = Literal["quick", "standard", "full"]


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What `darht-eval` measures.

    Attributes:
        tier: `quick` (FGSM, PGD-20, transfer, masking checks; 1,000 images), `standard` (and AutoAttack, on all test
            images), `full` (and adaptive and black-box attacks and corruptions).
        which: of a run: `student` (best on held-out rows) or `last`.
        data: the data set; None for the one that the model belongs to.
        root: where it lies; None for where the cache was built from.
        image_size: side to which an imagefolder is cut.
        download: fetch CIFAR when its files are not there.
        skip_broken: leave image files out that cannot be decoded.
        limit: the first so many test rows only.
        eps: radius in pixel levels; None for what the model was trained for, or 8.
        norm: `linf` or `l2`.
        teachers: folders by name, beside or instead of those the cache was built from; None leaves transfer out.
        surrogates: names of independently trained models, as `darht-eval` takes them.
        model: how foreign models are built.
        autoattack: its settings; eps and norm are set from the fields here.
        reference: run the authors' own AutoAttack instead of ours.
        corruptions: measure them in any tier; `full` does always.
        samples: draws that a random model's answer is the mean of.
        queries: of RayS and of Square in the black-box set; the masking checks take no more of Square.
        substitution: the adaptive black-box attack.
        seed: of everything random.
    """

    tier: Tier = "quick"
    which: str = BEST
    data: str | None = None
    root: Path | None = None
    image_size: int | None = None
    download: bool = False
    skip_broken: bool = False
    limit: int | None = None
    eps: float | None = None
    norm: Norm = "linf"
    teachers: Mapping[str, str] | None = field(default_factory=dict)
    surrogates: tuple[str, ...] = ()
    model: ModelOptions = field(default_factory=ModelOptions)
    autoattack: AutoAttack = field(default_factory=AutoAttack)
    reference: bool = False
    corruptions: bool = False
    samples: int = 16
    queries: tuple[int, int] = (10_000, 5000)
    substitution: Substitution = field(default_factory=Substitution)
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.reference and self.tier == "quick":
            raise ConfigError("--reference runs the reference AutoAttack: add --tier standard")
        if self.norm == "l2" and self.eps is None:
            raise ConfigError("an L2 radius has no default: give --eps in pixel levels, e.g. 128 for 128/255")
