"""Read a sealed cache."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from darht.cache.build import ORIGIN
from darht.cache.layout import ArrayLayout, layouts
from darht.cache.seal import Manifest, read_manifest, read_spec
from darht.cache.spec import CacheSpec
from darht.cache.store import Store
from darht.core.errors import ConfigError, CorruptError, IncompleteError
from darht.core.files import sha256_file


class Cache:
    """A sealed cache, opened for reading.

    Attributes:
        folder: where it lies.
        spec: what it was made from.
        manifest: its shards and root hash.
        arrays: the layout of every array by name.
    """

    def __init__(self, folder: Path, spec: CacheSpec, manifest: Manifest) -> None:
        self.folder, self.spec, self.manifest = folder, spec, manifest
        self.arrays: dict[str, ArrayLayout] = layouts(spec)
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
        self._check_shards(array, rows)
        values = self._store.read(array, rows)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise CorruptError(
                f"{self.folder}: {name} holds values that are not finite in rows {rows.start}..{rows.stop - 1}"
            )
        return values

    def _check_shards(self, array: ArrayLayout, rows: slice) -> None:
        for shard in range(rows.start // array.rows_per_shard, -(-rows.stop // array.rows_per_shard)):
            path, key = self._store.path(array, shard), (array.name, shard)
            if key in self._checked or not path.is_file():
                continue  # a missing shard is the store's to name
            if sha256_file(path) != self._sealed[key]:
                span = array.rows(shard)
                raise CorruptError(
                    f"{path} (rows {span.start}..{span.stop - 1} of {array.name}) does not have the sha256 that was "
                    "sealed: run darht-cache build again, then seal"
                )
            self._checked.add(key)

    def origin(self) -> dict[str, Any]:
        """Where data and teachers lay when the cache was built, as absolute paths; empty when nobody noted it."""
        path = self.folder / ORIGIN
        return _absolute(json.loads(path.read_text()), self.folder) if path.is_file() else {}

    def size(self, name: str) -> int:
        """The bytes of an array on disk."""
        return sum(shard.size for shard in self.manifest.shards if shard.array == name)


def _absolute(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {key: _absolute(item, folder) for key, item in value.items()}
    return str((folder / value).resolve()) if isinstance(value, str) else value


def open_cache(folder: Path) -> Cache:
    """Open a sealed cache.

    Raises:
        CacheError: the folder is not a cache.
        IncompleteError: it is not sealed, or a shard is missing.
        CorruptError: the manifest is not the spec's, or a shard has another size than recorded.
    """
    spec = read_spec(folder)
    manifest = read_manifest(folder, spec)
    for shard in manifest.shards:
        path = folder / shard.path
        if not path.is_file():
            raise IncompleteError(f"{path} is missing: run darht-cache build again")
        if path.stat().st_size != shard.size:
            raise CorruptError(f"{path} has {path.stat().st_size} bytes, the manifest says {shard.size}; build again")
    for file in manifest.metadata:
        path = folder / file.path
        if not path.is_file() or sha256_file(path) != file.sha256:
            raise CorruptError(f"{path} is not what was sealed: run darht-cache seal again, which writes it anew")
    return Cache(folder, spec, manifest)
