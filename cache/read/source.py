"""A source as a cache that nobody built: images and labels where they are, no teachers, and no files of its own."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from darht.cache.format.manifest import Manifest, root_hash
from darht.cache.format.spec import CacheSpec
from darht.cache.format.views import view_table
from darht.cache.read.reader import Cache
from darht.cache.sources.rows import LazyImages
from darht.core.config import fingerprint
from darht.core.storage import LocalStorage

_DECODED = 64  # images of files in memory on their way to those who asked


class SourceCache(Cache):
    """Rows of a source, read as those of a sealed cache are.

    Args:
        spec: what such a cache would be made from, without teachers.
        holdout: rows kept from training, for selection.
        images: uint8 `[N, 3, H, W]`; those of files are decoded whenever their rows are read.
        labels: `[N]`.
    """

    built: ClassVar[bool] = False

    def __init__(self, spec: CacheSpec, holdout: tuple[int, ...], images: Any, labels: np.ndarray) -> None:
        manifest = Manifest(fingerprint(spec), spec.data.rows, holdout, shards=(), root_hash="")
        name = LocalStorage(
            Path(f"the {spec.data.split} split of {spec.data.source}")
        )  # for messages: nothing is there
        super().__init__(name, spec, replace(manifest, root_hash=root_hash(manifest)))
        offsets = view_table(**vars(spec.views), seed=spec.seed)
        self._held = {"image": images, "label": labels, "views/offset": offsets}

    def read_into(self, out: Mapping[str, np.ndarray], rows: slice) -> None:
        """The same rows of several arrays, into numpy arrays of their shape and type that are there already."""
        for name, values in out.items():
            held = self._held[self._array(name).name]
            if not isinstance(held, LazyImages):
                values[...] = held[rows]
                continue
            for start in range(0, len(values), _DECODED):
                part = slice(start, min(start + _DECODED, len(values)))
                values[part] = held[rows.start + part.start : rows.start + part.stop]

    def check(self, name: str, shard: int) -> None:
        """Nothing: there are no shards."""

    def origin(self) -> dict[str, Any]:
        """Empty: it was not built."""
        return {}
