"""Read every byte of a cache and say everything that is wrong with it, not only the first thing."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from darht.cache.format.commit import State, commit_key, inspect_unit
from darht.cache.format.images import decode_image, each, image_size
from darht.cache.format.layout import ArrayLayout, layouts, shard_key
from darht.cache.format.manifest import read_manifest, read_origin, read_spec
from darht.cache.format.mixture import UNLABELLED
from darht.cache.format.resample import resample_all
from darht.cache.format.spec import AttackSpec, CacheSpec
from darht.cache.format.store import Store, part_hashes
from darht.cache.format.tar_index import INDEX
from darht.cache.format.views import crop_flip, view_table
from darht.cache.read.webdataset import open_shards
from darht.core.errors import CacheError, CorruptError, DataError
from darht.core.files import sha256_bytes
from darht.core.storage import Location, Storage, open_storage

OnUnit = Callable[[str, int], None]


def verify(location: Location, on_unit: OnUnit = lambda name, shard: None) -> list[str]:
    """Everything that is wrong with a sealed cache or an export of one, one line each; empty when nothing is.

    Checked are the manifest and its root hash, the sha256 of every shard, of metadata and `origin.json`, the
    checksum of every chunk, row counts, labels within the classes, finite logits, and that every stored perturbation
    stays inside its ball and its adversarial image within 0..255.

    Args:
        location: of the cache or the export.
        on_unit: told array and shard after each.

    Raises:
        CacheError: the folder is not a cache, or not sealed.
        CorruptError: spec or manifest do not parse, so that nothing else could be checked.
    """
    folder = open_storage(location)
    if folder.size(INDEX) is not None:
        return _verify_export(folder)
    spec = read_spec(folder)
    manifest, arrays = read_manifest(folder, spec), layouts(spec)
    problems = [
        f"{folder.name(file.path)} is not what was sealed"
        for file in manifest.metadata
        if sha256_bytes(folder.read(file.path) or b"") != file.sha256
    ]
    sealed = {(record.array, record.shard): record for record in manifest.shards}
    # Under a wrong description nothing can be decoded: then only bytes are compared.
    # Records stay behind when a cache is pulled or served: then the manifest alone says what the bytes are.
    recorded = any(folder.read(commit_key(array, 0)) is not None for array in arrays.values())
    verifier = _Verifier(folder, spec, arrays, Store(folder), described=not problems, recorded=recorded)
    try:
        read_origin(folder)
    except CorruptError as error:
        problems.append(str(error))
    for array in arrays.values():
        for shard in range(array.shards):
            problems += verifier.unit(array, shard, sealed[array.name, shard].sha256, sealed[array.name, shard].parts)
            on_unit(array.name, shard)
    return problems


def _verify_export(folder: Storage) -> list[str]:
    """An export is checked as a trainer reads it: index, sizes, sha256 and counts of all tars, every array decoded."""
    cache = open_shards(folder)
    try:
        for name in cache.arrays:
            cache.read(name)
    except CacheError as error:
        return [str(error)]
    return []


@dataclass(frozen=True)
class _Verifier:
    """Looks at one unit after the other."""

    folder: Storage
    spec: CacheSpec
    arrays: dict[str, ArrayLayout]
    store: Store
    described: bool
    recorded: bool

    @property
    def views(self) -> np.ndarray:
        """The table that the spec describes."""
        return view_table(**vars(self.spec.views), seed=self.spec.seed)

    def unit(self, array: ArrayLayout, shard: int, sealed: str | None, parts: tuple[str, ...]) -> list[str]:
        """What is wrong with a unit: its record, its bytes, or else its numbers."""
        path, rows = self.folder.name(shard_key(array, shard)), array.rows(shard)
        if self.recorded:
            state, reason, record = inspect_unit(self.folder, array, shard)
            if record is None or state is not State.DONE:
                return [reason]
            if record.sha256 != sealed:
                return [f"{self.folder.name(commit_key(array, shard))} has another sha256 than the manifest"]
        data = self.folder.read(shard_key(array, shard))
        if data is None:
            return [f"{path} is missing"]
        if sha256_bytes(data) != sealed:
            return [f"{path} does not have the sha256 of {'its record' if self.recorded else 'the manifest'}"]
        if not self.described or part_hashes(array, shard, data) != parts:
            return [f"{path} does not have the sha256 of each view that is named"] if self.described else []
        try:
            found = list(self.values(array, rows, self.store.decode(array, shard, data)))
        except CacheError as error:
            return [str(error)]
        except DataError as error:  # of an image among others' numbers, whose own unit says which it is
            return [f"{path} cannot be checked: {error}"]
        return [f"{path}, rows {rows.start}..{rows.stop - 1}: {what}" for what in found]

    def values(self, array: ArrayLayout, rows: slice, values: np.ndarray) -> Iterator[str]:
        """What the numbers themselves break, whoever wrote them and whatever their hashes say."""
        classes = len(self.spec.data.classes)
        if array.kind == "source_index" and not np.array_equal(values, np.arange(rows.start, rows.stop)):
            yield "the source indices are not the row numbers"
        if array.kind == "label":
            yield from self.labels(values[: max(0, self.spec.data.labelled - rows.start)], classes)
            if (values[max(0, self.spec.data.labelled - rows.start) :] != UNLABELLED).any():
                yield f"rows without labels have others than {UNLABELLED}"
        if array.encoded:
            yield from self.encoded(rows, values)
        if array.kind == "views" and values[0].any():
            yield "view 0 is not the identity"
        if array.kind == "views" and not np.array_equal(values, self.views):
            yield "the offsets are not the views of the spec"
        if array.kind == "logits-class" and (values.min() < 0 or values.max() >= classes):
            yield f"the logits are those of classes {values.min()}..{values.max()}, classes lie in 0..{classes - 1}"
        if array.kind == "boxes" and not np.array_equal(values, self.boxes(rows)):
            yield "the boxes are not those that the spec draws"
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            yield "logits that are not finite"
        if array.attack is not None and array.kind == "delta":
            yield from self.deltas(array, self.spec.attacks[array.attack], rows, values)

    def labels(self, values: np.ndarray, classes: int) -> Iterator[str]:
        """Whether labels are those of classes."""
        if len(values) and (values.min() < 0 or values.max() >= classes):
            yield f"labels lie in {values.min()}..{values.max()}, classes in 0..{classes - 1}"

    def deltas(self, array: ArrayLayout, attack: AttackSpec, rows: slice, values: np.ndarray) -> Iterator[str]:
        """Whether perturbations leave the ball, or adversarial images the pixel range."""
        images, scale = self.images(rows), float(array.attributes["scale"])
        for view in range(values.shape[1]):
            delta, shown = values[:, view].astype(np.float64) * scale, self.shown(images, rows, view)
            yield from (f"in view {view} {fault}" for fault in delta_faults(delta, shown, attack))

    def images(self, rows: slice) -> np.ndarray | list[np.ndarray]:
        """The pixels of some rows, uint8 `[3, H, W]` each."""
        values = self.store.read(self.arrays["image"], rows)
        return each(values, lambda number, pixels: pixels) if self.spec.store.encoded else values

    def encoded(self, rows: slice, values: np.ndarray) -> Iterator[str]:
        """Which images do not decode, or are of another size than the spec says."""
        for row, data in zip(range(rows.start, rows.stop), values, strict=True):
            try:
                shape = decode_image(data).shape
            except DataError as error:
                yield f"row {row}: {error}"
                continue
            if not self.spec.data.mixed and shape != self.spec.data.image_shape:
                yield f"row {row} is an image of {shape[2]}x{shape[1]} pixels"

    def shown(self, images: np.ndarray | list[np.ndarray], rows: slice, view: int) -> np.ndarray:
        """Some rows in one view."""
        if self.spec.views.resized:
            return resample_all(images, self.boxes(rows)[:, view], self.spec.views.size)
        return crop_flip(np.asarray(images), self.views[view])

    def boxes(self, rows: slice) -> np.ndarray:
        """Where the resized crops of some rows lie."""
        from darht.cache.format.boxes import draw_boxes  # needs torch, and other caches are verified without

        every = np.arange(rows.start, rows.stop, dtype=np.int64)
        if self.spec.data.mixed:
            sizes = np.array([image_size(data) for data in self.store.read(self.arrays["image"], rows)])
        else:
            sizes = np.tile(self.spec.data.image_shape[1:], (len(every), 1))
        return draw_boxes(sizes, every, self.spec.views, self.spec.seed)


def delta_faults(delta: np.ndarray, images: np.ndarray, attack: AttackSpec) -> Iterator[str]:
    """What is wrong with perturbations `[B, 3, H, W]` in pixel levels on uint8 images of the same shape."""
    flat = delta.reshape(len(delta), -1)
    reach = np.abs(flat).max(1) if attack.norm == "linf" else np.linalg.norm(flat, axis=1)
    far = reach > attack.eps * (1 + 1e-9)
    pixels = images + delta
    out = ((pixels < -1e-3) | (pixels > 255 + 1e-3)).reshape(len(delta), -1).any(1)
    if far.any():
        yield f"{far.sum()} rows leave the ball: up to {reach.max():.4f} levels, epsilon {attack.eps:g}"
    if out.any():
        yield f"{out.sum()} rows leave the pixel range [0, 255]"
