"""How many kernels a training step would launch on a GPU, counted on torch's `meta` device: no GPU is needed.

    python bench/launches.py      the table, for ResNet-18 and 50,000 images of 32x32

An operator on tensors of the device counts as one launch; views and empty tensors as none. What is marked `fused`
counts as one where it is compiled, and one on the way back. What a fused optimizer or a compiled network would save is
not in these figures.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

import darht.core.fused
from darht.cache.format.views import crop_flip_offsets
from darht.cache.read.training_set import TrainingSet
from darht.core.config import parse
from darht.core.fused import fusing
from darht.core.nets.batch_norm import FoldedConvs
from darht.core.preprocessing import Preprocessing
from darht.core.rng import RowRng
from darht.trainer.config import TrainConfig
from darht.trainer.progress.metrics import Metrics
from darht.trainer.schedule import make_optimizer
from darht.trainer.student import train as trainer
from darht.trainer.student import twin as twins
from darht.trainer.student.averaging import averaged_model
from darht.trainer.student.distributed import Ranks
from darht.trainer.student.gradients import compute_gradients
from darht.trainer.student.inner import Examples
from darht.trainer.student.model import Student
from darht.trainer.student.run import TrainState
from darht.trainer.student.twin import Twin
from darht.trainer.student.warm import WarmMemory

META = torch.device("meta")
ROWS, SIDE, TEACHERS, CLASSES, BATCH = 50_000, 32, 3, 10, 256
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "alias", "lift_fresh", "_unsafe_view"}
FOLDING = "student, batch norm folded"
REST, OPTIMIZER, AVERAGE = "rest", "optimizer, not fused", "average of the weights"
TITLE = "A training step"
ABOUT = """\
ResNet-18, batches of 256 images of 32x32 from a cache that lies on the device, one adversarial step of `darht` with
three teachers and averaged weights, not an epoch's first. It is counted on torch's `meta` device: nothing here was
measured on a GPU. An operator counts as one launch, a view as none. At about 5 microseconds each, 1,000 launches are
5 ms of the host's time."""
AFTER = """
`fused` is what `compute.compile` does on a GPU with the functions around the student's passes (`core/fused.py`: random
draws, crop and flip, the rows' memory, the move of a step of PGD, distances, metrics): each is one launch, and one on
the way back. The passes themselves stand uncompiled in both columns, so that what surrounds them can be compared;
compiled, each is one graph, which a CUDA graph launches at once where shapes are constant. The optimizer is one fused
launch on a GPU, which `meta` does not have. Steps of PGD ascend on a twin of the student that has BatchNorm folded into
its convolutions, once for each batch: before, their passes had 400 launches more.

Wanted around student and optimizer are 40 launches, and 10 more for each step of PGD. `tests/bench/test_launches.py`
holds the counts. Before the views of an epoch were drawn at once and the metrics summed together, a
whole step had 639 launches (`cached`), 1,010 (`warm`) and 2,318 (`pgd:10`).

Nothing in a step asks the device for a value: `tests/trainer/student/test_dry_run.py` trains on `meta`, and names what
a run asks for outside of its steps. A cache on the device is read at positions that are sent once in an epoch; of one
that is not, a thread gathers and sends two batches ahead, with the teachers' logits on the drawn view alone: on
CIFAR-100 with four teachers and all 162 views 0.2 MB a step in place of 33 MB. Of stored perturbations those of the
one attack that a batch of `inner: cached` shows are sent, in the drawn view: 0.8 MB, however many attacks and views;
`warm` takes the first view of each, without answers.
"""
MODES: dict[str, dict[str, Any]] = {
    "cached": {"inner": {"kind": "cached"}},
    "warm": {"inner": {"kind": "warm"}},
    "pgd:10": {"inner": {"kind": "pgd", "steps": 10}},
}


class _Mark(torch.autograd.Function):
    """Tensors as they are, whose gradients tell on their way back that they come by here."""

    @staticmethod
    def forward(ctx: Any, passing: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.passing = passing
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.passing()
        return None, *gradients


def marked(value: Any, passing: Callable[[], None]) -> Any:
    """The same value with its tensors that have a gradient marked."""
    leaves, spec = tree_flatten(value)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if places and torch.is_grad_enabled():
        for place, tensor in zip(places, _Mark.apply(passing, *(leaves[i] for i in places)), strict=True):
            leaves[place] = tensor
    return tree_unflatten(leaves, spec)


class Launches(TorchDispatchMode):
    """Counts operators on `meta` by the part of a step that is under way."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.back, self.counts = REST, REST, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [one for one in tree_leaves((args, kwargs, out)) if isinstance(one, Tensor)]
        on_device = any(one.device.type == "meta" for one in tensors)
        if self.part and on_device and not func.is_view and func.overloadpacket.__name__ not in FREE:
            self.counts[self.part] += 1
        return out

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """Count under another name for a while, or not at all under none."""
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

    def backward(self, part: str, function: Any) -> Any:
        """A backward pass, during which what lies within the student counts under this name."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.back = part
            with self.during(REST):
                return function(*args, **kwargs)

        return counted

    def student(self, function: Any) -> Any:
        """The student's forward, whose backward lies between its output and its pixels."""

        def counted(student: Student, x: Tensor) -> Any:
            with self.during("student, forward"):
                out = function(student, marked(x, lambda: setattr(self, "part", REST)))
            return marked(out, lambda: setattr(self, "part", self.back))

        return counted

    def fused(self, function: Any) -> Any:
        """A function that is one launch, and one on the way back."""

        def begin() -> None:
            self.counts[REST] += 1
            self.part = ""

        def counted(*args: Any, **kwargs: Any) -> Any:
            if not self.part:  # a part of another one
                return function(*args, **kwargs)
            self.counts[self.part] += 1
            args = marked(args, lambda: setattr(self, "part", REST))
            with self.during(""):
                return marked(function(*args, **kwargs), begin)

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
    count = launches.named
    places: list[tuple[Any, str, Any]] = [
        (Student, "forward", launches.student(Student.forward)),
        (torch.autograd, "grad", launches.backward("student, back to the pixels", torch.autograd.grad)),
        (Tensor, "backward", launches.backward("student, back to the weights", Tensor.backward)),
        (FoldedConvs, "refresh", count(FOLDING, FoldedConvs.refresh)),
        (RowRng, "integers", count("random numbers", RowRng.integers)),
        (RowRng, "uniform", count("random numbers", RowRng.uniform)),
        (Metrics, "count", count("metrics", Metrics.count)),
        (Metrics, "add", count("metrics", Metrics.add)),
        (trainer, "take_step", count(OPTIMIZER, trainer.take_step)),
        (AveragedModel, "update_parameters", count(AVERAGE, AveragedModel.update_parameters)),
        (torch, "autocast", lambda *_, **__: nullcontext()),
        (darht.core.fused, "compile_function", launches.fused),
    ]
    with ExitStack() as stack:
        for owner, name, replacement in places:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


def count(mode: str, kwargs: dict[str, Any] | None = None, *, fused: bool = True) -> Counter[str]:
    """Launches of one adversarial step of `darht` in a mode, by part, once every row has started.

    Args:
        mode: of `MODES`.
        kwargs: of the network.
        fused: whether functions of tensors are compiled, as `compute.compile` has it on a GPU.
    """
    settings = {"loss": {"clean_share": 0.0, "phases": [0.0, 1.0]}, "student": {"kwargs": kwargs or {}}}
    settings["average"] = {"kind": "ema", "decay": 0.999}
    config, launches, order = parse(TrainConfig, settings | MODES[mode], "bench"), Launches(), torch.arange(ROWS)
    data = training_set().ordered(order)
    norm = Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3)
    student = Student("resnet18", kwargs or {}, teachers=TEACHERS, num_classes=CLASSES, preprocessing=norm).to(META)
    memory = WarmMemory.create(ROWS, (3, SIDE, SIDE), torch.tensor([[4, 4, 0]]), META) if mode == "warm" else None
    if memory is not None:
        memory.complete = True
    average = averaged_model(student, config.average)
    state = TrainState(student, student, make_optimizer(student, config.optim), memory, average)
    with mock.patch.object(twins, "_agrees", lambda student, probe: True):  # compares two answers, once in a run
        twin = Twin(student, torch.empty(2, 3, SIDE, SIDE, device=META))
    examples = Examples(config, config.objective(), memory, rows=ROWS, twin=twin)
    metrics = Metrics(META)
    with parts(launches), fusing("meta" if fused else ""):
        for number, at in enumerate(order.split(BATCH)[:2]):  # the first makes the momenta and the epoch's draws
            launches.counts.clear()
            with launches:
                compute_gradients(state, examples, Ranks(), metrics, data=data, batch=at, number=number, done=0.5)
                trainer.take_step(student, state.optimizer, config.optim, 0.5)
                trainer._average(state, config, step=True, done=0.5)
    return launches.counts


def outside(counts: Counter[str]) -> int:
    """Launches that are neither a pass of the student nor the optimizer's."""
    return sum(n for part, n in counts.items() if part != OPTIMIZER and not part.startswith("student"))


def page(counts: dict[str, Counter[str]]) -> str:
    """The table as Markdown."""
    names = sorted({part for one in counts.values() for part in one}, key=lambda part: (part == REST, part))
    lines = [f"| launches in a step | {' | '.join(counts)} |", "|---|" + "---|" * len(counts)]
    lines += [f"| {part} | {' | '.join(str(one[part]) for one in counts.values())} |" for part in names]
    lines += [f"| **around student and optimizer** | {' | '.join(str(outside(one)) for one in counts.values())} |"]
    lines += [f"| all | {' | '.join(str(sum(one.values())) for one in counts.values())} |"]
    return "\n".join(lines)


def measured() -> dict[str, Counter[str]]:
    """Each mode, uncompiled and with what surrounds the student compiled."""
    return {f"{mode}{name}": count(mode, fused=on) for mode in MODES for name, on in (("", False), (", fused", True))}


def section() -> str:
    """The page's section, counted now."""
    return f"{ABOUT}\n\n{page(measured())}\n{AFTER}"


def main() -> int:
    argparse.ArgumentParser(description=__doc__.split("\n\n")[0]).parse_args()
    print(page(measured()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
