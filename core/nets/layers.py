"""The pieces that the CIFAR-form networks share, and the checks of their sizes."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from darht.core.errors import ModelError

BlockFactory = Callable[[int, int, int], nn.Module]


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias (a batch norm follows) that keeps H and W at stride 1; `kernel` is odd."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


def stage(block: BlockFactory, in_channels: int, out_channels: int, count: int, stride: int) -> nn.Sequential:
    """`count` blocks, each `block(in_channels, out_channels, stride)`; the first alone changes channels and size."""
    first = block(in_channels, out_channels, stride)
    return nn.Sequential(first, *(block(out_channels, out_channels, 1) for _ in range(count - 1)))


def global_pool(x: Tensor) -> Tensor:
    """The mean over H and W: `[B, D, H, W]` to `[B, D]`."""
    return x.mean(dim=(2, 3))


def check_positive(name: str, value: object) -> None:
    """Raise ModelError unless `value` is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{name} must be a whole number >= 1; got {value!r}")


def check_depth(depth: int) -> None:
    """Raise ModelError unless `depth` is one that a wide ResNet can have: 6n + 4 with n >= 1."""
    if depth < 10 or (depth - 4) % 6:
        raise ModelError(f"the depth of a wide ResNet must be 6n + 4 (10, 16, 22, 28, 34, ...); got {depth}")


def check_blocks(blocks: object) -> None:
    """Raise ModelError unless `blocks` holds four whole numbers of at least 1."""
    if isinstance(blocks, str) or not isinstance(blocks, Sequence) or len(blocks) != 4:
        raise ModelError(f"blocks must list the blocks of each of the 4 stages, such as [2, 2, 2, 2]; got {blocks!r}")
    for index, count in enumerate(blocks):
        check_positive(f"blocks[{index}]", count)
