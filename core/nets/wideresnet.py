"""Wide ResNet (Zagoruyko and Komodakis, arXiv 1605.07146) with the parameter names of the TRADES checkpoints.

RobustBench and most robust training code of the last years use the same names.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from darht.core.nets.layers import check_depth, check_positive, conv, global_pool, stage


class WideBlock(nn.Module):
    """A pre-activation block; where the channels change, the projected shortcut reads the activated input."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, out_channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3)
        self.convShortcut = None if in_channels == out_channels else conv(in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in, H, W]` to `[B, out, H/stride, W/stride]`."""
        active = F.relu(self.bn1(x))
        skip = x if self.convShortcut is None else self.convShortcut(active)
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active)))) + skip
        return out


class WideStage(nn.Module):
    """One stage of blocks; it exists for the `layer` in the parameter names."""

    def __init__(self, in_channels: int, out_channels: int, count: int, stride: int) -> None:
        super().__init__()
        self.layer = stage(WideBlock, in_channels, out_channels, count, stride)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in, H, W]` to `[B, out, H/stride, W/stride]`."""
        out: Tensor = self.layer(x)
        return out


class WideResNet(nn.Module):
    """WRN-`depth`-`widen`; `width` is the channels of the stem, 16 in the paper.

    `sub_block1` adds a second first stage that the forward pass never uses: TRADES checkpoints carry its weights.

    Raises:
        ModelError: `depth` is not 6n + 4 with n >= 1, or a size is not a whole number >= 1.
    """

    def __init__(self, depth: int, widen: int, num_classes: int, width: int = 16, sub_block1: bool = False) -> None:
        super().__init__()
        check_positive("the widening factor of a wide ResNet", widen)
        check_positive("width", width)
        check_depth(depth)
        count, channels = (depth - 4) // 6, [width * widen * factor for factor in (1, 2, 4)]
        self.conv1 = conv(3, width, 3)
        self.block1 = WideStage(width, channels[0], count, 1)
        self.sub_block1 = WideStage(width, channels[0], count, 1) if sub_block1 else None
        self.block2 = WideStage(channels[0], channels[1], count, 2)
        self.block3 = WideStage(channels[1], channels[2], count, 2)
        self.bn1 = nn.BatchNorm2d(channels[2])
        self.fc = nn.Linear(channels[2], num_classes)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised pixels `[B, 3, H, W]` to logits `[B, C]`."""
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        out = F.relu(self.bn1(out))
        logits: Tensor = self.fc(global_pool(out))
        return logits
