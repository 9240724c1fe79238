"""Resizing and normalising inside the model."""

import pytest
import torch

from darht.core.errors import ConfigError
from darht.core.nets import Preprocess

MEAN, STD = (0.5, 0.25, 0.0), (0.5, 0.25, 2.0)


def test_normalises_each_channel():
    x = torch.full((2, 3, 4, 4), 0.75)
    out = Preprocess(None, MEAN, STD)(x)
    assert torch.equal(out[:, :, 0, 0], torch.tensor([[0.5, 2.0, 0.375]]).expand(2, 3))
    assert torch.equal(x, torch.full((2, 3, 4, 4), 0.75))


def test_resizes_with_the_weights_of_bilinear_interpolation():
    x = torch.zeros(1, 3, 2, 2)
    x[..., 1] = 1.0
    out = Preprocess(4, (0.0,) * 3, (1.0,) * 3)(x)
    assert out.shape == (1, 3, 4, 4)
    assert torch.equal(out[0, 0, 0], torch.tensor([0.0, 0.25, 0.75, 1.0]))


def test_shrinking_does_not_antialias():
    x = torch.zeros(1, 3, 8, 8)
    x[..., 0, 0] = 1.0  # half-pixel centres at a factor of 4 read pixels 1 and 2, never the corner
    assert not Preprocess(2, (0.0,) * 3, (1.0,) * 3)(x).any()


@pytest.mark.parametrize("shape", [(8, 8), (8, 6), (3, 5), (16, 8)])
def test_any_size_becomes_the_one_asked_for(shape):
    assert Preprocess(8, (0.0,) * 3, (1.0,) * 3)(torch.rand(2, 3, *shape)).shape == (2, 3, 8, 8)


def test_the_right_size_is_left_alone():
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(Preprocess(8, (0.0,) * 3, (1.0,) * 3)(x), x)


@pytest.mark.parametrize("resize", [None, 3, 6])
def test_gradients_pass_through(resize):
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Preprocess(resize, MEAN, STD), (x,))


def test_mean_and_std_move_with_the_module_and_are_not_state():
    module = Preprocess(None, MEAN, STD)
    assert module.state_dict() == {}
    assert [name for name, _ in module.named_buffers()] == ["mean", "std"]
    assert module.double().mean.dtype == torch.float64
    assert module(torch.rand(1, 3, 2, 2, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize(
    ("resize", "mean", "std", "message"),
    [
        (0, MEAN, STD, "resize must be at least 1 pixel, or null for the source size; got 0"),
        (None, MEAN, (1.0, 0.0, 1.0), r"std must be above 0 in every channel; got \[1.0, 0.0, 1.0\]"),
        (None, MEAN, (1.0, -1.0, 1.0), "std must be above 0"),
        (None, (0.5,), STD, r"must be 3 finite numbers each; got \[0.5\]"),
        (None, MEAN, (1.0, 1.0), "must be 3 finite numbers each"),
        (None, (0.5, 0.5, float("nan")), STD, "must be 3 finite numbers each"),
        (None, MEAN, (1.0, 1.0, float("inf")), "must be 3 finite numbers each"),
    ],
)
def test_refused(resize, mean, std, message):
    with pytest.raises(ConfigError, match=message):
        Preprocess(resize, mean, std)
