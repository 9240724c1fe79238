"""The command line of the cache: each command is one library call."""

from pathlib import Path
from typing import Literal

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from darht.core.cli import StateGroup


@click.group(cls=StateGroup)
def cache() -> None:
    """Build and look into caches of perturbations and teachers' logits."""


@cache.command()
@click.argument("spec", type=click.Path(path_type=Path))
@click.option(
    "--out", required=True, help="The cache's folder, or a URL such as s3://BUCKET/NAME; a stopped build goes on."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--batch-size", default=256, show_default=True, type=click.IntRange(min=1), help="Images per forward pass."
)
@click.option("--download", is_flag=True, help="Fetch CIFAR when its files are not there.")
def build(spec: Path, out: str, device: str, batch_size: int, download: bool) -> None:
    """Craft perturbations, ask every teacher, store both, and seal the cache."""
    from darht.cache import build as builder
    from darht.cache.layout import ArrayLayout
    from darht.cache.seal import seal as seal_cache
    from darht.core.device import pick_device

    where = pick_device(device)
    plan = builder.plan_build(spec, device=where, download=download)
    console, units = Console(stderr=True), (BarColumn(), MofNCompleteColumn(), TextColumn("units"))
    columns = (TextColumn("{task.description}"), *units, TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("build", total=len(plan.units))

        def on_unit(array: ArrayLayout, shard: int, seconds: float) -> None:
            progress.update(task, advance=1, description=f"{array.name} {shard}")

        report = builder.build(plan, out, device=where, batch_size=batch_size, on_unit=on_unit)
    manifest = seal_cache(out)
    spent = sum(report.seconds.values())
    click.echo(f"{out}: {report.computed} units computed in {spent:.1f} s, {report.reused} reused; sealed")
    click.echo(f"root hash {manifest.root_hash}")


@cache.command()
@click.argument("location", metavar="CACHE")
def seal(location: str) -> None:
    """Check every unit and write the manifest (build does it at its end)."""
    from darht.cache.seal import seal as seal_cache

    click.echo(f"root hash {seal_cache(location).root_hash}")


@cache.command()
@click.argument("location", metavar="CACHE")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with the numbers of the shards that need work.")
def status(location: str, as_json: bool) -> None:
    """Print what is done and what is missing; exit 0 when whole and sealed, 3 when incomplete, 4 when corrupt."""
    import json
    import sys

    from darht.cache.commit import State
    from darht.cache.status import read_status
    from darht.core.config import to_plain

    found = read_status(location)
    if as_json:
        click.echo(json.dumps({"state": found.state.value, **to_plain(found)}, indent=2))
    else:
        table = Table(header_style="bold")
        for title in ("array", "done", "missing", "corrupt", "MB", "seconds", "seconds left"):
            table.add_column(title, no_wrap=title == "array", justify="left" if title == "array" else "right")
        for array in found.arrays:
            left = "?" if array.seconds_left is None else f"{array.seconds_left:.0f}"
            counts = (f"{array.done}/{array.units}", str(len(array.missing)), str(len(array.corrupt)))
            table.add_row(array.name, *counts, f"{array.size / 1e6:.2f}", f"{array.seconds:.1f}", left)
        console = Console()
        console.print(table)
        work = (
            f"shards of rows that need work: {','.join(map(str, found.shards))}" if found.shards else "all units done"
        )
        console.print(f"{work}; {'sealed' if found.sealed else 'not sealed'}", highlight=False, soft_wrap=True)
    sys.exit({State.DONE: 0, State.MISSING: 3, State.CORRUPT: 4}[found.state])


@cache.command()
@click.argument("location", metavar="CACHE")
def verify(location: str) -> None:
    """Read every byte of a sealed cache; exit 0 when all is right, 4 when not, with a line for everything wrong."""
    import sys

    from darht.cache.reader import open_cache
    from darht.cache.verify import verify as verify_cache

    problems = verify_cache(location)
    for problem in problems:
        click.echo(f"corrupt: {problem}", err=True)
    if problems:
        click.echo(f"{len(problems)} problems; darht-cache build on the same folder repairs them, then seal", err=True)
        sys.exit(4)
    opened = open_cache(location)
    click.echo(f"{location}: {len(opened.manifest.shards)} shards, every byte as sealed; root hash {opened.root_hash}")


@cache.command()
@click.argument("location", metavar="CACHE")
@click.option("--format", "_format", required=True, type=click.Choice(["webdataset"]), help="What to write.")
@click.option(
    "--layout",
    default="samples",
    show_default=True,
    type=click.Choice(["samples", "blocks"]),
    help="One entry per row for everybody, or one per 256 rows, which reads faster.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A new or empty folder.")
def export(location: str, _format: str, layout: Literal["samples", "blocks"], out: Path) -> None:
    """Write a sealed cache as WebDataset tar shards, which darht-train --shards takes as well."""
    from darht.cache.export import export_webdataset
    from darht.cache.reader import open_cache

    index = export_webdataset(open_cache(location), out, layout)
    size = sum(tar.size for tar in index.tars)
    click.echo(f"{out}: {len(index.tars)} tars, {size / 1e6:.2f} MB, {index.manifest.rows} rows, layout {layout}")


@cache.command()
@click.argument("location", metavar="CACHE")
def info(location: str) -> None:
    """Print what a sealed cache holds."""
    from darht.cache.info import summarise
    from darht.cache.reader import open_cache

    summary = summarise(open_cache(location))
    console = Console()
    for name, value in summary.facts:
        console.print(f"[bold]{name}[/bold]  {value}", highlight=False, soft_wrap=True)
    table = Table(header_style="bold")
    for title in ("array", "type", "shape"):
        table.add_column(title, no_wrap=title == "array")  # a name is for copying; a shape may take two lines
    for title in ("MB", "bytes/row", "of raw", "seconds"):
        table.add_column(title, justify="right")
    for row in summary.arrays:
        table.add_row(*row)
    console.print(table)
