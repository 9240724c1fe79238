"""FGSM: a linear model, where one step decides, the targeted step, and foolbox."""

import warnings

import pytest
import torch
from tiny import LinearModel, Tiny, images, labelled, library, rng

from darht.attacks import FGSM, PGD, Engine


@pytest.fixture(scope="module")
def scene():
    model, x = Tiny(), images(70)
    y = labelled(model, x)
    return model, x, y, (y + 1 + torch.arange(70) % 4) % 5


def test_sign_attacks_on_a_linear_model_decide_at_the_boundary():
    model, x = LinearModel(classes=2), 0.25 + images(40, side=6) / 2
    y = labelled(model, x)
    for eps in (1, 3, 8):
        beatable = model.distance(x, y, "linf") < eps / 255
        fooled = Engine().run(FGSM(eps=eps), model, x, y, generator=rng(40)).success
        assert torch.equal(fooled, beatable)
        assert torch.equal(Engine().run(PGD(eps=eps, step=1, steps=20), model, x, y, generator=rng(40)).success, fooled)


def test_one_step_goes_down_the_targets_loss(scene):
    model, x, y, targets = scene
    pixels = x.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(model(pixels), targets, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, pixels)
    want = ((x * 255).round() - 4 * gradient.sign()).clamp(0, 255) / 255
    torch.testing.assert_close(FGSM(eps=4)(model, x, y, generator=rng(70), targets=targets), want)


def test_fgsm_agrees_with_foolbox():
    foolbox = library("foolbox")
    model = Tiny()
    x = images(24)
    y = labelled(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
        _, theirs, _ = foolbox.attacks.LinfFastGradientAttack(random_start=False)(wrapped, x, y, epsilons=4 / 255)
    torch.testing.assert_close(FGSM(eps=4)(model, x, y, generator=rng(24)), theirs, rtol=0, atol=1e-6)
