"""The optimizer and its learning rate, as functions of the config and the share of the run that is done."""

import math

import torch
from torch import nn

from darht.trainer.config import OptimConfig


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD or AdamW; biases and normalisation weights decay like the rest, as in the released scripts of the field.

    On a GPU one fused kernel updates all weights.
    """
    fused = next(model.parameters()).device.type == "cuda"
    if config.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=fused)
    return torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
        fused=fused,
    )


def learning_rate(config: OptimConfig, done: float) -> float:
    """The rate after a share `done` in [0, 1) of the run."""
    if done < config.warmup:
        return config.lr * done / config.warmup
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * (done - config.warmup) / (1 - config.warmup)))
    if config.schedule == "piecewise":
        drops = sum(done >= milestone for milestone in config.milestones)
        return float(config.lr * 0.1**drops)
    return config.lr


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, config: OptimConfig, done: float) -> None:
    """One optimizer step at the scheduled rate, from the gradients that are there."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, done)
    if config.clip_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
    optimizer.step()
