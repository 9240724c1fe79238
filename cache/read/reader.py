"""Read a sealed cache."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from darht.cache.format.images import decode_views
from darht.cache.format.layout import OFFSETS, ArrayLayout, layouts
from darht.cache.format.logit_codes import companion_suffix, decode
from darht.cache.format.manifest import (
    MANIFEST,
    SPEC,
    Manifest,
    absolute_origin,
    parse_manifest,
    parse_spec,
    read_origin,
)
from darht.cache.format.resample import centred
from darht.cache.format.spec import CacheSpec
from darht.cache.format.views import view_table
from darht.cache.read.checked_shards import CheckedShards
from darht.cache.read.files import check_decoder, check_files, check_values, read_part
from darht.cache.read.reach import Reach
from darht.cache.read.together import together
from darht.core.errors import ConfigError, CorruptError, DataError, IncompleteError
from darht.core.storage import Coming, LocalStorage, Location, Storage, open_storage, read_together


class Cache(CheckedShards):
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
        super().__init__(folder, manifest, layouts(spec))
        self.spec, self.manifest = spec, manifest
        self.excluded: tuple[int, ...] = ()
        self.part: tuple[str, ...] | None = None

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
        arrays = [self._array(name) for name in out]
        for array in arrays:
            if len(shards := array.shards_of(rows)) > 1:  # blocks of a window are on their way
                self.prefetch([array.name], shards)

        def take(array: ArrayLayout, shard: int) -> None:
            part, wanted = array.overlap(shard, rows)
            self._decode(array, shard, part, out[array.name][wanted])

        together(self.folder, take, [(array, shard) for array in arrays for shard in array.shards_of(rows)])
        for name, values in out.items():
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
        check_decoder(self.folder, self.spec)

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

    def _array(self, name: str) -> ArrayLayout:
        if name not in self.arrays:
            raise ConfigError(f"{self.folder} has no array '{name}'; it has {', '.join(self.arrays)}")
        if self.part is not None and name not in self.part:
            raise IncompleteError(
                f"{self.folder} is a part of a cache, without {name}; it has {', '.join(self.part)}: pull the rest too"
            )
        return self.arrays[name]

    def _check_values(self, name: str, values: np.ndarray, rows: slice) -> None:
        check_values(self.folder, self.arrays[name], values, rows, len(self.classes))

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
    return open_described(folder, read_together(folder, (SPEC, MANIFEST)), reach)


def open_described(folder: Storage, described: Sequence[Coming], reach: Reach) -> Cache:
    """As `open_cache`, once spec and manifest are asked for."""
    spec = parse_spec(folder, described[0].result())
    manifest = parse_manifest(folder, described[1].result(), spec)
    part = read_part(folder) if isinstance(folder, LocalStorage) else None
    if isinstance(folder, LocalStorage):
        check_files(folder, manifest, part)
    files = ((shard.path, shard.size, shard.sha256) for shard in manifest.shards)
    cache = Cache(reach.through_copy(folder, files), spec, manifest)
    cache.part = part
    return cache
