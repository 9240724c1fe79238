"""A substitute network trained from a model's answers alone (Papernot et al. 2017; Mahmood et al. 2020).

The attacker holds a share of the training images and may ask the model for their class. In rounds the substitute is
trained on what was asked so far, and new images are made on it: each image moves a little along the sign of the
substitute's own gradient for its class (Jacobian-based augmentation), so that the next questions lie near the boundary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from darht.attacks.objectives import input_gradient
from darht.cache.sources.load import Source
from darht.core.config import to_plain
from darht.core.errors import ConfigError
from darht.core.keys import derive_seed
from darht.core.nets import build
from darht.core.rng import borrowed_generator

_BATCH = 128


@dataclass(frozen=True)
class Substitution:
    """The adaptive black-box attack's settings.

    Attributes:
        shares: of the training images that the attacker holds; the paper's 1, 25, 50, 75 and 100 %.
        rounds: of training and augmentation; each but the last doubles the questions.
        epochs: of each round.
        step: of the augmentation, in pixels of [0, 1]; the paper's lambda.
        lr: of Adam.
        width: of the substitute, a ResNet-18 in CIFAR form; 64 is its full width.
        most: images that a round may train on, the first one too, so that a CPU ends; a seeded choice is kept.
    """

    shares: tuple[float, ...] = (0.01, 0.25, 0.5, 0.75, 1.0)
    rounds: int = 4
    epochs: int = 10
    step: float = 0.1
    lr: float = 1e-3
    width: int = 16
    most: int = 50_000

    def __post_init__(self) -> None:
        if not self.shares or not all(0 < share <= 1 for share in self.shares):
            raise ConfigError(f"shares of the training data lie in (0, 1]; got {list(self.shares)}")
        if len(set(self.shares)) < len(self.shares):
            raise ConfigError(f"shares of the training data must differ; got {list(self.shares)}")
        if min(self.rounds, self.epochs, self.most, self.width) < 1:
            raise ConfigError("rounds, epochs, width and most of the substitute must be at least 1")

    def record(self, share: float, rows: int) -> dict[str, Any]:
        """The settings of one share, as they stand in the report."""
        plain = {key: value for key, value in to_plain(self).items() if key != "shares"}
        return {**plain, "share": share, "training_images": self.images(share, rows)}

    def images(self, share: float, rows: int) -> int:
        """How many training images the first round trains on: the attacker's share, at least one, at most `most`."""
        return min(self.most, max(1, round(share * rows)))

    def network(self, classes: int) -> nn.Module:
        """A substitute with fresh weights."""
        return build("resnet18", classes, {"width": self.width})

    def load(self, state: Mapping[str, np.ndarray], classes: int, device: torch.device) -> nn.Module:
        """A trained substitute, frozen, in eval mode."""
        with borrowed_generator(0, "load"):
            net = self.network(classes)
        net.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in state.items()})
        return net.to(device).eval().requires_grad_(False)


def label_by_asking(answers: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The class that the model names, and nothing else, int64 `[B]`."""
    return answers(x).argmax(1)


def train_substitute(
    config: Substitution,
    train: Source,
    share: float,
    ask: Callable[[Tensor], Tensor],
    *,
    seed: int,
    device: torch.device,
    on_epoch: Callable[[], None] = lambda: None,
) -> nn.Module:
    """Train a substitute.

    Args:
        config: rounds and schedule.
        train: the training split; its labels are not looked at.
        share: of its images that the attacker holds.
        ask: pixels to the evaluated model's classes.
        seed: of the choice of images, the weights and the order.
        device: where to train.
        on_epoch: told after each epoch.

    Returns:
        The network in eval mode.
    """  # fmt: skip
    chosen = _chosen(len(train.images), config.images(share, len(train.images)), seed, "share")
    x = torch.from_numpy(train.images[chosen]).to(device).float() / 255
    with borrowed_generator(seed, "substitute", share):
        net = config.network(len(train.classes)).to(device)
        optimizer = torch.optim.Adam(net.parameters(), lr=config.lr)
        y = _asked(ask, x)
        for round_ in range(config.rounds):
            for _ in range(config.epochs):
                _epoch(net, optimizer, x, y)
                on_epoch()
            if round_ + 1 < config.rounds:
                fresh = _augmented(net, x, y, config.step)
                x, y = torch.cat([x, fresh]), torch.cat([y, _asked(ask, fresh)])
                kept = torch.from_numpy(_chosen(len(x), min(len(x), config.most), seed, round_)).to(device)
                x, y = x[kept], y[kept]
    return net.eval().requires_grad_(False)


def _chosen(count: int, wanted: int, seed: int, purpose: object) -> np.ndarray:
    order = np.random.Generator(np.random.Philox(derive_seed(seed, "substitute", purpose))).permutation(count)
    return np.sort(order[:wanted])


def _asked(ask: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([ask(part) for part in x.split(_BATCH)])


def _epoch(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    net.train()
    for rows in torch.randperm(len(x)).to(x.device).split(_BATCH):
        if len(rows) > 1:  # one image alone has no batch statistics
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()


def _augmented(net: nn.Module, x: Tensor, y: Tensor, step: float) -> Tensor:
    net.eval()
    parts = []
    for rows in torch.arange(len(x), device=x.device).split(_BATCH):
        gradient = input_gradient(partial(_own_logit, net, y[rows]), x[rows])
        parts.append((x[rows] + step * gradient.sign()).clamp(0.0, 1.0))
    return torch.cat(parts)


def _own_logit(net: nn.Module, y: Tensor, z: Tensor) -> Tensor:
    logits: Tensor = net(z)
    return logits.gather(1, y[:, None]).squeeze(1)
