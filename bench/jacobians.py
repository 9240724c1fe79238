"""What first-order answers lose where Jacobians are stored at half or quarter resolution, or of the margin alone.

    python bench/jacobians.py --data DIR --zoo DIR --out PAGE
    python bench/jacobians.py --source imagefolder --data DIR --eps 4 --teacher resnet=OUT/teachers/resnet
        --teacher vit=OUT/teachers/vit --attacked OUT/run/no-teachers --out PAGE

Teachers are adversarially trained networks, of CIFAR-10 those of the zoo in `--zoo`; on Tiny ImageNet those that
`recipes/tiny-imagenet-small.yaml` left in OUT. Examples are those of PGD-10 on another network. A Jacobian has rows for
the label and the teacher's strongest other classes, `--classes` of them. At half resolution it holds the mean of each
gradient over 2x2 pixels, and stands for all four of them. That of the margin is the gradient of the label's logit minus
the strongest other's; half of its change goes to either. Printed are the nats of KL from the live teacher's answer, how
often the argmax is its own, and the bytes of a row.
"""

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darht.attacks import PGD
from darht.cache.builder.jacobian import jacobian_rows
from darht.cache.builder.teachers import load_teacher
from darht.cache.sources.load import load_source
from darht.core.cli import named_folders

TEACHERS, STUDENT = ("resnet4b_adv", "resnet2b_adv", "cnn_a_mix"), "resnet8_mlperf"
LEVELS, LARGE = 255, 224


def coarse(slopes: Tensor, side: int) -> Tensor:
    """Gradients `[B, K, 3, H, W]` as their means over squares of pixels."""
    flat = F.avg_pool2d(slopes.flatten(0, 1), side)
    return F.interpolate(flat, scale_factor=side, mode="nearest").view_as(slopes)


def answers(model: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, classes: int) -> Iterator[tuple[str, Tensor, float]]:
    """What each way says about `x_adv`: its name, logits `[B, C]`, and integers for each pixel and channel."""
    values, scales, chosen = jacobian_rows(model, x, y, classes)
    slopes, delta, at = values.float() * scales[..., None, None, None], (x_adv - x) * LEVELS, chosen.long()
    with torch.no_grad():
        clean = model(x)
    yield "the clean answer", clean, 0
    for name, side in (("whole", 1), ("half", 2), ("quarter", 4)):
        change = (coarse(slopes, side) * delta[:, None]).flatten(2).sum(2)
        yield name, clean.scatter_add(1, at, change), classes / side**2
    other, rows = clean.scatter(1, y[:, None], -torch.inf).argmax(1), torch.arange(len(y))
    first, second = (slopes[rows, (at == wanted[:, None]).int().argmax(1)] for wanted in (y, other))
    change = ((first - second) * delta).flatten(1).sum(1) / 2
    moved = clean.clone()
    moved[rows, y] += change
    moved[rows, other] -= change
    yield "of the margin", moved, 1


def networks(arguments: argparse.Namespace) -> tuple[dict[str, nn.Module], nn.Module]:
    """The teachers by name, and the network that is attacked."""
    if arguments.teacher:
        device = torch.device("cpu")
        folders = named_folders(tuple(arguments.teacher))
        teachers: dict[str, nn.Module] = {name: load_teacher(at, device)[0] for name, at in folders.items()}
        return teachers, load_teacher(arguments.attacked, device)[0]
    sys.path.insert(0, str(arguments.zoo))
    zoo = importlib.import_module("zoo")
    return {name: zoo.load(name) for name in TEACHERS}, zoo.load(STUDENT)


def tables(arguments: argparse.Namespace) -> Iterator[str]:
    """A line for each teacher and way."""
    teachers, attacked = networks(arguments)
    source = load_source(arguments.source, arguments.data, "test")
    rows = np.arange(arguments.images)
    if len(np.unique(source.labels[rows])) < len(source.classes):  # sorted by class
        rows = np.linspace(0, len(source.labels) - 1, arguments.images).astype(np.int64)
    x, y = torch.from_numpy(source.images[rows]).float() / LEVELS, torch.from_numpy(source.labels[rows]).long()
    x_adv = PGD(eps=arguments.eps, step=max(1.0, arguments.eps // 4), steps=10)(attacked, x, y)
    sides = x.shape[-1], LARGE
    yield f"| teacher | Jacobian | nats | same argmax % | kB a row at {sides[0]} | at {sides[1]} |"
    yield "|---|---|---|---|---|---|"
    for name, model in teachers.items():
        with torch.no_grad():
            live = model(x_adv)
        for way, said, share in answers(model, x, y, x_adv, arguments.classes):
            nats = F.kl_div(F.log_softmax(said, 1), F.log_softmax(live, 1), log_target=True, reduction="batchmean")
            same = 100 * float((said.argmax(1) == live.argmax(1)).float().mean())
            sizes = " | ".join(f"{share * 3 * side**2 / 1e3:,.1f}" for side in sides)
            yield f"| {name} | {way} | {float(nats):.2g} | {same:.1f} | {sizes} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--source", default="cifar10", help="one of darht's sources")
    parser.add_argument("--data", type=Path, required=True, help="where its files lie")
    parser.add_argument("--zoo", type=Path, help="holds zoo.py, of CIFAR-10")
    parser.add_argument("--teacher", action="append", default=[], metavar="NAME=FOLDER", help="in place of the zoo's")
    parser.add_argument("--attacked", type=Path, help="folder of the network that examples are made on; with --teacher")
    parser.add_argument("--eps", type=float, default=8)
    parser.add_argument("--classes", type=int, default=10, help="rows of a Jacobian")
    parser.add_argument(
        "--images", type=int, default=500, help="the first so many, evenly spaced where some class is not among them"
    )
    parser.add_argument("--out", type=Path, help="write the table here")
    arguments = parser.parse_args()
    if (not arguments.teacher and arguments.zoo is None) or bool(arguments.teacher) != bool(arguments.attacked):
        parser.error("give --zoo DIR, or --teacher NAME=FOLDER with --attacked FOLDER")
    lines = []
    for line in tables(arguments):
        print(line, flush=True)
        lines.append(line)
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
