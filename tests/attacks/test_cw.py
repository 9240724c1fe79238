"""Carlini & Wagner: a linear model, whose nearest boundary is known, and foolbox."""

import warnings

from tiny import LinearModel, Tiny, images, labelled, library, rng

from darht.attacks import CW, Engine


def test_cw_finds_the_nearest_boundary():
    model, x = LinearModel(), 0.25 + images(12, side=6) / 2
    y = labelled(model, x)
    attack = CW(eps=2000, steps=200, searches=7, first_c=1.0)
    found = Engine(rule="full").run(attack, model, x, y, generator=rng(12))
    far = model.distance(x, y, "l2") > 0.02  # nearer than one Adam step is beyond its resolution
    assert bool(found.success.all()) and int(far.sum()) >= 8
    ratio = attack.threat.distance(found.x_adv, x) / model.distance(x, y, "l2")
    assert float(ratio[far].max()) < 1.25 and float(ratio.min()) > 0.99


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
