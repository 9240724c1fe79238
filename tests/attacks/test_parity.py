"""Against the authors' own code and against references written from the papers."""

import warnings

import pytest
import torch
from tiny import Tiny, images, labelled, library, rng
from torch import nn

from darht.attacks import APGD, APGDT, CW, FGSM, MIM, PGD, Engine
from darht.attacks.objectives import cross_entropy

EXACT = Engine(fold=False, channels_last=False)


def noise_of(stream, shape):
    """What our attack would draw, for a library that asks torch.rand."""
    return lambda *_, **__: stream.uniform(shape)


@pytest.mark.real_data
@pytest.mark.parametrize(("name", "eps", "steps"), [("cnn_a_adv4", 4, 40), ("resnet8_mlperf", 1, 20)])
@pytest.mark.parametrize("objective", ["ce", "dlr"])
def test_apgd_flags_equal_the_authors(name, eps, steps, objective, zoo, cifar_test, monkeypatch):
    base = library("pyautoattack.autopgd_base")
    model = zoo(name)
    x, y = cifar_test[0][:96], cifar_test[1][:96]
    with torch.no_grad():
        right = (model(x).argmax(1) == y).nonzero().squeeze(1)[:48]
    x, y, stream = x[right], y[right], rng(96)[right]
    theirs = base.APGDAttack(model, n_iter=steps, norm="Linf", eps=eps / 255, loss=objective, seed=0)
    theirs.init_hyperparam(x)
    monkeypatch.setattr(base.torch, "rand", noise_of(stream, (3, 32, 32)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dead gradients of images that are far inside
        _, accurate, _, _ = theirs.attack_single_run(x, y)
    monkeypatch.undo()
    ours = EXACT.run(APGD(eps=eps, steps=steps, objective=objective), model, x, y, generator=stream)
    assert torch.equal(ours.robust, accurate.bool())
    assert 0 < int(ours.robust.sum()) < len(y)


@pytest.mark.real_data
def test_apgd_points_equal_the_authors_in_float64(zoo, cifar_test, monkeypatch):
    base = library("pyautoattack.autopgd_base")
    model = zoo("cnn_a_adv4").double()
    x, y, stream = (cifar_test[0][:16].double() * 255).round() / 255, cifar_test[1][:16], rng(16)
    theirs = base.APGDAttack(model, n_iter=30, norm="Linf", eps=8 / 255, loss="ce", seed=0)
    theirs.init_hyperparam(x)
    monkeypatch.setattr(base.torch, "rand", lambda *_, **__: stream.uniform((3, 32, 32)).double())
    best, _, _, _ = theirs.attack_single_run(x, y)
    monkeypatch.undo()
    ours = APGD(eps=8, steps=30)(model, x, y, generator=stream)
    # their step sizes and losses are float32 whatever the images are
    agree = (ours - best).abs().flatten(1).amax(1) < 1e-6
    assert int(agree.sum()) >= 15


@pytest.mark.real_data
def test_targeted_apgd_agrees_with_the_authors(zoo, cifar_test):
    base = library("pyautoattack.autopgd_base")
    model, x, y = zoo("cnn_a_adv4"), cifar_test[0][:96], cifar_test[1][:96]
    theirs = base.APGDAttack_targeted(model, n_iter=20, norm="Linf", eps=4 / 255, n_target_classes=4, seed=0)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        accurate = model(theirs.perturb(x, y)).argmax(1) == y
    ours = Engine().run(APGDT(eps=4, steps=20, targets=4), model, x, y, generator=rng(96))
    assert abs(int(ours.robust.sum()) - int(accurate.sum())) <= 1


def double_net() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    model = Tiny().double()
    x = (images(6).double() * 255).round() / 255
    return model, x, labelled(model, x)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_iterates_equal_the_paper(norm):
    model, x, y = double_net()
    eps, step = (8.0, 2.0) if norm == "linf" else (300.0, 70.0)
    for steps in (1, 5, 10):
        found = PGD(eps=eps, step=step, steps=steps, norm=norm, random_start=False)(model, x, y, generator=rng(6))
        point = x.clone()
        for _ in range(steps):
            point.requires_grad_()
            (gradient,) = torch.autograd.grad(cross_entropy(model(point), y).sum(), point)
            point = point.detach()
            if norm == "linf":
                point = point + step / 255 * gradient.sign()
                point = torch.max(torch.min(point, x + eps / 255), x - eps / 255).clamp(0, 1)
            else:
                length = gradient.flatten(1).norm(dim=1)[:, None, None, None]
                delta = point + step / 255 * gradient / length - x
                length = delta.flatten(1).norm(dim=1)[:, None, None, None]
                point = (x + delta * (eps / 255 / length).clamp(max=1)).clamp(0, 1)
        torch.testing.assert_close(found, point, rtol=0, atol=1e-9)


def test_mim_iterates_equal_the_paper():
    model, x, y = double_net()
    for steps in (1, 4, 10):
        found = MIM(eps=8, step=1, steps=steps, decay=0.9)(model, x, y, generator=rng(6))
        point, momentum = x.clone(), torch.zeros_like(x)
        for _ in range(steps):
            point.requires_grad_()
            (gradient,) = torch.autograd.grad(cross_entropy(model(point), y).sum(), point)
            momentum = 0.9 * momentum + gradient / gradient.abs().sum((1, 2, 3), keepdim=True)
            point = point.detach() + momentum.sign() / 255
            point = torch.max(torch.min(point, x + 8 / 255), x - 8 / 255).clamp(0, 1)
        torch.testing.assert_close(found, point, rtol=0, atol=1e-9)


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


def test_cw_agrees_with_foolbox():
    foolbox = library("foolbox")
    model = Tiny()
    x = images(12)
    y = labelled(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
        attack = foolbox.attacks.L2CarliniWagnerAttack(binary_search_steps=5, steps=150, stepsize=1e-2)
        _, theirs, fooled = attack(wrapped, x, y, epsilons=None)
    assert bool(fooled.all())
    own = CW(eps=255 * 20, steps=150, searches=5)
    ours = own.threat.distance(own(model, x, y, generator=rng(12)), x)
    want = own.threat.distance(theirs, x)
    assert (
        float((ours - want).abs().max()) < 0.005
    )  # Adam moves a pixel by 0.01 at first: very near images differ by that
    assert float(ours.sum() / want.sum()) < 1.01
