"""FAISS indexes over a sealed cache: perturbations, images, teachers' logits and students' features.

The main path is `build_indexes`: for every space project the vectors in a stream, choose an index, measure its recall
against exact search, and save it with the cache's root hash.
"""

import io
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np

from darht.cache.read.reader import Cache
from darht.core.config import parse
from darht.core.errors import CacheError, ConfigError, CorruptError, SpecMismatchError
from darht.core.files import is_free, sha256_bytes, sha256_file, write_atomic
from darht.core.sealed import Sealed, check_named, read_sealed, write_sealed
from darht.core.storage import LocalStorage
from darht.tools.kinds import make_index, pq_sample, search, train_ivfpq
from darht.tools.nearest import Nearest, recall
from darht.tools.project import Method, fit_projection, project
from darht.tools.vectors import Floats, Space, sample_rows, space_blocks, take

CARD = "index.json"
_AGAIN = "run darht-inspect index again"
OnRows = Callable[[str, int, int], None]

_RECALL_AT, _QUERIES = 10, 200  # 2,000 neighbours in question: a recall is known to about one per cent
_SAMPLE_BYTES = 64 * 2**20  # of vectors that a projection is fitted to: 5,000 perturbations of 32x32 pixels


@dataclass(frozen=True, kw_only=True)
class IndexSettings:
    """What an index is built with.

    Attributes:
        dim: dimensions after projection; spaces with no more are not projected.
        projection: `pca` or `random`.
        kind: `exact`, `hnsw` (fast, as large as the vectors and more), `ivfpq` (a byte for 2 dimensions, lower recall;
            the vectors are never held), or `auto`: exact below `exact_below` vectors, hnsw below `hnsw_below`, ivfpq
            from there on.
        exact_below: vectors; exact search over 100,000 takes about a millisecond for each query.
        hnsw_below: vectors; 500,000 of 128 dimensions and their links take 0.4 GB, and twice that while they are
            written.
        seed: of samples and of the random projection.
    """

    dim: int = 128
    projection: Method = "pca"
    kind: Literal["auto", "exact", "hnsw", "ivfpq"] = "auto"
    exact_below: int = 100_000
    hnsw_below: int = 500_000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dim < 1 or min(self.exact_below, self.hnsw_below) < 0:
            raise ConfigError(
                f"dim is at least 1, exact_below and hnsw_below at least 0; got {self.dim}, {self.exact_below} and "
                f"{self.hnsw_below}"
            )

    def kind_for(self, count: int) -> str:
        """The kind of an index over `count` vectors."""
        if self.kind != "auto":
            return self.kind
        return "exact" if count < self.exact_below else "hnsw" if count < self.hnsw_below else "ivfpq"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One index.

    Attributes:
        space: its name.
        identity: what the vectors are, where the root hash does not say it: the sha256 of a student's weights.
        vectors: N.
        dims: before and after projection.
        kind: `exact`, `hnsw` or `ivfpq`.
        recall: recall@10 against exact search in the same, projected vectors.
        kept: recall@10 of that exact search against one in all dimensions: what the projection costs.
        seconds: to build.
        size: of the file in bytes.
        sha256: of the file.
    """

    space: str
    identity: str
    vectors: int
    dims: tuple[int, int]
    kind: str
    recall: float
    kept: float
    seconds: float
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class IndexCard:
    """The contents of `index.json`."""

    root_hash: str
    settings: IndexSettings
    indexes: dict[str, Record]
    format_version: int = 1


@dataclass(frozen=True)
class Indexes:
    """The indexes of a cache, on disk."""

    folder: Path
    card: IndexCard
    sealed: Sealed

    def load(self, space: str) -> Any:
        """The FAISS index of a space; ids are rows.

        Raises:
            CacheError: the space has no index.
            CorruptError: its file is missing or not the one that was written.
        """
        path, record = _index_path(self.folder, space), self._record(space)
        data = path.read_bytes() if path.is_file() else b""
        if sha256_bytes(data) != record.sha256:
            raise CorruptError(f"{path} is not what was written: remove it and run darht-inspect index again")
        return faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8))

    def axes(self, space: str) -> Floats | None:
        """The projection `[dim, D]` of a space; None where there is none.

        Raises:
            CacheError: the space has no index.
            CorruptError: its file is missing or not the one that was written.
        """
        path = _axes_path(self.folder, space)
        before, after = self._record(space).dims
        if before <= after:
            return None
        check_named(self.folder / CARD, self.sealed, path.name, _AGAIN)
        try:
            axes: Floats = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:  # of an index without sha256
            raise CorruptError(f"{path} is damaged ({error}): {_AGAIN}") from error
        return axes

    def _record(self, space: str) -> Record:
        if space not in self.card.indexes:
            raise CacheError(f"{self.folder} holds no index of {space}, its making was stopped: {_AGAIN}")
        return self.card.indexes[space]


def _slug(space: str) -> str:
    return space.replace("/", "-")


def _index_path(folder: Path, space: str) -> Path:
    return folder / f"{_slug(space)}.faiss"


def _axes_path(folder: Path, space: str) -> Path:
    """Perturbations share their projection, so that those of two attacks can be compared."""
    return folder / f"{'delta' if space.startswith('delta/') else _slug(space)}.axes.npy"


def default_folder(cache: Cache, option: str = "--index") -> Path:
    """`CACHE/index`; `option` is what names another folder.

    Raises:
        ConfigError: the cache is not a local folder.
    """
    if not isinstance(cache.folder, LocalStorage):
        raise ConfigError(f"{cache.folder} is not a local folder: say where the index goes with {option} DIR")
    return cache.folder.folder / "index"


def open_indexes(cache: Cache, folder: Path) -> Indexes:
    """The indexes in `folder`, which must be those of this cache.

    Raises:
        CacheError: there are none.
        SpecMismatchError: they are another cache's.
        CorruptError: the card does not parse.
    """
    read = _read_card(folder)
    if read is None:
        raise CacheError(f"{folder} holds no index: darht-inspect index {cache.folder} makes one")
    card, sealed = read
    if card.root_hash != cache.root_hash:
        raise SpecMismatchError(
            f"{folder} holds the index of another cache (root hash {card.root_hash[:12]}, that of {cache.folder} is "
            f"{cache.root_hash[:12]}): run darht-inspect index again, or give the right --index"
        )
    return Indexes(folder, card, sealed)


def _read_card(folder: Path) -> tuple[IndexCard, Sealed] | None:
    path = folder / CARD
    if not path.is_file():
        return None
    try:
        sealed = read_sealed(path, "it is not what was written")
        return parse(IndexCard, sealed.value, CARD), sealed
    except (ConfigError, CorruptError) as error:
        raise CorruptError(f"{path} does not describe an index: {error}; remove the folder and index again") from error


def build_indexes(
    cache: Cache,
    spaces: dict[str, Space],
    folder: Path,
    settings: IndexSettings,
    *,
    identities: dict[str, str] | None = None,
    on_rows: OnRows = lambda space, done, total: None,
) -> tuple[Indexes, tuple[str, ...]]:
    """Make the indexes of all spaces, reusing those that are there and still fit.

    Args:
        cache: a sealed cache.
        spaces: from `cache_spaces`.
        folder: where they go.
        settings: dimension, projection, kind.
        identities: of spaces whose vectors do not follow from the cache: a hash by name.
        on_rows: told space, vectors read and vectors in all.

    Returns:
        The indexes, and the names of those that were built now.

    Raises:
        CacheError: the folder holds something else.
        ConfigError: too few vectors for `ivfpq`.
    """
    old, sealed = _read_card(folder) or (None, Sealed({}, {}, hashed=False))
    if old is None and not is_free(folder):
        raise CacheError(f"{folder} is not empty and holds no index: choose a new or empty folder")
    same = old is not None and (old.root_hash, old.settings) == (cache.root_hash, settings)
    records = dict(old.indexes) if same and old is not None else {}
    files = dict(sealed.files) if same else {}
    built = []
    for name, space in spaces.items():
        identity = (identities or {}).get(name, "")
        if name in records and _is_whole(folder, records[name], identity, files):
            continue
        axes = _fit(cache, spaces, space, folder, settings, files=files)
        record = _build(cache, space, folder, settings, axes=axes, on_rows=on_rows)
        records[name] = replace(record, identity=identity)
        files[_index_path(folder, name).name] = record.sha256
        built.append(name)
        card = IndexCard(root_hash=cache.root_hash, settings=settings, indexes=records)
        write_sealed(folder / CARD, asdict(card), files)
    return open_indexes(cache, folder), tuple(built)


def _is_whole(folder: Path, record: Record, identity: str, files: dict[str, str]) -> bool:
    path, axes = _index_path(folder, record.space), _axes_path(folder, record.space)
    has_axes = record.dims[0] == record.dims[1] or _is_file(axes, files)
    return has_axes and record.identity == identity and _is_file(path, {path.name: record.sha256})


def _is_file(path: Path, files: dict[str, str]) -> bool:
    return path.is_file() and files.get(path.name) == sha256_file(path)


def _fit(
    cache: Cache,
    spaces: dict[str, Space],
    space: Space,
    folder: Path,
    settings: IndexSettings,
    *,
    files: dict[str, str],
) -> Floats | None:
    """The projection of a space: for perturbations one for all attacks, fitted to all of them; noted in `files`."""
    if space.dim <= settings.dim:
        return None
    together = [other for other in spaces.values() if other.kind == "delta"] if space.kind == "delta" else [space]
    path = _axes_path(folder, space.name)
    if space is not together[0] and _is_file(path, files):  # the first one wrote it
        axes: Floats = np.load(path, allow_pickle=False)
        return axes
    count = _SAMPLE_BYTES // (4 * space.dim * len(together))
    rows = sample_rows(cache, max(count, settings.dim), settings.seed)
    sample = np.concatenate([take(cache, other, rows) for other in together])
    if min(sample.shape) < settings.dim:
        raise ConfigError(
            f"{settings.dim} dimensions of {space.name} need as many vectors, there are {len(sample)}: "
            "lower --dim of darht-inspect index"
        )
    axes = fit_projection(sample, settings.dim, settings.projection, settings.seed)
    buffer = io.BytesIO()
    np.save(buffer, axes, allow_pickle=False)
    write_atomic(path, buffer.getvalue())
    files[path.name] = sha256_bytes(buffer.getvalue())
    return axes


def _build(
    cache: Cache, space: Space, folder: Path, settings: IndexSettings, *, axes: Floats | None, on_rows: OnRows
) -> Record:
    start, N = time.perf_counter(), cache.rows
    kind, k = settings.kind_for(N), min(_RECALL_AT, N - 1)
    queries = sample_rows(cache, _QUERIES, settings.seed)
    asked = take(cache, space, queries)
    full, dim = Nearest(asked, k, exclude=queries), space.dim if axes is None else len(axes)
    close = Nearest(project(asked, axes), k, exclude=queries)
    index, vectors = None, np.empty((0 if kind == "ivfpq" else N, dim), dtype=np.float32)
    if kind == "ivfpq":
        sample = sample_rows(cache, pq_sample(N, dim, space.name), settings.seed)
        index = train_ivfpq(N, project(take(cache, space, sample), axes))
    for block in space_blocks(cache, space):
        values = space.read(block)
        near = project(values, axes)
        close.see(block.start, near)
        if axes is not None:
            full.see(block.start, values)
        if index is None:
            vectors[block] = near
        else:
            index.add(near)
        on_rows(space.name, block.stop, N)
    if index is None:
        index = make_index(kind, vectors, space.name)
    found = close.rows if kind == "exact" else search(index, close.queries, queries, k)
    del vectors
    data = faiss.serialize_index(index).data  # written without a copy
    write_atomic(_index_path(folder, space.name), data)
    return Record(
        space=space.name,
        identity="",
        vectors=N,
        dims=(space.dim, dim),
        kind=kind,
        recall=round(recall(found, close.rows), 4),
        kept=1.0 if axes is None else round(recall(close.rows, full.rows), 4),
        seconds=round(time.perf_counter() - start, 2),
        size=len(data),
        sha256=sha256_bytes(data),
    )
