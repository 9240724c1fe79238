"""What a cache is made from: the YAML a person writes (`CacheConfig`), and the facts it is resolved to (`CacheSpec`).

The config holds paths; the spec holds hashes instead, and nothing that does not change the bytes of a cache. Its
canonical JSON is `spec.json`, and the sha256 of that is the cache's fingerprint.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from darht.cache.format.mixture import Band, SourceSpec, check_sources, view_bands
from darht.core.bounded import show
from darht.core.config import added, parse
from darht.core.errors import ConfigError
from darht.core.preprocessing import Preprocessing

FORMAT_VERSION = 1
NEWEST_VERSION = 2  # of caches that use what version 1 did not have: see needed_version
RULES = 3  # how image files become rows, and rows are held out; see DataSpec
ATTACK_RULES = 2  # how an attack comes to its perturbations, see AttackSpec
PIXEL_RULES = 2  # the last under which the content hash of image files is that of their pixels
_ON_LEVELS = ("pgd", "fgsm", "mim", "cw-linf")  # what steps by whole levels from whole levels, and stays on them
MAX_INT8 = 127
RESIZED_CROP = "resized-crop"
_LONGEST = 16  # sides of a box, one to the other
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # of a teacher or an attack, which becomes a folder
_MAX_ROWS = 10**8  # seven times ImageNet-21k; what is made for every row, such as an order to read them, fits a memory
_MAX_UNITS = 10**5  # shards of an array, each with a record to look at; _MAX_ROWS in those of the default are fewer


@dataclass(frozen=True)
class StoreSpec:
    """How arrays are cut and coded."""

    rows_per_shard: int = 1024  # a unit of work: some seconds to minutes of attack
    rows_per_chunk: int = 128  # the smallest read
    logits: Literal["float16", "float32", "top-k", "int8"] = "float16"  # see docs/cache-format.md, "Coded logits"
    images: Literal["raw", "jpeg", "png"] = added("raw")  # or the files themselves: the same page, "Encoded images"
    top_k: int = added(0)  # logits of an answer that are kept, with top-k
    by_view: bool = added(False)  # a chunk of logits holds one view, and its rows show the same view in an epoch

    @property
    def coded(self) -> bool:
        """Whether an answer's logits are two arrays, which `cache.format.logit_codes` decodes."""
        return self.logits in ("top-k", "int8")

    @property
    def encoded(self) -> bool:
        """Whether images are stored as JPEG or PNG files, which may differ in size."""
        return self.images != "raw"

    def __post_init__(self) -> None:
        if (self.logits == "top-k") != (self.top_k > 0):
            raise ConfigError("store.top_k says how many logits of an answer are kept (at least 1), with store.logits: "
                              f"top-k and only then; got logits {self.logits} and top_k {self.top_k}")  # fmt: skip
        if self.rows_per_chunk < 1 or self.rows_per_shard < 1:
            raise ConfigError(f"rows_per_shard and rows_per_chunk must be at least 1; got {self.rows_per_shard} and "
                              f"{self.rows_per_chunk}")  # fmt: skip
        if self.rows_per_shard % self.rows_per_chunk:
            raise ConfigError(
                f"rows_per_shard must be a multiple of rows_per_chunk; got {self.rows_per_shard} % "
                f"{self.rows_per_chunk} = {self.rows_per_shard % self.rows_per_chunk}"
            )


@dataclass(frozen=True)
class PrecisionSpec:
    """The arithmetic of teachers and attacks; both flags change bytes, so both are in the fingerprint."""

    amp: bool = False  # bfloat16 autocast in every forward pass
    tf32: bool = False  # TensorFloat-32 matrix products on a GPU


@dataclass(frozen=True)
class DataSpec:
    """The images, by content.

    Attributes:
        rules: 1, the rules of specs that do not name any: each row is held out or not by a draw of its own, and image
            files are read without nested folders, EXIF orientation and transparency. 2: the count of held-out rows is
            exact, and image files are read as `cache/sources/folders.py` says. 3: `sha256` of a source that is read is
            over the bytes of its files, and no longer over pixels; the rest is as under 2.
        skipped: image files that could not be read and were left out.
        image_shape: `[3, H, W]`, or `[3]` where images differ in size.
        decoder: `cache.format.images.decoder_identity` where rows are stored as JPEG; else empty.
        sources: where there are several; `source`, `split` and `holdout` are then those of the first, `sha256` is over
            theirs, and the other fields are of all together.
    """

    source: str
    split: str
    rows: int
    image_shape: tuple[int, ...]
    classes: tuple[str, ...]
    sha256: str
    holdout: float
    rules: int = added(1)
    skipped: int = added(0)
    decoder: str = added("")
    sources: tuple[SourceSpec, ...] = added(())

    @property
    def mixed(self) -> bool:
        """Whether images differ in size."""
        return len(self.image_shape) == 1

    @property
    def labelled(self) -> int:
        """How many rows have labels: the first so many."""
        return sum(source.rows for source in self.sources if source.labelled) if self.sources else self.rows

    def __post_init__(self) -> None:
        if not 1 <= self.rules <= RULES:
            raise ConfigError(f"data.rules is {self.rules}, this darht knows 1..{RULES}: use the darht that wrote it")
        if not 1 <= self.rows <= _MAX_ROWS:
            raise ConfigError(f"rows must lie in 1..{_MAX_ROWS:,}; got {self.rows}: use a part of the data, with limit")
        if self.sources:
            check_sources(self.sources, self.rows)


@dataclass(frozen=True)
class ViewSpec:
    """The views, by how they are enumerated; `count` is V.

    Attributes:
        size: side of the square that a resized crop shows, in pixels; 0 for other kinds.
        scale: the least and the largest share of the image's area that it shows.
        ratio: the least and the largest width for each unit of height of what it shows.
    """

    kind: str
    padding: int
    flip: bool
    count: int
    size: int = added(0)
    scale: tuple[float, ...] = added(())
    ratio: tuple[float, ...] = added(())

    @property
    def resized(self) -> bool:
        """Whether views are boxes of their images, brought to one size."""
        return self.kind == RESIZED_CROP

    def __post_init__(self) -> None:
        if self.resized:
            check_resized_crop(self.size, self.scale, self.ratio)
        if not 0 <= self.padding <= MAX_INT8 or self.count < 1:
            raise ConfigError(
                f"padding must lie in 0..{MAX_INT8} pixels and count be at least 1; got {self.padding} and {self.count}"
            )


def check_resized_crop(size: int, scale: tuple[float, ...], ratio: tuple[float, ...]) -> None:
    """Raise ConfigError for resized crops that cannot be drawn; all that is wrong at once."""
    problems = []
    if size < 1:
        problems.append(f"views.size must be at least 1 pixel; got {size}")
    if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
        problems.append(f"views.scale must be two shares of the area in (0, 1], the smaller first; got {list(scale)}")
    if len(ratio) != 2 or not 1 / _LONGEST <= ratio[0] <= ratio[1] <= _LONGEST:
        problems.append(f"views.ratio must be two ratios of width to height in 1/{_LONGEST}..{_LONGEST}, the smaller "
                        f"first; got {list(ratio)}")  # fmt: skip
    if problems:
        raise ConfigError("; ".join(problems))


@dataclass(frozen=True)
class TeacherSpec:
    """A teacher, by the hash of its weights."""

    arch: str
    kwargs: dict[str, Any]
    preprocessing: Preprocessing
    num_classes: int
    weights_sha256: str
    role: str


@dataclass(frozen=True)
class AttackSpec:
    """An attack with all its parameters; it runs on the first `views` views.

    Attributes:
        rules: 1, the rules of specs that do not name any. 2, of a random start in L2: it lies on the sphere; under 1 it
            was cut to whole levels, which left nothing of it in a large image.
    """

    kind: str
    teacher: str
    views: int
    parameters: dict[str, Any]
    rules: int = added(1)

    def __post_init__(self) -> None:
        if not 1 <= self.rules <= ATTACK_RULES:
            raise ConfigError(f"rules of an attack are {self.rules}, this darht knows 1..{ATTACK_RULES}: use the darht "
                              "that wrote it")  # fmt: skip

    def attack(self) -> Any:
        """The attack itself, a dataclass of `darht.attacks`."""
        from darht.attacks import ATTACKS  # not before it is wanted: a reader needs no attack, and so no torch

        return parse(ATTACKS[self.kind], self.parameters, f"attack {self.kind}")

    @property
    def eps(self) -> float:
        """The radius in pixel levels."""
        return float(self.parameters["eps"])

    @property
    def norm(self) -> str:
        """Of the ball, `linf` or `l2`."""
        return str(self.parameters["norm"])

    @property
    def scale(self) -> float:
        """Pixel levels for each integer of the stored int8: 1 for attacks on whole levels, finer for the others."""
        whole = self.kind in _ON_LEVELS and self.norm == "linf"
        return 1.0 if whole else min(1.0, self.eps / MAX_INT8)


@dataclass(frozen=True)
class JacobianSpec:
    """How many rows of a teacher's Jacobian are stored, K."""

    classes: int


@dataclass(frozen=True)
class CacheSpec:
    """Everything that changes the bytes of a cache."""

    data: DataSpec
    views: ViewSpec
    teachers: dict[str, TeacherSpec]
    attacks: dict[str, AttackSpec]
    store: StoreSpec
    precision: PrecisionSpec
    seed: int
    jacobians: dict[str, JacobianSpec] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def view_shape(self) -> tuple[int, ...]:
        """Of what teachers and students see, `[3, H, W]`: of the images, or of their resized crops."""
        return (3, self.views.size, self.views.size) if self.views.resized else self.data.image_shape

    def __post_init__(self) -> None:
        check_version(self.format_version)
        if wrong := [name for name in (*self.teachers, *self.attacks) if not NAME.fullmatch(name)]:
            raise ConfigError(f"a teacher or attack is named by letters, digits, '_', '.' or '-'; got {show(wrong[0])}")
        if self.format_version != (needed := needed_version(self.data, self.views, self.store)):
            raise ConfigError(f"format_version must be {needed} for what this spec asks for; got {self.format_version}")
        if self.teachers and self.store.top_k >= (C := len(self.data.classes)):
            raise ConfigError(f"store.top_k must lie in 1..{C - 1} for {C} classes; got {self.store.top_k}: "
                              "store.logits: float16 keeps all")  # fmt: skip
        if self.data.mixed and not (self.views.resized and self.store.encoded):
            raise ConfigError(
                f"images of several sizes need views.kind {RESIZED_CROP} and store.images jpeg or png; got "
                f"{self.views.kind} and {self.store.images}"
            )
        units = -(-self.data.rows // self.store.rows_per_shard)
        if units > _MAX_UNITS:
            raise ConfigError(
                f"an array may have {_MAX_UNITS:,} shards; {self.data.rows} rows in shards of "
                f"{self.store.rows_per_shard} are {units}: raise store.rows_per_shard"
            )
        if self.data.sources:
            self._check_views(self.data.sources[0].views)

    def _check_views(self, views: int) -> None:
        """What several sources ask of the views; `views` are those of the first of them."""
        if views != self.views.count:
            raise ConfigError(
                f"the first source has all {self.views.count} views; got {views}: leave its views out, or lower "
                "views.count"
            )
        if len(self.bands) > 1 and (self.store.coded or self.store.by_view):
            raise ConfigError(
                "logits of sources with different numbers of views are float16 or float32, and not by_view; got "
                f"store.logits {self.store.logits} and by_view {str(self.store.by_view).lower()}: leave views out of "
                "the sources, or change these"
            )
        least = self.bands[0].stop
        if beyond := [name for name, attack in self.attacks.items() if attack.views > least]:
            raise ConfigError(
                f"attacks run on views that all rows have, here the first {least}; {', '.join(beyond)} asks for more"
            )

    @property
    def bands(self) -> tuple[Band, ...]:
        """Which rows have which views."""
        return view_bands(self.data.sources, self.data.rows, self.views.count)


def check_version(found: int) -> None:
    """Raise ConfigError for a format that this code does not know."""
    if not FORMAT_VERSION <= found <= NEWEST_VERSION:
        raise ConfigError(
            f"format_version is {found}, this darht knows {FORMAT_VERSION}..{NEWEST_VERSION}: use the darht that wrote "
            "it"
        )


def needed_version(data: DataSpec, views: ViewSpec, store: StoreSpec) -> int:
    """The version of a cache: that of the oldest reader which understands all of it."""
    new = views.resized or store.encoded or store.coded or store.by_view or data.sources
    return NEWEST_VERSION if new else FORMAT_VERSION
