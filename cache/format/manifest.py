"""The manifest of a sealed cache, whose root hash is its identity, and the spec that it belongs to."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darht.cache.format.layout import layouts, shard_key
from darht.cache.format.spec import FORMAT_VERSION, CacheSpec, check_version
from darht.core.bounded import show
from darht.core.config import added, fingerprint, parse_canonical, to_plain
from darht.core.errors import CacheError, ConfigError, CorruptError, DarhtError, IncompleteError
from darht.core.files import is_inside, is_sha256, sha256_bytes, user_data_folder
from darht.core.sealed import read_sealed, seal_json, tell_unhashed, unseal_json, write_sealed
from darht.core.storage import LocalStorage, Location, Storage, open_storage
from darht.core.zoo import in_zoo

MANIFEST, SPEC, ORIGIN = "manifest.json", "spec.json", "origin.json"


@dataclass(frozen=True)
class ShardRecord:
    """One shard in the manifest's table."""

    array: str
    shard: int
    path: str
    size: int
    sha256: str
    parts: tuple[str, ...] = added(())  # sha256 of each view's bytes, of arrays `by_view`


@dataclass(frozen=True)
class FileRecord:
    """One metadata file in the manifest's table."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`.

    Attributes:
        fingerprint: sha256 of `spec.json`.
        rows: N.
        holdout: source indices kept from training, for selection.
        shards: every shard of every array.
        root_hash: sha256 of the canonical JSON of the manifest without `metadata` and `root_hash`.
        metadata: every `zarr.json`; its bytes may differ between releases of zarr, so it is checked but is not part of
            the identity.
        format_version: of the cache.
    """

    fingerprint: str
    rows: int
    holdout: tuple[int, ...]
    shards: tuple[ShardRecord, ...]
    root_hash: str
    metadata: tuple[FileRecord, ...] = ()
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        check_version(self.format_version)


def read_spec(location: Location) -> CacheSpec:
    """Read `spec.json`.

    Raises:
        CacheError: there is none.
        CorruptError: it is not a spec.
    """
    folder = open_storage(location)
    return parse_spec(folder, folder.read(SPEC))


def parse_spec(folder: Storage, data: bytes | None) -> CacheSpec:
    """As `read_spec`, from the file's bytes, None where there is none."""
    name = folder.name(SPEC)
    if data is None:
        raise CacheError(f"{folder} is not a cache: {name} is missing; darht-cache build SPEC.yaml --out DIR makes one")
    try:
        return parse_canonical(CacheSpec, data, SPEC)
    except ConfigError as error:
        fix = "restore it, or run darht-cache build into another folder"
        raise CorruptError(f"{name} is not a cache spec: {error}; {fix}") from error


def root_hash(manifest: Manifest) -> str:
    """The sha256 over the fields of a manifest that identify the contents."""
    body = to_plain(manifest)
    return fingerprint({key: value for key, value in body.items() if key not in ("metadata", "root_hash")})


def read_manifest(location: Location, spec: CacheSpec) -> Manifest:
    """Read and check `manifest.json`.

    Raises:
        IncompleteError: the cache is not sealed.
        CorruptError: the manifest does not parse, its root hash is wrong, or it belongs to another spec.
    """
    folder = open_storage(location)
    return parse_manifest(folder, folder.read(MANIFEST), spec)


def parse_manifest(folder: Storage, data: bytes | None, spec: CacheSpec) -> Manifest:
    """As `read_manifest`, from the file's bytes, None where there is none."""
    name = folder.name(MANIFEST)
    if data is None:
        raise IncompleteError(f"{folder} is not sealed: {name} is missing; finish it with darht-cache build, then seal")
    try:
        manifest = parse_canonical(Manifest, data, MANIFEST)
    except ConfigError as error:
        raise CorruptError(f"{name} is not a manifest: {error}; run darht-cache seal again") from error
    if manifest.root_hash != root_hash(manifest):
        raise CorruptError(f"{name} does not have the root hash it names; run darht-cache seal again")
    if manifest.fingerprint != fingerprint(spec):
        raise CorruptError(f"{name} belongs to another spec than {folder.name(SPEC)}; run darht-cache seal again")
    if manifest.format_version != spec.format_version:
        raise CorruptError(
            f"{name} has format_version {manifest.format_version}, its spec {spec.format_version}; run darht-cache "
            "seal again"
        )
    check_table(manifest, spec, name)
    return manifest


def check_table(manifest: Manifest, spec: CacheSpec, where: str) -> None:
    """See that a manifest, which anybody may have written, names what its spec describes and nothing elsewhere.

    Raises:
        CorruptError: a shard is missing, comes twice or lies elsewhere, what names local copies is no sha256, metadata
            lie outside of the cache, or rows that are held out are not there.
    """
    arrays = layouts(spec).values()
    count = sum(array.shards for array in arrays)
    found = sorted((shard.array, shard.shard, shard.path) for shard in manifest.shards)
    if len(found) != count or found != sorted((a.name, k, shard_key(a, k)) for a in arrays for k in range(a.shards)):
        raise CorruptError(
            f"{where} must list the {count:,} shards of its spec, each once and in place, and lists {len(found):,}; "
            "run darht-cache seal again"
        )
    hashes = [sha256 for shard in manifest.shards for sha256 in (shard.sha256, *shard.parts)]
    hashes += [file.sha256 for file in manifest.metadata]
    if wrong := [sha256 for sha256 in hashes if not is_sha256(sha256)]:
        raise CorruptError(f"{where} has {show(wrong[0])} where a sha256 must be: run darht-cache seal again")
    views = {array.name: array.views_per_shard for array in arrays if array.by_view}
    if any(len(shard.parts) != views.get(shard.array, 0) for shard in manifest.shards):
        raise CorruptError(f"{where} must name a sha256 of each view that lies apart: run darht-cache seal again")
    outside = [
        file.path for file in manifest.metadata if not (is_inside(file.path) and file.path.endswith("zarr.json"))
    ]
    if outside:
        raise CorruptError(f"{where} names {show(outside[0])} among its metadata: run darht-cache seal again")
    if manifest.rows != spec.data.rows or not all(0 <= row < manifest.rows for row in manifest.holdout):
        raise CorruptError(
            f"{where} must hold out some of the {spec.data.rows} rows of its spec: run darht-cache seal again"
        )


_ORIGIN_AGAIN = "run darht-cache build again, which writes it anew, or remove it"


_PATHS = ("data_root", "data_roots", "teachers")


def write_remote_origin(folder: Storage, origin: Mapping[str, Any]) -> None:
    """Note what a cache behind a URL is built from; paths stay in the user's data folder, as others read the URL."""
    folder.write(ORIGIN, seal_json({key: value for key, value in origin.items() if key not in _PATHS}))
    try:
        write_sealed(_own_note(folder), {key: origin[key] for key in _PATHS if key in origin})
    except DarhtError:  # a machine that keeps nothing of the user: who needs the paths is asked for them
        return


def _own_note(folder: Storage) -> Path:
    return user_data_folder() / "origins" / f"{sha256_bytes(str(folder).encode())}.json"


def _own_origin(folder: Storage) -> dict[str, Any]:
    """What this machine has noted of a cache behind a URL."""
    try:
        path = _own_note(folder)
    except DarhtError:
        return {}
    return read_sealed(path, "remove it").value if path.is_file() else {}


def read_origin(location: Location) -> dict[str, Any]:
    """Where data and teachers lay when a cache was built, as it was noted; empty when nobody noted it.

    Raises:
        CorruptError: `origin.json` was changed, or does not hold paths.
    """
    folder = open_storage(location)
    data, name = folder.read(ORIGIN), folder.name(ORIGIN)
    if data is None:
        return {}
    sealed = unseal_json(data, name, _ORIGIN_AGAIN)
    if not isinstance(folder, LocalStorage):
        sealed.value.update(_own_origin(folder))
    if not sealed.hashed and isinstance(folder, LocalStorage):
        tell_unhashed(folder.folder / ORIGIN)
    size, paths = sealed.value.get("image_size"), [sealed.value.get("data_root")]
    for group in (sealed.value.get("teachers", {}), sealed.value.get("data_roots", {})):
        paths += group.values() if isinstance(group, dict) else [0]
    if not all(path is None or isinstance(path, str) for path in paths) or not isinstance(size, int | None):
        raise CorruptError(f"{name} must hold paths under data_root and teachers: {_ORIGIN_AGAIN}")
    return sealed.value


def relative_origin(origin: dict[str, Any], out: Path) -> dict[str, Any]:
    """Paths relative to the cache, so that a folder that holds data, teachers and cache can be moved as a whole.

    Teachers that come with darht keep their names.
    """
    return {key: _moved(value, lambda path: os.path.relpath(path, out.resolve())) for key, value in origin.items()}


def absolute_origin(origin: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What `relative_origin` made relative to a cache's folder, as absolute paths."""
    return {key: _moved(value, lambda path: str((folder / path).resolve())) for key, value in origin.items()}


def _moved(value: Any, move: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {key: _moved(item, move) for key, item in value.items()}
    return move(value) if isinstance(value, str) and not in_zoo(value) else value
