"""What happens to pixels before a network sees them, as data inside the model."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from darht.core.errors import ConfigError


class Preprocess(nn.Module):
    """Resize and normalise, differentiably: pixels `[B, 3, H, W]` in [0,1] to `[B, 3, resize or H, resize or W]`.

    Resizing is bilinear without antialiasing and happens only where the size differs; then `(x - mean) / std`. `mean`
    and `std` have one value per channel and are not part of the state: they belong to the model's description.

    Raises:
        ConfigError: `resize` is below 1, or `mean` and `std` are not three finite numbers each with `std` above 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, resize: int | None, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if resize is not None and resize < 1:
            raise ConfigError(f"resize must be at least 1 pixel, or null for the source size; got {resize}")
        if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, [*mean, *std])):
            raise ConfigError(f"mean and std must be 3 finite numbers each; got {list(mean)} and {list(std)}")
        if min(std) <= 0:
            raise ConfigError(f"std must be above 0 in every channel; got {list(std)}")
        self.resize = resize
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Pixels in [0,1] to what the network was trained on."""
        if self.resize is not None and x.shape[-2:] != (self.resize, self.resize):
            size = (self.resize, self.resize)
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=False)
        return (x - self.mean) / self.std
