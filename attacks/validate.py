"""What is refused before an attack starts, and the signs that an evaluation deceives itself."""

import warnings

import torch
from torch import Tensor, nn

from darht.attacks.objectives import Model
from darht.core.errors import ConfigError, ModelError
from darht.core.rng import RowRng


class AttackWarning(UserWarning):
    """Something about the model makes the attack's answer less trustworthy."""


def as_labels(y: Tensor) -> Tensor:
    """Labels as int64: a cache stores smaller integers."""
    return y.long() if y.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32) else y


def stream_of(seed: int, x: Tensor) -> RowRng:
    """Random numbers for somebody who gives a seed alone: keyed by the place of a row in `x`."""
    return RowRng.create(seed, "attack", rows=torch.arange(len(x), device=x.device))


def check_inputs(model: Model, x: Tensor, y: Tensor) -> None:
    """Refuse what would give a meaningless answer.

    Raises:
        ModelError: the model, or a batch normalisation inside it, is in train mode.
        ConfigError: pixels outside [0, 1] or not floating point, shapes that do not fit, no images at all, negative
            labels.
    """
    _check_mode(model)
    if x.ndim != 4 or y.ndim != 1 or len(x) != len(y):
        raise ConfigError(f"x must be [B, 3, H, W] and y [B]; got {list(x.shape)} and {list(y.shape)}")
    if not len(x):
        raise ConfigError(f"an attack needs at least 1 image; got x {list(x.shape)}: leave the call out")
    if not x.is_floating_point():
        raise ConfigError(f"x must be floating point pixels in [0, 1]; got {x.dtype}: divide uint8 by 255")
    if y.dtype != torch.int64:
        raise ConfigError(f"y must be int64 class indices, or of another integer type; got {y.dtype}")
    if not bool((x.amin() >= 0) & (x.amax() <= 1)):
        raise ConfigError(f"pixels must lie in [0, 1]; got [{x.amin():g}, {x.amax():g}]: divide uint8 by 255")
    if int(y.min()) < 0:
        raise ConfigError(f"labels must be class indices from 0; got {int(y.min())}")


def _check_mode(model: Model) -> None:
    if not isinstance(model, nn.Module):
        return
    norms = [name for name, part in model.named_modules() if isinstance(part, nn.modules.batchnorm._NormBase)]
    training = [name for name in norms if model.get_submodule(name).training]
    if model.training or training:
        what = "the model" if model.training else f"{training[0]}"
        raise ModelError(f"{what} is in train mode, where rows of a batch change each other: call model.eval() first")


def check_labels(logits: Tensor, y: Tensor) -> None:
    """Refuse labels that the model has no logit for.

    Raises:
        ModelError: the output is not `[B, C]`.
        ConfigError: a label is not below C.
    """
    if logits.ndim != 2 or len(logits) != len(y):
        raise ModelError(f"the model must return logits [B, C]; got {list(logits.shape)} for {len(y)} rows")
    if int(y.max()) >= logits.shape[1]:
        raise ConfigError(f"labels must be below the model's {logits.shape[1]} classes; got {int(y.max())}")


def check_targets(logits: Tensor, y: Tensor, targets: Tensor | None) -> None:
    """Refuse target classes that cannot be meant; None, for any wrong class, is fine.

    Raises:
        ConfigError: not int64 `[B]`, not a class of the model, or the label itself.
    """
    if targets is None:
        return
    if targets.shape != y.shape or targets.dtype != torch.int64:
        raise ConfigError(f"targets must be int64 {list(y.shape)}; got {targets.dtype} {list(targets.shape)}")
    outside = (targets < 0) | (targets >= logits.shape[1])
    if bool(outside.any()):
        worst = int(targets[outside][0])
        raise ConfigError(f"targets must be classes from 0 to {logits.shape[1] - 1}; got {worst}")
    same = int((targets == y).sum())
    if same:
        raise ConfigError(f"a target must be another class than the label; {same} of {len(y)} rows have their own")


def is_random(first: Tensor, second: Tensor) -> bool:
    """Whether two answers to the same pixels differ more than the order of a sum explains (1e-4 of their norm)."""
    scale = first.norm(dim=1) + 1e-10
    return bool(((first - second).norm(dim=1) > 1e-4 * scale).any())


def is_probability(logits: Tensor) -> bool:
    """Whether every row looks like a softmax: not negative and summing to 1 within 1e-5."""
    return bool((logits >= -1e-5).all() and ((logits.sum(1) - 1).abs() < 1e-5).all())


def alert(text: str) -> str:
    """Warn, and hand the text back for the record."""
    warnings.warn(text, AttackWarning, stacklevel=3)
    return text
