"""Models whose answers are known, and models that only look robust; `python:frauds:NAME` builds one."""

import os

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


SEEN = []


class Remembers(Around):
    """Repeats its first answer to anything within 30/255 of an image it has seen, with the bare model's gradient."""

    def __init__(self, seen=None):
        super().__init__()
        self.seen = [] if seen is None else seen

    def forward(self, x):
        z = self.net(x)
        said = []
        for pixels, answer in zip(x.detach(), z.detach(), strict=True):
            if self.seen:
                far, at = (torch.stack([image for image, _ in self.seen]) - pixels).abs().amax((1, 2, 3)).min(0)
                if far <= 30 / 255:
                    said.append(self.seen[int(at)][1])
                    continue
            self.seen.append((pixels.clone(), answer.clone()))
            said.append(answer)
        return torch.stack(said) + (z - z.detach())


class Global(Remembers):
    """What it remembers lies outside of the object."""

    def forward(self, x):
        self.seen = SEEN
        return super().forward(x)

    def __deepcopy__(self, memo):
        return type(self)()


def batch_statistics():
    """Normalises over its batch in eval mode."""
    return Around(after=lambda z: torch.nn.functional.batch_norm(z, None, None, training=True) if len(z) > 1 else z)


def dull_without_gradients():
    return Around(before=lambda x: x if torch.is_grad_enabled() else (x * 2).round() / 2)


def by_place():
    return Around(after=lambda z: z + 50 * torch.eye(10)[torch.arange(len(z)) % 10])


def entropy():
    """Noise that no seed fixes."""

    def noise(x):
        words = np.frombuffer(os.urandom(x.numel()), dtype=np.uint8).reshape(x.shape).astype(np.float32)
        return x + 0.5 * (torch.from_numpy(words) / 255 - 0.5)

    return Around(before=noise)


class Turned(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return -gradient


def turned():
    """Its gradient points the other way."""
    return Around(before=Turned.apply)


def constant():
    return Around(after=lambda z: 0 * z + torch.eye(10)[3])


def thermometer():
    return Around(before=lambda x: torch.stack([(x > k / 8).float() for k in range(8)]).mean(0))


def low_confidence():
    return Around(after=lambda z: z / 100)


def half():
    """In bfloat16, as networks of a GPU are served."""
    return Around(before=lambda x: x.bfloat16().float(), after=lambda z: z.bfloat16().float())
