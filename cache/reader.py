"""Read a sealed cache."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from darht.cache.build import ORIGIN
from darht.cache.layout import ArrayLayout, layouts
from darht.cache.seal import Manifest, read_manifest, read_spec
from darht.cache.spec import CacheSpec
from darht.cache.store import Store, shard_key
from darht.core.errors import ConfigError, CorruptError, IncompleteError
from darht.core.files import sha256_bytes
from darht.core.places import LocalPlace, Location, Place, place

_LOOKUPS = 16  # questions to an object store at a time


class Cache:
    """A sealed cache, opened for reading.

    Attributes:
        folder: the place where it lies.
        spec: what it was made from.
        manifest: its shards and root hash.
        arrays: the layout of every array by name.
        excluded: rows that are not trained on, though they are not held out for selection either.
    """

    def __init__(self, folder: Place, spec: CacheSpec, manifest: Manifest) -> None:
        self.folder, self.spec, self.manifest = folder, spec, manifest
        self.arrays: dict[str, ArrayLayout] = layouts(spec)
        self.excluded: tuple[int, ...] = ()
        self._store = Store(folder)
        self._sealed = {(shard.array, shard.shard): shard.sha256 for shard in manifest.shards}
        self._checked: set[tuple[str, int]] = set()

    @property
    def root_hash(self) -> str:
        """The identity of the cache's contents."""
        return self.manifest.root_hash

    @property
    def rows(self) -> int:
        """N."""
        return self.spec.data.rows

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Rows of an array (all of them by default), decoded and checked.

        Every chunk is checked against its crc32c, and every shard, the first time it is touched, against the sha256 of
        the manifest: chunks of another shard, or of another cache, have checksums that fit.

        Raises:
            ConfigError: no such array.
            CorruptError: a checksum fails, or logits hold NaN.
        """
        if name not in self.arrays:
            raise ConfigError(f"{self.folder} has no array '{name}'; it has {', '.join(self.arrays)}")
        array = self.arrays[name]
        rows = slice(*(rows or slice(None)).indices(array.shape[0]))
        values = np.empty((max(0, rows.stop - rows.start), *array.shape[1:]), dtype=array.dtype)
        for shard in array.shards_of(rows):
            part, wanted = array.overlap(shard, rows)
            values[wanted] = self._store.decode(array, shard, self._shard(array, shard))[part]
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise CorruptError(
                f"{self.folder}: {name} holds values that are not finite in rows {rows.start}..{rows.stop - 1}"
            )
        return values

    def _shard(self, array: ArrayLayout, shard: int) -> bytes:
        data, key = self._store.shard(array, shard), (array.name, shard)
        if key not in self._checked and sha256_bytes(data) != self._sealed[key]:
            span, name = array.rows(shard), self.folder.name(shard_key(array, shard))
            raise CorruptError(
                f"{name} (rows {span.start}..{span.stop - 1} of {array.name}) does not have the sha256 that was "
                "sealed: run darht-cache build again, then seal"
            )
        self._checked.add(key)
        return data

    def origin(self) -> dict[str, Any]:
        """Where data and teachers lay when the cache was built, as absolute paths; empty when nobody noted it."""
        data = self.folder.read(ORIGIN)
        found: dict[str, Any] = {} if data is None else json.loads(data)
        return _absolute(found, self.folder.folder) if isinstance(self.folder, LocalPlace) else found

    def size(self, name: str) -> int:
        """The bytes of an array on disk."""
        return sum(shard.size for shard in self.manifest.shards if shard.array == name)


def _absolute(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {key: _absolute(item, folder) for key, item in value.items()}
    return str((folder / value).resolve()) if isinstance(value, str) else value


def open_cache(location: Location) -> Cache:
    """Open a sealed cache in a folder or behind a URL.

    Raises:
        CacheError: it is not a cache.
        IncompleteError: it is not sealed, or a shard is missing.
        CorruptError: the manifest is not the spec's, or a shard has another size than recorded.
    """
    folder = place(location)
    spec = read_spec(folder)
    manifest = read_manifest(folder, spec)
    with ThreadPoolExecutor(_LOOKUPS) as pool:  # one question per shard: behind a URL their times would add up
        sizes = list(pool.map(folder.size, [shard.path for shard in manifest.shards]))
    for shard, size in zip(manifest.shards, sizes, strict=True):
        if size is None:
            raise IncompleteError(f"{folder.name(shard.path)} is missing: run darht-cache build again")
        if size != shard.size:
            raise CorruptError(
                f"{folder.name(shard.path)} has {size} bytes, the manifest says {shard.size}; build again"
            )
    for file in manifest.metadata:
        if sha256_bytes(folder.read(file.path) or b"") != file.sha256:
            name = folder.name(file.path)
            raise CorruptError(f"{name} is not what was sealed: run darht-cache seal again, which writes it anew")
    return Cache(folder, spec, manifest)
