"""DeepMind's networks: the names and shapes of the published checkpoints, and every formula a state dict hides."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from darht.core.nets import build
from darht.core.nets.deepmind import DMPreActBlock, DMWideBlock
from darht.core.nets.layout import PointConv2d, to_channels_last

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def shapes(arch, num_classes):
    with torch.device("meta"):
        model = build(arch, num_classes)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def batch_norm(name, channels):
    return {f"{name}.{key}": () if key == "num_batches_tracked" else (channels,) for key in NORM}


@pytest.mark.parametrize(("arch", "count", "widen"), [("dm-wrn-28-10", 4, 10), ("dm-wrn-94-16", 15, 16)])
def test_wide_resnet_has_the_names_and_shapes_of_the_published_checkpoints(arch, count, widen):
    expected = {"init_conv.weight": (16, 3, 3, 3)}
    for stage, (start, after) in enumerate(pairwise([16, 16 * widen, 32 * widen, 64 * widen])):
        for index, (before, out) in enumerate(pairwise([start] + [after] * count)):
            name = f"layer.{stage}.block.{index}"
            expected |= {**batch_norm(f"{name}.batchnorm_0", before), f"{name}.conv_0.weight": (out, before, 3, 3)}
            expected |= {**batch_norm(f"{name}.batchnorm_1", out), f"{name}.conv_1.weight": (out, out, 3, 3)}
            expected |= {f"{name}.shortcut.weight": (out, before, 1, 1)} if index == 0 else {}
    expected |= batch_norm("batchnorm", 64 * widen)
    expected |= {"logits.weight": (100, 64 * widen), "logits.bias": (100,)}
    assert shapes(arch, 100) == expected
    assert list(shapes(arch, 100)) == list(expected)


def test_preact_resnet18_has_the_names_and_shapes_of_the_published_checkpoints():
    expected = {"conv_2d.weight": (64, 3, 3, 3)}
    for stage, (start, after) in enumerate(pairwise([64, 64, 128, 256, 512])):
        for index, before in enumerate([start, after]):
            name = f"layer_{stage}.{index}"
            expected |= {**batch_norm(f"{name}.batchnorm_0", before), f"{name}.conv_2d_1.weight": (after, before, 3, 3)}
            expected |= {**batch_norm(f"{name}.batchnorm_1", after), f"{name}.conv_2d_2.weight": (after, after, 3, 3)}
            expected |= {f"{name}.shortcut.weight": (after, before, 3, 3)} if before != after else {}
    expected |= {**batch_norm("batchnorm", 512), "logits.weight": (10, 512), "logits.bias": (10,)}
    assert shapes("dm-preact-resnet18", 10) == expected
    assert list(shapes("dm-preact-resnet18", 10)) == list(expected)


@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", ["wide", "preact"])
def test_block_is_its_formula(kind, stride, activation):
    torch.manual_seed(1)
    block = {"wide": DMWideBlock, "preact": DMPreActBlock}[kind](4, 4 * stride, stride, activation=activation).eval()
    names = ("conv_0", "conv_1") if kind == "wide" else ("conv_2d_1", "conv_2d_2")
    first, second = (getattr(block, name).weight for name in names)
    block.batchnorm_0.running_mean.fill_(0.2)
    x, act, pad = torch.randn(2, 4, 8, 8), getattr(F, activation), (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1)
    active = act((x - 0.2) / (1 + 1e-5) ** 0.5)
    hidden = act(F.conv2d(F.pad(active, pad), first, stride=stride) / (1 + 1e-5) ** 0.5)
    skip = x
    if stride == 2 and kind == "wide":
        skip = F.conv2d(active, block.shortcut.weight, stride=2)
    elif stride == 2:
        skip = F.conv2d(F.pad(x, pad), block.shortcut.weight, stride=2)
    torch.testing.assert_close(block(x), F.conv2d(hidden, second, padding=1) + skip)


def test_the_activation_is_nowhere_in_the_state_and_changes_the_logits():
    silu = build("dm-wrn-10-2", 5, {"width": 2}).eval()
    relu = build("dm-wrn-10-2", 5, {"width": 2, "activation": "relu"}).eval()
    relu.load_state_dict(silu.state_dict(), strict=True)
    x = torch.rand(2, 3, 8, 8)
    assert not torch.allclose(silu(x), relu(x))


def test_narrow_strided_shortcuts_are_computed_safely_in_channels_last():
    model = build("dm-wrn-10-2", 5, {"width": 2})
    assert to_channels_last(model, torch.rand(2, 3, 16, 16))
    assert sum(isinstance(part, PointConv2d) for part in model.modules()) == 2
