"""The command lines that train: each command is one library call."""

import sys
import time
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from darht.cache.read.cli import chosen_reach, reach_options
from darht.core.cli import (
    FOLDER,
    DefaultGroup,
    Group,
    StateCommand,
    data_options,
    device_option,
    echo_notes,
    json_mapping,
    look_here,
    named_folders,
    numbers,
    print_table,
    progress_bar,
    resuming_command,
    version_option,
)
from darht.trainer.evaluation.cli import evaluate

__all__ = ["evaluate", "teacher", "train"]

_SPEAKS = 10  # seconds for the first process to say how to go on: torchrun ends all when one has ended


_data_options = data_options(
    required=True,
    data="digits, cifar10, cifar100, tiny-imagenet, imagefolder or npz.",
    root="Where the data set lies; none for digits.",
)


@click.group(cls=Group)
@version_option
def teacher() -> None:
    """Train, import and check teachers."""


@teacher.command("train")
@_data_options
@device_option
@click.option("--limit", type=int, help="Train on the first N rows only.")
@click.option("--test-limit", type=int, help="Measure on the first N test rows only.")
@click.option(
    "--arch",
    required=True,
    help="resnet18, preact_resnet18, wrn-D-W, dm-wrn-D-W, mobilenetv2, timm:NAME, python:M:F ...",
)
@click.option("--kwargs", default="{}", help="JSON options of the architecture.")
@click.option("--resize", type=click.IntRange(min=1), help="Side in pixels that the network wants, 224 for most ViTs.")
@click.option("--algorithm", default="pgd-at", show_default=True, help="standard, pgd-at, trades or fat.")
@click.option("--set", "assignments", multiple=True, help="A training option, e.g. optim.epochs=30, eps=8, tau=2.")
@click.option("--out", type=FOLDER, required=True, help="The teacher's folder.")
@click.option("--resume", is_flag=True, help="Go on with a training that was stopped.")
@click.pass_context
def teacher_train(
    ctx: click.Context,
    /,
    data: str,
    root: Path | None,
    device: str,
    limit: int | None,
    test_limit: int | None,
    arch: str,
    kwargs: str,
    resize: int | None,
    algorithm: str,
    assignments: tuple[str, ...],
    out: Path,
    resume: bool,
    **reading: Any,
) -> None:
    """Train a teacher (standard, pgd-at, trades or fat) and measure it on the test split."""
    from darht.cache.builder.teachers import save_teacher
    from darht.core.config import override, parse
    from darht.core.device import pick_device
    from darht.trainer.config import TeachConfig
    from darht.trainer.state.checkpoint import CHECKPOINT
    from darht.trainer.state.interrupt import STOPPING, InterruptHandler
    from darht.trainer.teacher import train as teach

    settings, where = override({"algorithm": algorithm}, assignments, TeachConfig), pick_device(device)
    config = parse(TeachConfig, settings, "training")
    look_here(arch)
    network: dict[str, Any] = {"arch": arch, "kwargs": json_mapping(kwargs, "--kwargs"), "resize": resize}
    teach.check_free(out, resume=resume)
    training = _images(data, root, "train", limit=limit, **reading)
    if resume and teach.is_finished(out, teach.expected_card(config, training, **network)):
        click.echo(f"{out}: trained and measured before")
        return
    test = _images(data, root, "test", limit=test_limit, **reading)
    try:
        with progress_bar() as progress, InterruptHandler(lambda: progress.console.print(STOPPING)) as interrupt:
            task = progress.add_task("train", total=None, note="")

            def on_step(step: int, total: int, images: int, loss: float) -> None:
                interrupt.arm()
                progress.update(task, completed=step, total=total, note=f"steps, loss {loss:.3f}")
                interrupt.check()

            network["checkpoint"] = out / CHECKPOINT
            model, card = teach.teach(config, training, **network, device=where, on_step=on_step)
        save_teacher(out, model.net, card)
        _report_check(out, model, test, eps=config.eps, device=where)
    except KeyboardInterrupt:
        click.echo(f"stopped; go on with: {resuming_command(ctx, 'darht-teacher', 'train')}", err=True)
        sys.exit(130)
    (out / CHECKPOINT).unlink(missing_ok=True)  # last: a check that is stopped can be gone on with


@teacher.command("import")
@click.argument("weights", type=FOLDER, required=False)
@click.option(
    "--arch", required=True, help="What the weights belong to: resnet18, robustbench:NAME, python:module:callable ..."
)
@click.option("--kwargs", default="{}", help="JSON options of the architecture.")
@click.option("--classes", type=click.IntRange(min=2), help="C, the class count; the default is what the file says.")
@click.option("--mean", help="Per channel, of pixels in [0, 1]; the default is the file's own, or none.")
@click.option("--std", help="Per channel, of pixels in [0, 1]; the default is the file's own, or none.")
@click.option("--resize", type=click.IntRange(min=1), help="Side in pixels that the network wants.")
@click.option(
    "--weights", "which", type=click.Choice(["raw", "ema"]), help="Which, in a file with raw and averaged weights."
)
@click.option("--out", type=FOLDER, required=True, help="The teacher's folder.")
def teacher_import(
    weights: Path | None,
    arch: str,
    kwargs: str,
    classes: int | None,
    mean: str | None,
    std: str | None,
    resize: int | None,
    which: Any,
    out: Path,
) -> None:
    """Make a teacher folder from foreign weights (.pt, .pth, .th, .safetensors), or from a python: callable alone."""
    from darht.cache.builder.teachers import import_teacher
    from darht.trainer.teacher.train import check_free

    check_free(out)
    said: dict[str, Any] = {} if resize is None else {"resize": resize}
    for key, text in (("mean", mean), ("std", std)):
        said |= {} if text is None else {key: numbers(text, f"--{key}", three=True)}
    look_here(arch)
    network: dict[str, Any] = {"arch": arch, "num_classes": classes, "kwargs": json_mapping(kwargs, "--kwargs")}
    card = import_teacher(weights, out, **network, preprocessing=said, which=which, on_note=click.echo)
    click.echo(f"{out}: {card.arch}, {card.num_classes} classes, weights {card.weights_sha256[:12]}")


@teacher.command("check")
@click.argument("folder", type=FOLDER)
@_data_options
@device_option
@click.option("--split", default="test", show_default=True, type=click.Choice(["train", "test"]))
@click.option("--limit", type=int, help="The first N rows only.")
@click.option("--eps", default="8", show_default=True, help="Radius of PGD-20 in pixel levels, 8 or 8/255.")
def teacher_check(
    folder: Path,
    data: str,
    root: Path | None,
    device: str,
    split: str,
    limit: int | None,
    eps: str,
    **reading: Any,
) -> None:
    """Measure clean and PGD-20 accuracy, parameters and speed, and note the accuracies in the card."""
    from darht.attacks import parse_eps
    from darht.cache.builder.teachers import load_teacher
    from darht.core.device import pick_device

    where, radius = pick_device(device), parse_eps(eps)
    model, _ = load_teacher(folder, where)
    source = _images(data, root, split, limit=limit, **reading)
    _report_check(folder, model, source, eps=radius, device=where)


@teacher.command("transfer")
@click.argument("folders", nargs=-1, required=True, type=FOLDER)
@_data_options
@device_option
@click.option("--split", default="test", show_default=True, type=click.Choice(["train", "test"]))
@click.option("--limit", type=int, help="Choose from the first N rows only.")
@click.option("--count", default=1000, show_default=True, help="Images for each pair, of each class equally many.")
@click.option("--attack", "kinds", multiple=True, default=("apgd",), show_default=True, help="Several: the worst case.")
@click.option("--eps", default="8", show_default=True, help="Radius in pixel levels; 8/255 is read as well.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@click.option("--out", type=FOLDER, required=True, help="Folder for transfer.md, transfer.json and transfer.png.")
def teacher_transfer(
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
    source = _images(data, root, split, limit=limit, **reading)
    matrix = transfer_between(folders, source, kinds=kinds, eps=eps, count=count, seed=seed, device=where)
    paths = matrix.save(out)
    table = Table("made on", *(f"asked of {name}" for name in matrix.teachers), header_style="bold")
    for a, (name, counts) in enumerate(zip(matrix.sources, matrix.counted, strict=True)):
        table.add_row(name, *(f"{matrix.text(a, t)} of {count}" for t, count in enumerate(counts)))
    print_table(table)
    click.echo(f"per cent still right, with 95 % intervals; written to {', '.join(map(str, paths))}")


def _images(data: str, root: Path | None, split: str, **options: Any) -> Any:
    """Load a split, and say what of it a person should know."""
    from darht.cache.sources.load import load_source

    source = load_source(data, root, split, **options)
    echo_notes(source.notes)
    return source


def _report_check(folder: Path, model: Any, source: Any, *, eps: float, device: Any) -> None:
    from darht.attacks.threat import describe_eps
    from darht.trainer.teacher.check import check_teacher

    click.echo(describe_eps(eps))
    result = check_teacher(folder, model, source, eps=eps, device=device)
    click.echo(
        f"{folder}: clean {result.clean.accuracy:.1f} %, PGD-20 at {eps:g}/255 {result.robust.accuracy:.1f} % "
        f"({result.clean.count} {source.split} images), {result.parameters:,} parameters, "
        f"{result.images_per_second:.0f} images/s forward"
    )


@click.group(cls=DefaultGroup, default="run")
@version_option
def train() -> None:
    """Train a student from a cache, and write what came out for use elsewhere.

    `darht-train --shards CACHE --out RUN` is short for `darht-train run --shards CACHE --out RUN`.
    """


@train.command("run")
@click.option(
    "--shards", required=True, help="A sealed cache or its export: a folder, a URL, or DIR/shard-{00000..00003}.tar."
)
@click.option("--out", type=FOLDER, required=True, help="The run's folder.")
@click.option("--recipe", type=FOLDER, help="A YAML file, or a name such as darht-warm; default: darht with inner pgd.")
@click.option(
    "--set", "assignments", multiple=True, help="Change a key: inner.kind=cached, optim.epochs=30; null: its default."
)
@click.option("--memory", default=8.0, show_default=True, help="GiB that the cache may take, or else is streamed in.")
@click.option("--exclude", type=FOLDER, help="A list of rows to leave out, from darht-inspect rows.")
@click.option("--resume", is_flag=True, help="Go on with a run that was stopped.")
@click.option("--teacher", "teachers", multiple=True, help="NAME=FOLDER of a live teacher that was moved.")
@reach_options
@device_option
@click.pass_context
def train_run(
    ctx: click.Context,
    shards: str,
    out: Path,
    recipe: Path | None,
    assignments: tuple[str, ...],
    memory: float,
    exclude: Path | None,
    resume: bool,
    teachers: tuple[str, ...],
    device: str,
    **reach: Any,
) -> None:
    """Train a student from a cache, without any teacher in memory unless the recipe says teachers: live."""
    from darht.cache.read.webdataset import open_shards
    from darht.core.device import pick_device
    from darht.trainer.config import load_recipe
    from darht.trainer.progress.monitor import Monitor
    from darht.trainer.student import train as trainer
    from darht.trainer.student.distributed import leave, rank_and_world
    from darht.trainer.student.exclude import exclude_rows

    look_here(*(text.partition("=")[2] for text in assignments))
    config, where, folders = load_recipe(recipe, assignments), pick_device(device), named_folders(teachers)
    cache = open_shards(shards, chosen_reach(shards, **reach))
    rank, world = rank_and_world()
    monitor = Monitor(out, config.optim.epochs, shown=rank == 0)
    if exclude is not None:
        monitor.on_note(f"{exclude_rows(cache, exclude)} rows are left out of training")
    callbacks = trainer.Callbacks(on_step=monitor.on_step, on_epoch=monitor.on_epoch, on_note=monitor.on_note)
    try:
        with monitor:
            state = trainer.train(
                config,
                cache,
                out,
                device=where,
                memory_gib=memory,
                resume=resume,
                teachers=folders,
                callbacks=callbacks,
            )
    except KeyboardInterrupt:
        if rank == 0:
            kept = "stopped before the first step; what was kept before stays"
            if monitor.finished is not None:
                kept = f"stopped: {monitor.finished} of {monitor.epochs} epochs are kept, nothing is half written"
            among = "" if world == 1 else f" {world} processes of"
            click.echo(f"{kept}\ngo on with{among}: {resuming_command(ctx, 'darht-train')}", err=True)
        else:
            time.sleep(_SPEAKS)
        leave(130)
    if rank == 0:
        seconds, scored = sum(row["seconds"] for row in state.history), "holdout_pgd" in state.history[0]
        best = f"best held-out PGD accuracy {state.best:.1f} %" if scored else "nothing held out"
        click.echo(f"{out}: {len(state.history)} epochs, {seconds:.1f} s of training; {best}")
    if world > 1:
        leave(0)


@train.command("export")
@click.argument("run", type=FOLDER)
@click.option("--out", type=FOLDER, required=True, help="A new or empty folder.")
@click.option(
    "--format",
    "kind",
    default="hub",
    show_default=True,
    type=click.Choice(["hub", "plain", "onnx"]),
    help="hub: the student with its map; plain: the folded network's state_dict; onnx: that network, pixels to logits.",
)
@click.option(
    "--which", default="student", show_default=True, type=click.Choice(["student", "last"]), help="Best or last."
)
def train_export(run: Path, out: Path, kind: Any, which: str) -> None:
    """Write a run's student for use elsewhere."""
    from darht.trainer.export.export import export_run

    exported = export_run(run, out, kind=kind, which=which)
    click.echo(f"{out}: {', '.join(exported.files)}; {exported.checked}")


@train.command("verify", cls=StateCommand)
@click.argument("folders", nargs=-1, required=True, type=FOLDER)
def train_verify(folders: tuple[Path, ...]) -> None:
    """Compare every file of runs, teachers, evaluations, indexes or exports with its sha256; exit 4 for a damaged one.

    A cache has darht-cache verify.
    """
    from darht.core.errors import CorruptError
    from darht.trainer.state.verify import verify_folder

    damaged = 0
    for folder in folders:
        found = verify_folder(folder)
        for line in found.damaged:
            click.echo(line)
        unhashed = f", {len(found.unhashed)} carry none" if found.unhashed else ""
        click.echo(f"{folder}: {len(found.whole)} files have their sha256{unhashed}, {len(found.damaged)} are damaged")
        damaged += len(found.damaged)
    if damaged:
        sys.exit(CorruptError.exit_code)
