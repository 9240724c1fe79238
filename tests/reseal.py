"""Caches whose numbers are wrong, and JSON that says something else, although every hash fits."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from darht.cache.builder.seal import seal
from darht.cache.format.commit import read_commit, write_commit
from darht.cache.format.layout import layouts
from darht.cache.format.manifest import read_spec
from darht.cache.format.store import Store
from darht.core.sealed import read_sealed, write_sealed
from darht.core.storage import open_storage


def reseal(folder: Path, name: str, change: Callable[[np.ndarray], None], shard: int = 0) -> None:
    """Change the numbers of a unit of an array and make every hash fit them, as a broken writer would."""
    array, store = layouts(read_spec(folder))[name], Store(folder)
    values = store.read(array, array.rows(shard)).copy()
    change(values)
    size, sha256, parts = store.write(array, shard, values)
    commit = read_commit(open_storage(folder), array, shard)
    assert commit is not None
    written = dataclasses.replace(commit, size=size, sha256=sha256, parts=parts)
    write_commit(open_storage(folder), array, written)
    seal(folder)


def rewrite(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file that carries its sha256."""
    sealed = read_sealed(path, "it is a test's")
    write_sealed(path, {**sealed.value, **changes}, sealed.files)
