"""What `darht-teacher train` does, as a frozen dataclass."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from darht.cache.builder.config import DataConfig, ViewConfig
from darht.core.config import override, parse
from darht.core.errors import ConfigError
from darht.trainer.config import AverageConfig, ComputeConfig, InnerConfig, OptimConfig, StudentConfig, TrainConfig
from darht.trainer.student.losses import RECIPES

# The recipe of each algorithm, and the settings that make it this one.
ALGORITHMS: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("at", {"clean_share": 1.0}),
    "pgd-at": ("at", {}),
    "trades": ("trades", {}),
    "fat": ("at", {}),
}
_RENAMED = {  # what settings were called while teachers had a loop of their own
    "eps": "inner.eps",
    "step": "inner.step",
    "steps": "inner.steps",
    "tau": "inner.tau",
    "beta": "loss.beta",
    "padding": "views.padding",
    "flip": "views.flip",
    "precision": "compute.precision",
    "compile": "compute.compile",
}
_FASTER: dict[str, Any] = {"channels_last": True}  # and nobody compares a teacher's bits with those of a student

_OF_TEACHERS = ("source", "root", "path", "limit", "image_size", "skip_broken")
_OF_NETWORKS = ("arch", "kwargs", "resize")


@dataclass(frozen=True)
class TeachConfig:
    """How a teacher is trained: as a student that has no teachers, on views of a source.

    Attributes:
        algorithm: `standard`, `pgd-at` (Madry et al. 2018), `trades` (Zhang et al. 2019), `fat` (Zhang et al. 2020).
        loss: settings of the algorithm's recipe, `at` or `trades`.
        inner: where adversarial examples come from; `kind: fat` for `fat`.
        optim: the optimizer and its schedule.
        average: of the weights; None for what a student would have.
        compute: precision and memory; `channels_last` unless it is said otherwise.
        views: how images are cropped and mirrored at random; digits and text must not be mirrored.
        holdout: share of the rows that is kept from training, by which the best epoch is chosen; 0 for the last epoch.
        seed: of everything random.
    """

    algorithm: Literal["standard", "pgd-at", "trades", "fat"] = "pgd-at"
    loss: dict[str, Any] = field(default_factory=dict)
    inner: InnerConfig = field(default_factory=InnerConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    average: AverageConfig | None = None
    compute: ComputeConfig = field(default_factory=lambda: ComputeConfig(**_FASTER))
    views: ViewConfig = field(default_factory=ViewConfig)
    holdout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        kind = {"standard": "pgd", "fat": "fat"}.get(self.algorithm, self.inner.kind)
        if self.inner.kind != kind:
            raise ConfigError(f"algorithm {self.algorithm} has inner.kind: {kind}; got {self.inner.kind}")
        DataConfig(source="", holdout=self.holdout)
        self.recipe(StudentConfig(feature_map=False))

    def recipe(self, network: StudentConfig) -> TrainConfig:
        """The same as a recipe for a student with this network.

        Raises:
            ConfigError: a setting that the recipe does not have, or one that breaks its rule.
        """
        recipe, fixed = ALGORITHMS[self.algorithm]
        if clash := sorted(fixed.keys() & self.loss.keys()):
            raise ConfigError(f"algorithm {self.algorithm} is loss.{clash[0]}: {fixed[clash[0]]:g}; leave it out")
        return TrainConfig(
            recipe=recipe,
            loss=self.loss | fixed,
            student=network,
            inner=self.inner,
            optim=self.optim,
            average=self.average,
            compute=self.compute,
            seed=self.seed,
        )


def load_teaching(given: Mapping[str, Any], assignments: tuple[str, ...] = ()) -> TeachConfig:
    """The settings that a command line or a mapping gives.

    Args:
        given: fields of `TeachConfig` as plain data. Where `inner.kind` is left out, examples come from where the
            algorithm has them from. A step from what a row had before starts from noise, as a source has no stored
            perturbations.
        assignments: `key=value` on top of it, as they are typed; `key=null` puts the default back.

    Raises:
        ConfigError: unknown keys, wrong values, or a key that is called otherwise now.
    """
    for assignment in assignments:
        key, _, value = assignment.partition("=")
        if key in _RENAMED:
            raise ConfigError(f"--set {key} is called {_RENAMED[key]} now: write --set {_RENAMED[key]}={value}")
    algorithm = str(override(dict(given), assignments).get("algorithm", TeachConfig.algorithm))
    recipe = ALGORITHMS.get(algorithm, ("at", {}))[0]
    usual: dict[str, dict[str, Any]] = {"inner": {"kind": "fat" if algorithm == "fat" else "pgd"}, "compute": _FASTER}
    data = dict(given)
    for key, values in usual.items():
        if isinstance(said := data.get(key, {}), dict):
            data[key] = values | said
    data = override(data, assignments, TeachConfig, {"loss": RECIPES[recipe]})
    if isinstance(data["inner"], dict) and data["inner"].get("kind") == "warm":
        data["inner"] = data["inner"] | {"warm": {"start": "noise", **data["inner"].get("warm", {})}}
    return parse(TeachConfig, data, "training")


def teacher_data(given: Mapping[str, Any]) -> DataConfig:
    """Which images, as `cache.yaml` says it under `data`: the training split is learned from, the test split measured.

    Raises:
        ConfigError: an unknown key, or one that says nothing about a teacher.
    """
    known = {field.name for field in fields(DataConfig)}
    if useless := sorted(given.keys() & (known - set(_OF_TEACHERS))):
        raise ConfigError(
            f"data of a teacher has {', '.join(_OF_TEACHERS)}; got {', '.join(useless)} too: leave it out (holdout is "
            "a key of the teacher's own settings)"
        )
    return parse(DataConfig, dict(given), "data")


def teacher_network(given: str | Mapping[str, Any]) -> StudentConfig:
    """A teacher's network from its architecture's name, or from a mapping of `arch`, `kwargs` and `resize`.

    Raises:
        ConfigError: an unknown key, or no `arch`.
    """
    network = {"arch": given} if isinstance(given, str) else dict(given)
    if "arch" not in network or network.keys() - set(_OF_NETWORKS):
        raise ConfigError(f"a network has arch, and may have kwargs and resize; got {', '.join(map(str, network))}")
    return parse(StudentConfig, network | {"feature_map": False}, "network")
