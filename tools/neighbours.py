"""What lies near a row: in the space of each attack's perturbations, and in the space of each teacher's logits.

`python -m darht.tools.neighbours CACHE --row 7` is `darht-inspect neighbours CACHE --row 7`.
"""

from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np

from darht.cache.reader import Cache
from darht.core.errors import ConfigError


@dataclass(frozen=True)
class Neighbour:
    """One hit: its row, the cosine to the query, its label, and what the space's teacher says about it."""

    row: int
    cosine: float
    label: int
    predicted: int


@dataclass(frozen=True)
class Space:
    """One space in which neighbours were looked for.

    Attributes:
        name: `delta/<attack>` or `logits/<teacher>`.
        teacher: whose answers are shown: the attack's victim on its adversarial image, or the teacher on the clean one.
        query: the query itself, as a hit of cosine 1.
        hits: the nearest rows, nearest first, without the query.
    """

    name: str
    teacher: str
    query: Neighbour
    hits: tuple[Neighbour, ...]


def find_neighbours(cache: Cache, row: int, k: int = 5) -> list[Space]:
    """The k nearest rows in every space, by cosine, exactly (a flat FAISS index over view 0).

    Raises:
        ConfigError: the row is not in the cache, or k is larger than the other rows.
    """
    if not 0 <= row < cache.rows:
        raise ConfigError(f"--row must lie in 0..{cache.rows - 1}; got {row}")
    if not 1 <= k < cache.rows:
        raise ConfigError(f"--k must lie in 1..{cache.rows - 1}, the other rows of the cache; got {k}")
    labels = cache.read("label")
    spaces = []
    for name, attack in cache.spec.attacks.items():
        vectors = cache.read(f"delta/{name}")[:, 0].reshape(cache.rows, -1).astype(np.float32)
        answers = cache.read(f"logits/{attack.teacher}/{name}")[:, 0].argmax(1)
        spaces.append(Space(f"delta/{name}", attack.teacher, *_search(vectors, row, k, labels=labels, answers=answers)))
    for teacher in cache.spec.teachers:
        logits = cache.read(f"logits/{teacher}/clean")[:, 0].astype(np.float32)
        vectors = logits - logits.mean(1, keepdims=True)  # softmax does not see a shift, so the angle must not either
        hits = _search(vectors, row, k, labels=labels, answers=logits.argmax(1))
        spaces.append(Space(f"logits/{teacher}", teacher, *hits))
    return spaces


def _search(
    vectors: np.ndarray, row: int, k: int, *, labels: np.ndarray, answers: np.ndarray
) -> tuple[Neighbour, tuple[Neighbour, ...]]:
    """The query and its k nearest rows."""
    vectors = np.ascontiguousarray(vectors)
    faiss.normalize_L2(vectors)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    cosines, rows = index.search(vectors[row : row + 1], k + 1)

    def hit(i: int, cosine: float) -> Neighbour:
        return Neighbour(i, cosine, int(labels[i]), int(answers[i]))

    found = [hit(int(i), float(cosine)) for i, cosine in zip(rows[0], cosines[0], strict=True) if i != row]
    return hit(row, float(vectors[row] @ vectors[row])), tuple(found[:k])


def draw(cache: Cache, spaces: list[Space], path: Path) -> None:
    """Write a sheet (PNG): a line for each space, the query first, then its neighbours.

    Perturbations are drawn around grey, full contrast at epsilon; in logit spaces the clean image is drawn.
    """
    from darht.tools.pictures import figure, save

    columns, classes = 1 + len(spaces[0].hits), cache.spec.data.classes
    fig = figure(0.4 + 1.35 * columns, 0.6 + 1.75 * len(spaces))
    grid = fig.subplots(len(spaces), columns, squeeze=False)
    for axes_row, space in zip(grid, spaces, strict=True):
        for axes, hit in zip(axes_row, (space.query, *space.hits), strict=True):
            axes.imshow(_picture(cache, space, hit.row), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            is_query = hit is space.query
            classes = cache.spec.data.classes
            axes.set_title(
                "query" if is_query else f"cos {hit.cosine:.2f}",
                fontsize=8,
                fontweight="bold" if is_query else "normal",
            )
            axes.set_xlabel(f"row {hit.row}: {classes[hit.label]}\nsays {classes[hit.predicted]}", fontsize=7)
        axes_row[0].set_ylabel(f"{space.name}\n({space.teacher} answers)", fontsize=7)
    fig.suptitle(f"Nearest rows to row {spaces[0].query.row} in each space", fontsize=10)
    save(fig, path)


def _picture(cache: Cache, space: Space, row: int) -> np.ndarray:
    picture: np.ndarray
    if space.name.startswith("delta/"):
        attack = cache.spec.attacks[space.name.removeprefix("delta/")]
        delta = cache.read(space.name, slice(row, row + 1))[0, 0].astype(np.float32) * attack.unit
        span = attack.parameters["eps"] if attack.parameters["norm"] == "linf" else max(1.0, float(np.abs(delta).max()))
        picture = np.clip(0.5 + delta / (2 * span), 0, 1).transpose(1, 2, 0)
        return picture
    picture = cache.read("image", slice(row, row + 1))[0].transpose(1, 2, 0)
    return picture


if __name__ == "__main__":
    from darht.tools.cli import neighbours

    neighbours()
