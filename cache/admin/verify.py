"""Read every byte of a cache and say everything that is wrong with it, not only the first thing."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from darht.cache.format.commit import State, commit_key, inspect_unit
from darht.cache.format.images import decode_image, each, image_size
from darht.cache.format.layout import OFFSETS, ArrayLayout, block_rows, layouts, shard_key
from darht.cache.format.manifest import read_manifest, read_origin, read_spec
from darht.cache.format.mixture import UNLABELLED
from darht.cache.format.resample import resample_all
from darht.cache.format.spec import AttackSpec, CacheSpec
from darht.cache.format.store import Store, part_hashes
from darht.cache.format.tar_index import INDEX
from darht.cache.format.views import crop_flip, view_table
from darht.cache.read.webdataset import ExportedCache, check_sizes, open_index
from darht.core.errors import CacheError, CorruptError, DataError
from darht.core.files import sha256_bytes
from darht.core.storage import Location, Storage, open_storage

OnUnit = Callable[[str, int], None]


def verify(location: Location, on_unit: OnUnit = lambda name, shard: None) -> list[str]:
    """Everything that is wrong with a sealed cache or an export of one, one line each; empty when nothing is.

    Checked are the manifest and its root hash, the sha256 of every shard, of metadata and `origin.json`, the
    checksum of every chunk, row counts, labels within the classes, finite logits, and that every stored perturbation
    stays inside its ball and its adversarial image within 0..255. Of an export these are the index with the manifest
    in it, size, sha256 and entries of every tar, and the same of its numbers, as a trainer reads them: some hundred
    rows at a time, and no more of a tar once they cannot be read.

    Args:
        location: of the cache or the export.
        on_unit: told array and shard after each, or a tar's name and number.

    Raises:
        CacheError: the folder is not a cache, or not sealed.
        CorruptError: spec or manifest do not parse, so that nothing else could be checked.
    """
    folder = open_storage(location)
    if (index := folder.read(INDEX)) is not None:
        return _verify_export(folder, open_index(folder, index), on_unit)
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
    store = Store(folder)
    numbers = _Numbers(spec, functools.partial(store.read, arrays["image"]))
    verifier = _Verifier(folder, numbers, store, described=not problems, recorded=recorded)
    try:
        read_origin(folder)
    except CorruptError as error:
        problems.append(str(error))
    for array in arrays.values():
        for shard in range(array.shards):
            problems += verifier.unit(array, shard, sealed[array.name, shard].sha256, sealed[array.name, shard].parts)
            on_unit(array.name, shard)
    return problems


def _verify_export(folder: Storage, cache: ExportedCache, on_unit: OnUnit) -> list[str]:
    problems, step = _views_of(cache), block_rows(cache.spec.store)
    for number, tar in enumerate(cache.tars):
        try:
            check_sizes(folder, [tar])
            begin, end = tar.rows
            for first in range(begin, end, step):
                block = _read_block(cache, slice(first, min(first + step, end)))
                numbers = _Numbers(cache.spec, functools.partial(_same, block["image"]))
                for name, values in block.items():
                    where, rows = f"{folder.name(tar.path)}, {name}", slice(first, first + len(values))
                    problems += numbers.problems(where, cache.arrays[name], rows, values)
        except CacheError as error:
            problems.append(str(error))
        on_unit(tar.path, number)
    return problems


def _read_block(cache: ExportedCache, rows: slice) -> dict[str, np.ndarray]:
    """All arrays in some rows; of views that later sources lack, the rows that have them."""
    arrays, block = [array for array in cache.arrays.values() if array.kind != "views"], dict[str, np.ndarray]()
    for last in sorted({array.shape[0] for array in arrays}, reverse=True):
        part = slice(rows.start, min(rows.stop, last))
        size = part.stop - part.start
        if size > 0:
            some = [array for array in arrays if array.shape[0] == last]
            out = {array.name: np.empty((size, *array.shape[1:]), array.dtype) for array in some}
            cache.read_into(out, part)
            block |= out
    return block


def _same(images: np.ndarray, rows: slice) -> np.ndarray:
    return images


def _views_of(cache: ExportedCache) -> list[str]:
    """What is wrong with the table of views in an export's index."""
    array, name = cache.arrays.get(OFFSETS), cache.folder.name(INDEX)
    if array is None:
        return []
    values = cache.read(OFFSETS)
    if values.shape != array.shape:
        return [f"{name} has {len(values)} views, the spec {array.shape[0]}"]
    return _Numbers(cache.spec, cache.clean).problems(name, array, array.rows(0), values)


@dataclass(frozen=True)
class _Verifier:
    """Looks at one unit after the other."""

    folder: Storage
    numbers: "_Numbers"
    store: Store
    described: bool
    recorded: bool

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
            return self.numbers.problems(path, array, rows, self.store.decode(array, shard, data))
        except CacheError as error:
            return [str(error)]


@dataclass(frozen=True)
class _Numbers:
    """Looks at decoded numbers, of a cache or of an export.

    Attributes:
        spec: what they must fit.
        stored: gives the images of some rows as they are stored.
    """

    spec: CacheSpec
    stored: Callable[[slice], np.ndarray]

    @property
    def views(self) -> np.ndarray:
        """The table that the spec describes."""
        return view_table(**vars(self.spec.views), seed=self.spec.seed)

    def problems(self, where: str, array: ArrayLayout, rows: slice, values: np.ndarray) -> list[str]:
        """What `values` finds, with the place; an image that they need may be damaged itself."""
        try:
            found = list(self.values(array, rows, values))
        except DataError as error:  # of an image among others' numbers, whose own unit says which it is
            return [f"{where} cannot be checked: {error}"]
        return [f"{where}, rows {rows.start}..{rows.stop - 1}: {what}" for what in found]

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
        values = self.stored(rows)
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
            sizes = np.array([image_size(data) for data in self.stored(rows)])
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
