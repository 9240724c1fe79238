"""Attention rollout (Abnar & Zuidema 2020, arXiv 2005.00928): how much each pixel counts for a vision transformer."""

import copy
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from darht.core.errors import ModelError


class Watched(nn.Module):
    """A private copy of a model around a timm vision transformer that keeps the attention of its last forward pass.

    Fused attention is switched off in the copy, since it never holds the attention matrix.

    Raises:
        ModelError: blocks whose attention cannot be watched.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.attention: list[Tensor] = []
        self.transformer = find_transformer(self.model)
        blocks: nn.Module = self.transformer.blocks
        for name, block in blocks.named_children():
            drop = getattr(getattr(block, "attn", None), "attn_drop", None)
            if not isinstance(drop, nn.Module) or not hasattr(block.attn, "fused_attn"):
                raise ModelError(f"block {name} of {type(self.transformer).__name__} has no attention that can be read")
            block.attn.fused_attn = False
            drop.register_forward_hook(self._keep)

    def _keep(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.attention.append(inputs[0].detach())

    def forward(self, x: Tensor) -> Tensor:
        """The model's logits `[B, C]`; afterwards `attention` holds one `[B, heads, tokens, tokens]` for each block."""
        self.attention = []
        logits: Tensor = self.model(x)
        return logits

    def weights(self, size: tuple[int, int]) -> Tensor:
        """The rollout of the last forward pass as `[B, 1, H, W]`, at most 1 in each row, without a graph.

        Raises:
            ModelError: a forward pass left other attention behind than one square matrix for each block.
        """
        net = self.transformer
        if len(self.attention) != len(net.blocks):
            raise ModelError(f"{len(net.blocks)} blocks left {len(self.attention)} attention matrices behind")
        prefix = int(net.num_prefix_tokens)
        pooled = getattr(net, "global_pool", "token") != "token"
        importance = rollout(self.attention, prefix if pooled else None)[:, prefix:]
        grid = getattr(net.patch_embed, "grid_size", None) or _square(importance.shape[1])
        picture = importance.reshape(-1, 1, *grid)
        picture = F.interpolate(picture, size=size, mode="bilinear", align_corners=False)
        return picture / picture.amax((1, 2, 3), keepdim=True)


def rollout(attention: list[Tensor], pooled_from: int | None) -> Tensor:
    """One row of the product of all layers' attention, `[B, tokens]`.

    Heads are averaged, the identity is added for the skip connection and rows are normalised. Only one row of the
    product is wanted, so that row alone is carried from the last layer to the first.

    Args:
        attention: `[B, heads, tokens, tokens]` of each block, first to last.
        pooled_from: None for the class token's row, else the mean of the rows of the tokens from this one on.
    """
    tokens = attention[0].shape[-1]
    row = attention[0].new_zeros(len(attention[0]), 1, tokens)
    if pooled_from is None:
        row[:, :, 0] = 1.0
    else:
        row[:, :, pooled_from:] = 1.0 / (tokens - pooled_from)
    for layer in reversed(attention):
        mean = layer.mean(1)
        row = (row / (mean.sum(-1) + 1.0)[:, None]) @ mean + row / (mean.sum(-1) + 1.0)[:, None]
    return row.squeeze(1)


def is_transformer(model: object) -> bool:
    """Whether there is a timm vision transformer inside."""
    return isinstance(model, nn.Module) and any(_looks_like_vit(part) for part in model.modules())


def find_transformer(model: nn.Module) -> Any:
    """The outermost timm vision transformer of a model.

    Raises:
        ModelError: there is none.
    """
    for part in model.modules():
        if _looks_like_vit(part):
            return part
    raise ModelError(f"{type(model).__name__} holds no timm vision transformer")


def _looks_like_vit(part: nn.Module) -> bool:
    return all(hasattr(part, name) for name in ("blocks", "patch_embed", "num_prefix_tokens"))


def _square(tokens: int) -> tuple[int, int]:
    side = round(tokens**0.5)
    if side * side != tokens:
        raise ModelError(f"{tokens} patches do not form a square, and the model does not tell their grid")
    return side, side
