"""What is served: caches and exports by name, and of each the files that its manifest names, with size and sha256."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from darht.cache.format.manifest import MANIFEST, SPEC
from darht.cache.format.tar_index import INDEX
from darht.cache.read.reader import Cache
from darht.cache.read.webdataset import ExportedCache, open_shards
from darht.core.errors import CacheError, ConfigError
from darht.core.files import sha256_bytes, sha256_file

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Item:
    """One file.

    Attributes:
        size: in bytes.
        sha256: of its bytes, as the manifest has it.
        fixed: whether the name will always mean these bytes, as it does for shards; a manifest grows with its cache.
    """

    size: int
    sha256: str
    fixed: bool


@dataclass(frozen=True)
class Served:
    """A cache, or an export, as it was when its manifest was read.

    Attributes:
        name: the first part of its URLs.
        folder: where it lies.
        items: what may be read, by key.
        cache: what it holds.
        stamp: of the manifest's file, to notice that the cache has grown.
        compared: size, time of change and inode of each file whose sha256 was compared.
    """

    name: str
    folder: Path
    items: Mapping[str, Item]
    cache: Cache
    stamp: tuple[int, int]
    compared: dict[str, tuple[int, int, int]] = field(default_factory=dict)

    def holds(self, key: str, found: os.stat_result) -> bool:
        """Whether a file has the sha256 that its manifest names; read once, and again when it is replaced."""
        stamp = found.st_size, found.st_mtime_ns, found.st_ino
        if self.compared.get(key) != stamp:
            if sha256_file(self.folder / key) != self.items[key].sha256:
                return False
            self.compared[key] = stamp
        return True

    @property
    def size(self) -> int:
        """Bytes of all that is served."""
        return sum(item.size for item in self.items.values())


class Catalogue:
    """The caches of one server, by name; one that has grown is read again.

    Raises:
        ConfigError: two folders of one name, or a name that does not fit into a URL.
        CacheError: a folder holds no sealed cache and no export.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self._served: dict[str, Served] = {}
        for folder in folders:
            name = folder.resolve().name
            if not _NAME.fullmatch(name):
                raise ConfigError(f"{folder} cannot be a part of a URL: use letters, digits, '.', '_' and '-' alone")
            if name in self._served:
                raise ConfigError(
                    f"{self._served[name].folder} and {folder} have one name, which is that of their URLs: rename one"
                )
            self._served[name] = _read(name, folder)

    def names(self) -> list[str]:
        """In the order of the command line."""
        return list(self._served)

    def get(self, name: str) -> Served | None:
        """The cache of a name, as it is now; None where there is none."""
        served = self._served.get(name)
        if served is not None and _stamp(served.folder) != served.stamp:
            served = self._served[name] = _read(name, served.folder)
        return served


def _stamp(folder: Path) -> tuple[int, int]:
    for name in (INDEX, MANIFEST):
        if (folder / name).is_file():
            found = (folder / name).stat()
            return found.st_mtime_ns, found.st_size
    raise CacheError(
        f"{folder} holds no sealed cache and no export: {MANIFEST} is missing; darht-cache build makes one"
    )


def _read(name: str, folder: Path) -> Served:
    stamp, cache = _stamp(folder), open_shards(folder)
    if isinstance(cache, ExportedCache):
        items = {tar.path: Item(tar.size, tar.sha256, fixed=True) for tar in cache.tars}
        described = [INDEX]
    else:
        items = {shard.path: Item(shard.size, shard.sha256, fixed=True) for shard in cache.manifest.shards}
        items |= {file.path: Item(file.size, file.sha256, fixed=False) for file in cache.manifest.metadata}
        described = [SPEC, MANIFEST]
    for key in described:
        data = (folder / key).read_bytes()
        items[key] = Item(len(data), sha256_bytes(data), fixed=False)
    return Served(name, folder, items, cache, stamp)
