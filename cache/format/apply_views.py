"""Views applied to tensors: the one part of the format that needs torch."""

import torch
from torch import Tensor


def inverse_offsets(offsets: Tensor) -> Tensor:
    """The views that undo views, `[B, 3]` of (dy, dx, flip): what a crop has cut off comes back as 0."""
    dy, dx, flip = offsets.unbind(-1)
    return torch.stack([-dy, torch.where(flip == 1, dx, -dx), flip], dim=-1)


def apply_views(images: Tensor, offsets: Tensor) -> Tensor:
    """Crop and flip each image: pixel (i, j) of the result is pixel (i + dy, j' + dx) of the image, or 0 outside of it.

    Args:
        images: `[B, 3, H, W]` of any dtype (pixels, or a perturbation).
        offsets: integers `[B, 3]` of (dy, dx, flip); with flip, j' = W - 1 - j.

    Returns:
        `[B, 3, H, W]` of the same dtype, from one gather.
    """
    B, channels, H, W = images.shape
    dy, dx, flip = offsets.long().unbind(1)
    columns = torch.arange(W, device=images.device)
    rows = torch.arange(H, device=images.device) + dy[:, None]
    columns = torch.where(flip[:, None] == 1, W - 1 - columns, columns) + dx[:, None]
    inside = ((rows >= 0) & (rows < H))[:, :, None] & ((columns >= 0) & (columns < W))[:, None, :]
    index = rows.clamp(0, H - 1)[:, :, None] * W + columns.clamp(0, W - 1)[:, None, :]
    index = index.view(B, 1, H * W).expand(-1, channels, -1)
    return images.flatten(2).gather(2, index).view_as(images) * inside[:, None]
