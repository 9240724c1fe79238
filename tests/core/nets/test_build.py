"""The CIFAR-form networks: shapes, the parameter names that public checkpoints use, and every refused option."""

import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import darht.core.nets
from darht.core.errors import ConfigError, ModelError
from darht.core.nets import build
from darht.core.nets.preact import PreActBlock
from darht.core.nets.resnet import Bottleneck
from darht.core.nets.wideresnet import WideBlock

TINY = {
    "resnet18": {"width": 4, "blocks": [1, 1, 1, 1]},
    "preact_resnet18": {"width": 4, "blocks": [1, 1, 1, 1]},
    "resnet50": {"width": 4, "blocks": [1, 1, 1, 1]},
    "wrn-10-1": {"width": 4},
    "dm-wrn-10-2": {"width": 2},
    "dm-preact-resnet18": {"width": 4, "blocks": [1, 1, 1, 1]},
    "xcit-s12-p4": {"width": 8, "heads": 2, "depth": 1},
    "mobilenetv2": {"width_multiplier": 0.1},
}
BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def shapes(arch, num_classes=10, kwargs=None):
    with torch.device("meta"):
        model = build(arch, num_classes, kwargs)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def batch_norm(name, channels):
    return {f"{name}.{key}": () if key == "num_batches_tracked" else (channels,) for key in BATCH_NORM}


def stages(prefix):
    """(name of the block, channels in, channels out) of the 8 blocks of an 18-layer net."""
    blocks = [(64, 64)] * 2 + [(64, 128), (128, 128), (128, 256), (256, 256), (256, 512), (512, 512)]
    return [(f"{prefix}{i // 2 + 1}.{i % 2}", *pair) for i, pair in enumerate(blocks)]


def test_public_names():
    assert darht.core.nets.__all__ == [
        "Backbone",
        "Preprocess",
        "backbone",
        "build",
        "check_pixels",
        "fold_head",
        "head_name",
    ]
    assert all(hasattr(darht.core.nets, name) for name in darht.core.nets.__all__)


def test_import_is_light():
    code = "import sys, darht.core.nets; print([m for m in ('timm', 'torchvision') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arch", "kwargs", "count"),
    [
        ("resnet18", {}, 11_173_962),
        ("resnet34", {}, 21_282_122),
        ("resnet50", {}, 23_520_842),
        ("preact_resnet18", {}, 11_171_146),
        ("preact_resnet18", {"out_shortcut": False}, 11_171_146),
        ("preact_resnet18", {"bn_before_fc": True}, 11_172_170),
        ("wrn-28-10", {}, 36_479_194),
        ("wrn-34-10", {}, 46_160_474),
        ("dm-wrn-28-10", {}, 36_479_194),
        ("mobilenetv2", {}, 2_296_922),
    ],
)
def test_parameter_counts_are_the_published_ones(arch, kwargs, count):
    with torch.device("meta"):
        model = build(arch, 10, kwargs)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_resnet18_has_the_names_and_shapes_of_pytorch_cifar():
    expected = {"conv1.weight": (64, 3, 3, 3), **batch_norm("bn1", 64)}
    for name, before, after in stages("layer"):
        expected |= {f"{name}.conv1.weight": (after, before, 3, 3), **batch_norm(f"{name}.bn1", after)}
        expected |= {f"{name}.conv2.weight": (after, after, 3, 3), **batch_norm(f"{name}.bn2", after)}
        if before != after:
            expected |= {f"{name}.shortcut.0.weight": (after, before, 1, 1)}
            expected |= batch_norm(f"{name}.shortcut.1", after)
    expected |= {"linear.weight": (10, 512), "linear.bias": (10,)}
    assert shapes("resnet18") == expected
    assert list(shapes("resnet18")) == list(expected)


def test_resnet50_has_the_names_and_shapes_of_pytorch_cifar():
    expected, before = {"conv1.weight": (64, 3, 3, 3), **batch_norm("bn1", 64)}, 64
    for number, (count, middle) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True), start=1):
        for index in range(count):
            name, after = f"layer{number}.{index}", 4 * middle
            expected |= {f"{name}.conv1.weight": (middle, before, 1, 1), **batch_norm(f"{name}.bn1", middle)}
            expected |= {f"{name}.conv2.weight": (middle, middle, 3, 3), **batch_norm(f"{name}.bn2", middle)}
            expected |= {f"{name}.conv3.weight": (after, middle, 1, 1), **batch_norm(f"{name}.bn3", after)}
            if index == 0:
                expected |= {f"{name}.shortcut.0.weight": (after, before, 1, 1)}
                expected |= batch_norm(f"{name}.shortcut.1", after)
            before = after
    expected |= {"linear.weight": (10, 2048), "linear.bias": (10,)}
    assert shapes("resnet50") == expected


def test_resnet34_has_the_blocks_of_resnet50_and_the_names_of_resnet18():
    model = build("resnet34", 10, {"width": 2})
    assert [len(layer) for layer in (model.layer1, model.layer2, model.layer3, model.layer4)] == [3, 4, 6, 3]
    assert {name.split(".", 2)[2] for name in shapes("resnet34") if name.startswith("layer")} == {
        name.split(".", 2)[2] for name in shapes("resnet18") if name.startswith("layer")
    }


@pytest.mark.parametrize("stride", [1, 2])
def test_bottleneck_is_its_formula(stride):
    torch.manual_seed(1)
    block = Bottleneck(4, 8, stride).eval()
    x, norm = torch.randn(2, 4, 8, 8), (1 + 1e-5) ** 0.5
    hidden = F.relu(F.conv2d(x, block.conv1.weight) / norm)
    hidden = F.relu(F.conv2d(hidden, block.conv2.weight, stride=stride, padding=1) / norm)
    skip = F.conv2d(x, block.shortcut[0].weight, stride=stride) / norm
    torch.testing.assert_close(block(x), F.relu(F.conv2d(hidden, block.conv3.weight) / norm + skip))


@pytest.mark.parametrize("bn_before_fc", [False, True])
def test_preact_resnet18_has_the_names_and_shapes_of_pytorch_cifar(bn_before_fc):
    expected = {"conv1.weight": (64, 3, 3, 3)}
    for name, before, after in stages("layer"):
        expected |= {**batch_norm(f"{name}.bn1", before), f"{name}.conv1.weight": (after, before, 3, 3)}
        expected |= {**batch_norm(f"{name}.bn2", after), f"{name}.conv2.weight": (after, after, 3, 3)}
        if before != after:
            expected |= {f"{name}.shortcut.0.weight": (after, before, 1, 1)}
    expected |= batch_norm("bn", 512) if bn_before_fc else {}
    expected |= {"linear.weight": (10, 512), "linear.bias": (10,)}
    assert shapes("preact_resnet18", kwargs={"bn_before_fc": bn_before_fc}) == expected


@pytest.mark.parametrize("sub_block1", [False, True])
def test_wide_resnet_has_the_names_and_shapes_of_trades(sub_block1):
    expected = {"conv1.weight": (16, 3, 3, 3)}
    blocks = [("block1", 16, 160), ("block2", 160, 320), ("block3", 320, 640)]
    for block, before, after in [*blocks, *([("sub_block1", 16, 160)] if sub_block1 else [])]:
        for index, (left, right) in enumerate(pairwise([before] + [after] * 5)):
            name = f"{block}.layer.{index}"
            expected |= {**batch_norm(f"{name}.bn1", left), f"{name}.conv1.weight": (right, left, 3, 3)}
            expected |= {**batch_norm(f"{name}.bn2", right), f"{name}.conv2.weight": (right, right, 3, 3)}
            expected |= {f"{name}.convShortcut.weight": (right, left, 1, 1)} if index == 0 else {}
    expected |= {**batch_norm("bn1", 640), "fc.weight": (10, 640), "fc.bias": (10,)}
    assert shapes("wrn-34-10", kwargs={"sub_block1": sub_block1}) == expected


def test_mobilenetv2_has_the_names_and_shapes_of_pytorch_cifar():
    found = shapes("mobilenetv2")
    outputs = [16, 24, 24, 32, 32, 32, 64, 64, 64, 64, 96, 96, 96, 160, 160, 160, 320]
    projected = {0, 1, 10, 16}  # stride 1 and another number of channels
    expected = {"conv1.weight": (32, 3, 3, 3), **batch_norm("bn1", 32)}
    for index, (before, after) in enumerate(pairwise([32, *outputs])):
        name, hidden = f"layers.{index}", before * (6 if index else 1)
        expected |= {f"{name}.conv1.weight": (hidden, before, 1, 1), **batch_norm(f"{name}.bn1", hidden)}
        expected |= {f"{name}.conv2.weight": (hidden, 1, 3, 3), **batch_norm(f"{name}.bn2", hidden)}
        expected |= {f"{name}.conv3.weight": (after, hidden, 1, 1), **batch_norm(f"{name}.bn3", after)}
        if index in projected:
            expected |= {f"{name}.shortcut.0.weight": (after, before, 1, 1)}
            expected |= batch_norm(f"{name}.shortcut.1", after)
    expected |= {"conv2.weight": (1280, 320, 1, 1), **batch_norm("bn2", 1280)}
    expected |= {"linear.weight": (10, 1280), "linear.bias": (10,)}
    assert found == expected


@pytest.mark.parametrize("arch", TINY)
@pytest.mark.parametrize("size", [8, 32, 64])
def test_logits_for_every_image_size(arch, size):
    model = build(arch, 5, TINY[arch])
    assert model.training
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 5)
    assert model.eval()(torch.zeros(1, 3, size, size)).shape == (1, 5)


@pytest.mark.parametrize("arch", TINY)
def test_state_survives_a_strict_load(arch):
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    first, second = build(arch, 5, TINY[arch]).eval(), build(arch, 5, TINY[arch]).eval()
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict(), strict=True)
    assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("arch", TINY)
def test_every_parameter_has_a_gradient(arch):
    model = build(arch, 5, TINY[arch])
    model(torch.rand(4, 3, 16, 16)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(("out_shortcut", "stride"), [(True, 2), (False, 2), (True, 1)])
def test_preact_block_is_its_formula(out_shortcut, stride):
    torch.manual_seed(1)
    block = PreActBlock(4, 4 * stride, stride, out_shortcut=out_shortcut).eval()
    block.bn1.running_mean.fill_(0.2)
    x = torch.randn(2, 4, 8, 8)
    active = F.relu((x - 0.2) / (1 + 1e-5) ** 0.5)
    hidden = F.conv2d(active, block.conv1.weight, stride=stride, padding=1)
    residual = F.conv2d(F.relu(hidden / (1 + 1e-5) ** 0.5), block.conv2.weight, padding=1)
    source = active if out_shortcut else x
    skip = x if stride == 1 else F.conv2d(source, block.shortcut[0].weight, stride=stride)
    torch.testing.assert_close(block(x), residual + skip)


@pytest.mark.parametrize("stride", [1, 2])
def test_wide_block_is_its_formula(stride):
    torch.manual_seed(1)
    block = WideBlock(4, 4 * stride, stride).eval()
    block.bn1.running_mean.fill_(0.2)
    x = torch.randn(2, 4, 8, 8)
    active = F.relu((x - 0.2) / (1 + 1e-5) ** 0.5)
    hidden = F.conv2d(active, block.conv1.weight, stride=stride, padding=1)
    residual = F.conv2d(F.relu(hidden / (1 + 1e-5) ** 0.5), block.conv2.weight, padding=1)
    skip = x if stride == 1 else F.conv2d(active, block.convShortcut.weight, stride=stride)
    torch.testing.assert_close(block(x), residual + skip)


def test_sub_block1_changes_no_logit():
    with_copy = build("wrn-10-1", 5, {"width": 4, "sub_block1": True}).eval()
    without = build("wrn-10-1", 5, {"width": 4}).eval()
    state = {key: value for key, value in with_copy.state_dict().items() if not key.startswith("sub_block1")}
    without.load_state_dict(state, strict=True)
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(with_copy(x), without(x))


def test_wide_resnet_starts_as_the_paper_says():
    torch.manual_seed(0)
    model = build("wrn-10-2", 10)
    conv = model.block3.layer[0].conv2
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)
    assert not model.fc.bias.any()


@pytest.mark.parametrize(("arch", "widths"), [("wrn-16-4", [64, 128, 256]), ("wrn-10-1", [16, 32, 64])])
def test_depth_and_width_are_read_from_the_name(arch, widths):
    model = build(arch, 10)
    stages = [model.block1, model.block2, model.block3]
    assert [stage.layer[-1].conv2.out_channels for stage in stages] == widths
    assert [len(stage.layer) for stage in stages] == [(int(arch.split("-")[1]) - 4) // 6] * 3


@pytest.mark.parametrize(
    ("arch", "kwargs", "message"),
    [
        ("resnet81", {}, "unknown architecture 'resnet81'; did you mean 'resnet18'?"),
        ("wrn-34", {}, "unknown architecture 'wrn-34'; did you mean 'wrn-34-10'?"),
        ("vit_tiny_patch16_224", {}, r"'vit_tiny_patch16_224' \(an architecture reads resnet18, .*timm:NAME"),
        ("", {}, "unknown architecture ''"),
        ("dm-wrn-70", {}, "unknown architecture 'dm-wrn-70'; did you mean 'dm-wrn-70-16'?"),
        ("dm-wrn-33-10", {}, r"must be 6n \+ 4 \(10, 16, 22, 28, 34, ...\); got 33"),
        ("dm-wrn-10-1", {"activation": "gelu"}, "activation must be silu or relu; got 'gelu'"),
        ("dm-preact-resnet18", {"activation": 1}, "activation must be silu or relu; got 1"),
        ("xcit-s12-p4", {"width": 12}, "multiple of 8 and of its heads; got 12 with 8 heads"),
        ("xcit-s12-p4", {"depth": 0}, "depth must be a whole number >= 1; got 0"),
        ("wrn-33-10", {}, r"must be 6n \+ 4 \(10, 16, 22, 28, 34, ...\); got 33"),
        ("wrn-4-1", {}, "got 4"),
        ("wrn-10-0", {}, "widening factor of a wide ResNet must be a whole number >= 1; got 0"),
        ("wrn-10-1", {"width": 0}, "width must be a whole number >= 1; got 0"),
        ("wrn-10-1", {"depth": 16}, "wrn-10-1 does not know depth; its kwargs are width, sub_block1"),
        ("resnet18", {"widht": 8, "a": 1}, "resnet18 does not know a, widht; its kwargs are width, blocks"),
        ("resnet18", {"width": "64"}, "width must be a whole number >= 1; got '64'"),
        ("resnet18", {"width": True}, "width must be a whole number >= 1; got True"),
        ("resnet18", {"blocks": [1, 1]}, r"each of the 4 stages, such as \[2, 2, 2, 2\]; got \[1, 1\]"),
        ("resnet18", {"blocks": "2222"}, "got '2222'"),
        ("resnet18", {"blocks": [1, 1, 0, 1]}, r"blocks\[2\] must be a whole number >= 1; got 0"),
        ("resnet18", {"num_classes": 3}, "num_classes cannot be set in kwargs"),
        ("preact_resnet18", {"width": -1}, "got -1"),
        ("preact_resnet18", {"blocks": 2}, "got 2"),
        ("mobilenetv2", {"width_multiplier": 0}, "width_multiplier must be a number > 0; got 0"),
        ("mobilenetv2", {"width_multiplier": "1"}, "got '1'"),
    ],
)
def test_refused(arch, kwargs, message):
    with pytest.raises(ModelError, match=message) as caught:
        build(arch, 10, kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_classes", [0, -1, 2.0])
def test_a_network_has_classes(num_classes):
    with pytest.raises(ModelError, match="num_classes must be a whole number >= 1"):
        build("resnet18", num_classes)


@pytest.mark.parametrize(
    "arch", ["timm:", ":resnet18", "keras:resnet", "python:", "python:a", "python:a:", "python:a:b:c"]
)
def test_malformed(arch):
    with pytest.raises(ConfigError, match="reads"):
        build(arch, 10)


def test_building_leaves_kwargs_alone():
    kwargs = {"width": 4}
    assert isinstance(build("resnet18", 10, kwargs), nn.Module)
    assert kwargs == {"width": 4}
