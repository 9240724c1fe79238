"""Read WebDataset shards that `darht-cache export` wrote, as if they were the cache that they came from.

A tar is compared with its sha256 when it is touched first, and its headers are read for where each entry begins. From
then on the entries that hold some rows are one read, so that an export can be streamed and is never held whole.
"""

import functools
import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from braceexpand import braceexpand

from darht.cache.format.layout import ArrayLayout
from darht.cache.format.manifest import MANIFEST, SPEC, check_table
from darht.cache.format.tar_index import INDEX, Index, TarRecord, lined_up, tar_name
from darht.cache.read.local_copy import CopiedStorage
from darht.cache.read.reach import Reach
from darht.cache.read.reader import Cache, open_described
from darht.cache.read.steady import FileChanged
from darht.core.bounded import show
from darht.core.config import fingerprint, parse_canonical
from darht.core.errors import CacheError, ConfigError, CorruptError, IncompleteError
from darht.core.files import is_sha256
from darht.core.storage import LocalStorage, Location, Storage, open_file, open_storage, read_together, sizes

Arrays = dict[str, np.ndarray]
_BROKEN = (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, tarfile.TarError)


@dataclass(frozen=True)
class _Table:
    """Where the entries of a tar lie: first row of each, and where it begins; one more offset for the end."""

    firsts: np.ndarray
    offsets: np.ndarray


class ExportedCache(Cache):
    """An export, opened for reading."""

    def __init__(self, folder: Storage, index: Index) -> None:
        super().__init__(folder, index.spec, index.manifest)
        self._index = index
        self._tables: dict[int, _Table] = {}

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Rows of an array (all of them by default).

        Raises:
            ConfigError: no such array.
            IncompleteError: a tar is missing.
            CorruptError: a tar is cut or changed.
        """
        if self._array(name).kind == "views":
            return np.array(self._index.offsets, dtype=np.int8)[rows or slice(None)]
        return super().read(name, rows)

    def read_into(self, out: Mapping[str, np.ndarray], rows: slice) -> None:
        """The same rows of several arrays, into numpy arrays of their shape and type that are there already.

        Raises:
            ConfigError, IncompleteError, CorruptError: as `read`.
        """
        arrays = [self._array(name) for name in out]
        for shard in arrays[0].shards_of(rows):
            part, wanted = arrays[0].overlap(shard, rows)
            tar, first = self._index.tars[shard], arrays[0].rows(shard).start
            span, at = slice(first + part.start, first + part.stop), wanted.start
            read = functools.partial(self._read_tar, shard, span, out, at)
            try:
                self._steadily(arrays[0].name, shard, read)
            except _BROKEN as error:
                raise CorruptError(f"{self.folder.name(tar.path)} does not decode: {error}; export again") from error
        for name, values in out.items():
            self._check_values(name, values, rows)

    def _apart(self, array: ArrayLayout) -> bool:
        return False

    def _is_known(self, name: str, shard: int) -> bool:
        return shard in self._tables

    def _check(self, name: str, shard: int) -> None:
        """Compare a tar with the sha256 of the index, once."""
        self._table(shard)

    def _path(self, name: str, shard: int) -> str:
        return self._index.tars[shard].path

    def _forget(self, name: str, shard: int) -> None:
        self._tables.pop(shard, None)

    def origin(self) -> dict[str, Any]:
        """Empty: an export travels, so it does not say where data and teachers lay."""
        return {}

    def size(self, name: str) -> int:
        """Bytes of an array when it is decoded; a tar does not keep arrays apart."""
        array = self.arrays[name]
        return super().size(name) if array.encoded else array.shape[0] * array.row_bytes

    @property
    def tars(self) -> tuple[TarRecord, ...]:
        """The tars of the index."""
        return self._index.tars

    def _read_tar(self, shard: int, rows: slice, out: Mapping[str, np.ndarray], start: int) -> None:
        table = self._table(shard)
        low = int(np.searchsorted(table.firsts, rows.start, "right")) - 1
        high = int(np.searchsorted(table.firsts, rows.stop, "left"))
        data = self._steady.read(self._index.tars[shard].path, int(table.offsets[low]), int(table.offsets[high]))
        for key, entry in _entries(data or b""):
            first = int(key)
            found = _block(entry, out) if self._index.layout == "blocks" else self._sample(entry, first, out)
            for name, values in found.items():
                last = min(first + len(values), rows.stop)
                kept = values[max(0, rows.start - first) : last - first]
                at = start + max(first, rows.start) - rows.start
                out[name][at : at + len(kept)] = kept

    def _table(self, shard: int) -> _Table:
        if shard not in self._tables:
            self._tables[shard] = self._checked_table(self._index.tars[shard])
        return self._tables[shard]

    def _checked_table(self, tar: TarRecord) -> _Table:
        """The table of a tar whose bytes are those that the index names."""
        name = self.folder.name(tar.path)
        with open_file(self._steady, tar.path, tar.size) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != tar.sha256:
                if isinstance(self.folder, CopiedStorage) and self.folder.drop(tar.path):
                    raise FileChanged(tar.path)  # the copy went bad on the disk, and is fetched again
                if self.folder.size(tar.path) is None:
                    raise IncompleteError(f"{name} is missing: export or push the cache again")
                raise CorruptError(f"{name} does not have the sha256 that the index names; export again")
            file.seek(0)
            return _table_of(file, tar, name)

    def _sample(self, entry: dict[str, bytes], row: int, names: Iterable[str]) -> Arrays:
        found: Arrays = {}
        with np.load(io.BytesIO(entry["logits.npz"]), allow_pickle=False) as logits:
            for name in names:
                array = self.arrays[name]
                if array.said:
                    found[name] = logits[array.of_teacher]
                elif array.attack is not None:
                    found[name] = self._delta(entry["delta.npy"], array.attack)
                elif array.encoded:
                    found[name] = np.empty((), dtype=object)
                    found[name][()] = entry["png"] if "png" in entry else entry["jpg"]
                elif array.kind == "image":
                    found[name] = _pixels(entry["png"], array.shape[1:])
                elif array.kind == "boxes":
                    found[name] = np.array(json.loads(entry["json"])["boxes"], dtype=array.dtype)
                else:
                    found[name] = np.asarray(int(entry["cls"]) if array.kind == "label" else row)
        return {name: value[None] for name, value in found.items()}

    def _delta(self, data: bytes, name: str) -> np.ndarray:
        """The perturbations of one attack: those of all attacks lie one behind the other."""
        attacks, deltas = self.spec.attacks, np.load(io.BytesIO(data), allow_pickle=False)
        before = list(attacks)[: list(attacks).index(name)]
        at = sum(attacks[other].views for other in before)
        values: np.ndarray = deltas[at : at + attacks[name].views]
        return values


def _pixels(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """An image `[3, H, W]`; one of another size is not decoded, however many pixels its header names."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        if image.size != (shape[2], shape[1]):
            raise ValueError(f"an image of {image.size[0]}x{image.size[1]} pixels among those of {shape[2]}x{shape[1]}")
        return np.asarray(image).transpose(2, 0, 1)


def _block(entry: dict[str, bytes], names: Iterable[str]) -> Arrays:
    with np.load(io.BytesIO(entry["npz"]), allow_pickle=False) as block:
        return {name: lined_up(block, name) for name in names}


def _entries(data: bytes) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The entries of a piece of a tar that begins and ends between two of them: key, and files by suffix."""
    key, files = "", dict[str, bytes]()
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            found, _, suffix = member.name.partition(".")
            if found != key and files:
                yield key, files
                files = {}
            key, file = found, archive.extractfile(member)
            files[suffix] = b"" if file is None else file.read()
    yield key, files


def _table_of(file: IO[bytes], tar: TarRecord, name: str) -> _Table:
    """Where entries begin, by the headers of a tar.

    Raises:
        CorruptError: it holds other entries than the index says.
    """
    firsts: list[int] = []
    offsets: list[int] = []
    with tarfile.open(fileobj=file) as archive:
        for member in archive:
            first = int(member.name.partition(".")[0])
            if not firsts or firsts[-1] != first:
                firsts.append(first)
                offsets.append(member.offset)
        end = archive.offset
    if len(firsts) != tar.entries or firsts[0] != tar.rows[0]:
        raise CorruptError(f"{name} holds {len(firsts)} entries, the index says {tar.entries}; export again")
    return _Table(np.array(firsts), np.array([*offsets, end]))


def open_shards(location: Location, reach: Reach = Reach()) -> Cache:
    """Open a sealed cache or an export of one.

    Args:
        location: a folder or a URL; of an export also a pattern of its tars, `DIR/shard-{00000..00003}.tar`, with
            `index.json` beside them.
        reach: how a URL is read.

    Raises:
        CacheError: it is neither.
        ConfigError: a pattern that does not name every tar of the index.
        IncompleteError: the cache is not sealed, or something is missing.
        CorruptError: the index or the manifest is not what was written, or a tar is cut.
        UnreachableError: a server does not answer.
    """
    pattern = str(location)
    if "{" not in pattern or Path(pattern).is_dir():  # a folder may be called c{1,2}
        folder = open_storage(location, retry_for=reach.retry_for)
        index, *described = read_together(folder, (INDEX, SPEC, MANIFEST))
        data = index.result()
        return open_described(folder, described, reach) if data is None else _open_export(folder, data, reach)
    parts = _expand(pattern)
    folder = open_storage(parts[0][0] or ".", retry_for=reach.retry_for)
    if len({part[0] for part in parts}) > 1:
        raise ConfigError(f"{pattern} names tars in several folders; an export lies in one")
    data = folder.read(INDEX)
    if data is None:
        raise CacheError(f"{folder} is not an export: {folder.name(INDEX)} is missing; darht-cache export writes it")
    cache = _open_export(folder, data, reach)
    named, held = {part[2] for part in parts}, {tar.path for tar in cache.tars}
    if named != held:
        wrong = [f"lacks {name}" for name in sorted(held - named)] + [
            f"names {name}, which the index does not hold" for name in sorted(named - held)
        ]
        raise ConfigError(f"{pattern} does not name the {len(held)} tars of {folder.name(INDEX)}: it {wrong[0]}")
    return cache


def _expand(pattern: str) -> list[tuple[str, str, str]]:
    """Folder, slash and name of each tar of a pattern; braces of a folder that is there are part of its name."""
    head, slash, tail = pattern.rpartition("/")
    try:
        if head and Path(head).is_dir():
            return [(head, slash, name) for name in braceexpand(tail)]
        return [path.rpartition("/") for path in braceexpand(pattern)]
    except ValueError as error:  # braceexpand's own word for braces that do not close
        raise ConfigError(f"{pattern} is no folder and no pattern of tars: {error}") from error


def _open_export(folder: Storage, data: bytes, reach: Reach) -> ExportedCache:
    cache = open_index(folder, data, reach)
    if isinstance(folder, LocalStorage):
        check_sizes(folder, cache.tars)
    return cache


def open_index(folder: Storage, data: bytes, reach: Reach = Reach()) -> ExportedCache:
    """An export from the bytes of its index; no tar is looked for yet.

    Raises:
        CorruptError: the index is not what was written.
    """
    name = folder.name(INDEX)
    try:
        index = parse_canonical(Index, data, INDEX)
    except ConfigError as error:
        raise CorruptError(f"{name} is not an export's index: {error}; export again") from error
    if index.sha256 != index.checksum():
        raise CorruptError(f"{name} does not have the sha256 that it names; export again")
    if index.manifest.fingerprint != fingerprint(index.spec):
        raise CorruptError(f"{name} holds a manifest of another spec; export again")
    check_table(index.manifest, index.spec, name)
    if wrong := [tar.sha256 for tar in index.tars if not is_sha256(tar.sha256)]:
        raise CorruptError(f"{name} has {show(wrong[0])} where a sha256 must be; export again")
    files = ((tar.path, tar.size, tar.sha256) for tar in index.tars)
    cache = ExportedCache(reach.through_copy(folder, files), index)
    rows = cache.arrays["label"]
    if [tar.rows for tar in index.tars] != [(rows.rows(k).start, rows.rows(k).stop) for k in range(rows.shards)]:
        raise CorruptError(f"{name} does not list one tar for each shard of rows; export again")
    if [tar.path for tar in index.tars] != [tar_name(k) for k in range(rows.shards)]:
        raise CorruptError(f"{name} must name {tar_name(0)} and so on, which lie beside it; export again")
    return cache


def check_sizes(folder: Storage, tars: Sequence[TarRecord]) -> None:
    """Every tar is there in its size.

    Raises:
        IncompleteError, CorruptError: the first is not.
    """
    for tar, size in zip(tars, sizes(folder, [tar.path for tar in tars]), strict=True):
        if size is None:
            raise IncompleteError(f"{folder.name(tar.path)} is missing: export the cache again")
        if size != tar.size:
            raise CorruptError(
                f"{folder.name(tar.path)} has {size} bytes, the index says {tar.size}: it is cut; export again"
            )
