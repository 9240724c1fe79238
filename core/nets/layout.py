"""The memory layout of a network's weights: channels-last where that is safe, contiguous elsewhere.

oneDNN (uxlfoundation/oneDNN issue 6035) computes the gradient to the weights of a strided 1x1 convolution in
channels-last with fewer input channels than a vector block wrongly: it writes past its workspace. A block is 8
channels with AVX2 and 16 with AVX-512. Heaps were corrupted with 2 to 6 channels under AVX2; the contiguous layout,
other kernels, depthwise, grouped and transposed convolutions, bfloat16, and the gradient to the input were right, so
weights that are constant are safe. A network meets it at its shortcuts, and a contiguous one takes 1.3 to 1.7 times as
long to train, so it is those layers that run another way: a strided 1x1 convolution is one of stride 1 on every
stride-th pixel.
"""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

BLOCK = 16  # input channels; an upper bound of the vector blocks, so that a choice does not depend on the processor
_TOLERANCE = 1e-3  # of the largest logit: another layout stays below 1e-5, a forward that mistakes it is far above


class PointConv2d(nn.Conv2d):
    """A strided 1x1 convolution that takes every stride-th pixel first; the same sums in another order."""

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Self:
        """In the place of `conv`, with its own parameters."""
        down, right = conv.stride
        made = cls(conv.in_channels, conv.out_channels, 1, (down, right), bias=conv.bias is not None, device="meta")
        made.weight, made.bias = conv.weight, conv.bias
        return made.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, D, H', W']`."""
        down, right = self.stride
        return F.conv2d(x[:, :, ::down, ::right], self.weight, self.bias)


def to_channels_last(model: nn.Module, probe: Tensor) -> bool:
    """Turn a network to channels-last; False, and contiguous weights, where it forbids that or would not be safe.

    On a CPU its strided 1x1 convolutions with fewer input channels than `BLOCK`, if their weights are trained, become
    `PointConv2d` first. Where such a convolution remains (a subclass, or a call on bare weights), where the forward
    pass cannot do with the layout, or answers otherwise in it, the network stays contiguous.
    Convolutions then work in that layout by themselves; pixels and gradients stay as they are, because steps that treat
    channels apart are slow in it.

    Args:
        model: a network, or one whose answer is a tuple that begins with logits. Names, values and modes stay.
        probe: pixels `[B, 3, H, W]` to compare answers on.
    """
    modes = {part: part.training for part in model.modules()}
    try:
        with torch.random.fork_rng([probe.device] if probe.is_cuda else []):
            return _turn(model.eval(), probe)
    finally:
        for part, training in modes.items():
            part.training = training


def pixel_layout(model: nn.Module) -> torch.memory_format:
    """The layout of pixels that a network's first layer need not turn.

    On a CPU that is contiguous whatever the weights: passes are as fast, and what treats channels apart is faster.
    """
    convs = [part.weight for part in model.modules() if isinstance(part, nn.Conv2d) and part.kernel_size != (1, 1)]
    if not convs or convs[0].device.type == "cpu":
        return torch.contiguous_format
    turned = convs[0].is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if turned else torch.contiguous_format


def layout_note(model: nn.Module) -> str:
    """What a person who asked for channels-last should know of a network after `to_channels_last`; "" for nothing."""
    weights = [part for part in model.parameters() if part.ndim == 4 and min(part.shape[1:]) > 1]
    if not all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights):
        return "compute.channels_last has no effect: this network computes its passes safely in contiguous layout alone"
    points = sum(isinstance(part, PointConv2d) for part in model.modules())
    if not points:
        return ""
    return f"compute.channels_last: {points} strided 1x1 convolutions of few channels run as convolutions of stride 1"


def to_contiguous(model: nn.Module) -> None:
    """Undo `to_channels_last`: the weights are contiguous, and every layer is the one that was built."""
    _set_layout(model, torch.contiguous_format)
    for name, part in list(model.named_modules()):
        if isinstance(part, PointConv2d):
            plain = nn.Conv2d(
                part.in_channels,
                part.out_channels,
                1,
                (part.stride[0], part.stride[1]),
                bias=part.bias is not None,
                device="meta",
            )
            plain.weight, plain.bias = part.weight, part.bias
            model.set_submodule(name, plain.train(part.training))


def _turn(model: nn.Module, probe: Tensor) -> bool:
    want = _ask(model, probe)
    if probe.device.type == "cpu":
        _replace(model)
    _set_layout(model, torch.channels_last)
    try:
        with _Watch() as watch, torch.enable_grad():  # type: ignore[no-untyped-call]
            got = _ask(model, probe)
    except RuntimeError:  # a view() of what is no longer contiguous
        _set_layout(model, torch.contiguous_format)
        return False
    if not watch.unsafe and bool((want - got).abs().max() <= _TOLERANCE * want.abs().max()):
        return True
    _set_layout(model, torch.contiguous_format)
    return False


def _ask(model: nn.Module, probe: Tensor) -> Tensor:
    torch.manual_seed(0)  # what draws at inference draws the same twice
    out = model(probe)
    logits: Tensor = out[0] if isinstance(out, tuple) else out
    return logits.detach()


def _replace(model: nn.Module) -> None:
    for name, part in list(model.named_modules()):
        if name and _is_point(part):
            assert isinstance(part, nn.Conv2d)
            model.set_submodule(name, PointConv2d.of(part))


def _is_point(part: nn.Module) -> bool:
    """Whether this is a plain convolution that `PointConv2d` can stand for, and has to."""
    if type(part) is not nn.Conv2d or part.groups != 1 or part.padding not in ((0, 0), "valid"):
        return False
    trained = part.weight.requires_grad and not has_hooks(part)
    return trained and is_unsafe(part.in_channels, part.kernel_size, part.stride)


def has_hooks(part: nn.Module) -> bool:
    """Whether somebody listens to this module; hooks belong to the caller and must fire on the caller's model."""
    return bool(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks)


def is_unsafe(channels: int, kernel: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether a convolution of so many input channels is one whose weights' gradient oneDNN computes wrongly."""
    return channels < BLOCK and max(kernel) == 1 and max(stride) > 1


class _Watch(TorchDispatchMode):
    """Notes whether a forward pass on a CPU runs an unsafe convolution, whoever calls it; needs gradients on."""

    unsafe = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: to keep its compiler out torch imports it, in 0.8 s, and nothing is compiled in here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            x, weight, _, stride, _, _, transposed, _, groups = args
            last = any(one.is_contiguous(memory_format=torch.channels_last) for one in (x, weight) if one.ndim == 4)
            if x.device.type == "cpu" and weight.requires_grad and not transposed and groups == 1 and last:
                self.unsafe |= is_unsafe(weight.shape[1], tuple(weight.shape[2:]), tuple(stride))
        return func(*args, **(kwargs or {}))


def _set_layout(model: nn.Module, layout: torch.memory_format) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=layout)
