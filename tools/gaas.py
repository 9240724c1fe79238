"""The gradient-aligned adversarial subspace (GAAS): how many orthogonal directions fool a teacher, and the others too.

Tramer et al. 2017 (arXiv 1704.03453), section 3: k orthogonal directions, all equally close to the gradient, are the
most that can each raise the loss by a given amount. In L-inf they come from a regular Hadamard matrix H of order k: the
pixels are dealt into k groups of equal gradient, and direction i is sign(gradient) times H[i, group]. Every direction
has the full radius at every pixel and gains `|gradient|_1 / sqrt(k)` to first order.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from darht.attacks.engine.slots import forward_all
from darht.cache.read.reader import Cache
from darht.core.device import device_of
from darht.tools.predictions import Ints
from darht.tools.vectors import Floats, read_rows, sample_rows

ORDERS = (1, 4, 16, 64)  # regular Hadamard matrices by Kronecker powers; 64 directions cost 85 passes a row in all
_BATCH = 128
_CANDIDATES = 8  # rows drawn for every row wanted: all teachers must be right on it


@dataclass(frozen=True, kw_only=True)
class Gaas:
    """What `measure_gaas` finds; T teachers, R rows that all teachers get right when clean.

    Attributes:
        teachers: names.
        rows: int `[R]`.
        dims: int `[T, R]`, the largest number of orthogonal directions that fool the teacher at this row.
        shared: int `[T, T, R]`: of those directions of teacher s, how many fool teacher t as well.
        eps: the radius in pixel levels.
    """

    teachers: tuple[str, ...]
    rows: Ints
    dims: Ints
    shared: Ints
    eps: float

    def mean(self, teacher: int) -> tuple[float, float]:
        """The mean dimension of a teacher, and 1.96 standard errors of it (a 95 % interval); NaN without rows."""
        values = self.dims[teacher]
        if not len(values):
            return float("nan"), float("nan")
        spread = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
        return float(values.mean()), float(1.96 * spread)

    def share(self, source: int, target: int) -> float:
        """The share of the source's directions that fool the target; NaN when the source has none."""
        total = self.dims[source].sum()
        return float(self.shared[source, target].sum() / total) if total else float("nan")


def regular_hadamard(order: int) -> Floats:
    """A symmetric Hadamard matrix `[k, k]` whose rows all sum to sqrt(k); the order is a power of 4."""
    core = np.ones((4, 4), dtype=np.float32) - 2 * np.fliplr(np.eye(4, dtype=np.float32))
    matrix = np.ones((1, 1), dtype=np.float32)
    while len(matrix) < order:
        matrix = np.kron(matrix, core)
    return matrix


def aligned_directions(gradient: Tensor, order: int) -> Tensor:
    """`order` directions `[k, 3, H, W]` of entries -1, 0, 1 that are orthogonal and gain about the same.

    Pixels are dealt to groups by size of gradient, there and back, so that groups are equal; what does not divide by k
    (the pixels of least gradient) stays 0.
    """
    flat = gradient.flatten()
    whole = flat.numel() // order * order
    ranked = flat.abs().argsort(descending=True, stable=True)[:whole].view(-1, order)
    ranked[1::2] = ranked[1::2].flip(1)
    group = torch.zeros(flat.numel(), dtype=torch.long, device=flat.device)
    group[ranked] = torch.arange(order, device=flat.device).expand_as(ranked)
    signs = torch.where(flat >= 0, 1.0, -1.0)  # a gradient of 0 takes either sign: full radius keeps them orthogonal
    used = torch.zeros(flat.numel(), device=flat.device)
    used[ranked.flatten()] = 1.0
    directions: Tensor = torch.from_numpy(regular_hadamard(order)).to(flat.device)[:, group] * (signs * used)
    return directions.view(order, *gradient.shape)


def measure_gaas(
    cache: Cache,
    teachers: dict[str, nn.Module],
    *,
    count: int = 32,
    seed: int = 0,
    on_step: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Gaas:
    """Count the directions on up to `count` rows that every teacher answers rightly.

    Args:
        cache: images and labels; the radius is the largest L-inf one of its attacks, 8 levels without any.
        teachers: by name, frozen.
        count: rows; each costs one gradient and 85 forward passes of every teacher for every teacher.
        seed: which rows are drawn.
        on_step: told what was finished, how many steps are done, and how many there are.
    """
    x, labels, rows = _rows(cache, teachers, count, seed)
    attacks = [attack.parameters for attack in cache.spec.attacks.values()]
    eps = max((about["eps"] for about in attacks if about["norm"] == "linf"), default=8.0)
    T, R = len(teachers), len(rows)
    dims, shared = np.zeros((T, R), dtype=np.int64), np.zeros((T, T, R), dtype=np.int64)
    for s, (name, model) in enumerate(teachers.items()):
        gradient = _gradients(model, x, labels)
        for r in range(R):
            for order in ORDERS:
                moved = (x[r] + eps / 255 * aligned_directions(gradient[r], order)).clamp(0, 1)
                fooled = _fooled(model, moved, labels[r])
                if int(fooled.sum()) > dims[s, r]:
                    dims[s, r] = int(fooled.sum())
                    shared[s, :, r] = [
                        int((fooled & _fooled(other, moved, labels[r])).sum()) for other in teachers.values()
                    ]
            on_step(f"directions of {name}", s * R + r + 1, T * R)
    return Gaas(teachers=tuple(teachers), rows=rows, dims=dims, shared=shared, eps=eps)


def _rows(cache: Cache, teachers: dict[str, nn.Module], count: int, seed: int) -> tuple[Tensor, Tensor, Ints]:
    """Rows that all teachers answer rightly, among up to eight times as many drawn; images where the teachers are."""
    drawn = sample_rows(cache, _CANDIDATES * count, seed, labelled=True)
    right = np.ones(len(drawn), dtype=bool)
    labels = cache.read("label")[drawn].astype(np.int64)
    device = device_of(next(iter(teachers.values()))) if teachers else torch.device("cpu")
    x = torch.from_numpy(read_rows(cache, "image", drawn)).to(device).float() / 255
    for model in teachers.values():
        right &= forward_all([model], x, _BATCH).argmax(1).cpu().numpy() == labels
    kept = np.random.default_rng(seed).permutation(np.flatnonzero(right))[:count]
    return x[torch.from_numpy(kept).to(device)], torch.from_numpy(labels[kept]).to(device), drawn[kept]


def _gradients(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    z = x.clone().requires_grad_(True)
    loss = nn.functional.cross_entropy(model(z), labels, reduction="sum")
    return torch.autograd.grad(loss, z)[0]


def _fooled(model: nn.Module, x: Tensor, label: Tensor) -> Tensor:
    """Which of the images `[k, 3, H, W]` the model does not answer with the label, bool `[k]` on the CPU."""
    return (forward_all([model], x, _BATCH).argmax(1) != label).cpu()
