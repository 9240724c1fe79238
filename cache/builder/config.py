"""The YAML of a cache, as a person writes it, and what is wrong with it."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from darht.attacks import ATTACKS, parse_eps
from darht.attacks.threat import Norm
from darht.cache.format.layout import CLEAN_FROM
from darht.cache.format.logit_codes import companion_suffix
from darht.cache.format.mixture import check_shares
from darht.cache.format.spec import (
    ATTACK_RULES,
    MAX_INT8,
    NAME,
    RESIZED_CROP,
    AttackSpec,
    PrecisionSpec,
    StoreSpec,
    check_resized_crop,
)
from darht.cache.sources.encoded import Index
from darht.cache.sources.load import FileSource, Source
from darht.cache.sources.mixture import mix
from darht.cache.sources.open import open_source
from darht.core.bounded import show
from darht.core.config import added, load_mapping, parse, to_plain
from darht.core.errors import ConfigError
from darht.core.files import expanded
from darht.core.keys import check_seed

PRECISIONS = {"fp32": {}, "tf32": {"tf32": True}, "bf16": {"amp": True}}
"""The arithmetic of teachers and attacks in a word, as the spec holds it."""

_SCALE, _RATIO = (0.25, 1.0), (0.75, 1.333)
_RESERVED = {
    "teacher": ("zarr.json",),
    "attack": ("zarr.json", "clean", "jacobian", "jacobian-scale", "jacobian-class"),
}


@dataclass(frozen=True)
class DataConfig:
    """Which images: see `darht.cache.sources.load.load_source`.

    Attributes:
        path: another name for `root`, for sources that are one file.
        labels: `none` for rows without labels, of a source beside others: those of its files are not read.
        share: of each batch, of a source beside others; those without a share have what is left, and an epoch is as
            many batches as their rows give.
        views: how many views teachers answer for its rows, of a source beside others; None for all of the cache's. An
            image that a generator made is seldom drawn twice, and one is enough.
    """

    source: str
    root: str | None = None
    split: Literal["train", "test"] = "train"
    limit: int | None = None
    image_size: int | None = None
    holdout: float = 0.02  # rows kept from training, for selection: 2 % of CIFAR's 50,000 is 1,000
    skip_broken: bool = added(False)  # image files that cannot be decoded are an error before they are left out
    path: str | None = added(None)
    labels: Literal["given", "none"] = added("given")
    share: float | None = added(None)
    views: int | None = added(None)

    def __post_init__(self) -> None:
        if not 0 <= self.holdout < 1:
            raise ConfigError(f"holdout is a share in [0, 1); got {self.holdout:g}")
        if self.path is not None and self.root is not None:
            raise ConfigError(f"path is another name for root; got {self.path} and {self.root}: leave one out")
        if self.views is not None and self.views < 1:
            raise ConfigError(f"views must be at least 1; got {self.views}")

    @property
    def place(self) -> str | None:
        """The folder or file."""
        return self.root if self.path is None else self.path


@dataclass(frozen=True)
class ViewConfig:
    """Which views of every row the teachers answer."""

    kind: Literal["identity", "crop-flip", "resized-crop"] = "crop-flip"
    padding: int = 4  # what RandomCrop uses on CIFAR
    flip: bool = True  # mirror images are views too; not for digits or text
    count: int | None = None  # all of them: no draw of the trainer is then ever approximated
    size: int | None = added(None)  # side of a resized crop
    scale: tuple[float, ...] | None = added(None)  # of the area; (0.25, 1) where none is given
    ratio: tuple[float, ...] | None = added(None)  # of width to height; (0.75, 1.333), as torchvision's

    def __post_init__(self) -> None:
        own = {"size": self.size, "scale": self.scale, "ratio": self.ratio}
        if self.kind != RESIZED_CROP:
            useless = [name for name, value in own.items() if value is not None]
            if useless:
                raise ConfigError(f"{', '.join(useless)}: only for kind {RESIZED_CROP}; leave out of {self.kind}")
        elif self.size is None or self.count is None or self.count < 1:
            raise ConfigError(
                f"{RESIZED_CROP} needs size (side in pixels) and count (views of each row, at least 1); got size "
                f"{self.size} and count {self.count}"
            )
        else:
            object.__setattr__(self, "scale", self.scale or _SCALE)
            object.__setattr__(self, "ratio", self.ratio or _RATIO)
            check_resized_crop(self.size, self.scale or (), self.ratio or ())
        if not 0 <= self.padding <= MAX_INT8:
            raise ConfigError(f"padding must lie in 0..{MAX_INT8} pixels; got {self.padding}")


@dataclass(frozen=True)
class TeacherConfig:
    """Where a teacher's folder lies and how it may be used."""

    path: str
    role: Literal["robust", "vanilla"] = "robust"


@dataclass(frozen=True)
class JacobianConfig:
    """Rows of a teacher's Jacobian to store: of all classes up to 10, else of the true one and the strongest others."""

    classes: int | None = None  # 10, or all where there are fewer

    def __post_init__(self) -> None:
        if self.classes is not None and self.classes < 1:
            raise ConfigError(f"jacobians.classes must be at least 1; got {self.classes}")


@dataclass(frozen=True)
class CacheConfig:
    """The YAML file of `darht-cache build`. Paths are relative to that file."""

    data: DataConfig | tuple[DataConfig, ...]
    teachers: dict[str, TeacherConfig]
    attacks: dict[str, dict[str, Any]] = field(default_factory=dict)
    jacobians: dict[str, JacobianConfig] = field(default_factory=dict)
    views: ViewConfig = ViewConfig()
    store: StoreSpec = StoreSpec()
    precision: PrecisionSpec = PrecisionSpec()
    seed: int = 0

    @property
    def mixed(self) -> bool:
        """Whether images may differ in size: where they are stored encoded and shown as resized crops."""
        return self.views.kind == RESIZED_CROP and self.store.encoded

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if not self.sources:
            raise ConfigError("data lists no source; name at least one")
        if len(self.sources) == 1:
            _check_alone(self.sources[0])
        else:
            check_shares([one.share for one in self.sources], [one.labels == "given" for one in self.sources])

    @property
    def sources(self) -> tuple[DataConfig, ...]:
        """The sources of the images, in the order of their rows."""
        return (self.data,) if isinstance(self.data, DataConfig) else self.data


def _check_alone(data: DataConfig) -> None:
    settings = {"labels": data.labels == "none", "share": data.share is not None, "views": data.views is not None}
    if given := [name for name, is_given in settings.items() if is_given]:
        raise ConfigError(
            f"data.{given[0]} is of a source beside others; leave it out, or list a source with labels before this one"
        )


def load_config(path: Path) -> CacheConfig:
    """Read and check the YAML file of a cache.

    Raises:
        ConfigError: unknown keys, wrong values, names that clash; all of them at once.
    """
    return check_config(load_mapping(path), path.name)


def check_config(data: Mapping[str, Any], name: str) -> CacheConfig:
    """A cache's config from a mapping, as the YAML file `name` would hold it.

    Raises:
        ConfigError: unknown keys, wrong values, names that clash; all of them at once.
    """
    config = parse(CacheConfig, {**data, **_precision(data.get("precision"), name)}, name)
    problems = [*_name_problems(config), *_attack_problems(config)]
    if problems:
        raise ConfigError(f"{name}: " + "; ".join(problems))
    return config


def _precision(written: object, name: str) -> dict[str, Any]:
    """What a precision that was written in a word stands for in the spec."""
    if not isinstance(written, str):
        return {}
    if written not in PRECISIONS:
        raise ConfigError(f"{name}: precision must be one of {', '.join(PRECISIONS)}; got {show(written)}")
    return {"precision": PRECISIONS[written]}


def _name_problems(config: CacheConfig) -> list[str]:
    names = [("teacher", name) for name in config.teachers] + [("attack", name) for name in config.attacks]
    problems = [
        f"{what} name '{name}' must be letters, digits, '_', '.' or '-'"
        for what, name in names
        if not NAME.fullmatch(name)
    ]
    suffix = companion_suffix(config.store)
    problems += [
        f"attack name '{name}' ends in '{suffix}', which store.logits: {config.store.logits} takes for itself"
        for name in config.attacks
        if suffix and name.endswith(suffix)
    ]
    problems += [
        f"{what} name '{name}' is taken by the format"
        for what, name in names
        if name in _RESERVED[what] or (what == "attack" and name.startswith(CLEAN_FROM))
    ]
    return problems


def _attack_problems(config: CacheConfig) -> list[str]:
    problems = []
    for name, raw in config.attacks.items():
        try:
            attack_spec(name, raw, tuple(config.teachers))
        except ConfigError as error:
            problems.append(str(error))
    return problems


def attack_spec(name: str, raw: dict[str, Any], teachers: tuple[str, ...]) -> AttackSpec:
    """One entry under `attacks`: `kind`, `teacher`, `views` and the attack's own parameters.

    Raises:
        ConfigError: an unknown kind, a teacher that is not there, a parameter that breaks a rule, or a radius that
            does not fit an int8 perturbation.
    """
    kind, teacher, views = raw.get("kind", "pgd"), raw.get("teacher"), raw.get("views", 1)
    if not isinstance(kind, str) or kind not in ATTACKS:
        raise ConfigError(f"attack '{name}': kind must be one of {', '.join(ATTACKS)}; got {show(kind)}")
    if teacher not in teachers:
        close = difflib.get_close_matches(str(teacher), teachers, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"teachers are {', '.join(teachers) or 'none'}"
        raise ConfigError(f"attack '{name}' names teacher {show(teacher)}, which is not there; {hint}")
    if not isinstance(views, int) or isinstance(views, bool) or views < 1:
        raise ConfigError(f"attack '{name}': views must be a whole number of at least 1; got {show(views)}")
    own = {key: value for key, value in raw.items() if key not in ("kind", "teacher", "views")}
    _check_eps(name, own, getattr(ATTACKS[kind], "norm", "linf"))
    attack = parse(ATTACKS[kind], own, f"attack '{name}'")
    if attack.eps < 1:
        raise ConfigError(
            f"attack '{name}': a stored perturbation is whole levels, so eps is at least 1; got {attack.eps:g}"
        )
    if attack.norm == "linf" and attack.eps > MAX_INT8:
        raise ConfigError(
            f"attack '{name}': a stored perturbation is int8, so eps is at most {MAX_INT8}; got {attack.eps:g}"
        )
    starts_in_l2 = attack.norm == "l2" and getattr(attack, "random_start", False)
    rules = ATTACK_RULES if starts_in_l2 else 1
    return AttackSpec(kind=kind, teacher=teacher, views=views, parameters=to_plain(attack), rules=rules)


def _check_eps(name: str, own: dict[str, Any], norm: Norm) -> None:
    """A radius means in a file what it means on a command line; what has two readings is refused with both."""
    written, norm = own.get("eps"), own.get("norm", norm)
    if isinstance(written, (str, int, float)) and norm in get_args(Norm):
        try:
            parse_eps(str(written), norm)
        except ConfigError as error:
            raise ConfigError(f"attack '{name}': {error}") from error


def data_root(data: DataConfig, base: Path) -> Path | None:
    """Where the images of a source lie; relative paths are relative to the folder of the config's file, `base`."""
    return None if data.place is None else base / expanded(data.place)


def load_images(
    sources: Sequence[DataConfig],
    base: Path,
    *,
    mixed: bool,
    download: bool,
    rules: int,
    indexes: Sequence[Index | None] = (),
) -> Source | FileSource:
    """The images of a config; see `open_source`, and for several sources `mix`.

    Args:
        sources: of the config.
        base: the folder of its file.
        mixed: whether image files may differ in size.
        download: fetch CIFAR when its files are not there.
        rules: see `DataSpec`.
        indexes: of an earlier look at the files of each source.
    """
    opened: list[Source | FileSource] = []
    for number, data in enumerate(sources):
        given: dict[str, Any] = {name: getattr(data, name) for name in ("limit", "image_size", "skip_broken")}
        options = given | {"download": download, "rules": rules, "mixed": mixed}
        options |= {"index": indexes[number] if indexes else None, "labelled": data.labels == "given"}
        options |= {"classes": opened[0].classes if opened else None}
        opened.append(open_source(data.source, data_root(data, base), data.split, **options))
    return opened[0] if len(opened) == 1 else mix(opened)
