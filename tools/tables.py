"""What inspection finds, as tables for a terminal."""

from collections.abc import Sequence

import numpy as np
from rich.table import Table

from darht.attacks.transfer import TransferMatrix
from darht.cache.read.reader import Cache
from darht.core.class_names import name_of_class
from darht.tools.gaas import ORDERS, Gaas
from darht.tools.index import Indexes
from darht.tools.neighbours import Hits, spoken
from darht.tools.rows import RowReport
from darht.tools.select import Ranking
from darht.tools.subspace import Geometry


def _table(title: str, *columns: str, text: int = 1) -> Table:
    """A table whose first `text` columns are words and whose others are numbers."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < text else "right")
    return table


def index_table(indexes: Indexes, built: Sequence[str]) -> Table:
    """Every index with its recall."""
    columns = ("space", "kind", "vectors", "dims", "recall", "kept", "MB", "s")
    title = "recall@10: of exact search in the projected vectors; kept@10: of that in all dimensions"
    table = _table(title, *columns, text=2)
    for name, one in indexes.card.indexes.items():
        dims = f"{one.dims[0]} -> {one.dims[1]}" if one.dims[0] != one.dims[1] else f"{one.dims[0]}"
        seconds = f"{one.seconds:.1f}" if name in built else "there"
        numbers = (f"{one.recall:.3f}", f"{one.kept:.3f}", f"{one.size / 1e6:.1f}", seconds)
        table.add_row(name, one.kind, str(one.vectors), dims, *numbers)
    return table


def neighbour_table(found: Sequence[Hits], classes: tuple[str, ...]) -> Table:
    """The query and its neighbours in every space."""
    table = Table("space", "rank", "row", "label", "teachers say", "cosine", header_style="bold")
    for hits in found:
        for rank, hit in enumerate((hits.query, *hits.hits)):
            outside = hit.row < 0
            wrong = "" if hit.label < 0 or set(hit.said.values()) <= {hit.label} else " (wrong)"
            said = spoken(hit.said, classes) + (wrong if len(hit.said) == 1 else "")
            label, row = ("", "outside") if outside else (name_of_class(classes, hit.label), str(hit.row))
            name, first = ("query", hits.space) if rank == 0 else (str(rank), "")
            table.add_row(first, name, row, label, said, f"{hit.cosine:.3f}")
        table.add_section()
    return table


def transfer_table(matrix: TransferMatrix, label: int | None = None, name: str = "all classes") -> Table:
    """Accuracy of every teacher on every attack, over all classes or for one."""
    title = (
        f"{name}: per cent still right of the rows that both teachers answer rightly when clean, with 95 % intervals"
    )
    table = _table(title, "attack", "crafted on", *matrix.teachers, text=2)
    if label is None:
        table.add_row("(clean)", "", *(f"{value:.1f}" for value in matrix.clean))
    for a, attack in enumerate(matrix.attacks):
        table.add_row(attack, matrix.sources[a], *(matrix.text(a, t, label) for t in range(len(matrix.teachers))))
    return table


def pair_table(found: Geometry) -> Table:
    """Every pair of attacks: angles, energy, mixing."""
    columns = ("pair", "angles", "per class", "energy", "mixing", "by chance", "p")
    title = (
        f"{found.k} directions of {found.dim}; angles in degrees: smallest, mean, largest; energy: per cent of the "
        f"first inside the second and back (chance {100 * found.k / found.dim:.1f}); mixing: per cent of neighbours"
    )
    table = _table(title, *columns)
    for (a, b), mix in found.mixing.items():
        angles, by_class = found.angles[a, b], found.class_angles[a, b]
        known = by_class[~np.isnan(by_class)]
        table.add_row(
            f"{found.attacks[a]}, {found.attacks[b]}",
            f"{angles[0]:.1f} {angles.mean():.1f} {angles[-1]:.1f}",
            f"{known.min():.1f} to {known.max():.1f}" if len(known) else "too few rows",
            f"{100 * found.energy[a, b]:.1f}, {100 * found.energy[b, a]:.1f}",
            f"{100 * mix.share:.1f}",
            f"{100 * mix.expected:.1f}",
            f"{mix.p_value:.3f}",
        )
    return table


def attack_table(found: Geometry) -> Table:
    """Every attack alone: what its subspace holds, and how much of an angle is only sampling."""
    columns = ("attack", "crafted on", "effective rank", "own energy %", "angle of its halves")
    table = _table(f"{found.rows} perturbations of each attack", *columns, text=2)
    for a, name in enumerate(found.attacks):
        rank, own = f"{found.effective_rank[a]:.0f}", f"{100 * found.energy[a, a]:.1f}"
        table.add_row(name, found.sources[a], rank, own, f"{found.angles[a, a].mean():.1f}")
    return table


def gaas_table(found: Gaas) -> Table:
    """How many orthogonal directions fool a teacher, and what share of them fools the others."""
    title = (
        f"orthogonal gradient-aligned directions (of {ORDERS[-1]} tried) that fool, at {found.eps:g} levels, on "
        f"{len(found.rows)} rows; then the per cent of them that fool each other teacher too"
    )
    table = _table(title, "made on", "directions", *found.teachers)
    for s, name in enumerate(found.teachers):
        mean, half = found.mean(s)
        shares = [
            "" if s == t else "none to share" if np.isnan(share := found.share(s, t)) else f"{100 * share:.1f}"
            for t in range(len(found.teachers))
        ]
        table.add_row(name, f"{mean:.1f} ± {half:.1f}", *shares)
    return table


def candidate_table(ranking: Ranking) -> Table:
    """Every teacher alone."""
    columns = ("teacher", "clean %", "robust %", "kept %", "entropy", "student %", "")
    table = _table("teachers; kept: of those right when clean, right under the own attack", *columns)
    for one in ranking.candidates:
        numbers = (one.clean, one.robust, one.kept)
        student = "" if np.isnan(one.student) else f"{100 * one.student:.1f}"
        why = ranking.refused.get(one.name, "")
        table.add_row(one.name, *(f"{value:.1f}" for value in numbers), f"{one.entropy:.2f}", student, why)
    return table


def set_table(ranking: Ranking) -> Table:
    """The best sets."""
    how = "all" if ranking.exact else "greedy search and exchange over"
    columns = ("set", "transfer %", "95 %", "worst pair %", "entropy", "student %")
    table = _table(f"the best of {how} {ranking.searched} sets", *columns)
    for one in ranking.sets:
        student = "" if np.isnan(one.student) else f"{100 * one.student:.1f}"
        low, high = one.interval
        spread = f"{100 * low:.1f} - {100 * high:.1f}"
        numbers = (f"{100 * one.transfer:.1f}", spread, f"{100 * one.worst:.1f}", f"{one.entropy:.2f}", student)
        table.add_row(" ".join(one.names), *numbers)
    return table


def row_tables(cache: Cache, report: RowReport, most: int) -> list[Table]:
    """The first rows of each kind."""
    classes, labels = cache.spec.data.classes, cache.read("label")
    fooled = _table(f"{len(report.fooled_all)} rows fool every teacher with one example", "row", "label", "by", text=3)
    for row in report.fooled_all[:most]:
        fooled.add_row(str(row.row), classes[labels[row.row]], ", ".join(row.attacks))
    lone = _table(f"{len(report.only_one)} rows stand with one teacher alone", "teacher", "rows", "first", text=1)
    for teacher in cache.spec.teachers:
        rows = [one.row for one in report.only_one if one.teacher == teacher]
        lone.add_row(teacher, str(len(rows)), " ".join(map(str, rows[:most])))
    wrong = _table(
        f"{len(report.label_candidates)} labels that all teachers doubt: candidates",
        "row",
        "label",
        "suggested",
        "lead",
        text=3,
    )
    for error in report.label_candidates[:most]:
        wrong.add_row(str(error.row), classes[error.label], classes[error.suggested], f"{error.margin:.2f}")
    if report.duplicates is None:
        return [fooled, lone, wrong]
    columns = ("row", "test image", "pixels", "detail", "logits", "")
    twins = _table(f"{len(report.duplicates)} pairs of a row and a test image are near-duplicates", *columns, text=0)
    for pair in report.duplicates[:most]:
        cosine = "" if np.isnan(pair.logits) else f"{pair.logits:.2f}"
        numbers = (f"{pair.pixels:.2f}", f"{pair.detail:.2f}", cosine)
        twins.add_row(str(pair.row), str(pair.test), *numbers, "mirrored" if pair.mirrored else "")
    return [fooled, lone, wrong, twins]
