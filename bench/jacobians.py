"""What first-order answers lose where Jacobians are stored at half or quarter resolution, or of the margin alone.

    python bench/jacobians.py --data DIR --zoo DIR --out PAGE

Teachers are adversarially trained networks on CIFAR-10, examples those of PGD-10 at 8/255 on another network. At half
resolution a Jacobian holds the mean of each gradient over 2x2 pixels, and stands for all four of them. That of the
margin is the gradient of the label's logit minus the strongest other's; half of its change goes to either. Printed are
the nats of KL from the live teacher's answer, how often the argmax is its own, and the bytes of a row.
"""

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darht.attacks import PGD
from darht.cache.builder.jacobian import jacobian_rows
from darht.cache.sources.load import load_source

TEACHERS, STUDENT = ("resnet4b_adv", "resnet2b_adv", "cnn_a_mix"), "resnet8_mlperf"
CLASSES, LEVELS = 10, 255


def coarse(slopes: Tensor, side: int) -> Tensor:
    """Gradients `[B, K, 3, H, W]` as their means over squares of pixels."""
    flat = F.avg_pool2d(slopes.flatten(0, 1), side)
    return F.interpolate(flat, scale_factor=side, mode="nearest").view_as(slopes)


def answers(model: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor) -> Iterator[tuple[str, Tensor, float]]:
    """What each way says about `x_adv`: its name, logits `[B, C]`, and integers for each pixel and channel."""
    values, scales, _ = jacobian_rows(model, x, y, CLASSES)
    slopes, delta = values.float() * scales[..., None, None, None], (x_adv - x) * LEVELS
    with torch.no_grad():
        clean = model(x)
    yield "the clean answer", clean, 0
    for name, side in (("whole", 1), ("half", 2), ("quarter", 4)):
        yield name, clean + (coarse(slopes, side) * delta[:, None]).flatten(2).sum(2), CLASSES / side**2
    other = clean.scatter(1, y[:, None], -torch.inf).argmax(1)
    rows = torch.arange(len(y))
    change = ((slopes[rows, y] - slopes[rows, other]) * delta).flatten(1).sum(1) / 2
    moved = clean.clone()
    moved[rows, y] += change
    moved[rows, other] -= change
    yield "of the margin", moved, 1


def tables(arguments: argparse.Namespace) -> Iterator[str]:
    """A line for each teacher and way."""
    sys.path.insert(0, str(arguments.zoo))
    zoo = importlib.import_module("zoo")
    source = load_source("cifar10", arguments.data, "test", limit=arguments.images)
    x, y = torch.from_numpy(source.images).float() / LEVELS, torch.from_numpy(source.labels).long()
    x_adv = PGD(eps=8, step=2, steps=10)(zoo.load(STUDENT), x, y)
    yield "| teacher | Jacobian | nats | same argmax % | kB a row at 32 | at 224 |"
    yield "|---|---|---|---|---|---|"
    for name in TEACHERS:
        model = zoo.load(name)
        with torch.no_grad():
            live = model(x_adv)
        for way, said, share in answers(model, x, y, x_adv):
            nats = F.kl_div(F.log_softmax(said, 1), F.log_softmax(live, 1), log_target=True, reduction="batchmean")
            same = 100 * float((said.argmax(1) == live.argmax(1)).float().mean())
            sizes = " | ".join(f"{share * 3 * side**2 / 1e3:,.1f}" for side in (32, 224))
            yield f"| {name} | {way} | {float(nats):.2g} | {same:.1f} | {sizes} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="holds cifar-10-batches-py")
    parser.add_argument("--zoo", type=Path, required=True, help="holds zoo.py")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--out", type=Path, help="write the table here")
    arguments = parser.parse_args()
    lines = []
    for line in tables(arguments):
        print(line, flush=True)
        lines.append(line)
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
