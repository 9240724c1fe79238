"""Which teachers share their weaknesses: the transferability matrix, read from a cache at no extra cost.

Every teacher has already answered every stored adversarial example, so the matrix takes no gradient and no forward
pass. `python -m darht.tools.transfer CACHE` is `darht-inspect transfer CACHE`.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from darht.cache.reader import Cache
from darht.core.errors import ConfigError
from darht.core.stats import wilson


@dataclass(frozen=True)
class TransferMatrix:
    """Accuracy of every teacher on every attack's stored examples.

    Attributes:
        attacks: the rows, A.
        sources: the teacher that each attack was crafted on, `[A]` names.
        teachers: the columns, T.
        clean: accuracy of each teacher on the clean images in per cent, `[T]`.
        counted: int `[A, T]`: rows that source and target both answer rightly when clean.
        right: int `[A, T]`: those of them that the target still answers rightly on the adversarial image.
    """

    attacks: tuple[str, ...]
    sources: tuple[str, ...]
    teachers: tuple[str, ...]
    clean: np.ndarray
    counted: np.ndarray
    right: np.ndarray

    @property
    def accuracy(self) -> np.ndarray:
        """Per cent still right, `[A, T]`; NaN where no row counts."""
        with np.errstate(invalid="ignore"):
            return np.where(self.counted > 0, 100 * self.right / np.maximum(self.counted, 1), np.nan)

    def interval(self, attack: int, teacher: int) -> tuple[float, float]:
        """The 95 % Wilson interval of one entry in per cent."""
        low, high = wilson(int(self.right[attack, teacher]), int(self.counted[attack, teacher]))
        return 100 * low, 100 * high


def transfer_matrix(cache: Cache) -> TransferMatrix:
    """Read the matrix on view 0 of every row; where an attack's target is its source, the entry is white-box accuracy.

    Raises:
        ConfigError: the cache holds no attacks.
    """
    attacks, teachers = cache.spec.attacks, tuple(cache.spec.teachers)
    if not attacks:
        raise ConfigError(f"{cache.folder} holds no attacks, so there is nothing to transfer; add some to its spec")
    labels = cache.read("label")
    clean = {name: _right(cache, f"logits/{name}/clean", labels) for name in teachers}
    counted = np.zeros((len(attacks), len(teachers)), dtype=np.int64)
    right = np.zeros_like(counted)
    for a, (attack, about) in enumerate(attacks.items()):
        for t, teacher in enumerate(teachers):
            both = clean[about.teacher] & clean[teacher]
            counted[a, t] = both.sum()
            right[a, t] = (both & _right(cache, f"logits/{teacher}/{attack}", labels)).sum()
    return TransferMatrix(
        attacks=tuple(attacks),
        sources=tuple(attack.teacher for attack in attacks.values()),
        teachers=teachers,
        clean=np.array([100 * clean[name].mean() for name in teachers]),
        counted=counted,
        right=right,
    )


def _right(cache: Cache, name: str, labels: np.ndarray) -> np.ndarray:
    right: np.ndarray = cache.read(name)[:, 0].argmax(1) == labels
    return right


def draw(matrix: TransferMatrix, path: Path) -> None:
    """Write the matrix as a heat map (PNG); dark cells are attacks that work."""
    from darht.tools.pictures import figure, save

    A, T = matrix.accuracy.shape
    fig = figure(4.2 + 1.2 * T, 2.4 + 0.62 * A)
    axes = fig.add_subplot()
    image = axes.imshow(matrix.accuracy, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    columns = zip(matrix.teachers, matrix.clean, strict=True)
    axes.set_xticks(range(T), [f"{name}\nclean {value:.1f} %" for name, value in columns])
    axes.set_yticks(range(A), [f"{a}\non {s}" for a, s in zip(matrix.attacks, matrix.sources, strict=True)])
    axes.set_xlabel("teacher that answers")
    axes.set_ylabel("attack, crafted on")
    fig.suptitle("Share of images that each teacher still gets right", fontsize=11)
    for a, source in enumerate(matrix.sources):
        for t, teacher in enumerate(matrix.teachers):
            value, weight = matrix.accuracy[a, t], "bold" if source == teacher else "normal"
            colour = "white" if value < 60 else "black"
            axes.text(t, a, f"{value:.1f}", ha="center", va="center", color=colour, fontweight=weight)
    fig.colorbar(image, ax=axes, label="accuracy, per cent\n(bold: white-box)")
    save(fig, path)


if __name__ == "__main__":
    from darht.tools.cli import transfer

    transfer()
