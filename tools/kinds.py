"""The kinds of FAISS index: exact search, HNSW, and product quantisation."""

from typing import Any

import faiss
import numpy as np

from darht.core.errors import ConfigError
from darht.tools.nearest import without_self
from darht.tools.predictions import Ints
from darht.tools.vectors import Floats

_HNSW_LINKS, _HNSW_BUILD, _HNSW_SEARCH = 32, 80, 96  # recall@10: 0.998 of 5,000 real ones, 0.95 of 150,000
_PQ_LISTS = 1024
_PQ_DIMS, _PQ_TRAIN = 2, 9_984  # dimensions in one byte; FAISS wants 39 training vectors for each of 256 centroids


def pq_sample(N: int, d: int, what: str) -> int:
    """How many vectors an `ivfpq` over N in d dimensions is trained on.

    Raises:
        ConfigError: too few vectors, or a number of dimensions that does not divide.
    """
    if N < _PQ_TRAIN or d % _PQ_DIMS:
        raise ConfigError(
            f"ivfpq needs at least {_PQ_TRAIN} vectors, and dimensions that are a multiple of {_PQ_DIMS}; "
            f"{what} has {N} in {d} dimensions: use --kind hnsw or exact"
        )
    return min(N, max(_PQ_TRAIN, 39 * _lists(N)))


def _lists(N: int) -> int:
    """The cells of the inverted file: more are not worth their training."""
    return min(int(np.sqrt(N)), _PQ_LISTS)


def train_ivfpq(N: int, sample: Floats) -> Any:
    """An empty index by inner product for N vectors, trained on a sample `[n, d]` of them.

    Half a byte a dimension; a million vectors of 128 dimensions take 70 MB, whatever they were before.
    """
    d, lists = sample.shape[1], _lists(N)
    index: Any = faiss.index_factory(d, f"IVF{lists},PQ{d // _PQ_DIMS}x8", faiss.METRIC_INNER_PRODUCT)
    index.do_polysemous_training = False  # the factory's default, which takes minutes and serves Hamming search only
    index.train(np.ascontiguousarray(sample))
    index.nprobe = max(8, lists // 8)
    return index


def make_index(kind: str, vectors: Floats, what: str) -> Any:
    """An index by inner product over vectors `[N, d]`.

    Raises:
        ConfigError: `ivfpq` over too few vectors, or in a number of dimensions that does not divide.
    """
    N, d = vectors.shape
    if kind == "ivfpq":
        sample = np.random.default_rng(0).permutation(N)[: pq_sample(N, d, what)]
        index: Any = train_ivfpq(N, vectors[np.sort(sample)])
    elif kind == "hnsw":
        index = faiss.IndexHNSWFlat(d, _HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = _HNSW_BUILD, _HNSW_SEARCH
    else:
        index = faiss.IndexFlatIP(d)
    index.add(vectors)
    return index


def search(index: Any, vectors: Floats, queries: Ints, k: int) -> Ints:
    """The `k` nearest rows of each query `[Q]`, itself left out, `[Q, k]`; `vectors` `[Q, d]` are the queries'."""
    _, rows = index.search(vectors, k + 1)
    return without_self(rows, queries, k)
