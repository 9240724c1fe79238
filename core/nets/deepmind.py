"""DeepMind's wide and pre-activation ResNets (Gowal et al., arXiv 2010.03593), with the names of their checkpoints.

Most of RobustBench's best CIFAR entries are one of them. Three things differ from the other networks here, and no
checkpoint shows them: the activation (SiLU), strided 3x3 convolutions that pad below and on the right alone as
TensorFlow's SAME does for even sizes, and, in the ResNet, 3x3 shortcuts that read the raw input.
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from darht.core.errors import ModelError
from darht.core.nets.layers import check_blocks, check_depth, check_positive, conv, global_pool, stage

_ACTIVATIONS = {"silu": F.silu, "relu": F.relu}


class DMWideBlock(nn.Module):
    """A pre-activation block; where the channels change, the 1x1 shortcut reads the activated input."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, activation: str) -> None:
        super().__init__()
        self.activation, self.stride = activation, stride
        self.batchnorm_0 = nn.BatchNorm2d(in_channels)
        self.conv_0 = _unpadded(in_channels, out_channels, stride)
        self.batchnorm_1 = nn.BatchNorm2d(out_channels)
        self.conv_1 = conv(out_channels, out_channels, 3)
        self.shortcut = None if in_channels == out_channels else conv(in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in, H, W]` to `[B, out, H/stride, W/stride]`."""
        activate = _ACTIVATIONS[self.activation]
        active = activate(self.batchnorm_0(x))
        skip = x if self.shortcut is None else self.shortcut(active)
        hidden = activate(self.batchnorm_1(self.conv_0(_pad(active, self.stride))))
        out: Tensor = self.conv_1(hidden) + skip
        return out


class DMWideStage(nn.Module):
    """One stage of blocks; it exists for the `block` in the parameter names."""

    def __init__(self, in_channels: int, out_channels: int, count: int, stride: int, *, activation: str) -> None:
        super().__init__()
        block = partial(DMWideBlock, activation=activation)
        self.block = stage(block, in_channels, out_channels, count, stride)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in, H, W]` to `[B, out, H/stride, W/stride]`."""
        out: Tensor = self.block(x)
        return out


class DMWideResNet(nn.Module):
    """DeepMind's WRN-`depth`-`widen`; `width` is the channels of the stem, `activation` silu or relu.

    Raises:
        ModelError: `depth` is not 6n + 4 with n >= 1, a size is not a whole number >= 1, or the activation is unknown.
    """

    def __init__(self, depth: int, widen: int, num_classes: int, width: int = 16, activation: str = "silu") -> None:
        super().__init__()
        check_positive("the widening factor of a wide ResNet", widen)
        check_positive("width", width)
        check_depth(depth)
        _check_activation(activation)
        self.activation = activation
        count, channels = (depth - 4) // 6, [width, *(width * widen * factor for factor in (1, 2, 4))]
        self.init_conv = conv(3, width, 3)
        stages = zip(channels, channels[1:], (1, 2, 2), strict=False)
        self.layer = nn.Sequential(
            *(DMWideStage(before, after, count, stride, activation=activation) for before, after, stride in stages)
        )
        self.batchnorm = nn.BatchNorm2d(channels[-1])
        self.logits = nn.Linear(channels[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised pixels `[B, 3, H, W]` to logits `[B, C]`."""
        out = _ACTIVATIONS[self.activation](self.batchnorm(self.layer(self.init_conv(x))))
        logits: Tensor = self.logits(global_pool(out))
        return logits


class DMPreActBlock(nn.Module):
    """A pre-activation block; where the shape changes, a 3x3 shortcut reads the raw input."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, activation: str) -> None:
        super().__init__()
        self.activation, self.stride = activation, stride
        self.batchnorm_0 = nn.BatchNorm2d(in_channels)
        self.conv_2d_1 = _unpadded(in_channels, out_channels, stride)
        self.batchnorm_1 = nn.BatchNorm2d(out_channels)
        self.conv_2d_2 = conv(out_channels, out_channels, 3)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = None if same else _unpadded(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in, H, W]` to `[B, out, H/stride, W/stride]`."""
        activate = _ACTIVATIONS[self.activation]
        skip = x if self.shortcut is None else self.shortcut(_pad(x, self.stride))
        hidden = self.conv_2d_1(_pad(activate(self.batchnorm_0(x)), self.stride))
        out: Tensor = self.conv_2d_2(activate(self.batchnorm_1(hidden))) + skip
        return out


class DMPreActResNet(nn.Module):
    """DeepMind's pre-activation ResNet-18; `width` and `blocks` make others, `activation` is silu or relu.

    Raises:
        ModelError: `width` or `blocks` is not a size, or the activation is unknown.
    """

    def __init__(
        self, num_classes: int, width: int = 64, blocks: Sequence[int] = (2, 2, 2, 2), activation: str = "silu"
    ) -> None:
        super().__init__()
        check_positive("width", width)
        check_blocks(blocks)
        _check_activation(activation)
        self.activation = activation
        block = partial(DMPreActBlock, activation=activation)
        self.conv_2d = conv(3, width, 3)
        self.layer_0 = stage(block, width, width, blocks[0], 1)
        self.layer_1 = stage(block, width, 2 * width, blocks[1], 2)
        self.layer_2 = stage(block, 2 * width, 4 * width, blocks[2], 2)
        self.layer_3 = stage(block, 4 * width, 8 * width, blocks[3], 2)
        self.batchnorm = nn.BatchNorm2d(8 * width)
        self.logits = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised pixels `[B, 3, H, W]` to logits `[B, C]`."""
        out = self.layer_3(self.layer_2(self.layer_1(self.layer_0(self.conv_2d(x)))))
        logits: Tensor = self.logits(global_pool(_ACTIVATIONS[self.activation](self.batchnorm(out))))
        return logits


def _unpadded(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, bias=False)


def _pad(x: Tensor, stride: int) -> Tensor:
    """What stands before a 3x3 convolution: one pixel on each side, or below and on the right alone at stride 2."""
    return F.pad(x, (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1))


def _check_activation(activation: object) -> None:
    if activation not in _ACTIVATIONS:
        raise ModelError(f"activation must be {' or '.join(_ACTIVATIONS)}; got {activation!r}")
