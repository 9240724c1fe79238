"""What BatchNorm folded into the convolutions saves on a CPU: in training steps of PGD and in attacks that evaluate.

    python bench/folding.py                            the table, for a small ResNet-18
    python bench/folding.py --run RUN --data CIFAR     AutoAttack on the first 64 test images, for a student of CIFAR-10

Each pair is timed in turns in this process, with one thread; the figure is the median ratio. AutoAttack is run once
each way, and its time is that of the processor.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from darht import load_student
from darht.attacks import APGD, PGD, AutoAttack, Engine, Threat
from darht.cache.sources.load import load_source
from darht.core.preprocessing import Preprocessing
from darht.core.rng import RowRng
from darht.trainer.evaluation.attacks.adaptive import Climb, fast_student, row_losses
from darht.trainer.student.distances import label_rows
from darht.trainer.student.model import Student
from darht.trainer.student.twin import Twin, frozen_twin

TITLE = "Folded networks"
NET, CLASSES, ROWS, ROUNDS = {"width": 6, "blocks": [1, 1, 1, 1]}, 10, 64, 5
PLAIN = Engine(rule="full", lanes=1, fold=False)


def a_student(kwargs: dict[str, object]) -> Student:
    """With the statistics that a few batches leave."""
    torch.manual_seed(0)
    norm = Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3)
    student = Student("resnet18", kwargs, teachers=2, num_classes=CLASSES, preprocessing=norm)
    for _ in range(3):
        student(torch.rand(ROWS, 3, 32, 32))
    return student.eval().requires_grad_(False)


def ratio(one: Callable[[], object], other: Callable[[], object], rounds: int) -> float:
    """The time of the second as a share of the first's."""
    one(), other()
    found = []
    for _ in range(rounds):
        clocks = [time.perf_counter()]
        for action in (one, other):
            action()
            clocks.append(time.perf_counter())
        found.append((clocks[2] - clocks[1]) / (clocks[1] - clocks[0]))
    return statistics.median(found)


def gradient(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Of the cross-entropy, to the pixels."""
    pixels = x.clone().requires_grad_()
    return torch.autograd.grad(label_rows(net(pixels).logits, y).sum(), pixels)[0]


def measured(kwargs: dict[str, object], *, steps: int = 10, rounds: int = ROUNDS) -> dict[str, float]:
    """The time with folded BatchNorm as a share of that without, by what is computed."""
    student = a_student(kwargs)
    x = torch.rand(ROWS, 3, 32, 32)
    y = student(x).logits.argmax(1)
    twin, plain, net = Twin(student, x[:2]), frozen_twin(student), student.fold().requires_grad_(False)
    keys, nothing = RowRng.create(0, "bench", rows=torch.arange(ROWS)), torch.zeros(ROWS, 0)
    climb = Climb(student, row_losses(2, CLASSES)["all rows, ce"], Threat(eps=1))
    folded = replace(climb, fast=fast_student(student, x[:2]))
    pgd, apgd = PGD(eps=8, step=2, steps=steps), APGD(eps=8, steps=steps)

    def ask(engine: Engine, attack: PGD | APGD) -> Callable[[], object]:
        return lambda: engine.craft(attack, net, x, y)

    def trained() -> None:
        for current in [twin.current()] * steps:
            gradient(current, x, y)

    pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        f"the examples of a training step of `pgd:{steps}`": (
            lambda: [gradient(plain, x, y) for _ in range(steps)],
            trained,
        ),
        f"PGD of {steps} steps on all rows": (ask(PLAIN, pgd), ask(replace(PLAIN, fold=True), pgd)),
        f"Auto-PGD of {steps} steps on all rows": (ask(PLAIN, apgd), ask(replace(PLAIN, fold=True), apgd)),
        "an adaptive attack on the map, nothing fooled": (
            lambda: climb(x, y, keys, nothing),
            lambda: folded(x, y, keys, nothing),
        ),
    }
    return {name: ratio(one, other, rounds) for name, (one, other) in pairs.items()}


def page(found: dict[str, float]) -> str:
    """The table as Markdown."""
    lines = ["| time with BatchNorm folded | of the time without |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {share:.2f} |" for name, share in found.items())])


def section() -> str:
    """The page's section, measured now."""
    torch.set_num_threads(1)
    return f"""\
ResNet-18 of 6 channels and blocks {NET["blocks"]}, {ROWS} images of 32x32, one thread, medians of ratios.
Training: folding once for each batch included. Attacks: as `darht-eval` runs them, copying and tracing included.

{page(measured(dict(NET)))}
"""


def autoattack(run: Path, data: Path, images: int) -> str:
    """What AutoAttack takes with BatchNorm folded, as a share of without, and what is left after each of its parts."""
    net, source = load_student(run, "cpu").requires_grad_(False), load_source("cifar10", data, "test", limit=images)
    x, y = torch.from_numpy(source.images).float() / 255, torch.from_numpy(source.labels)
    seconds, left = [], []
    for fold in (False, True):
        start = time.process_time()
        found = AutoAttack(eps=8, engine=Engine(lanes=1, fold=fold)).run(net, x, y)
        seconds.append(time.process_time() - start)
        left.append(found.after)
    return f"{seconds[1] / seconds[0]:.2f} of the time; left of {images}: {left[0]} without, {left[1]} with folding"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--run", type=Path, help="a run of darht-train on CIFAR-10")
    parser.add_argument("--data", type=Path, help="where CIFAR-10 lies")
    parser.add_argument("--images", type=int, default=64)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(section() if given.run is None else autoattack(given.run, given.data, given.images))
    return 0


if __name__ == "__main__":
    sys.exit(main())
