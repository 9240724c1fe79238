"""Linear maps to fewer dimensions that keep angles as well as they can."""

from typing import Literal

import numpy as np

from darht.tools.vectors import Floats, unit

Method = Literal["pca", "random"]


def fit_projection(sample: Floats, dim: int, method: Method, seed: int = 0) -> Floats:
    """The map `[dim, D]` for vectors like `sample`, `[n, D]`.

    `pca` keeps the `dim` orthonormal directions with the most energy of the sample, about the origin: cosines are
    angles about the origin, so nothing is centred (randomised SVD: Halko, Martinsson and Tropp 2011). `random` needs no
    sample: Gaussian entries of variance 1 / dim keep all angles to about 1 / sqrt(dim) (Johnson and
    Lindenstrauss 1984).
    """
    from sklearn.random_projection import GaussianRandomProjection
    from sklearn.utils.extmath import randomized_svd

    if method == "random":
        chosen = GaussianRandomProjection(dim, random_state=seed).fit(sample[:1])
        return np.asarray(chosen.components_, dtype=np.float32)
    _, _, axes = randomized_svd(sample, dim, n_iter=3, random_state=seed)
    return np.ascontiguousarray(axes, dtype=np.float32)


def project(vectors: Floats, axes: Floats | None) -> Floats:
    """Map `[n, D]` to `[n, dim]` of unit length; None leaves them as they are."""
    return vectors if axes is None else unit(vectors @ axes.T)
