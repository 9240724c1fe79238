"""`index.json` of a WebDataset export: the tars, and the cache that they came from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from darht.cache.format.manifest import Manifest
from darht.cache.format.spec import CacheSpec
from darht.core.config import fingerprint, to_plain

Layout = Literal["samples", "blocks"]


INDEX, FORMAT = "index.json", "darht-webdataset"
IMAGE_SIZES = "image-size"  # beside encoded images in a block


def flat_images(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of a block as an npz can hold them: encoded images end to end, uint8, with the size of each."""
    images = arrays.get("image")
    if images is None or images.dtype != object:
        return dict(arrays)
    flat = np.frombuffer(b"".join(images), dtype=np.uint8)
    return {**arrays, "image": flat, IMAGE_SIZES: np.array([len(image) for image in images], dtype=np.int64)}


def lined_up(block: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """An array of a block from its npz, encoded images one by one again."""
    if name != "image" or IMAGE_SIZES not in block:
        return block[name]
    data, ends = block[name].tobytes(), np.cumsum(block[IMAGE_SIZES]).tolist()
    found = np.empty(len(ends), dtype=object)
    found[:] = [data[first:last] for first, last in zip([0, *ends], ends, strict=False)]
    return found


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
