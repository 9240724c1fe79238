"""Pre-activation ResNet in its CIFAR form (He et al., arXiv 1603.05027).

Parameter names are those of the pytorch-cifar checkpoints. Robust training code has two habits of its own, and
both are options here because a checkpoint only gives its own logits under the right ones.
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from darht.core.nets.layers import check_blocks, check_positive, conv, global_pool, stage


class PreActBlock(nn.Module):
    """Batch norm and ReLU before each of two 3x3 convolutions.

    `shortcut` exists only where the shape changes; it reads the activated input if `out_shortcut`, else the raw one.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, out_shortcut: bool) -> None:
        super().__init__()
        self.out_shortcut = out_shortcut
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, out_channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3)
        self.shortcut: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(conv(in_channels, out_channels, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in, H, W]` to `[B, out, H/stride, W/stride]`."""
        active = F.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(active if self.out_shortcut else x)
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active)))) + skip
        return out


class PreActResNet(nn.Module):
    """PreAct ResNet-18 as it stands; `width` and `blocks` make smaller or larger ones.

    `bn_before_fc` adds the batch norm and ReLU (named `bn`) that Rice et al. (arXiv 2002.11569) put before pooling.
    `out_shortcut` is true in pytorch-cifar and Rice et al., false in Wong et al. (arXiv 2001.03994). It changes no
    parameter name or shape, so a checkpoint loads under the wrong value too, and then answers wrongly.

    Raises:
        ModelError: `width` or `blocks` is not a size.
    """

    def __init__(
        self,
        num_classes: int,
        width: int = 64,
        blocks: Sequence[int] = (2, 2, 2, 2),
        bn_before_fc: bool = False,
        out_shortcut: bool = True,
    ) -> None:
        super().__init__()
        check_positive("width", width)
        check_blocks(blocks)
        block = partial(PreActBlock, out_shortcut=out_shortcut)
        self.conv1 = conv(3, width, 3)
        self.layer1 = stage(block, width, width, blocks[0], 1)
        self.layer2 = stage(block, width, 2 * width, blocks[1], 2)
        self.layer3 = stage(block, 2 * width, 4 * width, blocks[2], 2)
        self.layer4 = stage(block, 4 * width, 8 * width, blocks[3], 2)
        self.bn = nn.BatchNorm2d(8 * width) if bn_before_fc else None
        self.linear = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised pixels `[B, 3, H, W]` to logits `[B, C]`."""
        out = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        if self.bn is not None:
            out = F.relu(self.bn(out))
        logits: Tensor = self.linear(global_pool(out))
        return logits
