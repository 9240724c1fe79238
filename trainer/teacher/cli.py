"""The commands of `darht-teacher` that measure: each is one library call."""

from pathlib import Path
from typing import Any

import click
from rich.table import Table

from darht.core.cli import FOLDER, Command, data_options, device_option, echo_notes, print_table, trust_option

required_data = data_options(
    required=True,
    data="digits, cifar10, cifar100, tiny-imagenet, imagefolder, webdataset, parquet or npz.",
    root="Where the data set lies; none for digits.",
)
allow_option = click.option(
    "--allow", multiple=True, metavar="NAME", help="Take this teacher though it makes no sense."
)


@click.command("check", cls=Command)
@click.argument("folder", type=FOLDER)
@required_data
@device_option
@click.option("--split", default="test", show_default=True, type=click.Choice(["train", "test"]))
@click.option("--limit", type=int, help="The first N rows only.")
@click.option("--eps", help="Radius of PGD-20 in pixel levels, 8 or 8/255; default: what it was trained for, or 8.")
@allow_option
@trust_option
def check(
    folder: Path,
    data: str,
    root: Path | None,
    device: str,
    split: str,
    limit: int | None,
    eps: str | None,
    allow: tuple[str, ...],
    **reading: Any,
) -> None:
    """Measure clean and PGD-20 accuracy, parameters and speed, and note the accuracies in the card.

    Before that some images tell whether the teacher makes sense; if not, it is refused unless --allow names its folder.
    """
    from darht.attacks import parse_eps
    from darht.attacks.threat import describe_eps
    from darht.cache.builder.teachers import load_teacher
    from darht.core.device import pick_device
    from darht.trainer.teacher.sense import check_sense

    where = pick_device(device)
    model, card = load_teacher(folder, where)
    radius = float(card.training.get("eps", 8)) if eps is None else parse_eps(eps)
    source = opened(data, root, split, limit=limit, **reading)
    click.echo(describe_eps(radius))
    check_sense(folder, model, source, eps=radius, device=where, allow=allow, on_line=click.echo)
    report_check(folder, model, source, eps=radius, device=where)


@click.command("transfer", cls=Command)
@click.argument("folders", nargs=-1, required=True, type=FOLDER)
@required_data
@device_option
@click.option("--split", default="test", show_default=True, type=click.Choice(["train", "test"]))
@click.option("--limit", type=int, help="Choose from the first N rows only.")
@click.option("--count", default=1000, show_default=True, help="Images for each pair, of each class equally many.")
@click.option("--attack", "kinds", multiple=True, default=("apgd",), show_default=True, help="Several: the worst case.")
@click.option("--eps", default="8", show_default=True, help="Radius in pixel levels; 8/255 is read as well.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@click.option("--out", type=FOLDER, required=True, help="Folder for transfer.md, transfer.json and transfer.png.")
@trust_option
def transfer(
    folders: tuple[Path, ...],
    data: str,
    root: Path | None,
    device: str,
    split: str,
    limit: int | None,
    count: int,
    kinds: tuple[str, ...],
    eps: str,
    seed: int,
    out: Path,
    **reading: Any,
) -> None:
    """Attack every teacher and ask every other: which adversarial examples transfer."""
    from darht.core.device import pick_device
    from darht.trainer.teacher.check import transfer_between

    where = pick_device(device)
    source = images(data, root, split, limit=limit, **reading)
    matrix = transfer_between(folders, source, kinds=kinds, eps=eps, count=count, seed=seed, device=where)
    paths = matrix.save(out)
    table = Table("made on", *(f"asked of {name}" for name in matrix.teachers), header_style="bold")
    for a, (name, counts) in enumerate(zip(matrix.sources, matrix.counted, strict=True)):
        table.add_row(name, *(f"{matrix.text(a, t)} of {count}" for t, count in enumerate(counts)))
    print_table(table)
    click.echo(f"per cent still right, with 95 % intervals; written to {', '.join(map(str, paths))}")


@click.command("pack", cls=Command)
@click.argument("folder", type=FOLDER)
@click.option("--out", type=FOLDER, required=True, help="A new or empty folder.")
def pack(folder: Path, out: Path) -> None:
    """Write a teacher, or a run's best student, as a teacher's folder of half the bytes, to be given to others.

    Its accuracies are not copied: darht-teacher check measures what the rounded weights do.
    """
    from darht.cache.builder.teachers import WEIGHTS
    from darht.trainer.teacher.pack import pack_teacher

    card = pack_teacher(folder, out)
    size = (out / WEIGHTS).stat().st_size
    click.echo(f"{out}: {card.arch}, {card.num_classes} classes, {size:,} bytes, weights {card.weights_sha256[:12]}")


@click.command("list", cls=Command)
def zoo_list() -> None:
    """Print the teachers that come with darht, by the names that `path:` and darht-eval take, and what was measured."""
    from darht.cache.builder.teachers import WEIGHTS, read_card
    from darht.core.zoo import PREFIX, zoo

    table = Table("teacher", "network", "kB", "eps", "measured on", "clean", "PGD-20", header_style="bold")
    table.columns[0].no_wrap = True
    for name, folder in zoo().items():
        card, size = read_card(folder), (folder / WEIGHTS).stat().st_size
        for what, found in card.accuracy.items():
            figures = (f"{found['clean']:.1f}", f"{found['pgd-20']:.1f}")
            network = card.arch.rpartition(":")[2]  # timm:NAME, python:module:NAME
            table.add_row(PREFIX + name, network, f"{size / 1e3:,.0f}", f"{found['eps']:g}/255", what, *figures)
    print_table(table)


def opened(data: str, root: Path | None, split: str, **options: Any) -> Any:
    """As `images`, but pixels of image files stay there until they are wanted."""
    from darht.trainer.teacher.train import open_split

    source = open_split(data, root, split, **options)
    echo_notes(source.notes)
    return source


def images(data: str, root: Path | None, split: str, **options: Any) -> Any:
    """Load a split, and say what of it a person should know."""
    from darht.cache.sources.load import load_source

    source = load_source(data, root, split, **options)
    echo_notes(source.notes)
    return source


def report_check(folder: Path, model: Any, source: Any, *, eps: float, device: Any) -> None:
    """Measure a teacher and print what came out."""
    from darht.trainer.teacher.check import check_teacher

    result = check_teacher(folder, model, source, eps=eps, device=device)
    click.echo(
        f"{folder}: clean {result.clean.accuracy:.1f} %, PGD-20 at {eps:g}/255 {result.robust.accuracy:.1f} % "
        f"({result.clean.count} {source.split} images), {result.parameters:,} parameters, "
        f"{result.images_per_second:.0f} images/s forward"
    )
