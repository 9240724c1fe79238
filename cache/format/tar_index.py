"""`index.json` of a WebDataset export: the tars, and the cache that they came from."""

from dataclasses import dataclass
from typing import Literal

from darht.cache.format.manifest import Manifest
from darht.cache.format.spec import CacheSpec
from darht.core.config import fingerprint, to_plain

Layout = Literal["samples", "blocks"]


INDEX, FORMAT = "index.json", "darht-webdataset"


def tar_name(number: int) -> str:
    """The name of a tar in its export."""
    return f"shard-{number:05d}.tar"


@dataclass(frozen=True)
class TarRecord:
    """One tar in the index: its rows [first, past the last], its entries, bytes and sha256."""

    path: str
    rows: tuple[int, ...]
    entries: int
    size: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """The contents of `index.json`: what was exported, how, and the tars; `sha256` is that of all the rest."""

    layout: Layout
    spec: CacheSpec
    manifest: Manifest
    offsets: tuple[tuple[int, ...], ...]
    tars: tuple[TarRecord, ...]
    format: str = FORMAT
    format_version: int = 1
    sha256: str = ""

    def checksum(self) -> str:
        """The sha256 of the canonical JSON without `sha256`."""
        return fingerprint({key: value for key, value in to_plain(self).items() if key != "sha256"})
