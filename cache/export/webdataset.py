"""A sealed cache as WebDataset shards: tar files that any WebDataset user can read, and darht-train as well.

Two layouts. `samples` has one entry per row (`.png`, `.cls`, `.delta.npy`, `.logits.npz`, `.json`), for people who
train with their own code. `blocks` has one `.npz` per block of rows (256, see `layout.block_rows`), which reads many
times faster. `index.json` beside the tars lists rows, bytes and sha256 of each, and is written last. The same cache
gives the same bytes, and however large it is, one block of it is held in memory at a time.
"""

import hashlib
import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from darht.cache.format.images import encode_png, suffix_of
from darht.cache.format.layout import BOXES, block_rows
from darht.cache.format.tar_index import INDEX, Index, Layout, TarRecord, flat_images, tar_name
from darht.cache.read.reader import Cache
from darht.core.config import canonical_json, parse_canonical
from darht.core.errors import CacheError, ConfigError
from darht.core.files import is_free, sha256_file, whole_file, write_atomic

UNFINISHED = "unfinished.json"
# Zeros after a tar's end, which tar ignores: without them the npz of the last sample lies within the last 64 KiB, where
# Python's zipfile (and so mlcroissant) looks for the end of a zip and takes the tar for one.
_TAIL = 1 << 17
Entry = dict[str, Any]


def export_webdataset(cache: Cache, out: Path, layout: Layout) -> Index:
    """Write a sealed cache as tar shards, one for each shard of rows, and `index.json` last.

    An export that was killed goes on, and one that is whole is left as it is: tars that are as they were recorded stay,
    the others are written, and the bytes are those of an export that never stopped.

    Raises:
        CacheError: the folder holds something else.
        CorruptError: a checksum of the cache fails.
    """
    known = {tar.path: tar for tar in _claim(cache, out, layout)}
    step, tars = cache.spec.store.rows_per_shard, list[TarRecord]()
    for number, first in enumerate(range(0, cache.rows, step)):
        path, rows = tar_name(number), slice(first, min(first + step, cache.rows))
        if path not in known or not _is_whole(out / path, known[path]):
            known[path] = _write_tar(cache, out, path, rows, layout)
            _keep(cache, out, layout, known)
        tars.append(known[path])
    offsets = () if cache.spec.views.resized else tuple(tuple(row) for row in cache.views.tolist())
    index = Index(layout, cache.spec, cache.manifest, offsets, tuple(tars))
    index = replace(index, sha256=index.checksum())
    write_atomic(out / INDEX, canonical_json(index).encode())
    (out / UNFINISHED).unlink(missing_ok=True)
    return index


@dataclass(frozen=True)
class _Unfinished:
    """The contents of `unfinished.json`, which lies there until `index.json` does: whose tars these are."""

    root_hash: str
    layout: Layout
    tars: tuple[TarRecord, ...] = ()


def _claim(cache: Cache, out: Path, layout: Layout) -> tuple[TarRecord, ...]:
    """The tars that an earlier export of the same left in `out`; what a killed write left is removed."""
    if is_free(out):
        for leftover in out.glob(".*.tmp"):
            leftover.unlink()
        _keep(cache, out, layout, {})
        return ()
    kind: type[_Unfinished | Index] = Index if (out / INDEX).is_file() else _Unfinished
    try:
        name = INDEX if kind is Index else UNFINISHED
        found = parse_canonical(kind, (out / name).read_bytes(), name)
    except (OSError, ConfigError) as error:
        raise CacheError(
            f"{out} is not empty and no export that goes on: choose a new or empty --out folder"
        ) from error
    root_hash = found.manifest.root_hash if isinstance(found, Index) else found.root_hash
    if (root_hash, found.layout) != (cache.root_hash, layout):
        raise CacheError(
            f"{out} holds an export of the cache {root_hash[:12]} with layout {found.layout}, this is "
            f"{cache.root_hash[:12]} with layout {layout}: choose a new or empty --out folder"
        )
    for leftover in out.glob(".*.tmp"):
        leftover.unlink()
    return found.tars


def _keep(cache: Cache, out: Path, layout: Layout, tars: dict[str, TarRecord]) -> None:
    state = _Unfinished(cache.root_hash, layout, tuple(tars[path] for path in sorted(tars)))
    write_atomic(out / UNFINISHED, canonical_json(state).encode())


def _is_whole(path: Path, tar: TarRecord) -> bool:
    return path.is_file() and path.stat().st_size == tar.size and sha256_file(path) == tar.sha256


class _Hashed:
    """A file that is hashed and counted while it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self._file.write(data)


def _write_tar(cache: Cache, out: Path, path: str, rows: slice, layout: Layout) -> TarRecord:
    count = 0
    with whole_file(out / path) as file:
        hashed = _Hashed(file)
        with tarfile.open(fileobj=hashed, mode="w|") as tar:  # type: ignore[call-overload]  # it is written to alone
            for entry in _entries(cache, rows, layout):
                _add(tar, entry)
                count += 1
        hashed.write(bytes(_TAIL))
    return TarRecord(path, (rows.start, rows.stop), count, hashed.size, hashed.digest.hexdigest())


def _add(tar: tarfile.TarFile, entry: Entry) -> None:
    """Write an entry as WebDataset's own writer does, which would import torch: `KEY.NAME`, by name."""
    for name in sorted(entry.keys() - {"__key__"}):
        member = tarfile.TarInfo(f"{entry['__key__']}.{name}")
        member.size, member.mode, member.mtime = len(entry[name]), 0o444, 0
        member.uname = member.gname = "darht"
        tar.addfile(member, io.BytesIO(entry[name]))


def _entries(cache: Cache, rows: slice, layout: Layout) -> Iterator[Entry]:
    step, names = block_rows(cache.spec.store), [name for name, array in cache.arrays.items() if array.kind != "views"]
    for first in range(rows.start, rows.stop, step):
        block = slice(first, min(first + step, rows.stop))
        arrays = {name: cache.read(name, block) for name in names if block.start < cache.arrays[name].shape[0]}
        if layout == "samples":
            yield from _samples(cache, arrays, block)
        else:
            yield {"__key__": f"{first:08d}", "npz": _npz(flat_images(arrays))}


def _samples(cache: Cache, arrays: dict[str, np.ndarray], rows: slice) -> Iterator[Entry]:
    attacks, classes = cache.spec.attacks, cache.spec.data.classes
    said = [(name, array) for name, array in cache.arrays.items() if array.said]
    for i in range(rows.stop - rows.start):
        label = int(arrays["label"][i])
        about = {
            "source_index": rows.start + i,
            "class": classes[label] if label >= 0 else None,
            "delta": {name: attack.views for name, attack in attacks.items()},
            "cache": cache.root_hash,
        }
        image = arrays["image"][i] if cache.spec.store.encoded else encode_png(arrays["image"][i])
        entry = {"__key__": f"{rows.start + i:08d}", suffix_of(image): image, "cls": str(label).encode()}
        entry["json"] = canonical_json(about).encode()
        entry["logits.npz"] = _npz(
            {array.of_teacher: arrays[name][i] for name, array in said if rows.start + i < array.shape[0]}
        )
        if BOXES in arrays:
            about["boxes"] = arrays[BOXES][i].tolist()
            entry["json"] = canonical_json(about).encode()
        if attacks:
            entry["delta.npy"] = _npy(np.concatenate([arrays[f"delta/{name}"][i] for name in attacks]))
        yield entry


def _npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(values), allow_pickle=False)
    return buffer.getvalue()


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()
