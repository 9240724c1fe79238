"""The first convolution's gradient as a forward convolution."""

import copy

import pytest
import torch
from tiny import Tiny, images, labelled, rng
from torch import nn

from darht.attacks import PGD, Engine
from darht.attacks.engine.first_layer import PixelConv2d, speed_up_first_layer


def gradients(model, x, seed=0):
    x = x.detach().requires_grad_()
    out = model(x)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=out.dtype)
    return out.detach(), torch.autograd.grad((out * weight).sum(), x)[0]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(32, 32), (9, 14)])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [(3, 1, 1), (3, 2, 1), (4, 2, 1), (4, 4, 0), (7, 2, 3), (1, 1, 0), (1, 2, 0), (3, 1, 0), ((5, 2), (3, 1), (4, 0))],
)
def test_the_gradient_is_the_usual_one(kernel, stride, padding, size, layout):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, kernel, stride, padding).double().requires_grad_(False)
    x = torch.randn(2, 3, *size, dtype=torch.float64).contiguous(memory_format=layout)
    quick = speed_up_first_layer(copy.deepcopy(conv))
    assert isinstance(quick, PixelConv2d)
    for found, want in zip(gradients(quick, x), gradients(conv, x), strict=True):
        torch.testing.assert_close(found, want, rtol=0, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(quick(x), conv(x))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(8, 8, 3), nn.Conv2d(3, 6, 3, groups=3), nn.Conv2d(3, 6, 3, dilation=2), nn.Conv2d(3, 6, 1, padding=1),
        nn.Conv2d(3, 6, 3, padding="same"), nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular"),
        type("Own", (nn.Conv2d,), {})(3, 6, 3),
    ],
)  # fmt: skip
def test_other_convolutions_are_left_alone(conv):
    model = speed_up_first_layer(nn.Sequential(conv, nn.ReLU()))
    assert model[0] is conv


def test_bfloat16_has_the_usual_gradient():
    x, model = images(4), Tiny().requires_grad_(False)
    quick = speed_up_first_layer(copy.deepcopy(model))
    with torch.autocast("cpu", torch.bfloat16):
        found, want = gradients(quick, x)[1], gradients(model, x)[1]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, want, rtol=0.05, atol=0.02 * float(want.abs().max()))


def test_the_engine_uses_it_and_leaves_the_callers_model_alone():
    model, x = Tiny(), images(20)
    engine = Engine()
    with engine.prepared(model, x, labelled(model, x)) as ready:
        assert isinstance(ready.fast[0].conv, PixelConv2d)
        assert type(ready.exact[0].conv) is nn.Conv2d
    assert type(model.conv) is nn.Conv2d
    plain = Engine(fold=False, channels_last=False)
    attack = PGD(eps=4, step=1, steps=5)
    found, want = (one.run(attack, model, x, labelled(model, x), generator=rng(20)) for one in (engine, plain))
    assert int((found.success != want.success).sum()) <= 1
