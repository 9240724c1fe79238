"""The geometry of the perturbations: do two attacks work in the same directions?

For every attack the subspace in which its perturbations (unit length, view 0) have most of their energy; for every pair
the principal angles between those, the energy that one has inside the other, and how their examples mix among nearest
neighbours.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from darht.cache.read.reader import Cache
from darht.core.errors import ConfigError
from darht.tools.index import Indexes
from darht.tools.predictions import Ints
from darht.tools.project import project
from darht.tools.vectors import Floats, cache_spaces, need_attacks, sample_rows, take

OnStep = Callable[[str, int, int], None]
_SAMPLE_BYTES = 64 * 2**20  # of vectors of one attack: 5,461 perturbations of 32x32 pixels
_DIRECT_ROWS = 1024  # up to here the exact decomposition takes less time than the randomised one
_RANK_ROWS = 2048  # of them the whole spectrum is computed, which takes seconds and grows with the cube
_QUERIES = 1000  # of each attack: their neighbours are looked up
_PERMUTATIONS = 999  # the smallest p-value is 0.001


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """How the examples of two attacks mix.

    Attributes:
        share: of the k nearest neighbours of an example, those that belong to the other attack; 0.5 when the two
            cannot be told apart.
        expected: its mean when each row's two examples change places by chance.
        p_value: how often chance mixes no more than what was seen, from permutations.
    """

    share: float
    expected: float
    p_value: float


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What `subspaces` finds; A attacks, k directions, D dimensions.

    Attributes:
        attacks: names.
        sources: the teacher that each was crafted on.
        k: directions.
        dim: D.
        rows: how many perturbations of each attack the subspaces are fitted to.
        angles: degrees `[A, A, k]`, smallest first; on the diagonal those between two halves of the attack's own rows.
        class_angles: degrees `[A, A, C]`, the mean principal angle for each class; NaN for classes of too few rows.
        energy: `[A, A]`, the share of a's perturbation energy inside b's subspace; chance is k / D.
        effective_rank: `[A]`, the exponential of the entropy of the energies, of up to 2,048 of the rows.
        mixing: by pair of attack numbers (a < b).
    """

    attacks: tuple[str, ...]
    sources: tuple[str, ...]
    k: int
    dim: int
    rows: int
    angles: Floats
    class_angles: Floats
    energy: Floats
    effective_rank: Floats
    mixing: dict[tuple[int, int], Mixing]


def top_directions(vectors: Floats, k: int) -> Floats:
    """An orthonormal basis `[D, k]` of the k directions in which `vectors` `[n, D]` have most energy."""
    from sklearn.utils.extmath import randomized_svd

    if len(vectors) > _DIRECT_ROWS:
        _, _, axes = randomized_svd(vectors, k, n_oversamples=max(10, k), n_iter=4, random_state=0)
        return np.ascontiguousarray(axes.T)
    _, _, axes = np.linalg.svd(vectors @ vectors.T, hermitian=True)  # the left vectors of `vectors`, strongest first
    basis, _ = np.linalg.qr(vectors.T @ axes[:k].T)
    return np.ascontiguousarray(basis)


def principal_angles(first: Floats, second: Floats) -> Floats:
    """Degrees between the spans of two bases `[D, k]`, smallest first (Bjorck and Golub 1973)."""
    from scipy.linalg import subspace_angles

    radians = subspace_angles(first.astype(np.float64), second.astype(np.float64))
    return np.asarray(np.degrees(np.sort(radians)), dtype=np.float32)


def effective_rank(vectors: Floats) -> float:
    """`exp(-sum p log p)` over the energies p (squared singular values, summing to 1) of `[n, D]`.

    After Roy and Vetterli 2007, who take the singular values themselves; with energies the many directions of next to
    no energy that every sample has do not count.
    """
    small = vectors if len(vectors) <= vectors.shape[1] else vectors.T
    energies = np.maximum(np.linalg.eigvalsh(small @ small.T), 0)
    p = energies[energies > 0] / energies.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def mixing(queries: Ints, neighbours: Ints, owners: Ints, *, rows: int, seed: int = 0) -> Mixing:
    """How often neighbours come from the other attack, and whether that is less than chance.

    Each row has one example by either attack, so under chance a row's two examples change places: the permutation test
    flips a coin for every row and keeps the graph (after Schilling 1986).

    Args:
        queries: the row of each query, `[2Q]`; the first half is of attack 0, the second of attack 1.
        neighbours: the rows of their neighbours, `[2Q, k]`.
        owners: the attack, 0 or 1, of each neighbour, `[2Q, k]`.
        rows: N.
        seed: of the permutations.
    """
    own = (np.arange(len(queries)) >= len(queries) // 2).astype(np.int8)
    other = (owners != own[:, None]).astype(bool)
    generator, chance = np.random.default_rng(seed), np.empty(_PERMUTATIONS)
    for number in range(_PERMUTATIONS):
        swap = generator.integers(0, 2, rows, dtype=np.int8).astype(bool)
        chance[number] = (other ^ swap[queries][:, None] ^ swap[neighbours]).mean()
    share = float(other.mean())
    below = 1 + int((chance <= share + 1e-12).sum())
    return Mixing(share=share, expected=float(chance.mean()), p_value=below / (_PERMUTATIONS + 1))


def subspaces(
    cache: Cache,
    indexes: Indexes,
    *,
    k: int = 16,
    neighbours: int = 10,
    seed: int = 0,
    on_step: OnStep = lambda what, done, total: None,
) -> Geometry:
    """Compare the perturbations of every pair of attacks.

    Args:
        cache: a sealed cache.
        indexes: its indexes; mixing is looked up there.
        k: directions of a subspace.
        neighbours: of an example, for mixing.
        seed: of samples and permutations.
        on_step: told what was finished, how many steps are done, and how many there are.

    Raises:
        ConfigError: no attacks, or k or `neighbours` larger than rows and dimensions allow.
    """
    need_attacks(cache)
    attacks, dim = tuple(cache.spec.attacks), int(np.prod(cache.spec.view_shape))
    rows = sample_rows(cache, max(_SAMPLE_BYTES // (4 * dim), 4 * k), seed)
    _check_sizes(cache, k, neighbours, len(rows), dim)
    A = len(attacks)
    pairs = [(a, b) for a in range(A) for b in range(a + 1, A)]
    total, bodies = A + len(pairs), []
    for a, name in enumerate(attacks):
        bodies.append(_body(cache, name, rows, k))
        on_step(f"subspace of {name}", a + 1, total)
    mixed = {}
    for number, (a, b) in enumerate(pairs, start=A + 1):
        mixed[a, b] = _mix(cache, indexes, (attacks[a], attacks[b]), k=neighbours, seed=seed)
        on_step(f"neighbours of {attacks[a]} and {attacks[b]}", number, total)
    spaces, bases = cache_spaces(cache), [body.basis for body in bodies]
    return Geometry(
        attacks=attacks,
        sources=tuple(attack.teacher for attack in cache.spec.attacks.values()),
        k=k,
        dim=dim,
        rows=len(rows),
        angles=_all_angles(bodies),
        class_angles=_all_class_angles([body.by_class for body in bodies]),
        energy=np.stack([inside(take(cache, spaces[f"delta/{name}"], rows), bases) for name in attacks]),
        effective_rank=np.array([body.rank for body in bodies], dtype=np.float32),
        mixing=mixed,
    )


@dataclass(frozen=True)
class _Body:
    """One attack's subspace, overall and by class, the angles between its halves, and its effective rank."""

    basis: Floats
    by_class: list[Floats | None]
    halves: Floats
    rank: float


def _body(cache: Cache, attack: str, rows: Ints, k: int) -> _Body:
    vectors = take(cache, cache_spaces(cache)[f"delta/{attack}"], rows)
    labels = cache.read("label")[rows]
    return _Body(
        basis=top_directions(vectors, k),
        by_class=[_class_basis(vectors[labels == c], k) for c in range(len(cache.spec.data.classes))],
        halves=principal_angles(top_directions(vectors[::2], k), top_directions(vectors[1::2], k)),
        rank=effective_rank(vectors[:: -(-len(vectors) // _RANK_ROWS)]),
    )


def _check_sizes(cache: Cache, k: int, neighbours: int, rows: int, dim: int) -> None:
    most = min(rows // 2, dim - 1)  # each half of the rows must span a subspace, and it must leave something out
    if not 1 <= k <= most:
        raise ConfigError(f"--k must lie in 1..{most} for {rows} perturbations of {dim} values; got {k}")
    if not 1 <= neighbours < cache.rows:
        raise ConfigError(f"--neighbours must lie in 1..{cache.rows - 1}, the other rows; got {neighbours}")


def inside(vectors: Floats, bases: list[Floats]) -> Floats:
    """The mean share of the energy of unit vectors `[n, D]` inside each of B subspaces, `[B]`."""
    total = np.einsum("nd,nd->", vectors, vectors, dtype=np.float64)
    return np.array([np.square(vectors @ basis).sum(dtype=np.float64) / total for basis in bases], dtype=np.float32)


def _class_basis(vectors: Floats, k: int) -> Floats | None:
    """The subspace of one class; None for a class of fewer than 2k rows, whose angles would be chance."""
    return top_directions(vectors, k) if len(vectors) >= 2 * k else None


def _all_angles(bodies: list[_Body]) -> Floats:
    A, k = len(bodies), bodies[0].basis.shape[1]
    angles = np.empty((A, A, k), dtype=np.float32)
    for a in range(A):
        angles[a, a] = bodies[a].halves
        for b in range(a):
            angles[a, b] = angles[b, a] = principal_angles(bodies[a].basis, bodies[b].basis)
    return angles


def _all_class_angles(by_class: list[list[Floats | None]]) -> Floats:
    A, C = len(by_class), len(by_class[0])
    angles = np.full((A, A, C), np.nan, dtype=np.float32)
    for a in range(A):
        for b in range(a):
            for c, (one, other) in enumerate(zip(by_class[a], by_class[b], strict=True)):
                if one is not None and other is not None:
                    angles[a, b, c] = angles[b, a, c] = principal_angles(one, other).mean()
    return angles


def _mix(cache: Cache, indexes: Indexes, pair: tuple[str, str], *, k: int, seed: int) -> Mixing:
    names = tuple(f"delta/{name}" for name in pair)
    queries, spaces = sample_rows(cache, _QUERIES, seed), cache_spaces(cache)
    stores = [indexes.load(name) for name in names]
    rows, owners = [], []
    for own, name in enumerate(names):
        vectors = project(take(cache, spaces[name], queries), indexes.axes(name))
        found_rows, found_owners = _merge(stores, vectors, queries, own=own, k=k)
        rows.append(found_rows)
        owners.append(found_owners)
    both = np.concatenate([queries, queries])
    return mixing(both, np.concatenate(rows), np.concatenate(owners), rows=cache.rows, seed=seed)


def _merge(stores: list[Any], vectors: Floats, queries: Ints, *, own: int, k: int) -> tuple[Ints, Ints]:
    """The k nearest of both indexes together, without the example itself: rows and owners, each `[Q, k]`."""
    cosines, rows, owners = [], [], []
    for owner, store in enumerate(stores):
        near, found = store.search(vectors, min(k + 1, store.ntotal))
        missing = (found < 0) | ((found == queries[:, None]) if owner == own else False)
        cosines.append(np.where(missing, -np.inf, near))
        rows.append(found)
        owners.append(np.full(found.shape, owner))
    order = np.argsort(-np.hstack(cosines), axis=1, kind="stable")[:, :k]
    return np.take_along_axis(np.hstack(rows), order, 1), np.take_along_axis(np.hstack(owners), order, 1)
