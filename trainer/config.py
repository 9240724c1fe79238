"""Recipes as data: what `darht-train` and `darht-teacher train` do, as frozen dataclasses."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from darht.attacks import PGD
from darht.core.config import load_mapping, override, parse
from darht.core.errors import ConfigError
from darht.trainer.student import Dropout


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule, in shares of the run so that a shorter run keeps its shape."""

    epochs: int = 100
    batch_size: int = 256  # the released DARHT
    optimizer: Literal["sgd", "adamw"] = "sgd"  # adamw for transformers trained from scratch
    lr: float = 0.1
    momentum: float = 0.9  # sgd
    weight_decay: float = 5e-4
    nesterov: bool = False  # sgd
    schedule: Literal["piecewise", "cosine", "constant"] = "piecewise"
    warmup: float = 0.0  # share of the run in which the rate rises linearly from 0
    milestones: tuple[float, ...] = (0.75, 0.9)  # shares of the run at which `piecewise` divides the rate by 10
    clip_norm: float | None = None  # of the whole gradient; transformers at a high rate need it

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise ConfigError(f"epochs and batch_size must be at least 1; got {self.epochs} and {self.batch_size}")
        if self.lr <= 0 or not 0 <= self.warmup < 1:
            raise ConfigError(f"lr must be above 0 and warmup a share in [0, 1); got {self.lr:g} and {self.warmup:g}")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum must lie in [0, 1); got {self.momentum:g}")
        if self.nesterov and self.momentum == 0:
            raise ConfigError("nesterov needs a momentum above 0; got 0: set momentum: 0.9, or nesterov: false")
        if self.weight_decay < 0:
            raise ConfigError(f"weight_decay must be at least 0; got {self.weight_decay:g}")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ConfigError(f"clip_norm must be above 0, or null for no limit; got {self.clip_norm:g}")
        if not all(0 <= milestone <= 1 for milestone in self.milestones):
            raise ConfigError(f"milestones are shares of the run in [0, 1]; got {list(self.milestones)}")


@dataclass(frozen=True)
class InnerConfig:
    """Where the student's adversarial examples come from at train time."""

    kind: Literal["cached", "pgd"] = "pgd"
    eps: float = 8.0  # pixel levels
    step: float = 2.0
    steps: int = 10

    def __post_init__(self) -> None:
        self.pgd()

    def pgd(self) -> PGD:
        """The attack's settings, checked."""
        return PGD(eps=self.eps, step=self.step, steps=self.steps)


@dataclass(frozen=True)
class StudentConfig:
    """The student's network."""

    arch: str = "resnet18"
    kwargs: dict[str, Any] = field(default_factory=dict)
    feature_map: bool = True  # a row of logits per teacher; without it the student is the plain classifier
    mc_dropout: float = 0.0  # share of the features that is dropped, also at inference; 0 for none, as released
    mc_samples: int = 16  # passes that are averaged at inference; each costs one linear layer, not one backbone

    def __post_init__(self) -> None:
        self.dropout()

    def dropout(self) -> Dropout:
        """The settings of Monte-Carlo dropout, checked."""
        return Dropout(self.mc_dropout, self.mc_samples)


@dataclass(frozen=True)
class TrainConfig:
    """A recipe.

    Attributes:
        recipe: the outer loss: `darht`, `rslad` or `at`.
        student: its network.
        inner: where adversarial examples come from.
        optim: the optimizer and its schedule.
        clean_share: share of steps on clean batches (`darht`, `at`); the released DARHT tosses a fair coin.
        phases: `darht`: shares of the run at which KD joins CE, and at which CE leaves; 50 and 118 of 350 epochs.
        kd_loss: `darht`: `kl` on probabilities or `mse` on raw logits.
        weights: `darht`: exp(-CE(T_t, y)) with the CE of the batch, as released, or of each row.
        rslad_clean: `rslad`: weight of the clean term; 1/6 in the paper.
        seed: of everything random.
    """

    recipe: Literal["darht", "rslad", "at"] = "darht"
    student: StudentConfig = StudentConfig()
    inner: InnerConfig = InnerConfig()
    optim: OptimConfig = OptimConfig()
    clean_share: float = 0.5
    phases: tuple[float, ...] = (50 / 350, 118 / 350)
    kd_loss: Literal["kl", "mse"] = "kl"
    weights: Literal["batch", "row"] = "batch"
    rslad_clean: float = 1 / 6
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.clean_share <= 1:
            raise ConfigError(f"clean_share is a share in [0, 1]; got {self.clean_share:g}")
        if len(self.phases) != 2 or not 0 <= self.phases[0] <= self.phases[1] <= 1:
            raise ConfigError(f"phases are two rising shares in [0, 1]; got {list(self.phases)}")
        if not 0 <= self.rslad_clean <= 1:
            raise ConfigError(f"rslad_clean is a share in [0, 1]; got {self.rslad_clean:g}")
        if self.recipe == "darht" and not self.student.feature_map:
            raise ConfigError("recipe darht trains the feature map; set student.feature_map: true, or recipe: rslad")


@dataclass(frozen=True)
class TeachConfig:
    """How a teacher is trained.

    Attributes:
        algorithm: `standard`, `pgd-at` (Madry et al. 2018), `trades` (Zhang et al. 2019), `fat` (Zhang et al. 2020).
        optim: the optimizer and its schedule.
        eps, step, steps: of the PGD inside, in pixel levels.
        beta: `trades`: weight of the robust term; 6 in the paper.
        tau: `fat`: steps that an example may go on after it is misclassified first.
        padding: of the random crop; 0 for none.
        flip: whether images are mirrored at random; digits and text must not be.
        seed: of everything random.
    """

    algorithm: Literal["standard", "pgd-at", "trades", "fat"] = "pgd-at"
    optim: OptimConfig = OptimConfig()
    eps: float = 8.0
    step: float = 2.0
    steps: int = 10
    beta: float = 6.0
    tau: int = 1
    padding: int = 4
    flip: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        self.pgd()
        if self.tau < 0:
            raise ConfigError(f"tau counts steps and is at least 0; got {self.tau}")
        if self.beta < 0:
            raise ConfigError(f"beta must be at least 0; got {self.beta:g}")
        if not 0 <= self.padding <= 127:
            raise ConfigError(f"padding must lie in 0..127 pixels; got {self.padding}")

    def pgd(self) -> PGD:
        """The attack's settings, checked."""
        return PGD(eps=self.eps, step=self.step, steps=self.steps)


def load_recipe(path: Path | None, assignments: tuple[str, ...]) -> TrainConfig:
    """A recipe from a YAML file (the defaults when None) with `key=value` assignments applied.

    Raises:
        ConfigError: unknown keys, wrong values.
    """
    name = "recipe" if path is None else path.name
    return parse(TrainConfig, override({} if path is None else load_mapping(path), assignments), name)
