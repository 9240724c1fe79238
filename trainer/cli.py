"""The command lines that train: each command is one library call."""

import time
from pathlib import Path
from typing import Any, NoReturn

import click

from darht.cache.read.cli import chosen_reach, reach_options
from darht.core import stopping
from darht.core.cli import (
    FOLDER,
    DefaultGroup,
    Group,
    command_again,
    data_options,
    device_option,
    json_mapping,
    look_here,
    named_folders,
    numbers,
    trust_option,
    version_option,
)
from darht.trainer.evaluation.cli import evaluate
from darht.trainer.export.cli import export
from darht.trainer.state.cli import verify
from darht.trainer.teacher.cli import (
    allow_option,
    check,
    images,
    opened,
    pack,
    report_check,
    required_data,
    transfer,
    zoo_list,
)

__all__ = ["evaluate", "teacher", "train"]

_SPEAKS = 10  # seconds for the first process to say how to go on: torchrun ends all when one has ended


@click.group(cls=Group)
@version_option
def teacher() -> None:
    """Train, import and check teachers."""


teacher.add_command(check)
teacher.add_command(transfer)
teacher.add_command(pack)
teacher.add_command(zoo_list)


@teacher.command("train", kept="what was kept before stays")
@required_data
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
@click.option(
    "--inner",
    type=click.Choice(["pgd", "warm", "n-fgsm", "fat"]),
    help="Where adversarial examples come from: warm and n-fgsm take one step. Default: fat for fat, else pgd.",
)
@click.option(
    "--set", "assignments", multiple=True, help="A key of a recipe or of views: optim.epochs=30, views.flip=false."
)
@click.option("--memory", default=8.0, show_default=True, help="GiB that the images may take, or else are streamed in.")
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
    inner: str | None,
    assignments: tuple[str, ...],
    memory: float,
    out: Path,
    resume: bool,
    **reading: Any,
) -> None:
    """Train a teacher (standard, pgd-at, trades or fat) and measure it on the test split."""
    from darht.attacks.threat import describe_eps
    from darht.cache.builder.teachers import load_teacher
    from darht.core.device import pick_device
    from darht.trainer.progress.monitor import Monitor
    from darht.trainer.student.distributed import leave, rank_and_world
    from darht.trainer.teacher import train as teach
    from darht.trainer.teacher.config import load_teaching, teacher_network

    given = {"algorithm": algorithm} | ({} if inner is None else {"inner": {"kind": inner}})
    config, where = load_teaching(given, assignments), pick_device(device)
    rank, world = rank_and_world()
    look_here(arch)
    network = teacher_network({"arch": arch, "kwargs": json_mapping(kwargs, "--kwargs"), "resize": resize})

    def split(name: str) -> Any:
        return opened(data, root, name, limit=limit if name == "train" else test_limit, **reading)

    splits = teach.unfinished(config, network, out, split, resume=resume)
    if splits is None:
        if rank == 0:
            click.echo(f"{out}: trained and measured before")
        return
    training, test = splits
    monitor = Monitor(out / teach.TRAINING, config.optim.epochs, shown=rank == 0)
    try:
        with monitor:
            teach.teach(config, training, network, out, device=where, memory_gib=memory, resume=resume,
                        callbacks=monitor.callbacks)  # fmt: skip
        if rank == 0:
            click.echo(describe_eps(config.inner.eps))
            report_check(out, load_teacher(out, where)[0], test, eps=config.inner.eps, device=where)
            teach.finish(out)  # last: a check that is stopped can be gone on with
    except KeyboardInterrupt:
        _stopped(monitor, ctx, "darht-teacher", "train")
    if world > 1:
        leave(0)


def _stopped(monitor: Any, ctx: click.Context, *command: str) -> NoReturn:
    """Say what is kept and how to go on, and end."""
    from darht.trainer.student.distributed import leave, rank_and_world
    from darht.trainer.student.run import kept_epochs

    rank, world = rank_and_world()
    if rank == 0:
        kept = "stopped before the first step; what was kept before stays"
        if monitor.finished is not None:
            epochs = kept_epochs(monitor.out)
            lost = f" ({monitor.finished} were done)" if monitor.finished > epochs else ""
            kept = f"stopped: {epochs} of {monitor.epochs} epochs are kept{lost}, nothing is half written"
        among = "" if world == 1 else f" {world} processes of"
        click.echo(f"{kept}\ngo on with{among}: {command_again(ctx, *command)}", err=True)
    else:
        time.sleep(_SPEAKS)
    leave(stopping.exit_code())


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
@data_options(data="Images to ask it about, by which it is refused where it makes no sense.", root="Where they lie.")
@click.option("--split", default="test", show_default=True, type=click.Choice(["train", "test"]))
@allow_option
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
    data: str | None,
    root: Path | None,
    split: str,
    allow: tuple[str, ...],
    out: Path,
    **reading: Any,
) -> None:
    """Make a teacher folder from foreign weights (.pt, .pth, .th, .safetensors), or from a python: callable alone.

    With --data it is asked some images. A teacher that guesses, gives probabilities, has no gradient or answers by
    batch or chance is not made, unless --allow names its folder.
    """
    from darht.cache.builder.sense import check_allowed
    from darht.cache.builder.teachers import import_teacher
    from darht.trainer.teacher.sense import check_import
    from darht.trainer.teacher.train import check_free

    check_free(out)
    check_allowed(allow, [out.resolve().name])
    source = None if data is None else images(data, root, split, **reading)
    said: dict[str, Any] = {} if resize is None else {"resize": resize}
    for key, text in (("mean", mean), ("std", std)):
        said |= {} if text is None else {key: numbers(text, f"--{key}", three=True)}
    look_here(arch)
    network: dict[str, Any] = {"arch": arch, "num_classes": classes, "kwargs": json_mapping(kwargs, "--kwargs")}
    card = import_teacher(weights, out, **network, preprocessing=said, which=which, on_note=click.echo)
    check_import(out, source, allow=allow, on_line=click.echo)
    click.echo(f"{out}: {card.arch}, {card.num_classes} classes, weights {card.weights_sha256[:12]}")


@click.group(cls=DefaultGroup, default="run")
@version_option
def train() -> None:
    """Train a student from a cache, and write what came out for use elsewhere.

    `darht-train --shards CACHE --out RUN` is short for `darht-train run --shards CACHE --out RUN`.
    """


@train.command("run", kept="what was kept before stays")
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
@trust_option
@reach_options
@device_option
@click.pass_context
def train_run(
    ctx: click.Context,
    /,
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
                callbacks=monitor.callbacks,
            )
    except KeyboardInterrupt:
        _stopped(monitor, ctx, "darht-train")
    if rank == 0:
        seconds, scored = sum(row["seconds"] for row in state.history), "holdout_pgd" in state.history[0]
        best = f"best held-out PGD accuracy {state.best:.1f} %" if scored else "nothing held out"
        click.echo(f"{out}: {len(state.history)} epochs, {seconds:.1f} s of training; {best}")
    if world > 1:
        leave(0)


train.add_command(export)
train.add_command(verify)
