"""The command line of inspection: each command is one library call."""

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from darht.core.cli import Command, Group

_FOLDER = click.Path(path_type=Path)


@click.group(cls=Group)
def inspect() -> None:
    """Look at the adversarial subspaces that a cache holds."""


def _picture(cache: Path, name: str, given: Path | None) -> Path:
    """Pictures lie beside the cache, never in it."""
    return given or cache.resolve().parent / f"{cache.resolve().name}-{name}.png"


@inspect.command(cls=Command)
@click.argument("cache", type=_FOLDER)
@click.option("--picture", type=_FOLDER, help="Where the heat map goes; beside the cache by default.")
def transfer(cache: Path, picture: Path | None) -> None:
    """Which teacher falls for which teacher's adversarial examples."""
    from darht.cache.reader import open_cache
    from darht.tools.transfer import draw, transfer_matrix

    matrix = transfer_matrix(open_cache(cache))
    table = Table("attack", "crafted on", *matrix.teachers, header_style="bold")
    table.add_row("(clean)", "", *(f"{value:.1f}" for value in matrix.clean))
    for a, attack in enumerate(matrix.attacks):
        cells = []
        for t in range(len(matrix.teachers)):
            low, high = matrix.interval(a, t)
            cells.append(f"{matrix.accuracy[a, t]:.1f} [{low:.0f}, {high:.0f}]")
        table.add_row(attack, matrix.sources[a], *cells)
    console, path = Console(), _picture(cache, "transfer", picture)
    console.print(table)
    console.print(
        "per cent still right of the rows that both teachers answer rightly when clean, with 95 % intervals",
        highlight=False,
    )
    draw(matrix, path)
    console.print(f"picture {path}", highlight=False, soft_wrap=True)


@inspect.command(cls=Command)
@click.argument("cache", type=_FOLDER)
@click.option("--row", required=True, type=int, help="The row (source index) to look around.")
@click.option("--k", default=5, show_default=True, type=int, help="How many neighbours.")
@click.option("--picture", type=_FOLDER, help="Where the sheet goes; beside the cache by default.")
def neighbours(cache: Path, row: int, k: int, picture: Path | None) -> None:
    """What lies near a row: its perturbations and each teacher's logits."""
    from darht.cache.reader import open_cache
    from darht.tools.neighbours import draw, find_neighbours

    opened = open_cache(cache)
    spaces, classes = find_neighbours(opened, row, k), opened.spec.data.classes
    table = Table("space", "rank", "row", "label", "teacher says", "cosine", header_style="bold")
    for space in spaces:
        for rank, hit in enumerate((space.query, *space.hits)):
            right = "" if hit.predicted == hit.label else " (wrong)"
            first = f"{space.name}" if rank == 0 else ""
            name = "query" if rank == 0 else str(rank)
            said = f"{classes[hit.predicted]}{right}"
            table.add_row(first, name, str(hit.row), classes[hit.label], said, f"{hit.cosine:.3f}")
        table.add_section()
    console, path = Console(), _picture(cache, f"neighbours-{row}", picture)
    console.print(table)
    draw(opened, spaces, path)
    console.print(f"picture {path}", highlight=False, soft_wrap=True)


def _call(words: tuple[str, ...]) -> None:
    from darht.cache.cli import cache as cache_command
    from darht.trainer import cli as trainer

    programs: dict[str, click.Command] = {
        "darht-teacher": trainer.teacher,
        "darht-cache": cache_command,
        "darht-train": trainer.train,
        "darht-eval": trainer.evaluate,
        "darht-inspect": inspect,
    }
    programs[words[0]].main(list(words[1:]), prog_name=words[0], standalone_mode=False)


@click.command(cls=Command)
@click.argument("recipe", type=_FOLDER)
@click.option("--out", type=_FOLDER, required=True, help="Where everything goes; a stopped experiment goes on.")
@click.option("--root", type=_FOLDER, help="Where the data set lies; none for digits.")
def experiment(recipe: Path, out: Path, root: Path | None) -> None:
    """Run teachers, cache, inspection, students and evaluation from one file."""
    from darht.tools.experiment import collect, load_experiment, run_experiment

    config = load_experiment(recipe)
    seconds = run_experiment(config, out, root=root, call=_call, tell=click.echo)
    result = collect(config, out, seconds)
    console = Console()
    table = Table(title="Teachers, per cent of test images", header_style="bold")
    for title in ("teacher", "network", "trained by", "clean", "PGD-20", "s"):
        table.add_column(
            title, justify="left" if title in ("teacher", "network") else "right", no_wrap=title != "network"
        )
    for row in result.teachers:
        table.add_row(*row)
    console.print(table)
    table = Table(title="Students, per cent of test images", header_style="bold")
    for title in ("student", "recipe", "inner", "clean", "PGD-20", "transfer", "worst"):
        text = title in ("student", "recipe", "inner")
        table.add_column(title, justify="left" if text else "right", no_wrap=True)
    for row in result.students:
        table.add_row(*row[:4], *row[5:8])  # FGSM and seconds are in the files: 80 columns hold no more
    console.print(table)
    for fact in result.facts:
        console.print(fact, highlight=False, soft_wrap=True)
