"""Recipes as data: what `darht-train` does, as frozen dataclasses."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from darht.attacks import PGD
from darht.attacks.threat import check_levels
from darht.cache.read.select import Selection
from darht.core.config import added, load_mapping, override, parse
from darht.core.errors import ConfigError
from darht.core.keys import check_seed
from darht.core.recipes import find_recipe
from darht.trainer.student.losses import RECIPES
from darht.trainer.student.model import Dropout
from darht.trainer.student.step import Recipe


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

    def check_rows(self, rows: int, per_batch: int | None = None) -> None:
        """Raise ConfigError where a batch is larger than the `rows` that are trained on, or its part of them is."""
        per_batch = per_batch or self.batch_size
        if per_batch > rows:
            others = f", of which {per_batch} are theirs" if per_batch < self.batch_size else ""
            most = rows * self.batch_size // per_batch
            raise ConfigError(
                f"optim.batch_size must be at most the rows trained on; got {self.batch_size}{others} for {rows} rows: "
                f"set optim.batch_size to {most} or less"
            )


@dataclass(frozen=True)
class WarmConfig:
    """`inner: warm`: one step from the perturbation that a row had before (FGSM-MEP, Jia et al. 2022).

    With `start: label` nothing is remembered of a row: every step starts at a sign pattern of its label, part of it
    noise (LIET, Pan et al. 2025).

    Attributes:
        start: what a row's first perturbation is: a stored one of a seeded choice of attack, `zero` or `noise`; or
            `label`, for every step.
        momentum: of the sign of the gradient, which moves the next start; 0.3 in the paper. Not of `label`.
        consistency: weight of the squared distance between the logits before and after the step; 10 in the paper. For
            `label` the weight at the end of the run of their Jensen-Shannon divergence, growing from 0.
        check_rows: training rows on which PGD-10 looks for collapse after every epoch; 0 for never.
        reset: epochs after which every row forgets its perturbation and starts anew; 40 in the public protocol of
            FGSM-PGI and FGSM-MEP, 0 for never.
    """

    start: Literal["cached", "zero", "noise", "label"] = "cached"
    momentum: float = 0.3
    consistency: float = 10.0
    check_rows: int = 512
    reset: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.momentum <= 0.5:  # what int8 holds; beyond it the sum of signs would saturate
            raise ConfigError(f"momentum must lie in [0, 0.5]; got {self.momentum:g}")
        if self.consistency < 0 or self.check_rows < 0:
            raise ConfigError(
                f"consistency and check_rows must be at least 0; got {self.consistency:g} and {self.check_rows}"
            )
        if self.start == "label" and (self.momentum != WarmConfig.momentum or self.reset):
            raise ConfigError(
                "warm.start: label remembers nothing of a row; leave momentum and reset out, or use another start"
            )
        if self.reset < 0:
            raise ConfigError(f"reset counts epochs and is at least 0, for never; got {self.reset}")


@dataclass(frozen=True)
class InnerConfig:
    """Where the student's adversarial examples come from at train time.

    Attributes:
        kind: stored ones, one `warm` step on the student, or `pgd` on the student: the default, for it needs nothing of
            the cache and keeps clean accuracy, of which `warm` costs some points at half of the time. `n-fgsm`: one
            step from noise of twice the radius, not projected, so that examples may lie three radii away. `fat`: `pgd`
            that stops a row soon after it is misclassified (Zhang et al. 2020).
        eps: radius in pixel levels; of `cached` the largest of the cache's L-inf attacks.
        step: of the student's own steps in pixel levels; by default eps / 4 for `pgd` and `fat`, eps for one step.
        steps: of `pgd` and `fat`.
        warm: settings of `warm`; `check_rows` is also that of `n-fgsm`.
        tau: `fat`: steps that an example may go on after it is misclassified first.
    """

    kind: Literal["cached", "warm", "n-fgsm", "pgd", "fat"] = "pgd"
    eps: float = 8.0
    step: float | None = None
    steps: int = 10
    warm: WarmConfig = WarmConfig()
    tau: int = added(1)

    def __post_init__(self) -> None:
        self.pgd()
        check_levels("step", self.length, "linf")
        if self.tau < 0 or (self.tau != 1 and self.kind != "fat"):
            raise ConfigError(f"inner.tau counts steps of inner.kind: fat, 0 or more; got {self.tau} for {self.kind}")
        if self.kind == "warm" and self.eps > 127:
            raise ConfigError(f"inner: warm remembers perturbations of at most 127 levels; got eps {self.eps:g}")
        shared = replace(WarmConfig(), check_rows=self.warm.check_rows) if self.kind == "n-fgsm" else WarmConfig()
        if self.kind != "warm" and self.warm != shared:
            raise ConfigError(f"inner.warm sets up inner.kind: warm; got {self.kind}")

    @property
    def single_step(self) -> bool:
        """Whether examples are one step on the student, which may collapse."""
        return self.kind in ("warm", "n-fgsm")

    @property
    def probed_rows(self) -> int:
        """How many rows are asked after every epoch whether the student has collapsed; 0 where it cannot."""
        return self.warm.check_rows if self.single_step else 0

    @property
    def length(self) -> float:
        """The step in pixel levels."""
        if self.step is not None:
            return self.step
        return self.eps if self.single_step else max(1.0, round(self.eps / 4))

    def pgd(self, steps: int | None = None) -> PGD:
        """PGD with these settings; for another number of `steps` the step grows so that it gets through the ball."""
        if steps is None:
            step = self.length if self.kind in ("pgd", "fat") else max(1.0, round(self.eps / 4))
            return PGD(eps=self.eps, step=step, steps=self.steps)
        return PGD(eps=self.eps, step=max(1.0, round(1.25 * self.eps / steps)), steps=steps)


@dataclass(frozen=True)
class StudentConfig:
    """The student's network.

    `init` is the folder of a trained network of the same architecture (a teacher, a run or a student): its weights and
    its normalisation are what training starts from. Without the feature map its head is taken too. `resize` is the side
    in pixels that images are brought to inside the network, 224 for most ViTs.
    """

    arch: str = "resnet18"
    kwargs: dict[str, Any] = field(default_factory=dict)
    feature_map: bool = True  # a row of logits per teacher; without it the student is the plain classifier
    mc_dropout: float = 0.0  # share of the features that is dropped, also at inference; 0 for none, as released
    mc_samples: int = 16  # passes that are averaged at inference; each costs one linear layer, not one backbone
    init: str | None = None
    resize: int | None = added(None)

    def __post_init__(self) -> None:
        self.dropout()
        if self.resize is not None and self.resize < 1:
            raise ConfigError(f"resize is a side in pixels, at least 1; got {self.resize}")
        if not self.mc_dropout and self.mc_samples != StudentConfig.mc_samples:
            raise ConfigError(
                f"mc_samples are passes of mc_dropout, which is 0; got {self.mc_samples}: set mc_dropout too"
            )

    def dropout(self) -> Dropout:
        """The settings of Monte-Carlo dropout, checked."""
        return Dropout(self.mc_dropout, self.mc_samples)


@dataclass(frozen=True)
class AverageConfig:
    """A mean of the weights over the run, which is then what is scored, selected and kept.

    Attributes:
        kind: `none`, `ema` (exponential, after every step) or `swa` (equal weights, after every epoch).
        decay: of `ema`.
        start: `swa`: share of the run after which epochs are averaged.
    """

    kind: Literal["none", "ema", "swa"] = "none"
    decay: float = 0.999  # about the last thousand steps
    start: float = 0.75  # where the learning rate usually falls first

    def __post_init__(self) -> None:
        if not 0 < self.decay < 1 or not 0 <= self.start < 1:
            raise ConfigError(f"decay lies in (0, 1) and start in [0, 1); got {self.decay:g} and {self.start:g}")


@dataclass(frozen=True)
class ComputeConfig:
    """The arithmetic of a run.

    Attributes:
        precision: `bf16` for autocast in the student's passes; weights stay float32.
        channels_last: store images and weights with the channels innermost.
        compile: the student through `torch.compile`, and on a GPU the functions around its passes too; there each pass
            is a CUDA graph.
        accumulate: parts that each batch is cut into, whose gradients are added: memory for time. What is taken over a
            batch (statistics of batch norm, `weights: batch` of `darht`) is then taken over a part.
        deterministic: kernels that give the same bits each time, also on a GPU, where it costs speed (how much was not
            measured) and torch refuses what it has no such kernel for. Without it a run on a GPU that is started again
            has the same draws, and its rounding may differ; on a CPU the bits are the same either way.
    """

    precision: Literal["float32", "bf16"] = "float32"
    channels_last: bool = False
    compile: bool = False
    accumulate: int = 1
    deterministic: bool = False

    def __post_init__(self) -> None:
        if self.accumulate < 1:
            raise ConfigError(f"accumulate must be at least 1; got {self.accumulate}")


Targets = Literal["clean", "nearest", "first-order"]


@dataclass(frozen=True)
class TrainConfig:
    """A recipe.

    Attributes:
        recipe: the outer loss, one of `darht.trainer.student.losses.RECIPES`.
        loss: the settings of that recipe; see its class.
        student: its network.
        inner: where adversarial examples come from.
        teachers: `cached`, or `live` to load them and ask them in every step, as the published methods do.
        targets: what stands for the teachers' answer to the student's own examples (`warm`, `pgd`): their answer to the
            `clean` view (which None means), to the `nearest` stored example, or the `first-order` estimate.
        optim: the optimizer and its schedule.
        average: of the weights. Left out: `ema` with a decay that fits the length of the run, `none` for a recipe that
            sees no adversarial images (`darht.trainer.student.averaging.default_average`).
        compute: precision and memory.
        seed: of everything random.
        select: which rows of the cache to train on; None for all that are not held out.
    """

    recipe: str = "darht"
    loss: dict[str, Any] = field(default_factory=dict)
    student: StudentConfig = StudentConfig()
    inner: InnerConfig = InnerConfig()
    teachers: Literal["cached", "live"] = "cached"
    targets: Targets | None = None
    optim: OptimConfig = OptimConfig()
    average: AverageConfig | None = None
    compute: ComputeConfig = ComputeConfig()
    seed: int = 0
    select: Selection | None = added(None)

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.recipe not in RECIPES:
            raise ConfigError(f"recipe must be one of {', '.join(RECIPES)}; got {self.recipe!r}")
        self.objective()
        recipe, kind = RECIPES[self.recipe], self.inner.kind
        if self.targets is not None and (
            self.teachers == "live" or kind == "cached" or not recipe.uses_adversarial_logits
        ):
            raise ConfigError(
                f"targets: {self.targets} stands for what teachers would say about the student's own examples; leave "
                f"it out (targets: null) with teachers: {self.teachers}, inner.kind: {kind}, recipe: {self.recipe}"
            )
        if self.teachers == "live" and (kind == "cached" or recipe.teachers_needed == "none"):
            raise ConfigError(
                "teachers: live are asked about the student's own examples; use inner.kind: pgd, warm or n-fgsm, and a "
                f"recipe with teachers; got {kind} and {self.recipe}"
            )
        if recipe.adversarial_when == "never" and kind != "pgd":
            raise ConfigError(f"recipe {self.recipe} trains on clean images alone; leave inner.kind: {kind} out")
        if recipe.needs_feature_map and not self.student.feature_map:
            raise ConfigError(
                f"recipe {self.recipe} trains the feature map; set student.feature_map: true, or recipe: rslad"
            )
        if recipe.uses_average and self.average is not None and self.average.kind != "ema":
            raise ConfigError(
                f"recipe {self.recipe} learns from the student's average after every step; leave average out, or set "
                f"average.kind: ema; got {self.average.kind}"
            )
        if recipe.uses_average and kind == "cached":
            raise ConfigError(f"recipe {self.recipe} trains on the student's own examples; use inner.kind: pgd or warm")
        if self.compute.compile and (setting := self.objective().second_order()):
            raise ConfigError(
                f"loss.{setting} takes the gradient of a gradient; set compute.compile: false, or {setting}: 0"
            )
        if recipe.needs_whole_batches and self.compute.accumulate > 1:
            raise ConfigError(
                f"recipe {self.recipe} learns its weights from whole batches, compute.accumulate is "
                f"{self.compute.accumulate}: leave it out, or lower optim.batch_size"
            )

    def objective(self) -> Recipe:
        """The recipe with its settings.

        Raises:
            ConfigError: a setting that this recipe does not have, or one that breaks its rule.
        """
        return parse(RECIPES[self.recipe], self.loss, f"loss of recipe {self.recipe}")


def load_recipe(path: Path | None, assignments: tuple[str, ...]) -> TrainConfig:
    """A recipe from a YAML file (the defaults when None) with `key=value` assignments applied.

    Args:
        path: the file, or the name of a recipe that comes with darht.
        assignments: as they are typed; `key=null` puts the default back.

    Raises:
        ConfigError: no such recipe, unknown keys, wrong values.
    """
    file = None if path is None else find_recipe(path)
    data = {} if file is None else load_mapping(file)
    chosen = str(override(data, assignments, TrainConfig).get("recipe", TrainConfig.recipe))
    under = {"loss": RECIPES[chosen]} if chosen in RECIPES else {}
    name = "recipe" if file is None else file.name
    return parse(TrainConfig, override(data, assignments, TrainConfig, under), name)
