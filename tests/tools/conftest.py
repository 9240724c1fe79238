"""A cache with planted geometry, and the indexes of the tiny cache."""

from pathlib import Path

import numpy as np
import pytest
from planted import levels, one_hot, write_cache

from darht.cache.read.reader import Cache, open_cache
from darht.tools.index import Indexes, IndexSettings, build_indexes
from darht.tools.vectors import cache_spaces

RANK, ROWS, CLASSES = 4, 600, 3


def planted_vectors() -> dict[str, np.ndarray]:
    """Directions in 192 dimensions: `a` and `same` in one subspace of 4 dimensions, `tilted` 30 degrees from it in
    every direction, `other` orthogonal to it."""
    generator = np.random.default_rng(5)
    basis, _ = np.linalg.qr(generator.standard_normal((192, 2 * RANK)))
    own, away = basis[:, :RANK], basis[:, RANK:]
    tilted = np.cos(np.radians(30)) * own + np.sin(np.radians(30)) * away
    bases = {"a": own, "same": own, "tilted": tilted, "other": away}
    draws = {name: generator.standard_normal((ROWS, RANK)) @ base.T for name, base in bases.items()}
    return {name: values / np.linalg.norm(values, axis=1, keepdims=True) for name, values in draws.items()}


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Four attacks in known subspaces; teachers who are always right when clean."""
    generator = np.random.default_rng(6)
    labels = np.arange(ROWS) % CLASSES
    right = one_hot(labels, CLASSES)
    vectors = planted_vectors()
    logits = {name: {"clean": right, **{f"pgd-{source}": right for source in vectors}} for name in vectors}
    folder = write_cache(
        tmp_path_factory.mktemp("planted") / "cache",
        images=generator.integers(0, 256, (ROWS, 3, 8, 8), dtype=np.uint8),
        labels=labels,
        deltas={name: levels(values) for name, values in vectors.items()},
        logits=logits,
        rows_per_shard=200,
    )
    return open_cache(folder)


@pytest.fixture(scope="session")
def planted_indexes(planted: Cache, tmp_path_factory: pytest.TempPathFactory) -> Indexes:
    """Exact, in all dimensions."""
    folder = tmp_path_factory.mktemp("index") / "planted"
    return build_indexes(planted, cache_spaces(planted), folder, IndexSettings(dim=192))[0]


@pytest.fixture(scope="session")
def tiny_indexes(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Indexes:
    """Of the tiny cache, in 16 dimensions."""
    cache = open_cache(tiny_cache)
    return build_indexes(cache, cache_spaces(cache), tmp_path_factory.mktemp("index") / "tiny", IndexSettings(dim=16))[
        0
    ]
