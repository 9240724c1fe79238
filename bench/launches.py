"""How many kernels a training step would launch on a GPU, counted on torch's `meta` device: no GPU is needed.

    python bench/launches.py                      the table, for ResNet-18 and 50,000 images of 32x32
    python bench/launches.py --out docs/benchmarks-gpu.md

An operator on tensors of the device counts as one launch; views and empty tensors as none. What a fused optimizer or a
compiled network would save is not in these figures: they are those of an uncompiled step.
"""

import argparse
import datetime
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from darht.cache.format.views import crop_flip_offsets
from darht.cache.read.loader import TrainingSet
from darht.core.config import parse
from darht.core.files import write_atomic
from darht.core.preprocessing import Preprocessing
from darht.core.rng import RowRng
from darht.trainer.config import TrainConfig
from darht.trainer.progress.metrics import Metrics
from darht.trainer.schedule import make_optimizer
from darht.trainer.student import train as trainer
from darht.trainer.student.distributed import Ranks
from darht.trainer.student.gradients import compute_gradients
from darht.trainer.student.inner import Examples
from darht.trainer.student.model import Student
from darht.trainer.student.run import TrainState
from darht.trainer.student.warm import WarmMemory

META = torch.device("meta")
ROWS, SIDE, TEACHERS, CLASSES, BATCH = 50_000, 32, 3, 10, 256
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "alias", "lift_fresh", "_unsafe_view"}
HEAD = "# Launches of a training step"
ABOUT = """ResNet-18, batches of 256 images
of 32x32, one adversarial step of `darht` with three teachers, not an epoch's first, not compiled. It is counted on
torch's `meta` device: nothing here was measured on a GPU. An operator counts as one launch, a view as none. At about 5
microseconds each, 1,000 launches are 5 ms of the host's time."""
AFTER = """
The optimizer is one fused launch on a GPU, which `meta` does not have. `compute.compile` makes one graph of each pass
of the student. Before the views of an epoch were drawn at once and the metrics summed together, a step had 639
(`cached`), 1,010 (`warm`) and 2,318 launches (`pgd:10`).

Too many still: the random start of `pgd` (one draw of Philox), the memory of `warm`, and the rest around the student's
own passes. Wanted are 40, and 10 for each step of `pgd`. CUDA graphs, a fused memory and a network twin for the inner
loop were not tried.

Nothing in a step asks the device for a value: `tests/trainer/student/test_dry_run.py` trains on `meta`, and names what
a run asks for outside of its steps.
"""
MODES: dict[str, dict[str, Any]] = {
    "cached": {"inner": {"kind": "cached"}},
    "warm": {"inner": {"kind": "warm"}},
    "pgd:10": {"inner": {"kind": "pgd", "steps": 10}},
}


class Launches(TorchDispatchMode):
    """Counts operators on `meta` by the part of a step that is under way."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.counts = "rest", Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [one for one in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(one, Tensor)]
        on_device = any(one.device.type == "meta" for one in tensors)
        if on_device and not func.is_view and func.overloadpacket.__name__ not in FREE:
            self.counts[self.part] += 1
        return out

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """Count under another name for a while."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def named(self, part: str, function: Any) -> Any:
        """A function whose launches count under another name."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.during(part):
                return function(*args, **kwargs)

        return counted


def training_set() -> TrainingSet:
    """Rows of a cache as a GPU would hold them, without numbers."""
    offsets = torch.from_numpy(crop_flip_offsets(4, flip=True))
    answers = torch.empty(ROWS, len(offsets), TEACHERS, CLASSES, dtype=torch.float16, device=META)
    return TrainingSet(
        rows=torch.arange(ROWS, device=META),
        keys=torch.arange(ROWS),
        images=torch.empty(ROWS, 3, SIDE, SIDE, dtype=torch.uint8, device=META),
        labels=torch.empty(ROWS, dtype=torch.int64, device=META),
        offsets=offsets.to(META),
        teachers=("a", "b", "c"),
        attacks=("pgd-a",),
        clean=answers,
        deltas=(torch.empty(ROWS, 1, 3, SIDE, SIDE, dtype=torch.int8, device=META),),
        scales=(1.0,),
        adversarial=(answers[:, :1],),
        jacobians=(),
        robust=torch.ones(TEACHERS, dtype=torch.bool),
        training=np.arange(ROWS),
        holdout=np.arange(0),
    )


@contextmanager
def parts(launches: Launches) -> Iterator[None]:
    """Name the parts of a step, and leave out what `meta` does not know."""
    places: list[tuple[Any, str, str]] = [
        (Student, "forward", "student, forward"),
        (torch.autograd, "grad", "backward to the pixels"),
        (Tensor, "backward", "backward to the weights"),
        (RowRng, "words", "random numbers"),
        (WarmMemory, "read", "memory of `warm`"),
        (WarmMemory, "write", "memory of `warm`"),
        (Metrics, "count", "metrics"),
        (trainer, "take_step", "optimizer, not fused"),
    ]
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "autocast", lambda *_, **__: nullcontext()))
        for owner, name, part in places:
            stack.enter_context(mock.patch.object(owner, name, launches.named(part, getattr(owner, name))))
        yield


def count(mode: str, kwargs: dict[str, Any] | None = None) -> Counter[str]:
    """Launches of one adversarial step of `darht` in a mode, by part, once every row has started."""
    settings = {"loss": {"clean_share": 0.0, "phases": [0.0, 1.0]}, "student": {"kwargs": kwargs or {}}}
    config, data, launches = parse(TrainConfig, settings | MODES[mode], "bench"), training_set(), Launches()
    norm = Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3)
    student = Student("resnet18", kwargs or {}, teachers=TEACHERS, num_classes=CLASSES, preprocessing=norm).to(META)
    memory = WarmMemory.create(ROWS, (3, SIDE, SIDE), torch.tensor([[4, 4, 0]]), META) if mode == "warm" else None
    if memory is not None:
        memory.complete = True
    state = TrainState(student, student, make_optimizer(student, config.optim), memory)
    examples = Examples(config, config.objective(), memory, rows=ROWS)
    metrics = Metrics(META)
    with parts(launches):
        for number in range(2):  # the optimizer's first step makes its momenta, and an epoch's draws are made once
            launches.counts.clear()
            at = torch.arange(number * BATCH, (number + 1) * BATCH)
            with launches:
                compute_gradients(state, examples, Ranks(), metrics, data=data, batch=at, number=number, done=0.5)
                trainer.take_step(student, state.optimizer, config.optim, 0.5)
    return launches.counts


def page(counts: dict[str, Counter[str]]) -> str:
    """The table as Markdown."""
    names = sorted({part for one in counts.values() for part in one}, key=lambda part: (part == "rest", part))
    lines = [f"| launches in a step | {' | '.join(counts)} |", "|---|" + "---|" * len(counts)]
    lines += [f"| {part} | {' | '.join(str(one[part]) for one in counts.values())} |" for part in names]
    lines += [f"| all | {' | '.join(str(sum(one.values())) for one in counts.values())} |"]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="write the page here too")
    out, text = parser.parse_args().out, page({mode: count(mode) for mode in MODES})
    print(text)
    if out is not None:
        made = (
            f"`python bench/launches.py --out {out}`, {datetime.date.today()}, torch {torch.__version__.split('+')[0]}."
        )
        write_atomic(out, f"{HEAD}\n\n{made} {ABOUT}\n\n{text}\n{AFTER}".encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
