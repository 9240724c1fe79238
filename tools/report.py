"""Everything that the report of a cache shows, collected once.

The main path is `collect`; `report_figures.py` draws, `report_page.py` writes the page.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from darht.attacks.transfer import TransferMatrix
from darht.cache.format.commit import read_commit
from darht.cache.read.reader import Cache
from darht.tools.gaas import Gaas, measure_gaas
from darht.tools.index import Indexes
from darht.tools.neighbours import amplified
from darht.tools.predictions import Ints, Predictions, read_predictions, softmax
from darht.tools.project import project
from darht.tools.rows import RowReport, find_rows
from darht.tools.select import Candidate, candidates_of, fooling
from darht.tools.subspace import Geometry, subspaces
from darht.tools.transfer import stored_transfer
from darht.tools.vectors import Floats, cache_spaces, need_attacks, sample_rows, take

OnStep = Callable[[str, int, int], None]
POINTS = 1500  # of the map, over all attacks: more make a page slow and cover each other
HARDEST = 12  # rows shown as pictures
OUTCOMES = ("already wrong when clean", "fools nobody", "fools its own teacher only", "fools another teacher too")


@dataclass(frozen=True, kw_only=True)
class Map:
    """A plane of perturbations; P points.

    Attributes:
        method: `PCA` or `UMAP`.
        xy: `[P, 2]`.
        attack: int `[P]`, its number.
        row: int `[P]`.
        outcome: int `[P]`, number of one of `OUTCOMES`.
        held: share of the perturbations' variance in the plane; NaN where that means nothing.
    """

    method: str
    xy: Floats
    attack: Ints
    row: Ints
    outcome: Ints
    held: float


@dataclass(frozen=True, kw_only=True)
class Hard:
    """A row and the stored example that fools most teachers.

    Attributes:
        row: its number.
        label: its class.
        attack: which example is shown.
        image: uint8 `[H, W, 3]`.
        delta: `[H, W, 3]` in [0, 1], amplified around grey.
        adversarial: uint8 `[H, W, 3]`.
        top: by teacher, the three most probable classes on the adversarial image with their probabilities.
    """

    row: int
    label: int
    attack: str
    image: NDArray[np.uint8]
    delta: NDArray[np.float32]
    adversarial: NDArray[np.uint8]
    top: dict[str, list[tuple[int, float]]]


@dataclass(frozen=True, kw_only=True)
class ArrayFacts:
    """One array of the cache: shape, type, bytes on disk, seconds of work (NaN when no record is there)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    size: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class CacheReport:
    """What a page shows; see the fields' own types. `uncounted` is why there is no `gaas`."""

    cache: Cache
    indexes: Indexes
    candidates: tuple[Candidate, ...]
    worst: Floats
    rates: NDArray[np.float64]
    matrix: TransferMatrix
    geometry: Geometry
    gaas: Gaas | None
    maps: tuple[Map, ...]
    rows: RowReport
    hardest: tuple[Hard, ...]
    arrays: tuple[ArrayFacts, ...]
    environment: dict[str, str]
    uncounted: str = ""


def collect(
    cache: Cache,
    indexes: Indexes,
    teachers: dict[str, nn.Module],
    *,
    k: int = 16,
    gaas_rows: int = 32,
    on_step: OnStep = lambda what, done, total: None,
) -> CacheReport:
    """Measure everything.

    Args:
        cache: a sealed cache.
        indexes: of this cache.
        teachers: those that could be loaded; without all of them, or with `gaas_rows` 0, no directions are counted.
        k: directions of a subspace.
        gaas_rows: rows on which orthogonal directions are counted.
        on_step: told what is being done, how many steps are done, and how many there are.

    Raises:
        ConfigError: no attacks, or k too large.
    """
    need_attacks(cache)
    predictions = read_predictions(cache)
    counts, fooled = fooling(predictions)
    geometry = subspaces(cache, indexes, k=k, on_step=on_step)
    gaas, uncounted = _directions(cache, teachers, gaas_rows, on_step)
    on_step("map of the perturbations", 0, 1)
    maps = draw_maps(cache, indexes, predictions)
    arrays, environment = _build_facts(cache)
    return CacheReport(
        cache=cache,
        indexes=indexes,
        candidates=candidates_of(cache, predictions, {}),
        worst=(100 * (predictions.right.all(0) & predictions.right_clean).mean(1)).astype(np.float32),
        rates=fooled.sum(2) / np.maximum(counts.sum(2), 1),
        matrix=stored_transfer(cache, predictions=predictions),
        geometry=geometry,
        gaas=gaas,
        maps=maps,
        rows=find_rows(cache, predictions=predictions),
        hardest=hardest_rows(cache, predictions),
        arrays=arrays,
        environment=environment,
        uncounted=uncounted,
    )


def _directions(cache: Cache, teachers: dict[str, nn.Module], count: int, on_step: OnStep) -> tuple[Gaas | None, str]:
    """Orthogonal directions that fool, or why they were not counted."""
    if count == 0:
        return None, "none were asked for (--gaas 0)"
    missing = [name for name in cache.spec.teachers if name not in teachers]
    if missing:
        return None, f"that needs every teacher; not at hand: {', '.join(missing)}"
    found = measure_gaas(cache, teachers, count=count, on_step=on_step)
    return (found, "") if len(found.rows) else (None, "no row was drawn that all teachers answer rightly")


def outcomes(predictions: Predictions, attack: int, rows: Ints) -> Ints:
    """What an attack's examples achieve on some rows: numbers of `OUTCOMES`."""
    own = predictions.teachers.index(predictions.sources[attack])
    clean = predictions.right_clean[:, rows]
    wins = clean & ~predictions.right[attack][:, rows]
    others = np.delete(wins, own, axis=0).any(0)
    found = np.where(others, 3, np.where(wins[own], 2, 1))
    result: Ints = np.where(clean[own], found, 0)
    return result


def draw_maps(cache: Cache, indexes: Indexes, predictions: Predictions) -> tuple[Map, ...]:
    """Planes of a sample of the perturbations: PCA, and UMAP (arXiv 1802.03426) where umap-learn is installed."""
    from sklearn.decomposition import PCA

    attacks, spaces = tuple(cache.spec.attacks), cache_spaces(cache)
    rows = sample_rows(cache, max(3, POINTS // len(attacks)), labelled=True)
    vectors = np.concatenate([take(cache, spaces[f"delta/{name}"], rows) for name in attacks])
    plane = PCA(2, svd_solver="randomized", random_state=0)
    shared = {
        "attack": np.repeat(np.arange(len(attacks)), len(rows)),
        "row": np.tile(rows, len(attacks)),
        "outcome": np.concatenate([outcomes(predictions, a, rows) for a in range(len(attacks))]),
    }
    xy = plane.fit_transform(vectors).astype(np.float32)
    maps = [Map(method="PCA", xy=xy, held=float(plane.explained_variance_ratio_.sum()), **shared)]
    flat = _umap(project(vectors, indexes.axes(f"delta/{attacks[0]}")))
    if flat is not None:
        maps.append(Map(method="UMAP", xy=flat, held=float("nan"), **shared))
    return tuple(maps)


def _umap(vectors: Floats) -> Floats | None:
    """None where umap-learn is not installed."""
    import warnings

    try:
        from umap import UMAP
    except ImportError:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a seed means one thread, and what numba thinks of this machine
        neighbours = min(15, len(vectors) - 1)
        xy = UMAP(metric="cosine", n_neighbors=neighbours, random_state=0, n_jobs=1).fit_transform(vectors)
    return np.asarray(xy, dtype=np.float32)


def hardest_rows(cache: Cache, predictions: Predictions, most: int = HARDEST) -> tuple[Hard, ...]:
    """Rows that all teachers answer rightly when clean, by how many teachers one of their examples fools.

    Among equals come first those whose examples fool most often in all.
    """
    wins = predictions.right_clean[None] & ~predictions.right
    able = predictions.right_clean.all(0)
    score = np.where(able, wins.sum(1).max(0) * wins.size + wins.sum((0, 1)), -1)
    rows = np.argsort(-score, kind="stable")[:most]
    return tuple(_hard(cache, int(row), int(wins[:, :, row].sum(1).argmax())) for row in rows if score[row] > 0)


def _hard(cache: Cache, row: int, number: int) -> Hard:
    at, attack = slice(row, row + 1), tuple(cache.spec.attacks)[number]
    image, delta = cache.clean(at)[0], cache.read(f"delta/{attack}", at)[0, 0]
    moved = np.rint(np.clip(image + cache.spec.attacks[attack].scale * delta, 0, 255)).astype(np.uint8)
    top = {}
    for teacher in cache.spec.teachers:
        p = softmax(cache.logits(teacher, attack, rows=at)[0])
        top[teacher] = [(int(c), float(p[c])) for c in np.argsort(-p)[:3]]
    return Hard(
        row=row,
        label=int(cache.read("label", at)[0]),
        attack=attack,
        image=image.transpose(1, 2, 0),
        delta=amplified(cache, attack, delta),
        adversarial=moved.transpose(1, 2, 0),
        top=top,
    )


def _build_facts(cache: Cache) -> tuple[tuple[ArrayFacts, ...], dict[str, str]]:
    """Sizes from the manifest, seconds and machine from the commit records, which an export does not have."""
    facts, environment = [], dict[str, str]()
    for array in cache.arrays.values():
        commits = [commit for s in range(array.shards) if (commit := read_commit(cache.folder, array, s)) is not None]
        seconds = sum(commit.seconds for commit in commits) if commits else float("nan")
        for commit in commits:
            known = ("darht", "torch", "device", "threads", "batch_size")
            environment |= {key: str(value) for key, value in commit.environment.items() if key in known}
        size = cache.size(array.name)
        facts.append(ArrayFacts(name=array.name, shape=array.shape, dtype=array.dtype, size=size, seconds=seconds))
    return tuple(facts), environment
