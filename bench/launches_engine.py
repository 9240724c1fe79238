"""How many kernels a look of the attack engine would launch on a GPU, and how often it would wait for one.

    python bench/launches_engine.py      the table, for PGD, Auto-PGD and a ResNet-18

Counted on the CPU with the engine's loop as it is on a GPU: constant batches, seldom asked. An operator that makes or
changes a tensor counts as one launch, a view as none. What is read on the host, and every tensor whose size depends on
values, counts as waiting.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from darht.attacks import APGD, PGD, Engine
from darht.attacks.engine import queue
from darht.core.nets import build
from darht.core.rng import RowRng

TITLE = "Attacks"
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "alias", "lift_fresh", "_unsafe_view"}
WAITS = {"_local_scalar_dense", "nonzero", "_unique2", "masked_select", "is_nonzero"}
LOOKS = (8, 24)  # steps of the two runs whose difference is what a step costs
NARROW = {"width": 4}  # of 64
ATTACKS: dict[str, Callable[[int], Any]] = {
    "PGD": lambda steps: PGD(eps=1, step=1, steps=steps),
    "Auto-PGD": lambda steps: APGD(eps=1, steps=steps),
}


class Counted(TorchDispatchMode):
    """Counts launches, and what waits for them."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.waits = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name.startswith("index") and any(
            isinstance(one, torch.Tensor) and one.dtype == torch.bool
            for value in args[1:]
            if isinstance(value, (list, tuple))
            for one in value
        )
        self.waits += masks or name in WAITS
        self.launches += not func.is_view and name not in FREE | WAITS
        return func(*args, **(kwargs or {}))


def network(kwargs: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return build("resnet18", 10, kwargs).eval().requires_grad_(False)


def passes(net: nn.Module, x: torch.Tensor) -> int:
    """Launches of the network alone: forward, and back to the pixels."""
    pixels = x.clone().requires_grad_()
    with Counted() as counted:
        torch.autograd.grad(net(pixels).sum(), pixels)
    return counted.launches


def a_step(make: Callable[[int], Any], rule: str, net: nn.Module, x: torch.Tensor) -> tuple[float, float]:
    """Launches and waits of one step for rows that are in the slots all the time."""
    y = net(x).argmax(1)
    found = []
    with mock.patch.object(queue, "looks_between", lambda device: queue.PATIENCE):
        for steps in LOOKS:
            engine = Engine(rule=rule, slots=16, fold=False, channels_last=False, lanes=1)  # type: ignore[arg-type]
            keys = RowRng.create(0, "bench", rows=torch.arange(len(x)))
            with Counted() as counted:
                engine.run(make(steps), net, x, y, generator=keys)
            found.append((counted.launches, counted.waits))
    few, many = found
    return tuple((b - a) / (LOOKS[1] - LOOKS[0]) for a, b in zip(few, many, strict=True))  # type: ignore[return-value]


def count(kwargs: dict[str, Any] | None = None) -> dict[str, dict[str, float]]:
    """By attack and rule: launches of a step, of which the network's, and waits."""
    net, x = network(kwargs or NARROW), torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    own, rows = passes(net, x), {}
    for name, make in ATTACKS.items():
        for rule in ("full", "first_hit"):
            launches, waits = a_step(make, rule, net, x)
            rows[f"{name}, `{rule}`"] = {"network": own, "around": launches - own, "waits": waits}
    return rows


def page(rows: dict[str, dict[str, float]]) -> str:
    """The table as Markdown."""
    lines = ["| a step of | launches of the network | around it | waits for the GPU |", "|---|---|---|---|"]
    lines += [f"| {name} | {r['network']:.0f} | {r['around']:.0f} | {r['waits']:.2f} |" for name, r in rows.items()]
    return "\n".join(lines)


def section() -> str:
    """The page's section, counted now."""
    return f"""\
ResNet-18 (of a sixteenth of its width, which changes no count) in eval mode, rows that are not fooled; counted on a CPU
by the engine's loop as it is on a GPU. `full` is what builds a cache, `first_hit` what evaluates; the network is not
folded here. Rows that may leave are asked for once in {queue.PATIENCE} looks, and where a budget ends.

{page(count())}

Before, every look asked: for what is not finite, for rows that are fooled, done or overtaken, and for empty slots. A
build sends the images and labels of a shard once, each stored perturbation once for all teachers, and fetches the
answers of a unit once; `tests/cache/builder/test_build.py` counts that.
"""


def main() -> int:
    argparse.ArgumentParser(description=__doc__.split("\n\n")[0]).parse_args()
    print(page(count()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
