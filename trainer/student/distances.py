"""Distances between what a student and its teachers say, which the recipes are made of."""

import torch
import torch.nn.functional as F
from torch import Tensor

from darht.core.errors import ConfigError


def kl_rows(target_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(target) || softmax(logits)) over the last axis, in nats."""
    target = F.log_softmax(target_logits, dim=-1)
    return (target.exp() * (target - F.log_softmax(logits, dim=-1))).sum(-1)


def teacher_weights(targets: Tensor, y: Tensor, per: str) -> Tensor:
    """`w_t = exp(-CE(T_t, y))` as `[B, T]`: with the mean CE of the batch as released, or with each row's own."""
    B, T, C = targets.shape
    ce = F.cross_entropy(targets.reshape(B * T, C), y.repeat_interleave(T), reduction="none").view(B, T)
    return torch.exp(-(ce.mean(0, keepdim=True).expand(B, T) if per == "batch" else ce))


def mean_log_probabilities(logits: Tensor, tau: float = 1.0) -> Tensor:
    """The teachers `[B, T, C]` as one: their mean probability at temperature `tau`, as its logarithm `[B, C]`."""
    return F.log_softmax(logits / tau, dim=-1).exp().mean(1).clamp(min=1e-12).log()


def check_number(name: str, value: float, low: float = 0.0, high: float = 1.0) -> None:
    """Raise ConfigError where a setting lies outside of [low, high]."""
    if not low <= value <= high:
        span = f"in [{low:g}, {high:g}]" if high < float("inf") else f"of at least {low:g}"
        raise ConfigError(f"{name} must be a number {span}; got {value:g}")
