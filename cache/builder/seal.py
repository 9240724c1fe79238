"""Seal a cache: check every unit, then write the manifest whose root hash is the cache's identity."""

import math
from concurrent.futures import ThreadPoolExecutor

import torch

from darht.cache.builder.history import former_of
from darht.cache.format.commit import Commit, State, inspect_unit
from darht.cache.format.layout import ArrayLayout, layouts, shard_key
from darht.cache.format.manifest import MANIFEST, FileRecord, Manifest, ShardRecord, read_spec, root_hash
from darht.cache.format.mixture import spans
from darht.cache.format.spec import RULES, CacheSpec
from darht.cache.format.store import Store
from darht.core.config import canonical_json, fingerprint
from darht.core.errors import CorruptError, IncompleteError
from darht.core.files import sha256_bytes
from darht.core.rng import RowRng
from darht.core.storage import Location, open_storage

_READERS = 4  # shards in memory at a time: one with Jacobians has some 30 MB


def seal(location: Location) -> Manifest:
    """Check every unit's bytes and write the manifest; sealing a sealed cache again gives the same manifest.

    Raises:
        IncompleteError: units are missing; the message counts them.
        CorruptError: a shard differs from its record.
    """
    folder = open_storage(location)
    spec = read_spec(folder)
    arrays = layouts(spec)
    units = [(array, shard) for array in arrays.values() for shard in range(array.shards)]
    former = former_of(folder)

    def look(unit: tuple[ArrayLayout, int]) -> tuple[State, str, ShardRecord | None]:
        state, reason, commit = inspect_unit(folder, *unit, check_bytes=True, former=former)
        return state, reason, None if commit is None else _record(*unit, commit)

    with ThreadPoolExecutor(_READERS) as pool:  # reading and hashing release the interpreter's lock
        found = list(pool.map(look, units))
    for wrong, error in ((State.CORRUPT, CorruptError), (State.MISSING, IncompleteError)):
        reasons = [reason for state, reason, _ in found if state is wrong]
        if reasons:
            raise error(
                f"{folder}: {len(reasons)} of {len(units)} units are {wrong.value}, first: {reasons[0]}; "
                "run darht-cache build again"
            )
    shards = tuple(record for _, _, record in found if record is not None)
    described = sorted(Store(folder).create(arrays).items())
    metadata = tuple(FileRecord(key, len(data), sha256_bytes(data)) for key, data in described)
    manifest = _manifest(spec, shards, metadata)
    folder.write(MANIFEST, canonical_json(manifest).encode())
    return manifest


def _record(array: ArrayLayout, shard: int, commit: Commit) -> ShardRecord:
    return ShardRecord(array.name, shard, shard_key(array, shard), commit.size, commit.sha256, commit.parts)


def _manifest(spec: CacheSpec, shards: tuple[ShardRecord, ...], metadata: tuple[FileRecord, ...]) -> Manifest:
    body = Manifest(
        fingerprint=fingerprint(spec),
        rows=spec.data.rows,
        holdout=held_out(spec),
        shards=shards,
        metadata=metadata,
        root_hash="",
        format_version=spec.format_version,
    )
    return Manifest(**{**body.__dict__, "root_hash": root_hash(body)})


def held_out(spec: CacheSpec) -> tuple[int, ...]:
    """The rows of a cache that are kept from training: of each of several sources those that it alone would keep."""
    data = spec.data
    if not data.sources:
        return holdout_rows(data.rows, data.holdout, spec.seed, data.rules)
    return tuple(
        span.start + row
        for source, span in zip(data.sources, spans(data.sources, data.rows), strict=True)
        for row in holdout_rows(source.rows, source.holdout, spec.seed, data.rules)
    )


def holdout_rows(rows: int, share: float, seed: int, rules: int = RULES) -> tuple[int, ...]:
    """The rows kept from training: those with the smallest hashes of their own index, so few move when rows are added.

    There are `share * rows` of them, rounded, and at least one row is left to train on. Under rules 1 (see `DataSpec`)
    a row is held out when its hash is below a bound, whatever the others' are: their count is left to chance.
    """
    words = RowRng.create(seed, "holdout", rows=torch.arange(rows)).words((1,))[:, 0]
    if rules == 1:
        return tuple(torch.nonzero(words < round(share * 2**32)).flatten().tolist())
    count = min(math.floor(share * rows + 0.5), rows - 1)
    return tuple(sorted(torch.argsort(words, stable=True)[:count].tolist()))
