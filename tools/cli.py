"""The command line of inspection: each command is one library call."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from darht.core.cli import (
    FOLDER,
    Command,
    Group,
    device_option,
    echo_notes,
    named_folders,
    print_table,
    transient_bar,
    trust_option,
    version_option,
)
from darht.core.errors import ConfigError

if TYPE_CHECKING:
    from darht.cache.read.reader import Cache
    from darht.tools.index import Indexes
    from darht.tools.live import Loaded


def _teachers_option(function: Any) -> Any:
    help_text = "NAME=FOLDER, when not where the cache was built from."
    return trust_option(click.option("--teacher", "teachers", multiple=True, help=help_text)(function))


_index_option = click.option("--index", "folder", type=FOLDER, help="Where the index lies; CACHE/index by default.")


_gaas_option = click.option(
    "--gaas",
    default=32,
    show_default=True,
    type=click.IntRange(min=0),
    help="Rows on which orthogonal directions are counted; 0: none.",
)


@click.group(cls=Group)
@version_option
def inspect() -> None:
    """Look at the adversarial subspaces that a cache holds. CACHE is a folder or a URL."""


def _beside(location: str, name: str, given: Path | None) -> Path:
    """Pictures and pages lie beside the cache, never in it; those of a cache behind a URL in the working folder."""
    if given:
        return given
    if "://" in location:
        return Path(f"{location.rstrip('/').rsplit('/', 1)[-1]}-{name}")
    cache = Path(location).resolve()
    return cache.parent / f"{cache.name}-{name}"


@contextmanager
def _steps() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr: told what is done, how much of it, and how much there is."""
    with transient_bar(Console(stderr=True)) as progress:
        task = progress.add_task("", total=None)
        yield lambda what, done, total: progress.update(task, description=what, completed=done, total=total)


def _print(*things: Any) -> None:
    console = Console(markup=False, emoji=False)
    for thing in things:
        if isinstance(thing, Table):
            print_table(thing)
        else:
            console.print(thing, highlight=False, soft_wrap=True)


def _indexes(cache: "Cache", folder: Path | None) -> "Indexes":
    """The index of a cache: finished where its making was stopped, made with default settings where there is none."""
    from darht.tools.index import CARD, IndexSettings, build_indexes, default_folder, open_indexes
    from darht.tools.vectors import cache_spaces

    where, spaces = folder or default_folder(cache), cache_spaces(cache)
    there = open_indexes(cache, where) if (where / CARD).is_file() else None
    if there is not None and spaces.keys() <= there.card.indexes.keys():
        return there
    with _steps() as on_rows:
        settings = there.card.settings if there else IndexSettings()
        return build_indexes(cache, spaces, where, settings, on_rows=on_rows)[0]


def _loaded(cache: "Cache", teachers: tuple[str, ...], device: str) -> "Loaded":
    from darht.core.device import pick_device
    from darht.tools.live import load_teachers

    found = load_teachers(cache, named_folders(teachers), pick_device(device))
    for name, why in found.missing.items():
        click.echo(f"teacher '{name}' is left out: {why}; give --teacher {name}=FOLDER", err=True)
    return found


@inspect.command(cls=Command)
@click.argument("location", metavar="CACHE")
@click.option("--out", type=FOLDER, help="The index's folder; CACHE/index by default.")
@click.option("--dim", default=128, show_default=True, help="Dimensions after projection.")
@click.option("--projection", default="pca", show_default=True, type=click.Choice(["pca", "random"]))
@click.option("--kind", default="auto", show_default=True, type=click.Choice(["auto", "exact", "hnsw", "ivfpq"]))
@click.option("--exact-below", default=100_000, show_default=True, help="Vectors from which on auto takes hnsw.")
@click.option(
    "--hnsw-below", default=500_000, show_default=True, help="Vectors from which on auto takes ivfpq instead."
)
@click.option("--student", type=FOLDER, help="A run of darht-train, whose features are indexed too.")
@trust_option
def index(location: str, out: Path | None, student: Path | None, **settings: Any) -> None:
    """Build FAISS indexes over perturbations, images, logits and features; what fits is kept."""
    from darht.cache.read.webdataset import open_shards
    from darht.core.device import pick_device
    from darht.tools import live
    from darht.tools.index import IndexSettings, build_indexes, default_folder
    from darht.tools.tables import index_table
    from darht.tools.vectors import cache_spaces

    cache, students, identities = open_shards(location), {}, {}
    chosen, folder = IndexSettings(**settings), out or default_folder(cache, option="--out")
    if student is not None:
        net = live.student_of(student, cache, pick_device("cpu"))
        students[student.name] = live.student_features(net, cache.spec.view_shape)
        identities[f"features/{student.name}"] = live.student_hash(student)
    spaces = cache_spaces(cache, students)
    with _steps() as on_rows:
        made, built = build_indexes(cache, spaces, folder, chosen, identities=identities, on_rows=on_rows)
    _print(index_table(made, built), f"{folder}: {len(built)} built, {len(made.card.indexes) - len(built)} kept")


@inspect.command(cls=Command)
@click.argument("location", metavar="CACHE")
@click.argument("query", metavar="[ROW|IMAGE.png]", required=False)
@click.option("--row", type=int, help="The row (source index) to look around; the same as ROW.")
@click.option("--k", default=5, show_default=True, type=int, help="How many neighbours.")
@click.option("--picture", type=FOLDER, help="Where the sheet goes; beside the cache by default.")
@_index_option
@_teachers_option
def neighbours(
    location: str,
    query: str | None,
    row: int | None,
    k: int,
    picture: Path | None,
    folder: Path | None,
    teachers: tuple[str, ...],
) -> None:
    """What lies near a row, or near an image from outside: perturbations, images, and each teacher's logits.

    An index is used when there is one (darht-inspect index); without it every vector is compared.
    """
    from darht.cache.read.webdataset import open_shards
    from darht.tools.index import CARD, default_folder, open_indexes
    from darht.tools.neighbours import draw, find_neighbours, outside_image
    from darht.tools.tables import neighbour_table

    if (query is None) == (row is None):
        raise ConfigError("say what to look around: a row, or an image file")
    cache = open_shards(location)
    given = folder or (None if "://" in location else default_folder(cache))
    indexes = open_indexes(cache, given) if given and (folder or (given / CARD).is_file()) else None
    number = row if query is None else int(query) if query.lstrip("-").isdigit() else None
    outside = None
    if number is None:
        outside = outside_image(cache, Path(str(query)), dict(_loaded(cache, teachers, "cpu").teachers))
    found = find_neighbours(cache, outside or (number or 0), k, indexes)
    path = _beside(location, f"neighbours-{number if outside is None else Path(outside.name).stem}.png", picture)
    _print(neighbour_table(found, cache.spec.data.classes))
    draw(cache, found, path, outside)
    _print(f"picture {path}")


@inspect.command(cls=Command)
@click.argument("location", metavar="CACHE")
@click.option("--k", default=16, show_default=True, help="Directions of a subspace.")
@click.option("--neighbours", "near", default=10, show_default=True, help="Neighbours of an example, for mixing.")
@_gaas_option
@_index_option
@_teachers_option
@device_option
def subspace(
    location: str, k: int, near: int, gaas: int, folder: Path | None, teachers: tuple[str, ...], device: str
) -> None:
    """In which directions attacks work: angles, energy, mixing, effective rank, and orthogonal directions that fool."""
    from darht.cache.read.webdataset import open_shards
    from darht.tools.gaas import measure_gaas
    from darht.tools.subspace import subspaces
    from darht.tools.tables import attack_table, gaas_table, pair_table

    cache = open_shards(location)
    indexes = _indexes(cache, folder)
    with _steps() as on_step:
        found = subspaces(cache, indexes, k=k, neighbours=near, on_step=on_step)
    _print(attack_table(found), pair_table(found))
    loaded = _loaded(cache, teachers, device) if gaas else None
    if loaded is not None and loaded.teachers:
        with _steps() as on_step:
            counted = measure_gaas(cache, dict(loaded.teachers), count=gaas, on_step=on_step)
        _print(gaas_table(counted) if len(counted.rows) else "no row was drawn that all teachers answer rightly")


@inspect.command(cls=Command)
@click.argument("location", metavar="CACHE")
@click.option("--by-class", is_flag=True, help="A table for each class as well.")
@click.option("--balanced", is_flag=True, help="Count equally many rows of each class, as darht-teacher transfer does.")
@click.option("--picture", type=FOLDER, help="Where the heat map goes; beside the cache by default.")
def transfer(location: str, by_class: bool, balanced: bool, picture: Path | None) -> None:
    """Which teacher falls for which teacher's adversarial examples."""
    from darht.cache.read.webdataset import open_shards
    from darht.tools.tables import transfer_table
    from darht.tools.transfer import draw, stored_transfer

    cache = open_shards(location)
    matrix = stored_transfer(cache, balanced=balanced)
    names = cache.spec.data.classes if by_class else ()
    path = _beside(location, "transfer.png", picture)
    _print(transfer_table(matrix), *(transfer_table(matrix, c, name) for c, name in enumerate(names)))
    draw(matrix, path)
    _print(f"picture {path}")


@inspect.command(cls=Command)
@click.argument("location", metavar="CACHE")
@click.option("--size", required=True, type=int, help="How many teachers to take.")
@click.option("--min-clean", default=0.0, show_default=True, help="Floor on clean accuracy, per cent.")
@click.option("--min-robust", default=0.0, show_default=True, help="Floor on accuracy under the own attack, per cent.")
@click.option("--by", default="transfer", show_default=True, type=click.Choice(["transfer", "student", "entropy"]))
@click.option("--student", type=FOLDER, help="A run of darht-train; its examples are tried on every teacher.")
@click.option("--most", default=10, show_default=True, type=click.IntRange(min=1), help="How many sets to show.")
@_teachers_option
@device_option
def select(location: str, student: Path | None, teachers: tuple[str, ...], device: str, **options: Any) -> None:
    """Which set of teachers to take: low mutual transfer, subject to floors on accuracy."""
    from darht.cache.read.webdataset import open_shards
    from darht.core.device import pick_device
    from darht.tools import live
    from darht.tools.select import rank_sets, spec_snippet
    from darht.tools.tables import candidate_table, set_table

    cache, measured = open_shards(location), {}
    if student is not None:
        net, loaded = live.student_of(student, cache, pick_device(device)), _loaded(cache, teachers, device)
        measured = live.student_transfer(cache, net, loaded.teachers)
    ranking = rank_sets(cache, student=measured, **options)
    _print(candidate_table(ranking), set_table(ranking))
    for warning in ranking.warnings:
        click.echo(f"warning: {warning}", err=True)
    _print(f"take {' '.join(ranking.sets[0].names)}:", spec_snippet(cache, ranking.sets[0].names))


@inspect.command(cls=Command)
@click.argument("location", metavar="CACHE")
@click.option("--out", type=FOLDER, help="The JSON list; CACHE-rows.json beside the cache by default.")
@click.option("--filter", "kinds", help="Kinds for darht-train --exclude: fooled-all, only-one, label-candidate, "
              "duplicate; default: duplicates, and candidates if teachers can be trusted.")  # fmt: skip
@click.option("--by", type=click.Choice(["entropy"]), help="Instead, choose rows to train on by how unsure teachers "
              "are together: of those without labels, where there are some.")  # fmt: skip
@click.option("--keep", type=float, help="With --by: the share of rows to keep; 0.5 by default.")
@click.option("--end", type=click.Choice(["lowest", "highest"]), help="With --by: which to keep; lowest by default.")
@click.option("--margin", default=0.5, show_default=True, help="Lead in probability that makes a label suspicious.")
@click.option("--root", type=FOLDER, help="Where the test split lies, when not where the cache was built from.")
@click.option("--most", default=10, show_default=True, type=click.IntRange(min=1), help="Rows of each kind to show.")
@click.option("--picture", type=FOLDER, help="Where the gallery goes; beside the cache by default.")
@_teachers_option
@device_option
def rows(
    location: str, out: Path | None, picture: Path | None, root: Path | None, teachers: tuple[str, ...], **options: Any
) -> None:
    """Rows that fool all, that one teacher alone gets right, with doubtful labels, or repeated in the test split."""
    from darht.cache.read.webdataset import open_shards

    asked = {name: value for name in ("by", "keep", "end") if (value := options.pop(name)) is not None}
    if asked:
        _select_rows(open_shards(location), asked, _beside(location, "rows.json", out), options["kinds"])
        return
    from darht.tools.label_judgement import survey_rows
    from darht.tools.live import ask, open_test
    from darht.tools.rows import draw, write_rows
    from darht.tools.tables import row_tables

    cache = open_shards(location)
    test, why = open_test(cache, root)
    logits: dict[str, Any] = {}
    if test is None:
        click.echo(f"duplicates are not looked for: {why}; give --root DIR", err=True)
    else:
        loaded = _loaded(cache, teachers, options["device"]).teachers
        logits = {name: ask(model, test.images) for name, model in loaded.items()}
    found = survey_rows(cache, test, logits, margin=options["margin"])
    echo_notes(found.notes)
    path, sheet = _beside(location, "rows.json", out), _beside(location, "rows.png", picture)
    named = None if options["kinds"] is None else [kind.strip() for kind in options["kinds"].split(",")]
    kinds = found.judgement.kinds if named is None else tuple(filter(None, named))
    chosen = write_rows(cache, found.report, path, kinds)
    draw(cache, found.report, sheet, None if test is None else test.images)
    lines = found.judgement.text, f"{len(chosen)} rows for --exclude in {path}", f"gallery {sheet}"
    _print(*row_tables(cache, found.report, options["most"]), *filter(None, lines))


def _select_rows(cache: "Cache", asked: dict[str, Any], path: Path, kinds: str | None) -> None:
    from darht.cache.read.select import Selection, candidates
    from darht.tools.rows import write_selection

    if "by" not in asked or kinds is not None:
        raise ConfigError(
            "--keep and --end say which rows --by keeps, which --filter does not: give --by entropy alone"
        )
    left_out, among = write_selection(cache, Selection(**asked), path), len(candidates(cache))
    _print(f"{among - len(left_out)} of {among} rows are kept; the others are listed for --exclude in {path}")


@inspect.command(cls=Command)
@click.argument("location", metavar="CACHE")
@click.option("--out", type=FOLDER, help="The page; CACHE-report.html beside the cache by default.")
@click.option("--k", default=16, show_default=True, help="Directions of a subspace.")
@_gaas_option
@_index_option
@_teachers_option
@device_option
def report(
    location: str, out: Path | None, k: int, gaas: int, folder: Path | None, teachers: tuple[str, ...], device: str
) -> None:
    """One self-contained page about a cache: teachers, transfer, subspaces, a map, the hardest rows, the build."""
    from darht.cache.read.webdataset import open_shards
    from darht.core.files import write_atomic
    from darht.tools.report import collect
    from darht.tools.report_page import render

    cache, path = open_shards(location), _beside(location, "report.html", out)
    indexes = _indexes(cache, folder)
    loaded = _loaded(cache, teachers, device) if gaas else None
    with _steps() as on_step:
        facts = collect(cache, indexes, dict(loaded.teachers) if loaded else {}, k=k, gaas_rows=gaas, on_step=on_step)
    page = render(facts).encode()
    write_atomic(path, page)
    _print(f"report {path}, {len(page) / 1e6:.1f} MB, no network needed")
