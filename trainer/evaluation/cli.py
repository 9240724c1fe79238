"""The command line of evaluation: `darht-eval MODEL`, and `darht-eval compare RUN...`."""

from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from darht.core.cli import (
    FOLDER,
    DefaultGroup,
    data_options,
    device_option,
    json_mapping,
    look_here,
    named_folders,
    numbers,
    print_table,
    progress_bar,
    trust_option,
    version_option,
)
from darht.core.errors import ConfigError

_SHOWN = 8  # bars on the screen; the full tier has dozens


@click.group(cls=DefaultGroup, default="measure")
@version_option
def evaluate() -> None:
    """Measure how robust a model is, in a way that a reviewer would accept.

    `darht-eval MODEL` is short for `darht-eval measure MODEL`; its options are told by `darht-eval measure --help`.
    """


def _model_options(function: Any) -> Any:
    for option in (
        click.option("--resize", type=click.IntRange(min=1), help="Side in pixels that a foreign network wants."),
        click.option("--std", help="Per channel, of pixels in [0, 1], e.g. 0.25,0.24,0.26."),
        click.option("--mean", help="Per channel, of pixels in [0, 1], e.g. 0.49,0.48,0.45."),
        click.option("--kwargs", default="{}", help="JSON options of the architecture."),
        click.option("--weights", type=click.Choice(["raw", "ema"]),
                     help="Which, of a file with raw and averaged weights."),
        click.option("--arch", help="The network that a file of weights belongs to: resnet18, wrn-D-W, "
                     "robustbench:NAME, timm:NAME ..."),
    ):  # fmt: skip
        function = option(function)
    return function


def _attack_options(function: Any) -> Any:
    for option in (
        click.option("--samples", default=16, show_default=True, type=click.IntRange(min=1),
                     help="Draws that a random model's answer is the mean of."),
        click.option("--shares", help=(
            "full: shares of the training data that a substitute's maker holds; default: 0.01,0.25,0.5,0.75,1.")),
        click.option("--surrogate", "surrogates", multiple=True, help=(
            "An independent model to transfer from: a folder of darht, timm:NAME, torchvision:NAME or python:M:F.")),
        click.option("--no-transfer", is_flag=True, help="Leave out the examples transferred from teachers."),
        click.option("--teacher", "teachers", multiple=True, help="NAME=FOLDER, when not where the cache lay."),
        click.option("--corruptions", is_flag=True, help="Measure the 15 corruptions in any tier."),
        click.option("--reference", is_flag=True, help="Run the authors' AutoAttack (pyautoattack) instead of ours."),
        click.option("--norm", default="linf", show_default=True, type=click.Choice(["linf", "l2"])),
        click.option("--eps", help="Radius in pixel levels, 8 or 8/255; default: what it was trained for, or 8."),
        click.option("--tier", default="quick", show_default=True,
                     type=click.Choice(["quick", "standard", "full"]), help=(
            "quick: FGSM, PGD-20, transfer, masking checks on 1,000 images. standard: and AutoAttack, on all "
            "test images. full: and adaptive and black-box attacks and corruptions.")),
    ):  # fmt: skip
        function = option(function)
    return function


@evaluate.command("measure", kept="what was measured is in eval-parts and is not measured again")
@click.argument("model")
@_attack_options
@click.option("--limit", "--test-limit", type=click.IntRange(min=1), help="The first N test rows only.")
@data_options(data="digits, cifar10, ...; default: what the run's cache was built from.",
              root="Where the data set lies, when not where the cache was built from.")  # fmt: skip
@_model_options
@click.option("--shards", help="Of a run: its cache, when not where the run says; a URL must be given.")
@click.option("--which", default="student", show_default=True, type=click.Choice(["student", "last", "both"]),
              help="Of a run: best on held-out rows, the last epoch's, or both.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@click.option("--out", type=FOLDER, help="Folder of the report; default: the run, or eval-NAME here.")
@trust_option
@click.option(
    "--workers",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="Processes that share the images, with the numbers of one; they go round the GPUs.",
)
@device_option
def measure(model: str, which: str, out: Path | None, device: str, workers: int, **options: Any) -> None:
    """Measure MODEL on a test split, and write eval.json, eval.md and report.html.

    MODEL is a run, a student's or teacher's folder, a file of weights with --arch, timm:NAME, torchvision:NAME, or
    python:module:callable that returns a model.
    """
    from darht.attacks.threat import describe_eps
    from darht.core.device import pick_device
    from darht.trainer.evaluation.run import assist
    from darht.trainer.evaluation.run import evaluate as run
    from darht.trainer.evaluation.target import students_of
    from darht.trainer.student.distributed import rank_and_world

    where = pick_device(device)
    look_here(model, options["arch"], *options["surrogates"])
    rank, world = rank_and_world()
    if world > 1 and workers > 1:
        raise ConfigError(f"torchrun has started {world} processes: leave --workers {workers} out")
    for one in students_of(model, _config(which, options).model, which):
        config = _config(one, options)
        if rank:
            assist(model, where, config=config, out=out, world=world)
            continue
        with progress_bar() as progress:
            tasks: dict[str, Any] = {}

            def on_batch(
                name: str, done: int, total: int, alive: int, progress: Progress = progress, tasks: Any = tasks
            ) -> None:
                if name not in tasks:
                    tasks[name] = progress.add_task(name, total=total, note="")
                    for old in list(tasks.values())[:-_SHOWN]:
                        progress.update(old, visible=False)
                progress.update(tasks[name], completed=done, note=f"images, {alive} alive")

            def on_note(text: str, progress: Progress = progress) -> None:
                progress.console.print(f"note: {text}", highlight=False, markup=False, soft_wrap=True)

            report = run(model, config, out=out, device=where, workers=workers, world=max(world, workers),
                         on_batch=on_batch, on_note=on_note)  # fmt: skip
        click.echo(describe_eps(report.record["threat"]["eps"]))
        _print(report)


def _config(which: str, options: dict[str, Any]) -> Any:
    from darht.attacks import parse_eps
    from darht.trainer.evaluation.attacks.substitute import Substitution
    from darht.trainer.evaluation.config import EvalConfig
    from darht.trainer.evaluation.target import ModelOptions

    teachers = options["teachers"]
    given = {name: str(folder) for name, folder in named_folders(teachers).items()}
    tier: Any = options["tier"]
    if teachers and options["no_transfer"]:
        raise ConfigError("--teacher says what to transfer from and --no-transfer leaves it out: give one of them")
    if options["shares"] and tier != "full":
        raise ConfigError(f"--shares is for the substitutes of --tier full; the tier is {tier}")
    shares: dict[str, Any] = {"shares": numbers(options["shares"], "--shares")} if options["shares"] else {}
    return EvalConfig(
        tier=tier,
        which=which,
        **{name: options[name] for name in ("data", "root", "image_size", "download", "skip_broken")},
        **{name: options[name] for name in ("limit", "norm", "seed")},
        eps=None if options["eps"] is None else parse_eps(options["eps"], options["norm"]),
        teachers=None if options["no_transfer"] else given,
        **{name: options[name] for name in ("surrogates", "reference", "corruptions", "samples")},
        model=ModelOptions(
            options["arch"],
            json_mapping(options["kwargs"], "--kwargs"),
            _preprocessing(options),
            weights=options["weights"],
            shards=options["shards"],
        ),
        substitution=Substitution(**shares),
    )


def _preprocessing(options: dict[str, Any]) -> dict[str, Any]:
    """What was said of it; a model's own stands for the rest."""
    said: dict[str, Any] = {
        name: numbers(options[name], f"--{name}", three=True) for name in ("mean", "std") if options[name]
    }
    return said | ({} if options["resize"] is None else {"resize": options["resize"]})


def _asked(on: str) -> str:
    """Which images were asked, short enough for a column: `all`, `still alive`, `first 200`."""
    return on.removeprefix("the ").removesuffix(" that are right when clean").replace("images", "").strip()


def _print(report: Any) -> None:
    from darht.trainer.evaluation.attacks.suite import SELF
    from darht.trainer.evaluation.report.write import describe

    console = Console(markup=False, emoji=False)
    table = Table(header_style="bold")
    for title in ("measured", "%", "95 %", "right of", "asked", "attack"):
        table.add_column(title, overflow="fold", no_wrap=title in ("%", "95 %", "right of"))
    for score in report.scores:
        low, high = score.interval
        cells = f"{score.accuracy:.1f}", f"{low:.1f}-{high:.1f}", f"{score.correct}/{score.count}", _asked(score.on)
        table.add_row(score.name, *cells, describe(score.attack).replace(f", on {SELF}", ""))
    print_table(table)
    if not report.masking.passed:
        console.print("do not believe the robust accuracy: a check below says that the attacks were misled",
                      style="bold red", highlight=False, soft_wrap=True)  # fmt: skip
    for check in report.masking.checks:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in check.figures.items())
        console.print(f"{check.status}  {check.name}: {figures}", highlight=False, soft_wrap=True)
    for text in report.record["warnings"]:
        console.print(f"warning: {text}", highlight=False, soft_wrap=True)
    written = f"written to {report.path}, .md, .npz and {report.page}"
    console.print("\n".join(filter(None, (report.note, written))), highlight=False, soft_wrap=True)


@evaluate.command("compare")
@click.argument("runs", nargs=-1, required=True, type=FOLDER)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of the bootstrap.")
@click.option("--out", type=FOLDER, help="Folder for compare.json, compare.md and compare.html.")
def compare(runs: tuple[Path, ...], seed: int, out: Path | None) -> None:
    """Put evaluations side by side, the most robust first, with the significance of each difference.

    RUN is a folder that holds eval.json, or such a file. All must have been asked about the same images.
    """
    from darht.trainer.evaluation.report.compare import compare_runs

    result = compare_runs(runs, seed=seed)
    console = Console(markup=False, emoji=False)
    table = Table(header_style="bold")
    for title in ("model", "clean %", "worst case %", "behind the first", "p"):
        table.add_column(title, overflow="fold")
    for cells in result.cells():
        table.add_row(*cells[:5])
    print_table(table)
    console.print(result.note, highlight=False, soft_wrap=True)
    if out is not None:
        console.print(f"written to {', '.join(map(str, result.save(out)))}", highlight=False, soft_wrap=True)
