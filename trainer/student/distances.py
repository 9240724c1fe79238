"""Distances between what a student and its teachers say, which the recipes are made of."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from darht.core.errors import ConfigError
from darht.core.fused import fused

Correct = Literal["none", "drop", "mix"]
_MARGIN = 0.01  # of probability, by which a label that was raised leads


@fused
def kl_rows(target_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(target) || softmax(logits)) over the last axis, in nats."""
    target = F.log_softmax(target_logits, dim=-1)
    return (target.exp() * (target - F.log_softmax(logits, dim=-1))).sum(-1)


@fused
def teacher_weights(targets: Tensor, y: Tensor, per: str) -> Tensor:
    """`w_t = exp(-CE(T_t, y))` as `[B, T]`: with the mean CE of the batch as released, or with each row's own."""
    B, T, C = targets.shape
    ce = F.cross_entropy(targets.reshape(B * T, C), y.repeat_interleave(T), reduction="none").view(B, T)
    return torch.exp(-(ce.mean(0, keepdim=True).expand(B, T) if per == "batch" else ce))


@fused
def mean_log_probabilities(logits: Tensor, tau: float = 1.0) -> Tensor:
    """The teachers `[B, T, C]` as one: their mean probability at temperature `tau`, as its logarithm `[B, C]`."""
    return F.log_softmax(logits / tau, dim=-1).exp().mean(1).clamp(min=1e-12).log()


@fused
def label_rows(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of logits `[B, C]` against labels `[B]`, of each row."""
    return F.cross_entropy(logits, y, reduction="none")


@fused
def smoothed_label_loss(logits: Tensor, y: Tensor, smoothing: float) -> Tensor:
    """Mean cross-entropy of logits `[B, C]` against `(1 - smoothing) onehot(y) + smoothing / C`."""
    return F.cross_entropy(logits, y, label_smoothing=smoothing)


@fused
def mean_square(one: Tensor, other: Tensor) -> Tensor:
    """The mean squared difference."""
    return (one - other).square().mean()


def check_number(name: str, value: float, low: float = 0.0, high: float = 1.0) -> None:
    """Raise ConfigError where a setting lies outside of [low, high]."""
    if not low <= value <= high:
        span = f"in [{low:g}, {high:g}]" if high < float("inf") else f"of at least {low:g}"
        raise ConfigError(f"{name} must be a number {span}; got {value:g}")


@fused
def correct_targets(
    logits: Tensor, y: Tensor, how: Correct, known: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """What to make of teachers that are wrong about a row; of one that is right nothing changes.

    `mix` raises the label's share until it wins: `(1 - a) p + a onehot(y)` with `a = g / (1 + g)`, g the lead of the
    winning class plus 0.01. `drop` leaves the row out.

    Args:
        logits: of teachers, `[B, C]` or `[B, T, C]`.
        y: labels `[B]`.
        how: one of both, or `none`.
        known: bool `[B]`, which rows have labels; nothing changes in the others. None where all have.

    Returns:
        Logits of the same shape; and for `drop` 1 where a row is kept and 0 elsewhere, `[B]` or `[B, T]`.
    """
    if how == "none":
        return logits, None
    said = F.softmax(logits, dim=-1)
    label = y.view(-1, *[1] * (logits.dim() - 1)).expand(*logits.shape[:-1], 1)
    lead = said.amax(-1) - said.gather(-1, label).squeeze(-1)
    if known is not None:
        lead = lead * known.view(-1, *[1] * (lead.dim() - 1))
    if how == "drop":
        return logits, (lead <= 0).to(logits.dtype)
    gap = torch.where(lead > 0, lead + _MARGIN, torch.zeros_like(lead))[..., None]
    share = gap / (1 + gap)
    mixed = (1 - share) * said + share * torch.zeros_like(said).scatter(-1, label, 1.0)
    return torch.where(gap > 0, mixed.clamp(min=1e-12).log(), logits), None


@fused
def mean_kept(rows: Tensor, kept: Tensor | None) -> Tensor:
    """The mean of rows `[B]`, or of those that are kept; 0 when none is."""
    return rows.mean() if kept is None else (rows * kept).sum() / kept.sum().clamp(min=1)
