"""APGD and its targeted form: against the authors' own code, and on chosen classes."""

import warnings

import pytest
import torch
from tiny import Tiny, images, labelled, library, rng

from darht.attacks import APGD, APGDT, FABT, Engine

EXACT = Engine(fold=False, channels_last=False)


@pytest.fixture(scope="module")
def scene():
    model, x = Tiny(), images(70)
    y = labelled(model, x)
    return model, x, y, (y + 1 + torch.arange(70) % 4) % 5


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


def test_attacks_on_several_classes_take_the_chosen_one_alone(scene):
    model, x, y, targets = scene
    for attack in (APGDT(eps=24, steps=20, objective="margin"), FABT(eps=24, steps=20)):
        found = Engine(rule="full").run(attack, model, x, y, generator=rng(70), targets=targets)
        assert int(found.backwards.max()) <= 21
        assert float(found.success.float().mean()) > 0.6, attack
