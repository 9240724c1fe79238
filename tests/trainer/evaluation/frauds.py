"""Models whose answers are known, and models that only look robust; `python:frauds:NAME` builds one."""

import numpy as np
import torch
from torch import nn

from darht.cache.sources.load import Source

THRESHOLD = 127.5
HONEST: nn.Module | None = None  # set by the fixture `sound`


class Brightness(nn.Module):
    """Class 1 above the middle grey, by a margin that grows with the mean level."""

    def forward(self, x):
        margin = (x.flatten(1).mean(1) * 255 - THRESHOLD) * 0.1
        return torch.stack([-margin, margin], dim=1)


def greys(values):
    images = np.repeat(values.astype(np.uint8), 3 * 4 * 4).reshape(-1, 3, 4, 4)
    labels = (values > THRESHOLD).astype(np.int64)
    labels[-1] = 0
    return Source("npz", "test", images, labels, ("dark", "bright"), "0" * 64)


class Around(nn.Module):
    """The honest model with something done to its input and its logits."""

    def __init__(self, before=lambda x: x, after=lambda z: z):
        super().__init__()
        self.net, self.before, self.after = HONEST, before, after
        self.eval()

    def forward(self, x):
        return self.after(self.net(self.before(x)))


def honest():
    return Around()


def quantised():
    """Rounding has a gradient of zero: attacks that follow it stand still."""
    return Around(before=lambda x: (x * 8).round() / 8)


def detached():
    """No gradient reaches the pixels at all."""
    return Around(before=lambda x: x.detach())


def noisy():
    """Every answer is another one."""
    return Around(before=lambda x: x + 0.3 * torch.randn_like(x))


def scaled():
    """The softmax of these logits is 0 or 1 in float32, so that cross-entropy has no gradient where they are right."""
    return Around(after=lambda z: z * 1e4)


def probabilities():
    return Around(after=lambda z: z.softmax(1))


def one_logit():
    return Around(after=lambda z: z[:, 0])


def never():
    """Names the least likely class."""
    return Around(after=lambda z: -z)


def no_network():
    return greys(np.array([1, 2]))


def answers_in_words():
    return Around(after=lambda z: {"logits": z})
