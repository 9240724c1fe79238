"""The full-size CIFAR-10 experiment on one GPU, in steps that can be stopped at any time and gone on with.

    python bench/gpu.py --list                                            the steps and their commands
    python bench/gpu.py --root DIR --all                                  everything, one step after the other
    python bench/gpu.py --root DIR --step "train darht-warm" --minutes 9  one step, stopped at a safe point
    python bench/gpu.py --smoke                                           every step in miniature on a CPU

`recipes/cifar10-gpu.yaml` says what is trained; the steps are the commands that a person would type. What a step has
finished stays: steps of a teacher or student, units of the cache, attacked batches of an evaluation. Nothing of this
has been run on a GPU yet.
"""

import argparse
import datetime
import os
import platform
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import click
import torch

from darht.cache.builder.teachers import read_card
from darht.cache.cli import cache as cache_command
from darht.core.errors import DarhtError
from darht.core.files import write_atomic
from darht.core.sealed import read_sealed, write_sealed
from darht.tools.experiment import (
    STAGES,
    ExperimentConfig,
    Stage,
    TeacherPlan,
    load_experiment,
    plan_stages,
    read_stages,
    write_inputs,
)
from darht.trainer import cli as trainer

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "cifar10-gpu.yaml"
PROGRAMS = {
    "darht-teacher": trainer.teacher,
    "darht-cache": cache_command,
    "darht-train": trainer.train,
    "darht-eval": trainer.evaluate,
}
STEPS = ("teacher", "cache", "train", "eval")  # of an experiment's stages; pictures are left out
TINY = {"width": 4, "blocks": [1, 1, 1, 1]}
TINY_KWARGS = {
    "resnet": TINY,
    "vit": {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2},
    "bit": {"layers": [1, 1], "channels": [32, 64], "basic": True, "bottle_ratio": 1.0, "stem_chs": 32},
}
EPS = 64  # of the miniature: nothing survives to take Square's 5,000 queries
STOPPED = 130  # as a command exits that Ctrl-C has stopped


def miniature(config: ExperimentConfig) -> ExperimentConfig:
    """The same steps on a handful of digits with tiny networks, float32, without compiling."""
    shorter = {
        "inner.eps": 32,
        "inner.step": 16,
        "inner.steps": 1,
        "views.padding": 1,
        "views.flip": False,
        "optim.epochs": 1,
        "optim.batch_size": 32,
    }
    teachers = {
        name: TeacherPlan(plan.arch, TINY_KWARGS[name], None, plan.algorithm, {**plan.set, **shorter}, allow=True)
        for name, plan in config.teachers.items()
    }
    attacks = {name: {**attack, "eps": EPS, "step": 16, "steps": 1} for name, attack in config.cache["attacks"].items()}
    store = {"rows_per_shard": 32, "rows_per_chunk": 16}
    students = {
        name: {
            **student,
            "student": {"arch": "resnet18", "kwargs": TINY},
            "inner": {"kind": student["inner"]["kind"], "eps": EPS, "steps": 1},
            "optim": {**student["optim"], "epochs": 12, "batch_size": 32},
            "compute": {"precision": "bf16", "channels_last": True},
        }
        for name, student in config.students.items()
    }
    return replace(
        config,
        data={"source": "digits", "limit": 80, "test_limit": 40, "holdout": 0.1},
        teachers=teachers,
        cache={"views": {"padding": 1, "flip": False}, "attacks": attacks, "store": store},
        students=students,
    )


def steps_of(config: ExperimentConfig, out: Path, root: Path | None) -> dict[str, Stage]:
    """The experiment's stages that are measured, by name; evaluation with AutoAttack on all test images."""
    chosen = {stage.name: stage for stage in plan_stages(config, out, root) if stage.name.split()[0] in STEPS}
    return {
        name: replace(stage, words=(*stage.words, "--tier", "standard")) if name.startswith("eval") else stage
        for name, stage in chosen.items()
    }


@contextmanager
def at_most(minutes: float) -> Iterator[None]:
    """Press Ctrl-C in the block when the minutes are over, which the tools take at a safe point; 0 for no limit."""
    handlers = {
        signal.SIGINT: signal.default_int_handler,  # also where a shell has started this in the background
        signal.SIGALRM: lambda number, frame: signal.raise_signal(signal.SIGINT),
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def run_step(stage: Stage, minutes: float) -> bool:
    """Run a step's command in this process; False when it was stopped before its end.

    Raises:
        DarhtError: the command's own.
    """
    try:
        with at_most(minutes):
            PROGRAMS[stage.words[0]].main(list(stage.words[1:]), prog_name=stage.words[0], standalone_mode=False)
    except (KeyboardInterrupt, click.Abort):
        return False
    except SystemExit as end:
        if end.code == STOPPED:
            return False
        if end.code:
            raise
    return True


def work_off(names: list[str], steps: dict[str, Stage], out: Path, minutes: float) -> int:
    """Run the named steps that are not done with these words yet; the exit code."""
    done = read_stages(out)
    for name in names:
        stage, noted = steps[name], done.get(name, {})
        spent = noted["seconds"] if noted.get("line") == stage.line else 0.0
        if noted.get("line") == stage.line and noted.get("done"):
            print(f"# done before: {stage.line}", flush=True)
            continue
        print(f"$ {stage.line}", flush=True)
        start = time.perf_counter()
        finished = run_step(stage, minutes)
        spent += time.perf_counter() - start
        done[name] = {"line": stage.line, "seconds": round(spent, 1), "done": finished}
        write_sealed(out / STAGES, done)
        if not finished:
            again = shlex.join(["python", *sys.argv])
            print(f"stopped in step '{name}' after {spent:.0f} s in all; go on with: {again}", file=sys.stderr)
            return STOPPED
    return 0


# What came out -----------------------------------------------------------------------------------------------------


def hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return f"{os.cpu_count()}-core {platform.machine()} CPU, no GPU"


def results(config: ExperimentConfig, steps: dict[str, Stage], out: Path, *, smoke: bool) -> str:
    """The tables of what is done so far."""
    done = read_stages(out)
    kept = {name: done[name] for name in steps if name in done}
    lines = ["| teacher | network | trained by | clean | PGD-20 |", "|---|---|---|---|---|"]
    for name in config.teachers:
        if kept.get(f"teacher {name}", {}).get("done"):
            card = read_card(out / "teachers" / name)
            found = next(iter(card.accuracy.values()))
            figures = f"{found['clean']:.1f} | {found['pgd-20']:.1f}"
            lines.append(f"| {name} | {card.arch} | {card.training['algorithm']} | {figures} |")
    lines += ["", "| student | inner | clean | AutoAttack | worst case | images |", "|---|---|---|---|---|---|"]
    for name in config.students:
        if kept.get(f"eval {name}", {}).get("done"):
            report = read_sealed(out / "run" / name / "eval.json", "run darht-eval again").value
            scores = {score["name"]: score["accuracy"] for score in report["scores"]}
            figures = (f"{scores[key]:.1f}" for key in ("clean", "autoattack", "worst case"))
            kind = report["recipe"]["inner"]["kind"]
            lines.append(f"| {name} | {kind} | {' | '.join(figures)} | {report['data']['rows']} |")
    lines += ["", "| step | seconds | done |", "|---|---|---|"]
    lines += [
        f"| {name} | {one['seconds']:.0f} | {'yes' if one['done'] else 'not yet'} |" for name, one in kept.items()
    ]
    command = "python bench/gpu.py" + (" --smoke" if smoke else " --all")
    what = "A miniature on digits, whose figures say nothing." if smoke else "CIFAR-10, L-inf 8/255."
    versions = f"torch {torch.__version__.split('+')[0]}"
    head = f"`{command}`, {datetime.date.today().isoformat()}, {hardware()}, {versions}. {what}"
    return "\n".join(["# CIFAR-10 at full size", "", head, "", *lines, ""])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--root", type=Path, default=Path("build/data"), help="holds cifar-10-batches-py")
    parser.add_argument("--work", type=Path, help="where everything goes; default: build/gpu, or build/gpu-smoke")
    parser.add_argument("--out", type=Path, help="write the page here; default: results.md in the folder of --work")
    parser.add_argument("--all", action="store_true", help="every step that is not done")
    parser.add_argument("--step", action="append", default=[], help="this step, whatever is not done of it")
    parser.add_argument("--list", action="store_true", help="name the steps")
    parser.add_argument("--minutes", type=float, default=0, help="after which a step is stopped; 0 for never")
    parser.add_argument("--smoke", action="store_true", help="every step in miniature, on the CPU")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> int:
    """Do what was asked; the exit code."""
    smoke = arguments.smoke
    out = arguments.work or Path("build/gpu-smoke" if smoke else "build/gpu")
    config, root = load_experiment(RECIPE), None if smoke else arguments.root
    config = miniature(config) if smoke else config
    steps = steps_of(config, out, root)
    unknown = [name for name in arguments.step if name not in steps]
    if unknown:
        raise DarhtError(f"no step is called {', '.join(unknown)}; the steps are {', '.join(steps)}")
    names = arguments.step or (list(steps) if arguments.all or smoke else [])
    if arguments.list or not names:
        print("\n".join(f"{name}: {stage.line}" for name, stage in steps.items()))
        return 0
    if not smoke and not torch.cuda.is_available():
        raise DarhtError("bench/gpu.py needs a GPU that torch sees; without one run it with --smoke")
    write_inputs(config, out, root)
    code = work_off(names, steps, out, arguments.minutes)
    text = results(config, steps, out, smoke=smoke)
    write_atomic(arguments.out or out / "results.md", text.encode())
    print(text)
    return code


def main() -> int:
    try:
        return run(parse())
    except DarhtError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return DarhtError.exit_code


if __name__ == "__main__":
    sys.exit(main())
