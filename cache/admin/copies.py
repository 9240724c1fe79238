"""Copy a sealed cache or an export from a URL to a folder, or the other way: in parallel, checked, and only what lacks.

The manifest, or an export's index, goes last, and that of another state is removed first, so that nothing looks whole
before it is. Commit records and `origin.json` stay where they are: they tell about the machines that built.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from darht.cache.admin.hub import push_to_hub
from darht.cache.admin.target import check_target, unseal
from darht.cache.format.commit import COMMITS
from darht.cache.format.manifest import MANIFEST, SPEC
from darht.cache.format.tar_index import INDEX
from darht.cache.read.files import PART, read_part
from darht.cache.read.local_copy import download
from darht.cache.read.reach import Reach
from darht.cache.read.reader import Cache
from darht.cache.read.webdataset import ExportedCache, open_shards
from darht.core.errors import CacheError, ConfigError, CorruptError
from darht.core.files import sha256_bytes, sha256_file, whole_file
from darht.core.hub import is_hub
from darht.core.sealed import seal_json
from darht.core.storage import LocalStorage, Storage, open_storage
from darht.core.storage_remote import IN_FLIGHT, RemoteStorage

_MULTIPART = 5 << 20  # bytes of a part of an upload, as obstore cuts it
OnFile = Callable[[int], None]


@dataclass(frozen=True)
class Copied:
    """What was done: files and bytes that were copied, those that were there, and the cache's identity.

    `part` names the arrays of a folder that is a part of a cache; it is empty of a whole one.
    """

    files: int
    bytes: int
    there: int
    root_hash: str
    part: tuple[str, ...] = ()


@dataclass(frozen=True)
class _File:
    key: str
    size: int
    sha256: str


def pull(
    url: str,
    out: Path,
    *,
    arrays: Sequence[str] = (),
    reach: Reach = Reach(),
    on_total: OnFile = lambda total: None,
    on_bytes: OnFile = lambda size: None,
) -> Copied:
    """Copy a cache or an export from a URL into a folder; what is there with the right sha256 is not fetched again.

    Args:
        url: where it lies.
        out: a new folder, or one that was pulled into before.
        arrays: only these, beside those of the same state that are there; the folder then says that it is a part,
            unless that is all. All by default.
        reach: how long the server is waited for.
        on_total: told the bytes of all files.
        on_bytes: told the bytes of each file that is done.

    Raises:
        ConfigError: not a URL, or no such array.
        CacheError: the folder holds a cache that was built there.
        CorruptError: what the server sends is not what was sealed.
    """
    folder = open_storage(url, retry_for=reach.retry_for)
    if not isinstance(folder, RemoteStorage):
        raise ConfigError(f"pull copies from a URL, such as https://HOST/NAME or s3://BUCKET/NAME; got {url}")
    cache = open_shards(folder)
    files, described = _files(cache, arrays), _described(cache)
    last = {key: _needed(folder, key) for key in described}
    _prepare(out, last)
    place = LocalStorage(out)
    part = _part(place, cache, arrays)
    on_total(sum(file.size for file in files))

    def fetch(file: _File) -> int:
        path, copied = out / file.key, 0
        if not (path.is_file() and path.stat().st_size == file.size and sha256_file(path) == file.sha256):
            with whole_file(path) as opened:
                download(folder, file.key, file.size, file.sha256, opened)
            copied = file.size
        on_bytes(file.size)
        return copied

    copied = _in_parallel(fetch, files)
    if part:
        place.write(PART, seal_json({"arrays": list(part), "of": cache.root_hash}))
    else:
        place.remove(PART)
    for key, data in last.items():
        place.write(key, data)
    return Copied(sum(size > 0 for size in copied), sum(copied), copied.count(0), cache.root_hash, part)


def push(
    folder: Path, url: str, *, on_total: OnFile = lambda total: None, on_bytes: OnFile = lambda size: None
) -> Copied:
    """Copy a sealed cache or an export into an object store or to the hub; what is there already is not sent again.

    Afterwards every file is compared: by its hash or ETag, or read back where that is no MD5.

    Args:
        folder: of the cache.
        url: where it goes: nothing lies there, or a state of the same cache, such as that before it was extended.
        on_total: told the bytes of all files.
        on_bytes: told the bytes of each file that is done.

    Raises:
        CacheError: it is not sealed, something is missing, or behind the URL lies a cache that was built there.
        SpecMismatchError: behind the URL lies a cache of other data.
        DarhtError: the URL cannot be written.
        CorruptError: the store holds other bytes than were sent.
    """
    cache, here = open_shards(folder), LocalStorage(folder)
    if cache.part is not None:
        raise CacheError(f"{folder} is a part of a cache: pull the rest first")
    files, described = _files(cache, ()), _described(cache)
    on_total(sum(file.size for file in files))
    if is_hub(url):
        keys = [*(file.key for file in files), *described]
        sent = push_to_hub(cache, folder, keys, url, on_bytes)
        size = sum((folder / key).stat().st_size for key in sent)
        return Copied(len(sent), size, len(keys) - len(sent), cache.root_hash)
    there, last = open_storage(url), {key: _needed(here, key) for key in described}
    tags = _tags(there)
    check_target(there, cache)
    if last.get(MANIFEST) != there.read(MANIFEST) and there.keys(COMMITS):
        raise CacheError(f"{url} holds a cache that was built there, in another state: push to another URL")
    unseal(there, last)

    def send(file: _File) -> int:
        data, copied = _needed(here, file.key), 0
        if sha256_bytes(data) != file.sha256:
            raise CorruptError(f"{here.name(file.key)} is not what was sealed; run darht-cache verify {folder}")
        if tags.get(file.key) != _expected_tag(data):
            there.write(file.key, data)
            copied = file.size
        on_bytes(file.size)
        return copied

    copied = _in_parallel(send, files)
    tags = _tags(there)

    def compare(file: _File) -> int:
        if tags.get(file.key) == _expected_tag(_needed(here, file.key)):
            return 0
        if sha256_bytes(there.read(file.key) or b"") != file.sha256:
            raise CorruptError(f"{there.name(file.key)} does not hold what was sent; push again")
        return 0

    _in_parallel(compare, [file for file, size in zip(files, copied, strict=True) if size])
    for key, data in last.items():
        there.write(key, data)
    return Copied(sum(size > 0 for size in copied), sum(copied), copied.count(0), cache.root_hash)


def _files(cache: Cache, arrays: Sequence[str]) -> list[_File]:
    """What the manifest or the index names, of some arrays or of all."""
    if isinstance(cache, ExportedCache):
        if arrays:
            raise ConfigError("an export keeps its arrays together: leave --arrays out")
        return [_File(tar.path, tar.size, tar.sha256) for tar in cache.tars]
    if unknown := [name for name in arrays if name not in cache.arrays]:
        raise ConfigError(f"{cache.folder} has no array '{unknown[0]}'; it has {', '.join(cache.arrays)}")
    shards = [shard for shard in cache.manifest.shards if not arrays or shard.array in arrays]
    described = [_File(file.path, file.size, file.sha256) for file in cache.manifest.metadata]
    return [*(_File(shard.path, shard.size, shard.sha256) for shard in shards), *described]


def _described(cache: Cache) -> tuple[str, ...]:
    return (INDEX,) if isinstance(cache, ExportedCache) else (SPEC, MANIFEST)


def _needed(folder: Storage, key: str) -> bytes:
    data = folder.read(key)
    if data is None:
        raise CacheError(f"{folder.name(key)} is gone since the cache was opened; try again")
    return data


def _prepare(out: Path, described: dict[str, bytes]) -> None:
    """A folder into which may be pulled; one that held another state of a cache is not sealed until all is there."""
    if (out / "commits").is_dir():
        raise CacheError(f"{out} holds a cache that was built there: choose a new folder as --out")
    unseal(LocalStorage(out), described)


def _part(place: Storage, cache: Cache, arrays: Sequence[str]) -> tuple[str, ...]:
    """The arrays of a cache that a folder has once some are pulled into it; empty where it has all."""
    held: Iterable[str] | None = ()
    with contextlib.suppress(CorruptError):  # then nobody knows
        held = read_part(place, cache.root_hash)
    if held is None:  # it is whole where the manifest of this state is left, which is written last
        held = cache.arrays if place.size(MANIFEST) is not None else ()
    has = tuple(dict.fromkeys((*held, *arrays)))
    return has if arrays and set(has) < set(cache.arrays) else ()


def _in_parallel(action: Callable[[_File], int], files: Iterable[_File]) -> list[int]:
    with ThreadPoolExecutor(IN_FLIGHT // 2) as pool:
        jobs = [pool.submit(action, file) for file in files]
        try:
            return [job.result() for job in jobs]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _tags(there: Storage) -> dict[str, str]:
    if not isinstance(there, RemoteStorage):
        return {}
    return {key: tag for key, (_, tag) in there.listing().items()}


def _expected_tag(data: bytes) -> str:
    """The ETag that S3 gives to bytes that obstore sends: an MD5, or one over those of the parts."""
    if len(data) <= _MULTIPART:
        return hashlib.md5(data, usedforsecurity=False).hexdigest()
    parts = [data[at : at + _MULTIPART] for at in range(0, len(data), _MULTIPART)]
    digests = b"".join(hashlib.md5(part, usedforsecurity=False).digest() for part in parts)
    return f"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(parts)}"
