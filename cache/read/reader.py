"""Read a sealed cache."""

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import numpy as np

from darht.cache.format.commit import COMMITS
from darht.cache.format.images import decode_views, decoder_identity
from darht.cache.format.layout import OFFSETS, ArrayLayout, layouts, shard_key
from darht.cache.format.logit_codes import companion_suffix, decode
from darht.cache.format.manifest import Manifest, absolute_origin, read_manifest, read_origin, read_spec
from darht.cache.format.resample import centred
from darht.cache.format.shards import Index, plain_index
from darht.cache.format.spec import CacheSpec
from darht.cache.format.store import ShardReader
from darht.cache.format.views import view_table
from darht.cache.read.files import all_finite, check_files, read_part
from darht.cache.read.local_copy import CopiedStorage
from darht.cache.read.reach import Reach
from darht.cache.read.steady import FileChanged, SteadyStorage
from darht.core.errors import ConfigError, CorruptError, DataError, IncompleteError
from darht.core.files import sha256_bytes
from darht.core.storage import LocalStorage, Location, Storage, open_file, open_storage

_CHANGES = 3  # times that a file may be replaced by the same bytes while some rows are read from it


class Cache:
    """A sealed cache, opened for reading.

    Attributes:
        folder: the storage where it lies.
        spec: what it was made from.
        manifest: its shards and root hash.
        arrays: the layout of every array by name.
        excluded: rows that are not trained on, though they are not held out for selection either.
        part: the arrays that are here, where the folder is a part of a cache, pulled by `darht-cache pull --arrays`.
        built: whether it lies somewhere; false for the rows of a source.
    """

    built: ClassVar[bool] = True

    def __init__(self, folder: Storage, spec: CacheSpec, manifest: Manifest) -> None:
        self.folder, self.spec, self.manifest = folder, spec, manifest
        self.arrays: dict[str, ArrayLayout] = layouts(spec)
        self.excluded: tuple[int, ...] = ()
        self.part: tuple[str, ...] | None = None
        self._steady = SteadyStorage(folder)
        self._store = ShardReader(self._steady)
        self._sealed = {(shard.array, shard.shard): shard for shard in manifest.shards}
        self._checked: set[tuple[str, int]] = set()
        self._checked_views: set[tuple[str, int, int]] = set()
        self._indices: dict[tuple[str, int], Index] = {}  # of shards that are read in parts, once for each

    @property
    def root_hash(self) -> str:
        """The identity of the cache's contents."""
        return self.manifest.root_hash

    @property
    def rows(self) -> int:
        """N."""
        return self.spec.data.rows

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of labels and logits, C."""
        return self.spec.data.classes

    @property
    def teachers(self) -> tuple[str, ...]:
        """Names of the teachers, in the order of `CacheDataset`'s `teacher_logits`, T."""
        return tuple(self.spec.teachers)

    @property
    def attacks(self) -> tuple[str, ...]:
        """Names of the attacks whose perturbations are stored."""
        return tuple(self.spec.attacks)

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Rows of an array (all of them by default), decoded and checked.

        Every chunk is checked against its crc32c, and every shard, the first time it is touched, against the sha256 of
        the manifest: chunks of another shard, or of another cache, have checksums that fit.

        Raises:
            ConfigError: no such array.
            CorruptError: a checksum fails, or logits hold NaN.
        """
        array = self._array(name)
        rows = slice(*(rows or slice(None)).indices(array.shape[0]))
        values = np.empty((max(0, rows.stop - rows.start), *array.shape[1:]), dtype=array.dtype)
        self.read_into({name: values}, rows)
        return values

    def read_into(self, out: Mapping[str, np.ndarray], rows: slice) -> None:
        """The same rows of several arrays, into numpy arrays of their shape and type that are there already.

        Whole shards are read at once; of others only the chunks that hold the rows.

        Raises:
            ConfigError, IncompleteError, CorruptError: as `read`.
        """
        for name, values in out.items():
            array = self._array(name)
            for shard in array.shards_of(rows):
                part, wanted = array.overlap(shard, rows)
                self._decode(array, shard, part, values[wanted])
            self._check_values(name, values, rows)

    def logits(self, teacher: str, about: str = "clean", *, rows: slice | None = None, view: int = 0) -> np.ndarray:
        """What a teacher said about one view of rows (all of them by default), `[n, C]`, whatever code they are in.

        Args:
            teacher: its name.
            about: `clean`, or the attack whose images of the view were shown.
            rows: which.
            view: its number.

        Returns:
            Raw logits of all classes: float32 where they are coded (see `cache.format.logit_codes`), else as stored.

        Raises:
            ConfigError, IncompleteError, CorruptError: as `read`.
        """
        name, suffix = f"logits/{teacher}/{about}", companion_suffix(self.spec.store)
        main = self._view(name, rows, view)
        return decode(main, self._view(name + suffix, rows, view), len(self.classes)) if suffix else main

    def _view(self, name: str, rows: slice | None, view: int) -> np.ndarray:
        array = self._array(name)
        rows = slice(*(rows or slice(None)).indices(array.shape[0]))
        values = np.empty((max(0, rows.stop - rows.start), *array.shape[2:]), dtype=array.dtype)
        self.read_view(name, rows, range(array.shape[1])[view], values)
        return values

    def read_view(self, name: str, rows: slice, view: int, out: np.ndarray) -> None:
        """One view of rows of an array, into `out`, `[n, ...]` in its type.

        Of arrays `by_view` nothing else is read, and only the view's part of a shard is compared with its sha256.

        Raises:
            ConfigError, IncompleteError, CorruptError: as `read`.
        """
        array = self._array(name)
        if not self._apart(array):
            out[...] = self.read(name, rows)[:, view]
            return
        for shard in array.shards_of(rows):
            part, wanted = array.overlap(shard, rows)
            read = functools.partial(self._decode_view, array, shard, part, view, out[wanted][:, None])
            self._steadily(name, shard, read)
        self._check_values(name, out, rows)

    def _apart(self, array: ArrayLayout) -> bool:
        """Whether one view can be read alone."""
        return array.by_view

    def _decode_view(self, array: ArrayLayout, shard: int, part: slice, view: int, out: np.ndarray) -> None:
        name = array.name
        if (name, shard) not in self._checked and (name, shard, view) not in self._checked_views:
            self._accept(name, shard, self._store.view_sha256(array, shard, view), view)
        self._store.read_part(array, shard, plain_index(array, shard), part, out, view=view)

    def clean(self, rows: slice | None = None) -> np.ndarray:
        """Images of rows (all of them by default) as view 0 shows them, uint8 `[n, 3, H, W]`.

        Raises:
            ConfigError: they are JPEG files, which this machine decodes to other pixels than teachers saw.
            CorruptError: a checksum fails, or an image does not decode.
        """
        images = self.read("image", rows)
        if self.spec.store.encoded:
            return self._decoded(images)
        return centred(images, self.spec.views.size) if self.spec.views.resized else images

    def check_decoder(self) -> None:
        """Raise ConfigError where images are JPEG files that this machine decodes to other pixels than teachers saw."""
        there = self.spec.data.decoder
        if there and there != (here := decoder_identity()):
            raise ConfigError(
                f"{self.folder} was built with a JPEG decoder that makes pixels {there[:12]} of a small image, Pillow "
                f"makes {here[:12]} of it here: install the Pillow that {COMMITS} names"
            )

    def _decoded(self, images: np.ndarray) -> np.ndarray:
        self.check_decoder()
        if not len(images):
            return np.empty((0, *self.spec.view_shape), dtype=np.uint8)
        try:
            return decode_views(images, None, self.spec.views.size)
        except DataError as error:
            raise CorruptError(f"{self.folder}: {error}; build again") from error

    @property
    def views(self) -> np.ndarray:
        """The table of views, `[V, ...]`: `views/offset`, or for resized crops what `views.view_table` says of each."""
        if self.spec.views.resized:
            return view_table(**vars(self.spec.views), seed=self.spec.seed)
        return self.read(OFFSETS)

    def check(self, name: str, shard: int) -> None:
        """Compare a shard with the sha256 of the manifest, piece by piece, once: nothing in it is trusted before.

        Raises:
            IncompleteError: it is missing.
            CorruptError: it was changed.
        """
        self._steadily(name, shard, lambda: self._check(name, shard))

    def prefetch(self, names: Iterable[str], shards: Iterable[int]) -> None:
        """Begin to copy shards that are wanted soon, where there is a local copy at all."""
        if isinstance(self.folder, CopiedStorage):
            shards = list(shards)
            units = [(name, shard) for name in names for shard in shards if shard < self.arrays[name].shards]
            self.folder.prefetch(dict.fromkeys(self._path(name, shard) for name, shard in units))

    def _path(self, name: str, shard: int) -> str:
        """The key of the file that holds a shard of an array."""
        return self._sealed[name, shard].path

    def _steadily(self, name: str, shard: int, action: Callable[[], None]) -> None:
        """An action on one file; again, from its sha256 on, when the file was replaced meanwhile."""
        path = self._path(name, shard)
        for _ in range(_CHANGES):
            try:
                return action()
            except FileChanged:
                self._steady.forget(path)
                self._forget(name, shard)
        raise CorruptError(f"{self.folder.name(path)} is replaced again and again while it is read: stop who writes it")

    def _forget(self, name: str, shard: int) -> None:
        self._checked.discard((name, shard))
        self._checked_views -= {key for key in self._checked_views if key[:2] == (name, shard)}
        self._indices.pop((name, shard), None)

    def _check(self, name: str, shard: int) -> None:
        if (name, shard) not in self._checked:
            sealed = self._sealed[name, shard]
            with open_file(self._steady, sealed.path, sealed.size) as file:
                self._accept(name, shard, hashlib.file_digest(file, "sha256").hexdigest())

    def _array(self, name: str) -> ArrayLayout:
        if name not in self.arrays:
            raise ConfigError(f"{self.folder} has no array '{name}'; it has {', '.join(self.arrays)}")
        if self.part is not None and name not in self.part:
            raise IncompleteError(
                f"{self.folder} is a part of a cache, without {name}; it has {', '.join(self.part)}: pull the rest too"
            )
        return self.arrays[name]

    def _decode(self, array: ArrayLayout, shard: int, part: slice, out: np.ndarray) -> None:
        self._steadily(array.name, shard, lambda: self._decode_once(array, shard, part, out))

    def _decode_once(self, array: ArrayLayout, shard: int, part: slice, out: np.ndarray) -> None:
        rows = array.rows(shard)
        if part == slice(0, rows.stop - rows.start):
            data = self._store.shard(array, shard)
            if (array.name, shard) not in self._checked:
                self._accept(array.name, shard, sha256_bytes(data))
            self._store.decode_into(array, shard, data, part, out)
            return
        self._check(array.name, shard)
        key = (array.name, shard)
        if key not in self._indices:
            self._indices[key] = self._store.read_index(array, shard, self._sealed[key].size)
        self._store.read_part(array, shard, self._indices[key], part, out)

    def _accept(self, name: str, shard: int, sha256: str, view: int | None = None) -> None:
        sealed = self._sealed[name, shard]
        if sha256 != (sealed.sha256 if view is None else sealed.parts[view]):
            if isinstance(self.folder, CopiedStorage) and self.folder.drop(self._path(name, shard)):
                raise FileChanged(self._path(name, shard))  # the copy went bad on the disk, and is fetched again
            if self.folder.size(self._path(name, shard)) is None:
                raise IncompleteError(f"{self.folder.name(self._path(name, shard))} is missing: build or push it again")
            array = self.arrays[name]
            span, path = array.rows(shard), self.folder.name(shard_key(array, shard))
            raise CorruptError(
                f"{path} (rows {span.start}..{span.stop - 1} of {name}) does not have the sha256 that was sealed: run "
                "darht-cache build again, then seal"
            )
        if view is None:
            self._checked.add((name, shard))
        else:
            self._checked_views.add((name, shard, view))

    def _check_values(self, name: str, values: np.ndarray, rows: slice) -> None:
        if self.arrays[name].kind == "logits-class" and values.size:
            low, high = int(values.min()), int(values.max())
            if low < 0 or high >= len(self.classes):
                raise CorruptError(
                    f"{self.folder}: {name} names classes {low}..{high} in rows {rows.start}..{rows.stop - 1}, there "
                    f"are 0..{len(self.classes) - 1}"
                )
        if values.dtype.kind == "f" and not all_finite(values):
            raise CorruptError(
                f"{self.folder}: {name} holds values that are not finite in rows {rows.start}..{rows.stop - 1}"
            )

    def origin(self) -> dict[str, Any]:
        """Where data and teachers lay when the cache was built, as absolute paths; empty when nobody noted it.

        Raises:
            CorruptError: `origin.json` is damaged.
        """
        found = read_origin(self.folder)
        return absolute_origin(found, self.folder.folder) if isinstance(self.folder, LocalStorage) else found

    def size(self, name: str) -> int:
        """The bytes of an array on disk."""
        return sum(shard.size for shard in self.manifest.shards if shard.array == name)


def open_cache(location: Location, reach: Reach = Reach()) -> Cache:
    """Open a sealed cache in a folder or behind a URL.

    On a disk every shard is looked for and every description compared; a server is asked for spec and manifest alone,
    and a shard that is missing there, or is not what was sealed, is noticed when it is touched first.

    Args:
        location: of the cache.
        reach: how a URL is read.

    Raises:
        CacheError: it is not a cache.
        IncompleteError: it is not sealed, or a shard is missing.
        CorruptError: the manifest is not the spec's, or a shard has another size than recorded.
        UnreachableError: a server does not answer.
    """
    folder = open_storage(location, retry_for=reach.retry_for)
    spec = read_spec(folder)
    manifest = read_manifest(folder, spec)
    part = read_part(folder) if isinstance(folder, LocalStorage) else None
    if isinstance(folder, LocalStorage):
        check_files(folder, manifest, part)
    files = ((shard.path, shard.size, shard.sha256) for shard in manifest.shards)
    cache = Cache(reach.through_copy(folder, files), spec, manifest)
    cache.part = part
    return cache
