"""Models that draw random numbers (Monte-Carlo dropout, noise layers), made fit to be attacked and judged.

An attack on one draw follows a gradient that the next draw does not have, and a judge of one draw calls luck robust.
Expectation over transformation (Athalye et al. 2018, arXiv 1707.07397) does both on the mean over several draws.
"""

import torch
from torch import Tensor, nn

from darht.attacks.objectives import Model
from darht.attacks.validate import is_random
from darht.core.errors import ConfigError
from darht.core.rng import borrowed_generator


class Expectation(nn.Module):
    """The mean of a random model's logits over several draws; its gradient is the mean of their gradients.

    Args:
        model: pixels `[B, 3, H, W]` to logits `[B, C]`, drawing from torch's global generator.
        samples: draws for each answer.

    Raises:
        ConfigError: fewer than one sample.
    """

    def __init__(self, model: Model, samples: int) -> None:
        super().__init__()
        if samples < 1:
            raise ConfigError(f"samples must be at least 1 draw; got {samples}")
        self.model, self.samples = model, samples
        if isinstance(model, nn.Module):
            self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        """Mean logits `[B, C]`."""
        return torch.stack([self.model(x) for _ in range(self.samples)]).mean(0)


def draws_random_numbers(model: Model, x: Tensor) -> bool:
    """Whether two answers to the same pixels `[B, 3, H, W]` differ by more than rounding."""
    with torch.no_grad(), borrowed_generator(0, "is it random"):
        return is_random(model(x), model(x))


def obeys_seed(model: Model, x: Tensor) -> bool:
    """Whether torch's seed fixes the answers to pixels `[B, 3, H, W]`; `os.urandom` does not obey it."""
    answers = []
    with torch.no_grad():
        for _ in range(2):
            with borrowed_generator(0, "is it seeded"):
                answers.append(model(x))
    return not is_random(*answers)
