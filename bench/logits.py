"""What codes of logits lose against dense ones: in nats, in the loss of a student and in its gradient; and their bytes.

    python bench/logits.py --images DIR --zoo DIR --out PAGE

Logits are those of linear discriminants (Fisher) on the features of a small ResNet that knows CIFAR-10: of the 200
classes of Tiny ImageNet, and of 1,000, each of these in five poses (as it is, turned by 90, 180 and 270 degrees, upside
down in its colours), so that classes resemble one another as in larger sets. They are sharpened until their mean
entropy is that of a confident teacher, 1 nat, or of an unsure one, 3 nats. The student is a discriminant of half the
images. What is measured are answers to images that neither was fitted to.
"""

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darht.cache.format.logit_codes import decode, encode_int8, encode_top
from darht.cache.sources.load import load_source

TEMPERATURES = (1.0, 4.0)
KEPT = (5, 10, 32)
HELD_OUT = 2000
FEATURES = 64
ENTROPIES = (1.0, 3.0)


class Code(NamedTuple):
    """One way to store an answer: its bytes, and what comes back."""

    name: str
    size: int
    logits: Tensor


def codes(logits: Tensor) -> Iterator[Code]:
    """Every code of answers `[n, C]`."""
    exact, classes = logits.numpy(), logits.shape[1]
    yield Code("float16", 2 * classes, logits.half().float())
    int8 = encode_int8(exact)
    yield Code("int8", classes + 8, torch.from_numpy(decode(*int8, classes)))
    for k in (*KEPT, (classes + 8 - 2) // 4):  # the last has the bytes of int8
        top = torch.from_numpy(decode(*encode_top(exact, k, "int16"), classes))
        yield Code(f"top-{k}", 4 * k + 2, top)


def losses(code: Code, exact: Tensor, student: Tensor, tau: float) -> tuple[float, float, float]:
    """KL(exact || code) in nats, KL(code || student) over KL(exact || student), and the gradient's relative error.

    The gradient of KL(p || softmax(s / tau)) for s is (softmax(s / tau) - p) / tau.
    """
    p, q, s = (F.log_softmax(z.double() / tau, dim=1) for z in (exact, code.logits, student))

    def kl(one: Tensor, other: Tensor) -> float:
        return float((one.exp() * (one - other)).sum(1).mean())

    wrong, right = (p.exp() - q.exp()).norm(dim=1), (s.exp() - p.exp()).norm(dim=1)
    return kl(p, q), kl(q, s) / kl(p, s), float((wrong / right).mean())


def poses(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """200 classes as 1,000."""
    turned = [images, *(images.rot90(k, (2, 3)) for k in (1, 2, 3)), 255 - images]
    return torch.cat(turned), torch.cat([labels * 5 + pose for pose in range(5)])


@torch.no_grad()
def features(net: nn.Module, images: Tensor) -> Tensor:
    """What the last linear layer of a network is given, `[n, D]`."""
    seen: list[Tensor] = []
    head = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
    handle = head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    for part in images.split(250):
        net(part.float() / 255)
    handle.remove()
    return torch.cat(seen).double()


def discriminant(x: Tensor, y: Tensor, classes: int, asked: Tensor) -> Tensor:
    """Logits `[m, C]` of normal classes with one covariance, fitted to features `[n, D]`."""
    means = torch.stack([x[y == label].mean(0) for label in range(classes)])
    spread = (x - means[y]).T @ (x - means[y]) / len(x)
    spread += 0.05 * spread.diagonal().mean() * torch.eye(x.shape[1])
    weights = torch.linalg.solve(spread, means.T)
    logits = asked @ weights - (means.T * weights).sum(0) / 2
    return (logits - logits.mean(1, keepdim=True)).float()


def sharpened(logits: Tensor, nats: float) -> Tensor:
    """Logits times the factor that gives their softmax a mean entropy of so many nats, by bisection."""
    low, high = 0.0, 64.0
    for _ in range(40):
        factor = (low + high) / 2
        p = F.log_softmax(logits * factor, dim=1)
        low, high = (factor, high) if -float((p.exp() * p).sum(1).mean()) > nats else (low, factor)
    return logits * factor


def tables(net: nn.Module, images: Tensor, labels: Tensor, classes: int) -> Iterator[str]:
    """Lines of one task, `images` in random order."""
    unseen = slice(0, HELD_OUT), slice(HELD_OUT, None), slice(HELD_OUT, None, 2)
    shown, truth = poses(images, labels) if classes == 1000 else (images, labels)
    x = features(net, shown).view(-1, len(images), FEATURES)  # [poses, n, D]
    y = truth.view(-1, len(images))

    def part(rows: slice) -> tuple[Tensor, Tensor]:
        return x[:, rows].reshape(-1, FEATURES), y[:, rows].reshape(-1)

    asked, answer = part(unseen[0])
    teacher, student = (discriminant(*part(rows), classes, asked) for rows in unseen[1:])
    right = 100 * float((teacher.argmax(1) == answer).float().mean())
    for nats in ENTROPIES:
        yield f"\nC = {classes:,}, {right:.1f} % right, mean entropy {nats:g} nat"
        exact, said = sharpened(teacher, nats), sharpened(student, nats)
        for code in codes(exact):
            found = [losses(code, exact, said, tau) for tau in TEMPERATURES]
            cells = " | ".join(f"{loss:.2g} | {ratio:.3f} | {wrong:.2g}" for loss, ratio, wrong in found)
            yield f"| {code.name} | {code.size:,} | {cells} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=Path, required=True, help="holds tiny-imagenet-200")
    parser.add_argument("--zoo", type=Path, required=True, help="holds zoo.py")
    parser.add_argument("--out", type=Path, help="write the tables here")
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.zoo))
    net = importlib.import_module("zoo").load("resnet8_mlperf")
    source = load_source("tiny-imagenet", arguments.images, "test")
    order = np.random.default_rng(0).permutation(len(source.images))
    images = F.avg_pool2d(torch.from_numpy(source.images[order]).float(), 2).to(torch.uint8)
    labels = torch.from_numpy(source.labels[order]).long()
    lines = []
    for classes in (200, 1000):
        for line in tables(net, images, labels, classes):
            print(line, flush=True)
            lines.append(line)
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
