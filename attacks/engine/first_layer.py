"""The gradient of the pixels through a network's first convolution, as a forward convolution.

The usual backward kernel has three channels to give back and leaves vector units empty. The gradient of a block of m by
m pixels is one convolution of the output's gradient with m * m times as many channels: on small ResNets on a CPU half
the time of that layer's backward pass, 6 % of a whole step.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FEW = 4  # channels of an image; with more the usual kernel is as fast


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """How one dimension of the gradient is cut into blocks.

    Pixel m * q + r gets, of the output's gradient g at o, weight t = m * q + r + padding - stride * o. In terms of
    d = o - q * m / stride that is t = r + padding - stride * d, which does not depend on the block q: a convolution.

    Attributes:
        pixels: in a block (m), a multiple of the stride.
        stride: of the forward convolution.
        padding: of the forward convolution.
        taps: the size of the forward convolution's kernel.
    """

    pixels: int
    stride: int
    padding: int
    taps: int

    @property
    def first(self) -> int:
        """The smallest d with a weight; never above 0 where the padding is below the kernel's size."""
        return -((self.taps - 1 - self.padding) // self.stride)

    @property
    def size(self) -> int:
        """How many d have one: the size of the kernel."""
        return (self.pixels - 1 + self.padding) // self.stride - self.first + 1

    @property
    def pace(self) -> int:
        """The stride of the convolution of g."""
        return self.pixels // self.stride

    def tap(self, pixel: int, position: int) -> int | None:
        """The weight that the kernel holds for a pixel of the block; None for 0."""
        found = pixel + self.padding - self.stride * (position + self.first)
        return found if 0 <= found < self.taps else None

    def pads(self, pixels: int, outputs: int) -> tuple[int, int]:
        """The zeros before and behind g, negative to leave some of g out, for an image of so many pixels."""
        blocks = -(-pixels // self.pixels)
        return -self.first, (blocks - 1) * self.pace + self.size - outputs + self.first


class PixelConv2d(nn.Conv2d):
    """A convolution of pixels with constant weights; the gradient is the usual one to float rounding."""

    blocks: tuple[Blocks, Blocks]
    backward_weight: Tensor

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Self:
        """With the same weights, which must not change any more."""
        settings: dict[str, Any] = {name: getattr(conv, name) for name in ("kernel_size", "stride", "padding")}
        frozen = cls(conv.in_channels, conv.out_channels, bias=conv.bias is not None, device="meta", **settings)
        frozen.weight, frozen.bias = conv.weight, conv.bias
        frozen.blocks = _blocks(conv, 0), _blocks(conv, 1)
        frozen.register_buffer("backward_weight", _backward_weight(conv.weight, *frozen.blocks), persistent=False)
        return frozen.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, D, H', W']`."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return super().forward(x)
        found: Tensor = _Convolve.apply(x, self)  # type: ignore[no-untyped-call]
        return found


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, conv: PixelConv2d) -> Tensor:
        ctx.conv, ctx.shape, ctx.plain = conv, x.shape, x.is_contiguous()
        return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _input_gradient(ctx.conv, gradients[0], ctx.shape, plain=ctx.plain), None


def _input_gradient(conv: PixelConv2d, g: Tensor, shape: torch.Size, *, plain: bool) -> Tensor:
    """The gradient `shape` of the input from that of the output; `plain` where the input was not channels-last."""
    down, right = conv.blocks
    top, bottom = down.pads(shape[2], g.shape[2])
    left, behind = right.pads(shape[3], g.shape[3])
    weight, pace = conv.backward_weight.to(g.dtype), (down.pace, right.pace)
    if top == bottom >= 0 and left == behind >= 0:
        found = F.conv2d(g, weight, None, pace, (top, left))
    else:
        found = F.conv2d(F.pad(g, (left, behind, top, bottom)), weight, None, pace)
    block = found.unflatten(1, (down.pixels, right.pixels, shape[1]))  # [B, m, m, C, H / m, W / m]
    height, width = block.shape[4] * down.pixels, block.shape[5] * right.pixels
    if plain:
        found = block.permute(0, 3, 4, 1, 5, 2).reshape(len(g), shape[1], height, width)
    else:
        found = block.permute(0, 4, 1, 5, 2, 3).reshape(len(g), height, width, shape[1]).permute(0, 3, 1, 2)
    cut: Tensor = found[:, :, : shape[2], : shape[3]]
    return cut


def _blocks(conv: nn.Conv2d, dimension: int) -> Blocks:
    stride, padding, taps = (int(size[dimension]) for size in (conv.stride, conv.padding, conv.kernel_size))
    pixels = 2 if stride == 1 and taps > 1 and conv.in_channels <= _FEW else stride
    return Blocks(pixels=pixels, stride=stride, padding=padding, taps=taps)


def _backward_weight(weight: Tensor, down: Blocks, right: Blocks) -> Tensor:
    """`[m * m * C, D, size, size]` from the forward weight `[D, C, taps, taps]`."""
    outputs, inputs = weight.shape[:2]
    made = weight.new_zeros(down.pixels, right.pixels, inputs, outputs, down.size, right.size)
    for row in range(down.pixels):
        for i in range(down.size):
            for column in range(right.pixels):
                for j in range(right.size):
                    y, x = down.tap(row, i), right.tap(column, j)
                    if y is not None and x is not None:
                        made[row, column, :, :, i, j] = weight[:, :, y, x].T
    found: Tensor = made.flatten(0, 2)
    return found


def _fits(part: nn.Module) -> bool:
    """Whether this is a plain convolution of pixels; not one of a subclass, which may do otherwise."""
    if type(part) is not nn.Conv2d or part.in_channels > _FEW or part.groups != 1 or part.padding_mode != "zeros":
        return False
    if isinstance(part.padding, str) or tuple(part.dilation) != (1, 1):
        return False
    return all(padding < taps for padding, taps in zip(part.padding, part.kernel_size, strict=True))


def speed_up_first_layer(model: nn.Module) -> nn.Module:
    """A private copy with a `PixelConv2d` in the place of every convolution of pixels."""
    for name, part in list(model.named_modules()):
        if _fits(part):
            assert isinstance(part, nn.Conv2d)
            if not name:
                return PixelConv2d.of(part)
            model.set_submodule(name, PixelConv2d.of(part))
    return model
