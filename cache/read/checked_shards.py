"""Shards of a sealed cache, of which nothing is trusted before it was compared with its sha256.

Who holds a file may know its sha256: the local copy compares it on its way in, `darht-cache serve` before it sends it,
and object stores keep what the writer noted. Where that is the sha256 of the sealed bytes, nobody reads all of them for
it once more.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from darht.cache.format.layout import ArrayLayout
from darht.cache.format.manifest import Manifest
from darht.cache.format.shards import Index, plain_index
from darht.cache.format.store import ShardReader
from darht.cache.read.files import refusal
from darht.cache.read.local_copy import CopiedStorage
from darht.cache.read.steady import FileChanged, SteadyStorage
from darht.cache.read.together import together
from darht.core.errors import CorruptError
from darht.core.files import sha256_bytes
from darht.core.storage import LocalStorage, Storage, open_file

_CHANGES = 3  # times that a file may be replaced by the same bytes while some rows are read from it


class CheckedShards:
    """The shards of a cache in a folder.

    Attributes:
        folder: the storage where they lie.
        arrays: the layout of every array by name.
    """

    def __init__(self, folder: Storage, manifest: Manifest, arrays: dict[str, ArrayLayout]) -> None:
        self.folder, self.arrays = folder, arrays
        self._steady = SteadyStorage(folder)
        self._store = ShardReader(self._steady)
        self._sealed = {(shard.array, shard.shard): shard for shard in manifest.shards}
        self._checked: set[tuple[str, int]] = set()
        self._checked_views: set[tuple[str, int, int]] = set()
        self._indices: dict[tuple[str, int], Index] = {}  # of shards that are read in parts, once for each

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

    def stop_prefetch(self) -> None:
        """Begin to copy no shard more of those that were wanted soon."""
        if isinstance(self.folder, CopiedStorage):
            self.folder.cancel()

    def look_up(self, units: Sequence[tuple[str, int]]) -> None:
        """Ask a server where the chunks of shards lie that are read in parts, and what it knows of their sha256."""
        if not isinstance(self.folder, LocalStorage):
            together(self.folder, self._ask, units)

    def _ask(self, name: str, shard: int) -> None:
        self._steadily(name, shard, lambda: self._is_known(name, shard))

    def _path(self, name: str, shard: int) -> str:
        """The key of the file that holds a shard of an array."""
        return self._sealed[name, shard].path

    def _steadily(self, name: str, shard: int, action: Callable[[], object]) -> None:
        """An action on one file; again, from its sha256 on, when the file was replaced meanwhile."""
        path = self._path(name, shard)
        for _ in range(_CHANGES):
            try:
                action()
                return
            except FileChanged:
                self._steady.forget(path)
                self._forget(name, shard)
        raise CorruptError(f"{self.folder.name(path)} is replaced again and again while it is read: stop who writes it")

    def _forget(self, name: str, shard: int) -> None:
        self._checked.discard((name, shard))
        self._checked_views -= {key for key in self._checked_views if key[:2] == (name, shard)}
        self._indices.pop((name, shard), None)

    def _check(self, name: str, shard: int) -> None:
        if not self._is_known(name, shard):
            sealed = self._sealed[name, shard]
            with open_file(self._steady, sealed.path, sealed.size) as file:
                self._accept(name, shard, hashlib.file_digest(file, "sha256").hexdigest())

    def _is_known(self, name: str, shard: int) -> bool:
        """Whether a shard was compared with its sha256: here, or by who holds it and says so.

        Reading in parts takes the word of a server in any case: what it sends later is held against its tag alone.
        """
        if (name, shard) not in self._checked and not isinstance(self.folder, LocalStorage):
            try:
                self._chunks(self.arrays[name], shard)
            except CorruptError:  # a copy that went bad, or worse: who compares all of it finds out
                return False
            if self._steady.sha256(self._path(name, shard)) == self._sealed[name, shard].sha256:
                self._checked.add((name, shard))
        return (name, shard) in self._checked

    def _chunks(self, array: ArrayLayout, shard: int) -> Index:
        key = (array.name, shard)
        if key not in self._indices:
            self._indices[key] = self._store.read_index(array, shard, self._sealed[key].size)
        return self._indices[key]

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
        self._store.read_part(array, shard, self._chunks(array, shard), part, out)

    def _decode_view(self, array: ArrayLayout, shard: int, part: slice, view: int, out: np.ndarray) -> None:
        name = array.name
        if (name, shard, view) not in self._checked_views and not self._is_known(name, shard):
            self._accept(name, shard, self._store.view_sha256(array, shard, view), view)
        self._store.read_part(array, shard, plain_index(array, shard), part, out, view=view)

    def _accept(self, name: str, shard: int, sha256: str, view: int | None = None) -> None:
        sealed = self._sealed[name, shard]
        if sha256 != (sealed.sha256 if view is None else sealed.parts[view]):
            if isinstance(self.folder, CopiedStorage) and self.folder.drop(self._path(name, shard)):
                raise FileChanged(self._path(name, shard))  # the copy went bad on the disk, and is fetched again
            raise refusal(self.folder, self._path(name, shard), self.arrays[name], shard)
        if view is None:
            self._checked.add((name, shard))
        else:
            self._checked_views.add((name, shard, view))
