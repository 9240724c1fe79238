"""What a run keeps between two epochs, and how long the next one waits for it: 50,000 rows of 32x32, on the CPU.

    python bench/epoch_end.py      the table

A ResNet-18 with SGD's momentum, the mean of its weights and the rows' memory of `warm` are kept as a run keeps them.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from darht.core.config import parse, to_plain
from darht.core.preprocessing import Preprocessing
from darht.trainer.config import AverageConfig, TrainConfig
from darht.trainer.schedule import make_optimizer
from darht.trainer.state.checkpoint import StudentCard, write_run
from darht.trainer.student import checkpoints
from darht.trainer.student.averaging import averaged_model
from darht.trainer.student.checkpoints import Checkpoints, advance
from darht.trainer.student.model import Student
from darht.trainer.student.run import TrainState
from darht.trainer.student.score import _folded
from darht.trainer.student.warm import WarmMemory

CPU, ROWS, TEACHERS, CLASSES, ROUNDS = torch.device("cpu"), 50_000, 3, 10, 3
TITLE = "What is kept between two epochs"
ABOUT = f"""\
ResNet-18 with momentum, the mean of its weights and the memory of {ROWS:,} rows of 32x32 (`inner: warm`), on a CPU. The
first line is what every epoch cost before checkpoints were written by a thread; an epoch whose end is not written
yet is copied where a collapse may go back to it, and costs nothing elsewhere."""


def run_state() -> tuple[TrainState, StudentCard]:
    """A run after its first step, without a cache."""
    config, norm = parse(TrainConfig, {}, "bench"), Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3)
    student = Student("resnet18", {}, teachers=TEACHERS, num_classes=CLASSES, preprocessing=norm)
    optimizer = make_optimizer(student, config.optim)
    student(torch.rand(2, 3, 32, 32)).logits.sum().backward()
    optimizer.step()
    average = averaged_model(student, AverageConfig(kind="ema"))
    assert average is not None
    average.update_parameters(student)
    memory = WarmMemory.create(ROWS, (3, 32, 32), torch.tensor([[4, 4, 0]]), CPU)
    memory.pixels.random_(-8, 9)
    names = tuple("abc")
    card = StudentCard("resnet18", {}, names, CLASSES, norm, tuple("0123456789"), "", to_plain(config), 1)
    return TrainState(student, student, optimizer, memory, average), card


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measured(out: Path) -> dict[str, list[float]]:
    """Seconds that an epoch's end takes of the run, by what is done there."""
    state, card = run_state()
    write_run(out, {}, {})
    rows: dict[str, list[float]] = {}
    with Checkpoints(out, writes=True, goes_back=True) as kept:
        for number in range(1, ROUNDS + 1):
            best = advance(state.progress, {"epoch": number})

            def end(now: bool, best: bool = best) -> None:
                kept.add(state, card, best=best, now=now)

            checkpoints.EVERY = float("inf")
            written = seconds(lambda: end(now=True)) + seconds(kept.wait)
            rows.setdefault("written before the next epoch", []).append(written)
            rows.setdefault("copied, and written by a thread", []).append(seconds(lambda: end(now=True)))
            kept.wait()
            rows.setdefault("copied, not due yet", []).append(seconds(lambda: end(now=False)))
            rows.setdefault("a student folded to be scored" + ("" if number > 1 else ", first"), []).append(
                seconds(lambda: _folded(state.student))
            )
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return rows | {f"MB on the disk: {size / 1e6:.0f}": []}


def page(rows: dict[str, list[float]]) -> str:
    """The table as Markdown: medians, as parts of the first."""
    medians = {name: statistics.median(values) for name, values in rows.items() if values}
    first = next(iter(medians.values()))
    lines = ["| what the next epoch waits for | of the first |", "|---|---|"]
    lines += [f"| {name} | {value / first:.2f} |" for name, value in medians.items()]
    return "\n".join([*lines, "", *(f"{name}." for name, values in rows.items() if not values)])


def section() -> str:
    """The page's section, measured now."""
    with tempfile.TemporaryDirectory() as folder:
        return f"{ABOUT}\n\n{page(measured(Path(folder) / 'run'))}\n"


def main() -> int:
    argparse.ArgumentParser(description=__doc__.split("\n\n")[0]).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(page(measured(Path(folder) / "run")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
