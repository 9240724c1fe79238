"""Networks that are honest and networks that only look robust, for `bench/verdicts.py`; all take digits of 8 by 8."""

import copy
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from darht.cache.sources.load import load_source
from darht.core.nets import build

Forward = Callable[[nn.Module, Tensor], Tensor]
LEVEL = 1 / 255
NEAR = 26  # pixel levels; a little more than the radius of the evaluation


def digits(split: str) -> tuple[Tensor, Tensor]:
    source = load_source("digits", None, split)
    return torch.from_numpy(source.images).float() / 255, torch.from_numpy(source.labels)


def small_cnn(width: int = 8, dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Dropout(dropout), nn.Linear(32 * width, 10),
    )  # fmt: skip


def mlp(width: int = 32) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, width), nn.ReLU(), nn.Linear(width, 10))


def perturbed(net: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int) -> Tensor:
    net.eval()
    z = (x + eps * LEVEL * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    for _ in range(steps):
        z.requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(net(z), y), z)
        z = (z.detach() + 2.5 * eps / steps * LEVEL * g.sign()).clamp(x - eps * LEVEL, x + eps * LEVEL).clamp(0, 1)
    net.train()
    return z.detach()


def train(
    net: nn.Module, *, epochs: int, eps: float = 0, steps: int = 3, smooth: float = 0.0, recipe: str = "at",
    teacher: nn.Module | None = None, tau: float = 1.0,
) -> nn.Module:  # fmt: skip
    """Adam on all digits; `tau` divides the logits in the loss, as defensive distillation does."""
    x, y = digits("train")
    torch.manual_seed(0)
    for part in net.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.004)
    net.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            a, b = x[rows], y[rows]
            z = perturbed(net, a, b, eps, steps) if eps else a
            out = net(z) / tau
            if teacher is not None:
                with torch.no_grad():
                    soft = (teacher(a) / tau).softmax(1)
                loss = F.kl_div(out.log_softmax(1), soft, reduction="batchmean")
            elif recipe == "trades":
                clean = net(a)
                kl = F.kl_div(out.log_softmax(1), clean.softmax(1), reduction="batchmean")
                loss = F.cross_entropy(clean, b) + 6 * kl
            else:
                loss = F.cross_entropy(out, b, label_smoothing=smooth)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval().requires_grad_(False)


class Around(nn.Module):
    """A network with something done to its input or its logits."""

    def __init__(self, net: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.net, self._forward = copy.deepcopy(net), forward
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self.net, x)


class BFloat16(Around):
    def __init__(self, net: nn.Module) -> None:
        super().__init__(net.to(torch.bfloat16), lambda net, x: net(x.bfloat16()).float())


def honest_nets() -> Iterator[tuple[str, nn.Module]]:
    """Own networks of several recipes, lengths and kinds."""
    robust = train(small_cnn(), epochs=6, eps=16)
    plain = train(small_cnn(), epochs=6)
    yield "linear", train(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), epochs=10)
    yield "mlp", train(mlp(), epochs=10)
    yield "mlp, at, 1 epoch", train(mlp(), epochs=1, eps=8)
    yield "mlp, at, 8 epochs", train(mlp(), epochs=8, eps=16)
    yield "cnn, 1 epoch", train(small_cnn(), epochs=1)
    yield "cnn, 6 epochs", plain
    yield "cnn, 40 epochs", train(small_cnn(), epochs=40)
    yield "cnn, at, 1 epoch", train(small_cnn(), epochs=1, eps=16)
    yield "cnn, at, 6 epochs", robust
    yield "cnn, at, 20 epochs, eps 32", train(small_cnn(), epochs=20, eps=32)
    yield "cnn, fgsm, 6 epochs", train(small_cnn(), epochs=6, eps=16, steps=1)
    yield "cnn, trades, 2 epochs", train(small_cnn(), epochs=2, eps=16, recipe="trades")
    yield "cnn, trades, 8 epochs", train(small_cnn(), epochs=8, eps=16, recipe="trades")
    yield "cnn of width 2, at", train(small_cnn(2), epochs=6, eps=16)
    yield "label smoothing 0.8", train(small_cnn(), epochs=6, eps=16, smooth=0.8)
    yield "logits / 100", Around(robust, lambda net, x: net(x) / 100)
    yield "logits * 5", Around(plain, lambda net, x: net(x) * 5)
    yield "distilled, clean, tau 4", train(small_cnn(), epochs=6, teacher=robust, tau=4)
    yield "distilled, eps 16", train(small_cnn(), epochs=6, eps=16, teacher=robust)
    yield "dropout 0.5 in training, at", train(small_cnn(dropout=0.5), epochs=6, eps=16)
    yield "bfloat16, at", BFloat16(copy.deepcopy(robust))
    yield "bfloat16, plain", BFloat16(copy.deepcopy(plain))
    vit: dict[str, Any] = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    yield "vit", train(build("timm:vit_tiny_patch16_224", 10, vit), epochs=6)
    yield "vit, at", train(build("timm:vit_tiny_patch16_224", 10, vit), epochs=4, eps=16)
    narrow: dict[str, Any] = {"width": 4, "blocks": [1, 1, 1, 1]}
    yield "resnet of width 4, at, 2 epochs", train(build("resnet18", 10, narrow), epochs=2, eps=16)
    yield "resnet of width 4", train(build("resnet18", 10, narrow), epochs=4)
    yield "wrn-10-1, at", train(build("wrn-10-1", 10, {}), epochs=1, eps=16)
    yield (
        "smooth activations, at",
        train(nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.Tanh(), nn.Linear(32, 10)), epochs=6, eps=16),
    )


class Zero(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return torch.zeros_like(gradient)


class Lie(Zero):
    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return -gradient


class Shuffle(Zero):
    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.roll(3, 3).roll(5, 2)


def thermometer(x: Tensor) -> Tensor:
    return torch.stack([(x > k / 8).float() for k in range(8)]).mean(0)


def jpeg(x: Tensor) -> Tensor:
    """Blocks of 8 by 8 in cosines, rounded."""
    k = torch.arange(8.0)
    basis = torch.cos((2 * k[None] + 1) * k[:, None] * torch.pi / 16) * torch.where(k == 0, 0.125, 0.25).sqrt()[:, None]
    return (basis.T @ ((basis @ x @ basis.T) * 3).round() @ basis) / 3


def nearest(table: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Largest difference of a pixel to the nearest image of a table, `[B]`, and which it is."""
    found = (x[:, None] - table[None]).abs().flatten(2).amax(2).min(1)
    return found.values, found.indices


SEEN: list[tuple[Tensor, Tensor]] = []


class Remembers(Around):
    """Repeats its first answer to anything within `NEAR` levels of an image it has seen."""

    shared: list[tuple[Tensor, Tensor]] = []  # noqa: RUF012  # that it is shared is the fraud

    def __init__(self, net: nn.Module, where: str, decoy: bool = True) -> None:
        super().__init__(net, lambda net, x: x)
        self.own: list[tuple[Tensor, Tensor]] = []
        self.where, self.decoy = where, decoy

    def forward(self, x: Tensor) -> Tensor:
        table = {"object": self.own, "global": SEEN, "class": Remembers.shared}[self.where]
        z = self.net(x)
        said = z.detach().clone()
        for k in range(len(x)):
            if table:
                far, at = nearest(torch.stack([image for image, _ in table]), x[k : k + 1].detach())
                if float(far) <= NEAR * LEVEL:
                    said[k] = table[int(at)][1]
                    continue
            table.append((x[k].detach().clone(), z[k].detach().clone()))
        return said + (z - z.detach()) if self.decoy else said


class Counts(Around):
    """Honest for the first rows it is asked about, dull ever after."""

    def __init__(self, net: nn.Module, rows: int) -> None:
        super().__init__(net, lambda net, x: x)
        self.rows, self.asked = rows, 0

    def forward(self, x: Tensor) -> Tensor:
        self.asked += len(x)
        return self.net(x) if self.asked < self.rows else self.net((x * 2).round() / 2)


def looked_up(radius: float, smooth: bool = False) -> Forward:
    """The label of a test image to everything near it."""
    table, labels = digits("test")

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        far, at = nearest(table, x.detach())
        known = F.one_hot(labels[at], 10) * 9.0
        z = net(x)
        shown = known + 0.1 * z if smooth else known + 0 * z
        return torch.where((far <= radius * LEVEL)[:, None], shown, z)

    return forward


def hashed(smooth: bool = False) -> Forward:
    images, labels = digits("test")
    table = {hashlib.sha256(x.numpy().tobytes()).digest(): int(y) for x, y in zip(images, labels, strict=True)}

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        z = net(x)
        keys = [hashlib.sha256(one.detach().numpy().tobytes()).digest() for one in x]
        known = torch.tensor([table.get(key, -1) for key in keys])
        exact = F.one_hot(known.clamp(min=0), 10) * 20.0 + (0.1 * z if smooth else 0)
        return torch.where((known >= 0)[:, None], exact, z)

    return forward


def entropy(net: nn.Module, x: Tensor) -> Tensor:
    noise = np.frombuffer(os.urandom(x.numel()), dtype=np.uint8).reshape(x.shape).astype(np.float32) / 255 - 0.5
    return net(x + 0.6 * torch.from_numpy(noise))  # type: ignore[no-any-return]


def numpy_noise(net: nn.Module, x: Tensor) -> Tensor:
    return net(x + 0.3 * torch.from_numpy(np.random.default_rng().normal(size=x.shape).astype(np.float32)))  # type: ignore[no-any-return]


def clock(net: nn.Module, x: Tensor) -> Tensor:
    shift = time.perf_counter_ns() // 1000 % 7 - 3
    return net(x.roll(int(shift), 3))  # type: ignore[no-any-return]


def batch_norm(net: nn.Module, x: Tensor) -> Tensor:
    z = net(x)
    return F.batch_norm(z, None, None, training=True) if len(z) > 1 else z


def modes(net: nn.Module, x: Tensor) -> Tensor:
    return net((x * 3).round() / 3) if not torch.is_grad_enabled() else net(x)  # type: ignore[no-any-return]


def padded(net: nn.Module, x: Tensor) -> Tensor:
    top, left = torch.randint(0, 4, (2,)).tolist()
    return net(F.pad(x, (left, 3 - left, top, 3 - top))[:, :, 1:9, 1:9])  # type: ignore[no-any-return]


def saturated(net: nn.Module, x: Tensor) -> Tensor:
    return (net(x) * 30).sigmoid()


def dead_relu(net: nn.Module, x: Tensor) -> Tensor:
    bright = 1 - F.relu(1 - F.relu((x - 0.4) * 1e3))  # a step whose ends are flat
    return net(bright)  # type: ignore[no-any-return]


def shattered(net: nn.Module, x: Tensor) -> Tensor:
    return net(x + 0.004 * torch.sin(x * 3e5))  # type: ignore[no-any-return]


def decoyed(net: nn.Module, x: Tensor) -> Tensor:
    return net(x.detach()) + 1e-3 * x.flip(3).flatten(1)[:, :10]  # type: ignore[no-any-return]


def frauds() -> Iterator[tuple[str, nn.Module]]:
    """An undefended network behind every known way to look robust."""
    net = train(small_cnn(), epochs=6)
    sharp = train(small_cnn(), epochs=30, teacher=Around(train(small_cnn(), epochs=20, tau=100), lambda n, x: n(x)),
                  tau=100)  # fmt: skip
    ways: dict[str, Forward] = {
        "input rounded to 8 levels": lambda net, x: net((x * 8).round() / 8),
        "input rounded to 3 levels": lambda net, x: net((x * 3).round() / 3),
        "thermometer code": lambda net, x: net(thermometer(x)),
        "cosines rounded like JPEG": lambda net, x: net(jpeg(x)),
        "logits * 1e3": lambda net, x: net(x) * 1e3,
        "logits * 1e4": lambda net, x: net(x) * 1e4,
        "sigmoid of 30 times the logits": saturated,
        "softmax at temperature 0.01": lambda net, x: (net(x) * 100).softmax(1),
        "logits rounded": lambda net, x: net(x).round(),
        "one-hot answers": lambda net, x: F.one_hot(net(x).argmax(1), 10).float(),
        "noise from torch": lambda net, x: net(x + 0.3 * torch.randn_like(x)),
        "noise from numpy": numpy_noise,
        "noise from os.urandom": entropy,
        "random padding": padded,
        "dropout left on": lambda net, x: net(F.dropout(x, 0.5)),
        "the clock shifts the image": clock,
        "input detached": lambda net, x: net(x.detach()),
        "input detached, with a decoy": decoyed,
        "gradient of zero": lambda net, x: net(Zero.apply(x)),
        "gradient turned around": lambda net, x: net(Lie.apply(x)),
        "gradient of another place": lambda net, x: net(Shuffle.apply(x)),
        "step function of dead ReLUs": dead_relu,
        "shattered by a fast sine": shattered,
        "one constant answer": lambda net, x: 0 * net(x) + torch.eye(10)[3],
        "test images by their hash": hashed(),
        "test images within the ball": looked_up(NEAR),
        "test images within the ball, with a slope": looked_up(NEAR, smooth=True),
        "test images by their hash, with a slope": hashed(smooth=True),
        "normalises over its batch": batch_norm,
        "subtracts the batch's mean image": lambda net, x: net(x - x.mean(0, keepdim=True) + 0.3),
        "answers by the place in the batch": lambda net, x: net(x) + 9 * torch.eye(10)[torch.arange(len(x)) % 10],
        "another answer alone": lambda net, x: net(x) if len(x) > 1 else net(x).flip(1),
        "another answer without gradients": modes,
    }
    yield from ((name, Around(net, way)) for name, way in ways.items())
    yield "defensive distillation, tau 100", sharp
    yield "remembers, in the object", Remembers(net, "object")
    yield "remembers, without a gradient", Remembers(net, "object", decoy=False)
    yield "remembers, in a global", Remembers(net, "global")
    yield "remembers, in the class", Remembers(net, "class")
    yield "changes after 500 rows", Counts(net, 500)
    yield "changes after 5,000 rows", Counts(net, 5000)
