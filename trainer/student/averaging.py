"""The mean of a student's weights over a run: what decides it when the recipe does not, and one fused update a step."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from darht.trainer.config import AverageConfig
from darht.trainer.student.step import Recipe

DECAY = 0.9995  # the most: what the field uses in runs of 100,000 steps, a horizon of 2,000 of them
SPAN = 20  # a run is as long as this many horizons of its mean; 10 to 40 do alike: docs/usage.md

Tensors = list[Tensor] | tuple[Tensor, ...]
Update = Callable[[Tensors, Tensors, Tensor | int], None]


def default_average(recipe: Recipe, steps: int) -> AverageConfig:
    """What `average: null` means in a run of `steps` steps.

    `ema` with the decay `min(0.9995, steps / (steps + 20))`: the mean looks back over a twentieth of the run, and over
    2,000 steps at the most. A recipe that sees no adversarial images averages nothing: there it is robustness that
    averaging buys.
    """
    if recipe.clean_mix()[0] == 1:
        return AverageConfig(kind="none")
    return AverageConfig(kind="ema", decay=min(DECAY, steps / (steps + SPAN)))


def averaged_model(student: nn.Module, config: AverageConfig | None) -> AveragedModel | None:
    """A mean of weights and of batch norm's statistics that has taken nothing in yet, in eval mode; or None."""
    if config is None or config.kind == "none":
        return None
    return AveragedModel(student, multi_avg_fn=update_of(config), use_buffers=True).eval()


def update_of(config: AverageConfig) -> Update:
    """How the means of all tensors of one type take in the new ones; counters, which have no mean, are copied."""

    @torch.no_grad()
    def update(means: Tensors, new: Tensors, count: Tensor | int) -> None:
        if not means[0].is_floating_point():
            torch._foreach_copy_(means, new)
        elif config.kind == "ema":
            torch._foreach_lerp_(means, new, 1 - config.decay)
        else:
            for mean, value in zip(means, new, strict=True):  # once in an epoch
                mean.add_((value - mean) / (count + 1))

    return update


def is_due(config: AverageConfig | None, *, step: bool, done: float) -> bool:
    """Whether the mean takes the weights in: `ema` after every `step`, `swa` after every epoch past its start."""
    if config is None or config.kind == "none":
        return False
    return step if config.kind == "ema" else not step and done >= config.start
