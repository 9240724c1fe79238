import copy
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from darht.attacks import PGD, Engine
from darht.core.nets import build
from darht.core.nets.layout import PointConv2d, _Watch, is_unsafe, layout_note, to_channels_last, to_contiguous
from darht.core.rng import RowRng

PIXELS = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def make(arch: str, **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return build(arch, 5, kwargs)


SMALL = [
    pytest.param("resnet18", {"width": width, "blocks": [1, 1, 1, 1]}, id=f"resnet18-{width}")
    for width in (1, 4, 8, 12)
] + [
    pytest.param("preact_resnet18", {"width": 4, "blocks": [1, 1, 1, 1]}, id="preact"),
    pytest.param("wrn-10-1", {}, id="wrn"),
    pytest.param("mobilenetv2", {}, id="mobilenet"),
]


def convolutions(model: nn.Module, x: torch.Tensor) -> list[tuple[int, int, int, bool]]:
    """Input channels, kernel, stride and layout of every convolution that a training step runs."""
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.convolution.default and args[8] == 1 and not args[6]:
                last = args[0].is_contiguous(memory_format=torch.channels_last) and not args[0].is_contiguous()
                seen.append((args[1].shape[1], args[1].shape[2], args[3][0], last))
            return func(*args, **(kwargs or {}))

    with Watch():
        model(x).sum().backward()
    return seen


@pytest.mark.parametrize(("arch", "kwargs"), SMALL)
def test_no_network_of_ours_meets_the_unsafe_kernel_in_channels_last(arch: str, kwargs: dict):
    model = make(arch, **kwargs)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert to_channels_last(model, PIXELS)
    inner = [p for p in model.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in inner) and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert before.keys() == model.state_dict().keys()
    seen = convolutions(model, PIXELS)
    assert seen and not any(last and is_unsafe(c, (k, k), (s, s)) for c, k, s, last in seen)


GRADIENTS = """
    import sys, torch, torch.nn.functional as F
    from darht.core.nets import build
    from darht.core.nets.layout import to_channels_last
    torch.set_num_threads(1)
    for arch, kwargs in eval(sys.argv[1]):
        torch.manual_seed(0)
        net, exact = build(arch, 5, kwargs), build(arch, 5, kwargs).double()
        exact.load_state_dict(net.state_dict())
        x, y = torch.rand(64, 3, 16, 16, dtype=torch.float64), torch.arange(64) % 5
        assert to_channels_last(net, x[:2].float())
        F.cross_entropy(exact(x), y).backward()
        for _ in range(3):  # the fault shows after some passes
            net.zero_grad()
            F.cross_entropy(net(x.float()), y).backward()
        for (name, mine), theirs in zip(net.named_parameters(), exact.parameters(), strict=True):
            apart = (mine.grad.double() - theirs.grad).norm() / theirs.grad.norm().clamp(min=1e-6)
            assert apart < 1e-3, (arch, kwargs, name, float(apart))
        print(arch, flush=True)
"""


def test_gradients_in_channels_last_are_those_of_float64():
    """In a process of its own: on a processor without AVX-512 the fault ends it."""
    nets = [one.values for one in (SMALL[1], SMALL[2], SMALL[4])]
    command = [sys.executable, "-c", textwrap.dedent(GRADIENTS), repr(nets)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.stdout.split() == [arch for arch, _ in nets], (run.returncode, run.stderr[-500:])


def test_the_other_way_is_the_same_convolution():
    conv = nn.Conv2d(3, 7, 1, stride=(2, 3))
    torch.testing.assert_close(PointConv2d.of(conv)(PIXELS), conv(PIXELS))
    assert PointConv2d.of(conv).weight is conv.weight and PointConv2d.of(conv).bias is conv.bias


class Subclass(nn.Conv2d):
    """As timm's standardised convolutions are."""


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.weight = nn.Conv2d(3, 4, 3, padding=1), nn.Parameter(torch.rand(5, 4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(self.stem(x), self.weight, stride=2).mean((2, 3))


class Standardised(Subclass):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight / self.weight.norm(), self.bias)


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).view(len(x), -1))


def hooked() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net[1].register_forward_hook(lambda *_: None)
    return net


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(3, 4, 3), Subclass(4, 5, 1, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Sequential(nn.Conv2d(3, 4, 3), Standardised(4, 5, 1, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        Bare(),
        Views(),
        hooked(),
    ],
    ids=["subclass", "standardised weights", "bare weights", "views", "hooks"],
)
def test_what_cannot_run_another_way_stays_contiguous_and_says_so(model: nn.Module):
    want = model(PIXELS)
    assert not to_channels_last(model, PIXELS)
    assert all(p.is_contiguous() for p in model.parameters())
    torch.testing.assert_close(model(PIXELS), want)
    assert "has no effect" in layout_note(model)


def test_wide_networks_and_others_kernels_keep_their_layers():
    wide = make("resnet18", width=16, blocks=[1, 1, 1, 1])
    assert to_channels_last(wide, PIXELS) and layout_note(wide) == ""
    assert not any(isinstance(part, PointConv2d) for part in wide.modules())
    narrow = make("resnet18", width=8, blocks=[1, 1, 1, 1])
    assert to_channels_last(narrow, PIXELS)
    assert sum(isinstance(part, PointConv2d) for part in narrow.modules()) == 1
    assert layout_note(narrow).startswith("compute.channels_last: 1 strided")


def test_a_network_that_draws_is_compared_on_the_same_draws_and_the_callers_stream_stays():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 50), Always(), nn.Linear(50, 5))
    state = torch.get_rng_state()
    assert to_channels_last(net, PIXELS)
    assert torch.equal(torch.get_rng_state(), state)


class Always(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, 0.5, training=True)


def test_back_in_contiguous_layout_it_is_the_network_that_was_built():
    net, kept = (make("resnet18", width=4, blocks=[1, 1, 1, 1]) for _ in range(2))
    assert to_channels_last(net, PIXELS)
    to_contiguous(net)
    assert [type(part) for part in net.modules()] == [type(part) for part in kept.modules()]
    assert torch.equal(net.eval()(PIXELS), kept.eval()(PIXELS))


def test_constant_weights_take_no_gradient_and_keep_their_layers():
    net = make("resnet18", width=4, blocks=[1, 1, 1, 1]).requires_grad_(False)
    assert to_channels_last(net, PIXELS)
    assert not any(isinstance(part, PointConv2d) for part in net.modules())


def test_the_engines_private_copy_is_safe_and_the_callers_model_is_untouched():
    model = make("resnet18", width=4, blocks=[1, 1, 1, 1]).eval()
    kept = copy.deepcopy(model)
    x, y = torch.rand(20, 3, 8, 8).mul(255).round() / 255, torch.arange(20) % 5
    found = Engine().run(PGD(eps=8, steps=2), model, x, y, generator=RowRng.create(0, "test", rows=torch.arange(20)))
    assert found.record["channels_last"]
    assert [type(part) for part in model.modules()] == [type(part) for part in kept.modules()]


def test_a_network_is_watched_without_torchs_compiler():
    """Keeping the compiler out of a dispatch mode imports it: 0.8 s of the first attack in a process."""
    assert "__wrapped__" not in vars(_Watch.__torch_dispatch__)
