"""The training loop measured: beside its bare arithmetic, beside DARHT with its teachers in the loop, beside RSLAD.

    python bench/trainer.py --out docs/benchmarks-trainer.md

Bare steps of a second, identical student on tensors that lie ready are made between the steps of `train()` itself, so
that what else the machine does disturbs both alike; what counts is the median of their quotients. Teachers have random
weights, which cost what trained ones do. `--smoke` does the same with tiny networks.
"""

import argparse
import contextlib
import json
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from timers import Timers
from torch import Tensor, nn
from trainer_page import page

from darht.cache.builder.build import build, plan_build
from darht.cache.builder.seal import seal
from darht.cache.builder.teachers import Card, save_teacher
from darht.cache.read.loader import load_training_set
from darht.cache.read.reader import Cache, open_cache
from darht.cache.read.sampler import coin
from darht.cache.read.training_set import TrainingSet
from darht.core.config import parse
from darht.core.nets import build as build_net
from darht.core.nets.classifier import Classifier
from darht.core.preprocessing import Preprocessing
from darht.core.vision import torchvision
from darht.trainer.config import TrainConfig
from darht.trainer.progress.metrics import Metrics
from darht.trainer.schedule import make_optimizer, take_step
from darht.trainer.student import train as trainer
from darht.trainer.student.inner import Examples
from darht.trainer.student.losses import Darht
from darht.trainer.student.model import Student
from darht.trainer.student.step import Step
from darht.trainer.student.targets import clean_answer, live_answer
from darht.trainer.student.warm import WarmMemory

CPU = torch.device("cpu")
CLASSES, SEED = 10, 3
TINY = {"width": 4, "blocks": [1, 1, 1, 1]}
# name: (kwargs of resnet18, rows of the cache, batch, epochs)
STUDENTS = {"ResNet-18": ({}, 256, 32, 2), "ResNet-18, a quarter as wide": ({"width": 16}, 1024, 128, 2)}
# The released script's teachers by what they are; ViTs see images scaled to 224 pixels.
RELEASED = {
    "WRN-70-16": ("wrn-70-16", None),
    "ViT-B/16, first": ("timm:vit_base_patch16_224", 224),
    "ViT-B/16, second": ("timm:vit_base_patch16_224", 224),
    "ViT-B/32": ("timm:vit_base_patch32_224", 224),
}
RSLAD = {"WRN-34-10": ("wrn-34-10", None)}
SMALL = dict.fromkeys((*RELEASED, *RSLAD), ("wrn-10-1", None))
MODES = {
    "cached": {"kind": "cached"},
    "warm": {"kind": "warm", "warm": {"check_rows": 0}},  # the check after an epoch is no part of a step
    "pgd:10": {"kind": "pgd", "steps": 10},
}
AIMS = {"cached": None, "warm": 25, "pgd:10": 7}
PARTS = ("draw", "forward", "loss", "backward", "optimizer", "tally")


def make_cache(folder: Path, rows: int) -> Cache:
    """A sealed cache of random 32x32 images: what training reads of four teachers depends on their number alone."""
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (rows, 3, 32, 32), dtype=np.uint8), np.arange(rows) % CLASSES
    folder.mkdir(parents=True)
    np.savez(folder / "train.npz", images=images, labels=labels)
    card = Card(arch="resnet18", kwargs=TINY, num_classes=CLASSES, preprocessing=Preprocessing(), weights_sha256="")
    for number in range(len(RELEASED)):
        torch.manual_seed(number)
        save_teacher(folder / f"teacher{number}", build_net("resnet18", CLASSES, TINY), card)
    config = {
        "data": {"source": "npz", "root": str(folder / "train.npz")},
        "teachers": {f"t{number}": {"path": f"teacher{number}"} for number in range(len(RELEASED))},
        "attacks": {"pgd": {"kind": "pgd", "teacher": "t0", "eps": 8, "step": 8, "steps": 1}},
        "views": {"count": 4},
    }
    (folder / "cache.yaml").write_text(yaml.safe_dump(config))
    build(plan_build(folder / "cache.yaml", device=CPU), folder / "cache", device=CPU, on_unit=lambda *_: None)
    seal(folder / "cache")
    return open_cache(folder / "cache")


def recipe(kwargs: dict[str, Any], mode: str, batch: int, epochs: int, **more: Any) -> TrainConfig:
    """The released objective in its second phase from start to end, half of the batches clean, as released."""
    optim = {"epochs": epochs, "batch_size": batch, "lr": 1e-3}
    student = {"arch": "resnet18", "kwargs": kwargs}
    plain = {"recipe": "darht", "loss": {"phases": [0, 1]}, "student": student, "optim": optim, "seed": SEED}
    plain["average"] = {"kind": "none"}  # as the page was measured
    return parse(TrainConfig, {**plain, "inner": {"eps": 8, **MODES[mode]}, **more}, "bench")


def make_student(config: TrainConfig) -> Student:
    torch.manual_seed(0)
    teachers, plain = len(RELEASED), Preprocessing()
    options = {"num_classes": CLASSES, "preprocessing": plain}
    return Student(config.student.arch, config.student.kwargs, teachers=teachers, **options).train()


# (a) Beside the bare arithmetic ------------------------------------------------------------------------------------


def bare_step(config: TrainConfig, batch: int) -> Callable[[], float]:
    """Forward, loss, backward and optimizer on tensors that lie ready; gives the seconds of one."""
    student, objective = make_student(config), config.objective()
    optimizer = make_optimizer(student, config.optim)
    x, y, T = torch.rand(batch, 3, 32, 32), torch.arange(batch) % CLASSES, len(RELEASED)
    targets, robust = torch.randn(batch, T, CLASSES), torch.ones(T, dtype=torch.bool)
    step = Step(x, x, y, clean_answer(targets), targets, targets, robust.expand(batch, -1), robust, 0.5)

    def once() -> float:
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        objective.loss(student, step, student(x), {}).value.backward()
        optimizer.step()
        return time.perf_counter() - start

    once()
    return once


WATCHED = (
    (Examples, "draw", "draw"), (Student, "forward", "forward"), (Darht, "loss", "loss"),
    (Tensor, "backward", "backward"), (trainer, "take_step", "optimizer"),
    (Metrics, "add", "tally"), (Metrics, "count", "tally"),
    (trainer, "_scores", "end"), (trainer.Checkpoints, "add", "end"),
)  # fmt: skip


def beside_bare(config: TrainConfig, cache: Cache, out: Path) -> dict[str, Any]:
    """Train, with a bare step after each step; the first step of an epoch, which ends the one before, is left out."""
    bare, timers = bare_step(config, config.optim.batch_size), Timers()
    rows: list[tuple[bool, float, float]] = []
    last = [0.0]

    def on_step(step: int, total: int, images: int, metrics: Metrics) -> None:
        taken, timers.counting = time.perf_counter() - last[0], False
        if (step - 1) % (total // config.optim.epochs):
            rows.append((not coin(0.5, SEED, step - 1), taken, bare()))
        else:
            timers.spent.clear() if step == 1 else None
        timers.counting, last[0] = True, time.perf_counter()

    with contextlib.ExitStack() as stack:
        for owner, name, label in WATCHED:
            stack.enter_context(timers.on(owner, name, label))
        trainer.train(config, cache, out, device=CPU, callbacks=trainer.Callbacks(on_step=on_step))
    return summary(rows, timers.spent, config)


def summary(rows: list[tuple[bool, float, float]], spent: Counter[str], config: TrainConfig) -> dict[str, Any]:
    """Medians of the quotients, and seconds per image: the mean of clean and adversarial steps, half of each."""
    batch = config.optim.batch_size
    kinds = [[taken for adversarial, taken, _ in rows if adversarial is kind] for kind in (False, True)]
    seconds = statistics.mean(statistics.median(kind) for kind in kinds if kind)
    counted = max(1, len(rows) + config.optim.epochs - 1)
    return {
        "steps": len(rows),
        "ratio": statistics.median(taken / bare for _, taken, bare in rows),
        "adversarial": statistics.median([taken / bare for kind, taken, bare in rows if kind] or [float("nan")]),
        "bare": statistics.median(bare for *_, bare in rows),
        "image": seconds / batch,
        "parts": {part: 1000 * spent[part] / counted for part in PARTS},
    }


def overhead(work: Path, arguments: argparse.Namespace) -> tuple[list[str], dict[str, float]]:
    """The table of (a), and the seconds per image of each mode for the full student."""
    head = f"| student, batch | inner | steps | bare step ms | loop / bare | on adversarial | {' | '.join(PARTS)} |"
    lines, images = [head, "|" + "---|" * (6 + len(PARTS))], {}
    for number, (name, sizes) in enumerate(STUDENTS.items()):
        kwargs, rows, batch, epochs = (TINY, 64, 8, 2) if arguments.smoke else sizes
        cache = make_cache(work / f"cache{number}", rows)
        for mode in MODES:
            out = work / f"run-{number}-{mode.replace(':', '-')}"
            found = beside_bare(recipe(kwargs, mode, batch, epochs), cache, out)
            tell(student=name, mode=mode, **found)
            parts = " | ".join(f"{found['parts'][part]:.1f}" for part in PARTS)
            lines.append(
                f"| {name}, {batch} | `{mode}` | {found['steps']} | {1000 * found['bare']:.1f} | {found['ratio']:.3f} "
                f"| {found['adversarial']:.3f} | {parts} |"
            )
            if number == 0:
                images[mode] = found["image"]
    return lines, images


def tell(**found: Any) -> None:
    print(json.dumps(found, default=lambda value: round(value, 5)), flush=True)


# (b), (c) Beside teachers in the loop ------------------------------------------------------------------------------


def load_teachers(names: dict[str, tuple[str, int | None]], arguments: argparse.Namespace) -> dict[str, nn.Module]:
    torchvision()
    teachers = {}
    for name in names:
        arch, resize = (SMALL if arguments.smoke else names)[name]
        teachers[name] = (
            Classifier(build_net(arch, CLASSES, {}), Preprocessing(resize=resize)).eval().requires_grad_(False)
        )
    return teachers


def live_steps(
    config: TrainConfig, data: TrainingSet, teachers: dict[str, nn.Module], numbers: list[int], arguments: Any
) -> dict[str, Any]:
    """Whole steps with the teachers asked once about each image, as the published scripts do; seconds per image.

    Args:
        config: `darht`, whose teachers see what the student trains on, or `rslad`, whose teacher sees the clean image.
        data: rows of the cache; its logits are read and then replaced by the live ones.
        teachers: by name.
        numbers: of the steps: they decide by the recipe's coin which are clean.
        arguments: `batch` images in a step.
    """
    student, objective = make_student(config), config.objective()
    optimizer, examples, spent = make_optimizer(student, config.optim), Examples(config, objective), Counter()
    for number in numbers:
        at = torch.arange(arguments.batch) + number * arguments.batch % (len(data.rows) - arguments.batch)
        start = time.perf_counter()
        step = examples.draw(student, data, at, epoch=0, number=number, done=0.5, pgd_share=0.0)
        pixels, answers = step.clean if config.recipe == "rslad" else step.x, []
        for name, teacher in teachers.items():
            asked = time.perf_counter()
            with torch.no_grad():
                answers.append(live_answer([teacher])(pixels))
            spent[name] += time.perf_counter() - asked
        heard = torch.cat(answers, dim=1)
        every = heard if heard.shape[1] == len(RELEASED) else heard.expand(-1, len(RELEASED), -1)
        step = step._replace(targets=every, clean_targets=every)
        optimizer.zero_grad(set_to_none=True)
        objective.loss(student, step, student(step.x), {}).value.backward()
        take_step(student, optimizer, config.optim, 0.5)
        spent["whole step"] += time.perf_counter() - start
    return {name: seconds / len(numbers) / arguments.batch for name, seconds in spent.items()}


def one_of_each(count: int) -> list[int]:
    """Numbers of `count` clean and `count` adversarial steps under the recipe's coin."""
    clean = [number for number in range(99) if coin(0.5, SEED, number)]
    adversarial = [number for number in range(99) if number not in clean]
    return [*adversarial[:count], *clean[:count]]


def warm_rslad(config: TrainConfig, cache: Cache, data: TrainingSet, arguments: Any, numbers: list[int]) -> float:
    """Seconds per image of RSLAD with one warm step, no teacher asked."""
    student, objective = make_student(config), config.objective()
    offsets = torch.from_numpy(cache.read("views/offset"))
    memory = WarmMemory.create(cache.rows, cache.spec.data.image_shape, offsets, CPU)
    optimizer, examples = make_optimizer(student, config.optim), Examples(config, objective, memory)
    seconds = []
    for number in [*numbers, *numbers]:
        at = torch.arange(arguments.batch) + number * arguments.batch % (len(data.rows) - arguments.batch)
        start = time.perf_counter()
        step = examples.draw(student, data, at, epoch=0, number=number, done=0.5, pgd_share=0.0)
        out = student(step.x)
        drift = config.inner.warm.consistency * (out.logits - step.start).square().mean()
        optimizer.zero_grad(set_to_none=True)
        (objective.loss(student, step, out, {}).value + drift).backward()
        take_step(student, optimizer, config.optim, 0.5)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) / arguments.batch


def beside_live(work: Path, images: dict[str, float], arguments: argparse.Namespace) -> list[str]:
    """The tables of (b) and (c)."""
    kwargs = TINY if arguments.smoke else {}
    cache = open_cache(work / "cache0" / "cache")
    data = load_training_set(cache, device=CPU, adversarial=True, budget_gib=1)
    released = live_steps(
        recipe(kwargs, "pgd:10", arguments.batch, 1), data, load_teachers(RELEASED, arguments),
        one_of_each(1 if arguments.smoke else 2), arguments,
    )  # fmt: skip
    tell(live="darht", **released)
    lines = ["| per training image | ms | cheaper than live by | to reach |", "|---|---|---|---|"]
    lines += [f"| live: {name} | {1000 * seconds:.1f} | | |" for name, seconds in released.items() if name in RELEASED]
    teachers = sum(released[name] for name in RELEASED)
    lines.append(f"| live: whole step, as measured | {1000 * released['whole step']:.1f} | | |")
    whole = min(released["whole step"], teachers + images["pgd:10"])
    lines.append(f"| **live**: that, or teachers and `pgd:10` below where they are less | {1000 * whole:.1f} | 1 | |")
    for mode, seconds in images.items():
        lines.append(f"| `{mode}` | {1000 * seconds:.1f} | {whole / seconds:.1f} | {AIMS[mode] or ''} |")
    rslad = {"recipe": "rslad", "loss": {}}
    numbers = [0, 1]
    live = live_steps(
        recipe(kwargs, "pgd:10", arguments.batch, 1, **rslad), data, load_teachers(RSLAD, arguments), numbers, arguments
    )
    warm = warm_rslad(recipe(kwargs, "warm", arguments.batch, 1, **rslad), cache, data, arguments, numbers)
    tell(live="rslad", warm=warm, **live)
    rest = live["whole step"] - live["WRN-34-10"]
    lines += ["", "| RSLAD, per training image | ms | cheaper than live by |", "|---|---|---|"]
    lines.append(f"| live: WRN-34-10 | {1000 * live['WRN-34-10']:.1f} | |")
    lines.append(f"| **live: whole step** | {1000 * live['whole step']:.1f} | 1 |")
    lines.append(f"| `pgd:10` from the cache | {1000 * rest:.1f} | {live['whole step'] / rest:.1f} |")
    lines.append(f"| `warm` from the cache | {1000 * warm:.1f} | {live['whole step'] / warm:.1f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="write the page here")
    parser.add_argument("--batch", type=int, default=8, help="images in a step with live teachers")
    parser.add_argument("--smoke", action="store_true", help="tiny networks, seconds")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        beside, images = overhead(Path(temporary), arguments)
        text = page(beside, beside_live(Path(temporary), images, arguments), arguments, time.perf_counter() - start)
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
