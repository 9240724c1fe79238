"""MobileNetV2 (Sandler et al., arXiv 1801.04381) in its CIFAR form: the image is halved three times, not five.

Parameter names are those of the pytorch-cifar checkpoints, so that they load with `strict=True`.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from darht.core.errors import ModelError
from darht.core.nets.layers import conv, global_pool

# (expansion, channels, blocks, stride of the first block): table 2 of the paper, with the CIFAR strides.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; at stride 1 a shortcut, projected where the channels change."""

    def __init__(self, in_channels: int, out_channels: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = expansion * in_channels
        self.stride = stride
        self.conv1 = conv(in_channels, hidden, 1)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = conv(hidden, hidden, 3, stride, groups=hidden)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = conv(hidden, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride == 1 and in_channels != out_channels:
            self.shortcut.extend([conv(in_channels, out_channels, 1), nn.BatchNorm2d(out_channels)])

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in, H, W]` to `[B, out, H/stride, W/stride]`."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        narrow: Tensor = self.bn3(self.conv3(out))
        return narrow + self.shortcut(x) if self.stride == 1 else narrow


class MobileNetV2(nn.Module):
    """MobileNetV2; `width_multiplier` scales every channel count, rounded to a multiple of 8.

    Raises:
        ModelError: `width_multiplier` is not a number above 0.
    """

    def __init__(self, num_classes: int, width_multiplier: float = 1.0) -> None:
        super().__init__()
        if not isinstance(width_multiplier, int | float) or not 0 < width_multiplier < float("inf"):
            raise ModelError(f"width_multiplier must be a number > 0; got {width_multiplier!r}")
        stem, last = _scaled(32, width_multiplier), _scaled(1280, width_multiplier)
        self.conv1 = conv(3, stem, 3)
        self.bn1 = nn.BatchNorm2d(stem)
        self.layers = nn.Sequential()
        channels = stem
        for expansion, base, count, stride in _STAGES:
            for index in range(count):
                out_channels = _scaled(base, width_multiplier)
                self.layers.append(InvertedResidual(channels, out_channels, expansion, 1 if index else stride))
                channels = out_channels
        self.conv2 = conv(channels, last, 1)
        self.bn2 = nn.BatchNorm2d(last)
        self.linear = nn.Linear(last, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised pixels `[B, 3, H, W]` to logits `[B, C]`."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(self.layers(out))))
        logits: Tensor = self.linear(global_pool(out))
        return logits


def _scaled(channels: int, multiplier: float) -> int:
    return max(8, 8 * round(channels * multiplier / 8))
