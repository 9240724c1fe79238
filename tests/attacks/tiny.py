"""Tiny networks and generators for the tests of attacks."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from darht.attacks import APGD, APGDT, CW, FABT, FGSM, MIM, PGD, CWLinf, Square
from darht.core.rng import RowRng

SMALL = [
    PGD(eps=4, step=1, steps=6),
    PGD(eps=200, step=60, steps=6, norm="l2"),
    FGSM(eps=4),
    MIM(eps=4, steps=6),
    APGD(eps=4, steps=12),
    APGDT(eps=4, steps=8, targets=2),
    FABT(eps=4, steps=8, targets=2),
    CW(eps=300, steps=12, searches=2),
    CWLinf(eps=4, step=1, steps=6),
    Square(eps=4, queries=30),
    MIM(eps=200, step=60, steps=6, norm="l2"),
    APGD(eps=200, steps=12, norm="l2"),
    FABT(eps=200, steps=8, targets=2, norm="l2"),
    Square(eps=200, queries=30, norm="l2"),
]
NAMES = [f"{type(attack).__name__}-{attack.norm}" for attack in SMALL]


def rng(count: int, seed: int = 0, first: int = 0) -> RowRng:
    return RowRng.create(seed, "test", rows=torch.arange(first, first + count))


def library(name: str) -> Any:
    """An optional library; its own deprecation warnings at import are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


def images(count: int, side: int = 8, seed: int = 0) -> Tensor:
    noise = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), generator=noise).float() / 255


class Tiny(nn.Module):
    """A convolution, a batch normalisation with real statistics, and a linear layer."""

    def __init__(self, classes: int = 5, side: int = 8, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.bn = nn.BatchNorm2d(8)
        self.head = nn.Linear(8 * (side // 2) ** 2, classes)
        with torch.no_grad():
            self.bn.running_mean.uniform_(-0.5, 0.5)
            self.bn.running_var.uniform_(0.5, 2.0)
            self.head.weight.mul_(3.0)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bn(self.conv(x))).flatten(1))


def labelled(model: nn.Module, x: Tensor) -> Tensor:
    """The model's own answers as labels, so that every row is right when clean."""
    with torch.no_grad():
        return model(x).argmax(1)


class LinearModel(nn.Module):
    """`W x + b`, whose nearest boundary is known in closed form."""

    def __init__(self, classes: int = 4, side: int = 6, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(3 * side * side, classes))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def distance(self, x: Tensor, y: Tensor, norm: str) -> Tensor:
        """To the nearest boundary, ignoring the pixel range, `[B]` in pixels."""
        linear = self.net[1]
        with torch.no_grad():
            logits = self(x)
            gaps = logits.gather(1, y[:, None]) - logits
            normals = linear.weight[y][:, None] - linear.weight[None]
            sizes = normals.abs().sum(2) if norm == "linf" else normals.norm(dim=2)
            return torch.where(gaps > 0, gaps / sizes.clamp(min=1e-12), torch.inf).amin(1)


def double_net() -> tuple[nn.Module, Tensor, Tensor]:
    """A network, stored pixels and labels in float64, for comparisons of iterates."""
    model = Tiny().double()
    x = (images(6).double() * 255).round() / 255
    return model, x, labelled(model, x)
