"""Read WebDataset shards that `darht-cache export` wrote, as if they were the cache that they came from."""

import io
import tarfile
from typing import Any

import numpy as np
from PIL import Image

from darht.cache.export import INDEX, Index, TarRecord
from darht.cache.reader import Cache, open_cache
from darht.core.config import fingerprint, parse_canonical
from darht.core.errors import ConfigError, CorruptError, IncompleteError
from darht.core.files import sha256_bytes
from darht.core.places import Location, Place, place

Arrays = dict[str, np.ndarray]


class ExportedCache(Cache):
    """An export, opened for reading; all of it is read and checked at the first `read`."""

    def __init__(self, folder: Place, index: Index) -> None:
        super().__init__(folder, index.spec, index.manifest)
        self._index = index
        self._values: Arrays = {}

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Rows of an array (all of them by default).

        Raises:
            ConfigError: no such array.
            IncompleteError: a tar is missing.
            CorruptError: a tar is cut or changed.
        """
        if name not in self.arrays:
            raise ConfigError(f"{self.folder} has no array '{name}'; it has {', '.join(self.arrays)}")
        if not self._values:
            self._load()
        return self._values[name][rows or slice(None)]

    def origin(self) -> dict[str, Any]:
        """Empty: an export travels, so it does not say where data and teachers lay."""
        return {}

    def size(self, name: str) -> int:
        """Bytes of an array when it is decoded; a tar does not keep arrays apart."""
        return int(self.read(name).nbytes)

    def _load(self) -> None:
        values = {name: np.empty(array.shape, dtype=array.dtype) for name, array in self.arrays.items()}
        values["views/offset"][:] = np.array(self._index.offsets)
        for tar in self._index.tars:
            self._fill(values, tar)
        self._values = values

    def _fill(self, values: Arrays, tar: TarRecord) -> None:
        data = _checked(self.folder, tar)
        read = 0
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            entries: dict[str, dict[str, bytes]] = {}
            for member in archive:
                key, _, suffix = member.name.partition(".")
                file = archive.extractfile(member)
                entries.setdefault(key, {})[suffix] = b"" if file is None else file.read()
        for key, entry in entries.items():
            first = int(key)
            block = _block(entry) if self._index.layout == "blocks" else self._sample(entry, first)
            for name, rows in block.items():
                values[name][first : first + len(rows)] = rows
            read += len(block["label"])
        if len(entries) != tar.entries or read != tar.rows[1] - tar.rows[0]:
            raise CorruptError(
                f"{self.folder.name(tar.path)} holds {len(entries)} entries, the index says {tar.entries}"
            )

    def _sample(self, entry: dict[str, bytes], row: int) -> Arrays:
        with Image.open(io.BytesIO(entry["png"])) as image:
            pixels = np.asarray(image).transpose(2, 0, 1)
        with np.load(io.BytesIO(entry["logits.npz"]), allow_pickle=False) as logits:
            out = {f"logits/{name}": logits[name] for name in logits.files}
        out |= {"image": pixels, "label": np.asarray(int(entry["cls"])), "source_index": np.asarray(row)}
        if self.spec.attacks:
            deltas, at = np.load(io.BytesIO(entry["delta.npy"]), allow_pickle=False), 0
            for name, attack in self.spec.attacks.items():
                out[f"delta/{name}"] = deltas[at : at + attack.views]
                at += attack.views
        return {name: value[None] for name, value in out.items()}


def _block(entry: dict[str, bytes]) -> Arrays:
    with np.load(io.BytesIO(entry["npz"]), allow_pickle=False) as block:
        return {name: block[name] for name in block.files}


def _checked(folder: Place, tar: TarRecord) -> bytes:
    data, name = folder.read(tar.path), folder.name(tar.path)
    if data is None:
        raise IncompleteError(f"{name} is missing: export the cache again")
    if len(data) != tar.size:
        raise CorruptError(f"{name} has {len(data)} bytes, the index says {tar.size}: it is cut; export again")
    if sha256_bytes(data) != tar.sha256:
        raise CorruptError(f"{name} does not have the sha256 that the index names; export again")
    return data


def open_shards(location: Location) -> Cache:
    """Open a sealed cache or an export of one, in a folder or behind a URL.

    Raises:
        CacheError: it is neither.
        IncompleteError: the cache is not sealed, or something is missing.
        CorruptError: the index or the manifest is not what was written.
    """
    folder = place(location)
    data, name = folder.read(INDEX), folder.name(INDEX)
    if data is None:
        return open_cache(folder)
    try:
        index = parse_canonical(Index, data, INDEX)
    except ConfigError as error:
        raise CorruptError(f"{name} is not an export's index: {error}; export again") from error
    if index.manifest.fingerprint != fingerprint(index.spec):
        raise CorruptError(f"{name} holds a manifest of another spec; export again")
    return ExportedCache(folder, index)
