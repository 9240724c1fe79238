"""The command line of whole experiments: `darht-experiment RECIPE --out DIR`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from darht.core import stopping
from darht.core.cli import FOLDER, Command, print_table, trust_option, version_option

if TYPE_CHECKING:
    from darht.tools.experiment_config import ExperimentConfig
    from darht.tools.experiment_results import Result


def call(words: tuple[str, ...]) -> None:
    """Run one command of darht in this process."""
    from darht.cache.cli import cache as cache_command
    from darht.tools.cli import inspect
    from darht.trainer import cli as trainer

    programs: dict[str, click.Command] = {
        "darht-teacher": trainer.teacher,
        "darht-cache": cache_command,
        "darht-train": trainer.train,
        "darht-eval": trainer.evaluate,
        "darht-inspect": inspect,
    }
    programs[words[0]].main(list(words[1:]), prog_name=words[0], standalone_mode=False)


@click.command(cls=Command, kept="finished stages stay, and so does what each of the others kept")
@version_option
@click.argument("recipe", type=FOLDER)
@click.option("--out", type=FOLDER, required=True, help="Where everything goes; a stopped experiment goes on.")
@click.option("--root", type=FOLDER, help="Where the data set lies; none for digits.")
@click.option(
    "--jobs",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="Stages at a time, each with its share of the cores and its log below OUT/logs.",
)
@click.option(
    "--set", "assignments", multiple=True, help="Change a key: data.limit=500, teachers.vit.set.optim.epochs=9."
)
@trust_option
def experiment(recipe: Path, out: Path, root: Path | None, jobs: int, assignments: tuple[str, ...]) -> None:
    """Run teachers, cache, inspection, students and evaluation from one file."""
    from darht.tools.experiment import run_experiment
    from darht.tools.experiment_config import load_experiment
    from darht.tools.experiment_page import write_page
    from darht.tools.experiment_results import collect, seeds_done

    config = load_experiment(recipe, assignments)
    command = ["darht-experiment", str(recipe), "--out", str(out), *(["--root", "DIR"] if root else [])]
    command += ["--jobs", str(jobs)] if jobs > 1 else []
    command += [word for assignment in assignments for word in ("--set", assignment)]

    def so_far(seconds: dict[str, float]) -> None:
        if 0 < seeds_done(config, out) < config.seeds:
            write_page(config, out, collect(config, out, seconds), shlex.join(command))

    try:
        seconds = run_experiment(config, out, root=root, call=call, tell=click.echo, jobs=jobs, on_measured=so_far)
    except SystemExit as stage:  # it was stopped and said how it goes on; so does the whole
        if stage.code in (stopping.BY_HAND, stopping.BY_SCHEDULER):
            raise KeyboardInterrupt from None
        raise
    except click.Abort:  # what click makes of Ctrl-C in a stage that keeps nothing
        raise KeyboardInterrupt from None
    result = collect(config, out, seconds)
    page = write_page(config, out, result, shlex.join(command))
    _print(config, result)
    click.echo(f"page: {page}")


def _print(config: "ExperimentConfig", result: "Result") -> None:
    """The two tables and the facts, for a terminal."""
    console = Console(markup=False, emoji=False)
    table = Table(title="Teachers, per cent of test images", header_style="bold")
    for title in ("teacher", "network", "trained by", "clean", "PGD-20", "s"):
        table.add_column(
            title, justify="left" if title in ("teacher", "network") else "right", no_wrap=title != "network"
        )
    for row in result.teachers:
        table.add_row(*row)
    print_table(table)
    table = Table(title="Students, per cent of test images", header_style="bold")
    last = "transfer" if config.baseline is None else "gain"
    judge = "worst" if config.tier == "quick" else "AA"
    for title in ("student", "recipe", "inner", "clean", "PGD-20", judge, last):
        text = title in ("student", "recipe", "inner")
        table.add_column(title, justify="left" if text else "right", no_wrap=True)
    for way in result.ways:  # seconds and the rest are on the page: 80 columns hold no more
        transfer = "-" if way.transfer is None else f"{way.transfer:.1f}"
        figures = (f"{share.mean:.1f}" for share in (way.clean, way.pgd, way.judged))
        gained = way.gain.cell if way.gain else ""
        table.add_row(way.name, way.recipe, way.inner, *figures, transfer if config.baseline is None else gained)
    print_table(table)
    for fact in result.facts:
        console.print(fact, highlight=False, soft_wrap=True)
