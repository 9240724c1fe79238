"""What a reader sees of a sealed cache's files before it trusts them, and of numbers after it read them."""

import numpy as np

from darht.cache.format.commit import COMMITS
from darht.cache.format.images import decoder_identity
from darht.cache.format.layout import ArrayLayout, shard_key
from darht.cache.format.manifest import Manifest
from darht.cache.format.spec import CacheSpec
from darht.core.errors import CacheError, ConfigError, CorruptError, IncompleteError
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


def check_decoder(folder: Storage, spec: CacheSpec) -> None:
    """JPEG files decode to the pixels that teachers saw.

    Raises:
        ConfigError: this machine's decoder is another.
    """
    there = spec.data.decoder
    if there and there != (here := decoder_identity()):
        raise ConfigError(
            f"{folder} was built with a JPEG decoder that makes pixels {there[:12]} of a small image, Pillow makes "
            f"{here[:12]} of it here: install the Pillow that {COMMITS} names"
        )


def check_values(folder: Storage, array: ArrayLayout, values: np.ndarray, rows: slice, classes: int) -> None:
    """Logits are finite, and classes are among those that there are.

    Raises:
        CorruptError: they are not.
    """
    where = f"in rows {rows.start}..{rows.stop - 1}"
    if array.kind == "logits-class" and values.size:
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= classes:
            raise CorruptError(
                f"{folder}: {array.name} names classes {low}..{high} {where}, there are 0..{classes - 1}"
            )
    if values.dtype.kind == "f" and not all_finite(values):
        raise CorruptError(f"{folder}: {array.name} holds values that are not finite {where}")


def refusal(folder: Storage, path: str, array: ArrayLayout, shard: int) -> CacheError:
    """What to raise about a shard that does not have its sha256."""
    if folder.size(path) is None:
        return IncompleteError(f"{folder.name(path)} is missing: build or push it again")
    span, path = array.rows(shard), folder.name(shard_key(array, shard))
    return CorruptError(
        f"{path} (rows {span.start}..{span.stop - 1} of {array.name}) does not have the sha256 that was sealed: run "
        "darht-cache build again, then seal"
    )


def read_part(folder: Storage, of: str = "") -> tuple[str, ...] | None:
    """The arrays that are here, where a folder is a part of a cache; none of a cache of another root hash than `of`."""
    data = folder.read(PART)
    if data is None:
        return None
    again = "run darht-cache pull again"
    said = unseal_json(data, folder.name(PART), again).value
    arrays = said.get("arrays")
    if not isinstance(arrays, list) or not all(isinstance(name, str) for name in arrays):
        raise CorruptError(f"{folder.name(PART)} must list the arrays that are here: {again}")
    return tuple(arrays) if of in ("", said.get("of")) else ()


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
