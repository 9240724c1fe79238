"""What a reader sees of a sealed cache's files before it trusts them, and of numbers after it read them."""

import numpy as np

from darht.cache.format.manifest import Manifest
from darht.core.errors import CorruptError, IncompleteError
from darht.core.files import sha256_bytes
from darht.core.sealed import unseal_json
from darht.core.storage import Storage, sizes

PART = "part.json"


def all_finite(values: np.ndarray) -> bool:
    """Whether no float is infinite or not a number."""
    if values.dtype != np.float16:
        return bool(np.isfinite(values).all())
    # An exponent of ones; 17 times as fast as isfinite, which goes through float32.
    return not values.size or int((values.view(np.uint16) & 0x7C00).max()) < 0x7C00


def read_part(folder: Storage) -> tuple[str, ...] | None:
    """The arrays that are here, where a folder is a part of a cache."""
    data = folder.read(PART)
    if data is None:
        return None
    again = "run darht-cache pull again"
    arrays = unseal_json(data, folder.name(PART), again).value.get("arrays")
    if not isinstance(arrays, list) or not all(isinstance(name, str) for name in arrays):
        raise CorruptError(f"{folder.name(PART)} must list the arrays that are here: {again}")
    return tuple(arrays)


def check_files(folder: Storage, manifest: Manifest, part: tuple[str, ...] | None) -> None:
    """Every shard is there in its size, and every description is the one that was sealed."""
    shards = [shard for shard in manifest.shards if part is None or shard.array in part]
    found = sizes(folder, [shard.path for shard in shards])
    for shard, size in zip(shards, found, strict=True):
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
