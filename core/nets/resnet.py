"""ResNet in its CIFAR form (He et al., arXiv 1512.03385): a 3x3 stem, no max pooling, four stages of basic
or bottleneck blocks.

Parameter names are those of the pytorch-cifar checkpoints, so that they load with `strict=True`.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from darht.core.nets.layers import check_blocks, check_positive, conv, global_pool, stage

_EXPANSION = 4  # channels of a bottleneck block's answer, in those of its 3x3 convolution


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is projected where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, out_channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut.extend([conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels)])

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in, H, W]` to `[B, out, H/stride, W/stride]`."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class Bottleneck(nn.Module):
    """A 3x3 convolution on a quarter of the channels between two 1x1 ones, and a shortcut as a basic block has."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        middle = out_channels // _EXPANSION
        self.conv1 = conv(in_channels, middle, 1)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = conv(middle, middle, 3, stride)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = conv(middle, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut.extend([conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels)])

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in, H, W]` to `[B, out, H/stride, W/stride]`."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-18 as it stands; `width` (channels of the first stage) and `blocks` make smaller or larger ones.

    With `bottleneck` its stages have four times the channels: blocks [3, 4, 6, 3] are then ResNet-50, else ResNet-34.

    Raises:
        ModelError: `width` or `blocks` is not a size.
    """

    def __init__(
        self, num_classes: int, width: int = 64, blocks: Sequence[int] = (2, 2, 2, 2), bottleneck: bool = False
    ) -> None:
        super().__init__()
        check_positive("width", width)
        check_blocks(blocks)
        block, first = (Bottleneck, _EXPANSION * width) if bottleneck else (BasicBlock, width)
        self.conv1 = conv(3, width, 3)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = stage(block, width, first, blocks[0], 1)
        self.layer2 = stage(block, first, 2 * first, blocks[1], 2)
        self.layer3 = stage(block, 2 * first, 4 * first, blocks[2], 2)
        self.layer4 = stage(block, 4 * first, 8 * first, blocks[3], 2)
        self.linear = nn.Linear(8 * first, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised pixels `[B, 3, H, W]` to logits `[B, C]`."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        logits: Tensor = self.linear(global_pool(out))
        return logits
