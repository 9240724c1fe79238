"""Which arrays a spec asks for: names, shapes, types, how they are cut, and what each of them depends on."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from darht.cache.format.mixture import Band, spans
from darht.cache.format.spec import AttackSpec, CacheSpec, StoreSpec
from darht.cache.format.views import view_table
from darht.core.config import fingerprint, to_plain
from darht.core.errors import ConfigError

_MAX_CHUNK = 2**31 - 1  # what the codecs of zarr take in one buffer
_MAX_JACOBIAN = 2**30  # of a unit; it is computed in parts of float32 and then held twice
_BLOCK = 256  # rows of a block: some MB of small images, so that a disk or an object store answers few large questions


Part = Literal["jacobian", "jacobian-scale", "jacobian-class"]
Answer = Literal["logits", "logits-top", "logits-class", "logits-int8", "logits-scale"]
Kind = Literal["source_index", "label", "image", "views", "boxes", "delta"] | Answer | Part
OFFSETS, BOXES = "views/offset", "views/box"
ENCODED = "object"  # numpy's name for values of any length, here the bytes of an image
BOX_COLUMNS = "top, left, height, width, flip"
ANSWERS: tuple[Answer, ...] = get_args(Answer)
JACOBIAN_PARTS: tuple[Part, ...] = get_args(Part)  # of logits/<teacher>/


@dataclass(frozen=True)
class ArrayLayout:
    """One array of a cache.

    Attributes:
        name: path inside `data.zarr`.
        kind: what its values are.
        shape: the whole array; axis 0 is cut into shards.
        dtype: numpy's name.
        rows_per_shard: rows of a unit.
        rows_per_chunk: rows of the smallest read.
        packed: compressed (pixels, perturbations) or stored plain (logits, labels).
        fingerprint: of every part of the spec that changes this array's bytes.
        attributes: stored beside the array.
        teacher: who is asked, or for perturbations attacked; None where no teacher computes it.
        attack: whose perturbations these are, or are answered; None for clean views.
        first_view: the view that comes first on the second axis.
        by_view: whether a chunk holds one view of its rows, and a shard one view after the other.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: str
    rows_per_shard: int
    rows_per_chunk: int
    packed: bool
    fingerprint: str
    attributes: dict[str, Any]
    teacher: str | None = None
    attack: str | None = None
    first_view: int = 0
    by_view: bool = False

    @property
    def views_per_shard(self) -> int:
        """Into how many views the chunks of a shard are cut, one after the other: 1 where a chunk holds all."""
        return self.shape[1] if self.by_view else 1

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """The values of one chunk."""
        return (self.rows_per_chunk, *((1, *self.shape[2:]) if self.by_view else self.shape[1:]))

    @property
    def shards(self) -> int:
        """How many units the array has."""
        return -(-self.shape[0] // self.rows_per_shard)

    def rows(self, shard: int) -> slice:
        """The rows of a unit."""
        return slice(shard * self.rows_per_shard, min((shard + 1) * self.rows_per_shard, self.shape[0]))

    def shards_of(self, rows: slice) -> range:
        """The units that hold `rows`."""
        return range(rows.start // self.rows_per_shard, -(-rows.stop // self.rows_per_shard))

    def overlap(self, shard: int, rows: slice) -> tuple[slice, slice]:
        """The part of a unit that lies in `rows`: counted from the unit's first row, and from that of `rows`."""
        own = self.rows(shard)
        first, last = max(own.start, rows.start), min(own.stop, rows.stop)
        return slice(first - own.start, last - own.start), slice(first - rows.start, last - rows.start)

    @property
    def encoded(self) -> bool:
        """Whether each value is the bytes of an image."""
        return self.dtype == ENCODED

    @property
    def is_jacobian(self) -> bool:
        """Whether it is a part of a teacher's Jacobian."""
        return self.kind in JACOBIAN_PARTS

    @property
    def of_teacher(self) -> str:
        """The name among what teachers say, as an export's `logits.npz` has it: `T/clean`, `T/ATTACK`, `T/jacobian`."""
        return self.name.removeprefix("logits/")

    @property
    def said(self) -> bool:
        """Whether it is what a teacher says: logits, or a part of its Jacobian."""
        return self.is_answer or self.is_jacobian

    @property
    def is_answer(self) -> bool:
        """Whether it is a teacher's logits, or a part of them where they are coded."""
        return self.kind in ANSWERS

    @property
    def is_clean_answer(self) -> bool:
        """Whether it is what a teacher says about clean views."""
        return self.is_answer and self.attack is None

    @property
    def has_views(self) -> bool:
        """Whether its second axis are views."""
        return self.kind in ("delta", "boxes") or self.is_answer

    @property
    def of_some_rows(self) -> bool:
        """Whether only the first rows have it: further views of clean logits."""
        return self.first_view > 0

    @property
    def fill_value(self) -> float | int:
        """What a hole reads as: NaN where the type has one, so that it cannot pass for data."""
        return float("nan") if np.dtype(self.dtype).kind == "f" else 0

    @property
    def row_bytes(self) -> int:
        """What a row takes in memory; of encoded images, which differ, without their bytes."""
        return math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize


def check_chunks(arrays: dict[str, ArrayLayout]) -> None:
    """Every chunk fits the codec, and every unit of a Jacobian the memory that computes it.

    Raises:
        ConfigError: chunks or Jacobians that are too large, with what fits.
    """
    rows = {name: array.row_bytes for name, array in arrays.items()}
    worst = max(arrays, key=lambda name: arrays[name].rows_per_chunk * rows[name])
    if arrays[worst].rows_per_chunk * rows[worst] > _MAX_CHUNK:
        raise ConfigError(
            f"store.rows_per_chunk is {arrays[worst].rows_per_chunk}, but chunks must be below 2 GiB and a row of "
            f"{worst} has {rows[worst]} bytes; write at most {_MAX_CHUNK // rows[worst]}"
        )

    for array in arrays.values():
        unit = min(array.rows_per_shard, array.shape[0]) * rows[array.name]
        if array.kind == "jacobian" and unit > _MAX_JACOBIAN:
            raise ConfigError(
                f"the Jacobian of teacher '{array.teacher}' takes {rows[array.name]:,} bytes a row, "
                f"{array.shape[0] * rows[array.name] / 1e9:,.1f} GB in all and {unit / 1e9:,.1f} GB a shard, which is "
                f"computed in memory, at most {_MAX_JACOBIAN / 1e9:.1f} GB: leave it out and train with targets: "
                "clean, ask for fewer jacobians.classes, or lower store.rows_per_shard"
            )


def block_rows(store: StoreSpec) -> int:
    """Rows that are exported, read and shuffled together: whole chunks, about 256 rows, at most a shard."""
    chunk = store.rows_per_chunk
    return min(max(1, _BLOCK // chunk) * chunk, store.rows_per_shard)


def row_blocks(spec: CacheSpec) -> np.ndarray:
    """Every block as (first row, one past the last), int64 `[K, 2]`; the last of a shard or source may be short."""
    N, shard, size = spec.data.rows, spec.store.rows_per_shard, block_rows(spec.store)
    starts = {first for start in range(0, N, shard) for first in range(start, min(start + shard, N), size)}
    cuts = np.array(sorted(starts | {span.start for span in spans(spec.data.sources, N)}), dtype=np.int64)
    return np.stack([cuts, np.append(cuts[1:], N)], axis=1)


def label_dtype(classes: int) -> str:
    """int16 holds the labels of any data set below 32,768 classes."""
    return "int16" if classes <= np.iinfo(np.int16).max else "int32"


def layouts(spec: CacheSpec) -> dict[str, ArrayLayout]:
    """Every array of a cache, in the order in which a shard is computed: inputs before what is made from them."""
    plain = to_plain(spec)
    base = {key: plain[key] for key in ("format_version", "store")} | {"data": _content(plain["data"])}
    table = view_table(**plain["views"], seed=spec.seed)
    N = spec.data.rows
    arrays = [
        _array(spec, "source_index", "source_index", (N,), "int64", inputs=base),
        _array(spec, "label", "label", (N,), label_dtype(len(spec.data.classes)), inputs=base),
        _images(spec, base),
        _views(spec, base | {"views": table.tolist()} | ({"seed": spec.seed} if spec.views.resized else {})),
    ]
    computed = base | {"precision": plain["precision"]}
    for name, attack in spec.attacks.items():
        arrays.append(_delta(spec, name, attack, computed | _attack_inputs(plain, name, table)))
    for name in spec.teachers:
        own = computed | {"teacher": _without_role(plain["teachers"][name])}
        for band in spec.bands:
            inputs = own | {"views": table[band.first : band.stop].tolist()}
            arrays += _answers(spec, name, None, band, inputs | ({"rows": band.rows} if band.first else {}))
        for attack_name, attack in spec.attacks.items():
            inputs = own | _attack_inputs(plain, attack_name, table)
            arrays += _answers(spec, name, attack_name, Band(0, attack.views, N), inputs)
        if name in spec.jacobians:
            arrays += _jacobian(spec, name, own)
    return {array.name: array for array in arrays}


def _images(spec: CacheSpec, inputs: dict[str, Any]) -> ArrayLayout:
    N = spec.data.rows
    if spec.store.encoded:
        return _array(spec, "image", "image", (N,), ENCODED, inputs=inputs, rows_per_chunk=1)
    return _array(spec, "image", "image", (N, *spec.data.image_shape), "uint8", inputs=inputs, packed=True)


def _content(data: dict[str, Any]) -> dict[str, Any]:
    """The part of the data that changes bytes: which rows are held out does not, and what was read has its sha256."""
    return {key: value for key, value in data.items() if key not in ("holdout", "rules", "skipped", "sources")}


def _attack_inputs(plain: dict[str, Any], name: str, table: np.ndarray) -> dict[str, Any]:
    """What an attack's perturbations depend on; of the views only the first few, which it runs on."""
    attack = plain["attacks"][name]
    return {
        "seed": plain["seed"],
        "attack": {"name": name, **attack},
        "attack_views": table[: attack["views"]].tolist(),
        "victim": _without_role(plain["teachers"][attack["teacher"]]),
    }


def _without_role(teacher: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in teacher.items() if key != "role"}


def _delta(spec: CacheSpec, name: str, attack: AttackSpec, inputs: dict[str, Any]) -> ArrayLayout:
    shape = (spec.data.rows, attack.views, *spec.view_shape)
    about = {"scale": attack.scale, "eps": attack.parameters["eps"], "norm": attack.parameters["norm"]}
    if spec.data.labelled < spec.data.rows:
        about["unlabelled"] = "against the attacked teacher's own answer to the view"
    more = {"packed": True, "attributes": about, "teacher": attack.teacher, "attack": name}
    return _array(spec, f"delta/{name}", "delta", shape, "int8", inputs=inputs, **more)


CLEAN_FROM = "clean-from-"


def _answers(spec: CacheSpec, name: str, attack: str | None, band: Band, inputs: dict[str, Any]) -> list[ArrayLayout]:
    """A teacher's logits on clean views or on an attack's images: one array, or the two that they are coded as.

    Clean views of all rows are `clean`, those of a further band `clean-from-` its first.
    """
    about = attack or (f"{CLEAN_FROM}{band.first}" if band.first else "clean")
    C, k, main = spec.teachers[name].num_classes, spec.store.top_k, f"logits/{name}/{about}"
    parts: list[tuple[str, Answer, int, str]]
    match spec.store.logits:
        case "top-k":
            parts = [(main, "logits-top", k + 1, "float16"), (f"{main}-class", "logits-class", k, label_dtype(C))]
        case "int8":
            parts = [(main, "logits-int8", C, "int8"), (f"{main}-scale", "logits-scale", 2, "float32")]
        case dtype:
            parts = [(main, "logits", C, dtype)]
    more = {"teacher": name, "attack": attack, "first_view": band.first, "by_view": spec.store.by_view}
    return [
        _array(spec, part, kind, (band.rows, band.stop - band.first, last), dtype, inputs=inputs, **more)
        for part, kind, last, dtype in parts
    ]


def _jacobian(spec: CacheSpec, teacher: str, own: dict[str, Any]) -> list[ArrayLayout]:
    N, K = spec.data.rows, spec.jacobians[teacher].classes
    inputs = own | {"jacobian": {"classes": K}}
    image, where = spec.view_shape, f"logits/{teacher}"
    parts = zip(JACOBIAN_PARTS, ((N, K, *image), (N, K), (N, K)), ("int8", "float32", "int16"), strict=True)
    return [
        _array(spec, f"{where}/{kind}", kind, shape, dtype, inputs=inputs, packed=kind == "jacobian", teacher=teacher)
        for kind, shape, dtype in parts
    ]


def _views(spec: CacheSpec, inputs: dict[str, Any]) -> ArrayLayout:
    V = spec.views.count
    if spec.views.resized:
        about = {"columns": BOX_COLUMNS, "size": spec.views.size}
        return _array(spec, BOXES, "boxes", (spec.data.rows, V, 5), "int32", inputs=inputs, attributes=about)
    about = {"columns": "dy, dx, flip"}
    return ArrayLayout(OFFSETS, "views", (V, 3), "int8", V, V, False, fingerprint(inputs), about)


def _array(spec: CacheSpec, name: str, kind: Kind, shape: tuple[int, ...], dtype: str, **more: Any) -> ArrayLayout:
    own: dict[str, Any] = {"packed": False, "attributes": {}, "rows_per_chunk": spec.store.rows_per_chunk} | more
    return ArrayLayout(
        name=name,
        kind=kind,
        shape=shape,
        dtype=dtype,
        rows_per_shard=spec.store.rows_per_shard,
        fingerprint=fingerprint({"array": name, **own.pop("inputs")}),
        **own,
    )


DATA = "data.zarr"


def shard_key(array: ArrayLayout, shard: int) -> str:
    """Where a shard lies in a cache."""
    return "/".join([DATA, array.name, "c", str(shard), *("0" for _ in array.shape[1:])])
