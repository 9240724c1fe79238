"""The command line of the cache: each command is one library call."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from rich.console import Console
from rich.progress import TextColumn, TimeRemainingColumn
from rich.text import Text

from darht.cache.admin.cli import pull, push
from darht.cache.serve.cli import serve
from darht.core.cli import (
    FOLDER,
    StateGroup,
    device_option,
    echo_notes,
    named_folders,
    print_table,
    skip_broken_option,
    transient_bar,
    trust_option,
    version_option,
)
from darht.core.errors import ConfigError

if TYPE_CHECKING:
    from darht.cache.builder.pool import OnNotice
    from darht.cache.builder.writer import OnUnit
    from darht.cache.format.layout import ArrayLayout


@click.group(cls=StateGroup)
@version_option
def cache() -> None:
    """Build and look into caches of perturbations and teachers' logits."""


@cache.command(kept="every unit that was done is kept, nothing is half written")
@click.argument("spec", type=FOLDER)
@click.option(
    "--out", required=True, help="The cache's folder, or a URL such as s3://BUCKET/NAME; a stopped build goes on."
)
@device_option
@click.option(
    "--batch-size", type=click.IntRange(min=1), help="Images per forward pass; default: 256, on a GPU what fits."
)
@click.option("--download", is_flag=True, help="Fetch CIFAR when its files are not there.")
@skip_broken_option
@click.option("--workers", default=1, show_default=True, type=click.IntRange(min=1), help="Processes, or Ray's actors.")
@click.option("--engine", default="local", show_default=True, type=click.Choice(["local", "ray"]), help="Who works.")
@click.option("--allow", multiple=True, metavar="NAME", help="A teacher to take though it makes no sense.")
@click.option("--shard", metavar="I/N", help="This job's part: I/N from 0, auto, auto/N, or row blocks such as 3,7,9.")
@trust_option
def build(
    spec: Path,
    out: str,
    device: str,
    batch_size: int | None,
    download: bool,
    skip_broken: bool,
    workers: int,
    engine: Literal["local", "ray"],
    allow: tuple[str, ...],
    shard: str | None,
    extending: bool = False,
) -> None:
    """Craft perturbations, ask every teacher, store both, and seal the cache once all of it is there.

    Before that new teachers are asked some images; one that makes no sense stops the build, unless --allow names it.
    """
    import os
    from functools import partial

    from darht.cache.admin.status import read_status
    from darht.cache.builder import build as builder
    from darht.cache.builder.extend import grow
    from darht.cache.builder.jobs import PoolConfig, build_shared, choose_part
    from darht.cache.builder.seal import seal as seal_cache
    from darht.cache.builder.sense import check_teachers
    from darht.core.device import pick_device
    from darht.core.trust import is_trusting

    pool_config = PoolConfig(engine=engine, workers=workers, device=device)
    where = pick_device(device if pool_config.alone else "cpu")  # the others load the teachers where they compute
    known = builder.spec_in(out)
    reading: Any = {"download": download, "skip_broken": skip_broken, "known": known, "out": out}
    plan = builder.plan_build(spec, device=where, **reading)
    echo_notes(plan.source.notes)
    if part := None if shard is None else choose_part(shard, plan.shards, os.environ):
        click.echo(part.reason)
    check_teachers(plan, out, extending=extending, device=pool_config.asking_device(), allow=allow, on_line=click.echo)
    if extending:
        grow(out, plan.spec)
    shards = range(plan.shards) if part is None else part.shards
    with _progress(sum(len(plan.block(k)) for k in shards)) as (on_unit, on_notice):
        common: Any = {"batch_size": batch_size, "shards": shards, "on_unit": on_unit}
        if pool_config.alone:
            report = builder.build(plan, out, device=where, **common)
        else:
            again: Any = reading | {"download": False, "trust_code": is_trusting()}
            load = partial(builder.plan_build, spec.resolve(), **again)
            report = build_shared(plan, load, out, pool_config, on_notice=on_notice, **common)
    done = f"{out}: {report.computed} units computed in {sum(report.seconds.values()):.1f} s, {report.reused} reused"
    if part is not None and (left := read_status(out).left):
        click.echo(f"{done}; {left} of {len(plan.units)} units left in all")
        return
    manifest = seal_cache(out)
    click.echo(f"{done}; sealed")
    click.echo(f"root hash {manifest.root_hash}")


@contextlib.contextmanager
def _progress(total: int) -> "Iterator[tuple[OnUnit, OnNotice]]":
    """A bar on a terminal's stderr; notices are printed above it."""
    console = Console(stderr=True)
    with transient_bar(console, TextColumn("units"), TimeRemainingColumn()) as progress:
        task = progress.add_task("build", total=total)

        def on_unit(array: "ArrayLayout", shard: int, seconds: float) -> None:
            progress.update(task, advance=1, description=f"{array.name} {shard}")

        def on_notice(text: str) -> None:
            console.print(text, highlight=False, soft_wrap=True, markup=False)

        yield on_unit, on_notice


@cache.command(
    kept="every unit that was done is kept",
    params=[option for option in build.params if option.name not in ("spec", "out")],
)
@click.argument("location", metavar="CACHE")
@click.argument("spec", type=FOLDER)
@click.pass_context
def extend(context: click.Context, /, location: str, spec: Path, **options: Any) -> None:
    """Add the teachers, attacks and views that SPEC has beyond CACHE's, keep everything else, and seal.

    A stopped extend goes on with the same command, or with build and the new spec.
    """
    context.invoke(build, spec=spec, out=location, extending=True, **options)


@cache.command()
@click.argument("location", metavar="CACHE")
def seal(location: str) -> None:
    """Check every unit and write the manifest (build does it at its end)."""
    from darht.cache.builder.seal import seal as seal_cache

    click.echo(f"root hash {seal_cache(location).root_hash}")


@cache.command()
@click.argument("location", metavar="CACHE")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with the numbers of the shards that need work.")
def status(location: str, as_json: bool) -> None:
    """Print what is done and what is missing; exit 0 when whole and sealed, 3 when incomplete, 4 when corrupt."""
    import json
    import sys

    from darht.cache.admin.status import read_status
    from darht.cache.admin.tables import status_line, status_table
    from darht.cache.format.commit import State
    from darht.core.config import to_plain

    found = read_status(location)
    if as_json:
        click.echo(json.dumps({"state": found.state.value, **to_plain(found)}, indent=2))
    else:
        print_table(status_table(found))
        click.echo(status_line(found))
    sys.exit({State.DONE: 0, State.MISSING: 3, State.CORRUPT: 4}[found.state])


@cache.command()
@click.argument("location", metavar="CACHE")
@click.option("--recompute", metavar="2%", help="Also compute a sample of rows again: a share, or a count.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of the sample.")
@click.option("--data-root", type=FOLDER, help="Where the data set lies, if not as when built.")
@click.option("--teacher", "teachers", multiple=True, help="NAME=FOLDER of a teacher that does not lie as when built.")
@click.option("--tolerance", type=click.FloatRange(min=0), help="Largest difference of a logit [default: 0.05].")
@click.option("--moved", type=click.FloatRange(0, 100), help="Largest % of a perturbation's values [default: 10].")
@trust_option
@device_option
def verify(
    location: str,
    recompute: str | None,
    seed: int,
    data_root: Path | None,
    teachers: tuple[str, ...],
    tolerance: float | None,
    moved: float | None,
    device: str,
) -> None:
    """Read every byte of a sealed cache; exit 0 when all is right, 4 when not, with a line for everything wrong.

    With --recompute teachers and attacks run again on a seeded sample of batches. On the same machine and engine
    nothing differs; beyond the tolerances the exit code is 4, and 2 when data or teachers are not at hand.
    """
    import sys

    from darht.cache.admin.verify import verify as verify_cache
    from darht.cache.format.manifest import read_spec
    from darht.cache.read.webdataset import open_shards

    folders = named_folders(teachers)
    if recompute:  # a mistake is told before every byte is read
        from darht.cache.admin.recompute import LOGITS, VALUES, sample_size
        from darht.cache.admin.recompute import recompute as compute_again
        from darht.cache.admin.tables import recompute_table
        from darht.core.device import pick_device

        count, where = sample_size(recompute, read_spec(location).data.rows), pick_device(device)
    problems = verify_cache(location)
    for problem in problems:
        click.echo(f"corrupt: {problem}", err=True)
    if problems:
        repair = "darht-cache build on the same folder repairs a cache, then seal; an export is exported again"
        click.echo(f"{len(problems)} problems; {repair}", err=True)
        sys.exit(4)
    opened = open_shards(location)
    click.echo(f"{location}: {len(opened.manifest.shards)} shards, every byte as sealed; root hash {opened.root_hash}")
    if not recompute:
        return
    found = compute_again(opened, count, device=where, seed=seed, data_root=data_root, teachers=folders)
    print_table(recompute_table(found))
    stored = f"; stored were those of {'; '.join(found.made_on)}" if found.made_on else ""
    click.echo(f"{found.rows} rows computed again on {where}{stored}")
    beyond = found.beyond(LOGITS if tolerance is None else tolerance, VALUES if moved is None else moved / 100)
    for line in beyond:
        click.echo(f"differs: {line}", err=True)
    sys.exit(4 if beyond else 0)


@cache.command()
@click.argument("first", metavar="CACHE")
@click.argument("second", metavar="CACHE|SPEC.yaml")
@click.option("--values", is_flag=True, help="Read what differs: largest differences, rows, argmax flips.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def diff(first: str, second: str, values: bool, as_json: bool) -> None:
    """Print what differs between two caches, or a cache and a spec; exit 0 when nothing does, 1 when something does.

    Errors have their codes: 2 usage, 3 not sealed, 4 corrupt.
    """
    import json
    import sys

    from darht.cache.admin.diff import diff_caches, diff_spec
    from darht.cache.admin.tables import diff_table
    from darht.core.config import to_plain

    is_spec = second.endswith((".yaml", ".yml"))
    if is_spec and values:
        raise ConfigError(f"--values compares what two caches hold; {second} is a spec and holds nothing")
    found = diff_spec(first, Path(second)) if is_spec else diff_caches(first, second, values=values)
    if as_json:
        click.echo(json.dumps({"same": found.same, **to_plain(found)}, indent=2))
    else:
        for line in found.spec:
            click.echo(line)
        print_table(diff_table(found))
        click.echo("the same spec and the same bytes" if found.same else "they differ")
    sys.exit(0 if found.same else 1)


@cache.command()
@click.argument("location", metavar="CACHE")
@click.option("--yes", is_flag=True, help="Remove what is listed; without it nothing is.")
@click.option("--all", "everything", is_flag=True, help="Also what is younger than an hour: only when nobody builds.")
def gc(location: str, yes: bool, everything: bool) -> None:
    """List what killed or former builds left in CACHE, and remove it with --yes.

    Nothing that the spec names and that is done is touched, nor any file that darht does not know, nor, without --all,
    what is younger than an hour: it may belong to a build that is under way.
    """
    from darht.cache.admin.gc import find_leftovers, remove_leftovers

    found = find_leftovers(location, young=everything)
    for leftover in found:
        click.echo(f"{leftover.size:>12,} bytes  {leftover.key}  ({leftover.why})")
    if yes:
        remove_leftovers(location, found)
    done = "removed" if yes else "can be removed with --yes"
    total = sum(leftover.size for leftover in found)
    click.echo(f"{location}: {len(found)} files, {total:,} bytes {done}" if found else f"{location}: nothing left over")


@cache.command(kept="every tar that was done is kept")
@click.argument("location", metavar="CACHE")
@click.option(
    "--format", "kind", required=True, type=click.Choice(["webdataset", "croissant"]), help="Tars, or metadata."
)
@click.option(
    "--layout",
    default="samples",
    show_default=True,
    type=click.Choice(["samples", "blocks"]),
    help="Of tars: one entry per row for everybody, or one per 256 rows, which reads faster.",
)
@click.option("--out", type=FOLDER, help="Of tars: a new or empty folder.")
def export(location: str, kind: str, layout: Literal["samples", "blocks"], out: Path | None) -> None:
    """Write a sealed cache as WebDataset tar shards, which darht-train --shards takes as well.

    With --format croissant write croissant.json, which describes every file and array, into CACHE, which may also be
    an export.
    """
    from darht.cache.export.croissant import CROISSANT, export_croissant
    from darht.cache.export.webdataset import export_webdataset
    from darht.cache.read.reader import open_cache

    if kind == "croissant":
        if out is not None:
            raise ConfigError(f"--format croissant writes {CROISSANT} beside the files that it names: leave --out out")
        files, records = (len(export_croissant(location)[key]) for key in ("distribution", "recordSet"))
        click.echo(f"{location}/{CROISSANT}: {files} files and sets of files, {records} record sets")
        return
    if out is None:
        raise ConfigError("--format webdataset writes tars: give a new or empty folder as --out")
    index = export_webdataset(open_cache(location), out, layout)
    size = sum(tar.size for tar in index.tars)
    click.echo(f"{out}: {len(index.tars)} tars, {size / 1e6:.2f} MB, {index.manifest.rows} rows, layout {layout}")


@cache.command()
@click.argument("location", metavar="CACHE")
@click.option("--run", type=click.Path(path_type=Path), help="A run of this cache, to say when the cache pays.")
def info(location: str, run: Path | None) -> None:
    """Print what a sealed cache holds, what it cost, and when it pays."""
    from darht.cache.admin.info import summarise
    from darht.cache.admin.tables import info_table
    from darht.cache.read.reader import open_cache

    summary = summarise(open_cache(location), run)
    console = Console()
    for name, value in summary.facts:
        console.print(Text.assemble((name, "bold"), f"  {value}"), soft_wrap=True)
    print_table(info_table(summary))


for command in (pull, push, serve):
    cache.add_command(command)
