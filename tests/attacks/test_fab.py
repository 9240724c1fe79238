"""FAB on linear models, whose nearest boundary is known."""

import pytest
import torch
from tiny import LinearModel, images, labelled, rng

from darht.attacks import FABT, Engine


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fab_finds_the_nearest_boundary(norm):
    model, x = LinearModel(), 0.25 + images(20, side=6) / 2
    y = labelled(model, x)
    attack = FABT(eps=120 if norm == "linf" else 2000, norm=norm, steps=30, targets=3)
    found = Engine(rule="full").run(attack, model, x, y, generator=rng(20))
    best = model.distance(x, y, norm)
    assert bool(found.success.all())
    ratio = attack.threat.distance(found.x_adv, x) / best
    assert float(ratio.max()) < 1.25 and float(ratio.min()) > 0.99


def test_fab_finds_the_nearest_boundary_of_the_target():
    model, x = LinearModel(), 0.25 + images(20, side=6) / 2
    y = labelled(model, x)
    targets = (y + 2) % 4
    found = Engine(rule="full").run(FABT(eps=250, steps=30), model, x, y, generator=rng(20), targets=targets)
    weight = model.net[1].weight.detach()
    with torch.no_grad():
        logits = model(x)
    gaps = logits - logits.gather(1, targets[:, None])
    each = gaps / (weight[None] - weight[targets][:, None]).abs().sum(2).clamp(min=1e-12)
    bound = each.amax(1)  # to win against the strongest rival alone
    ratio = (found.x_adv - x).abs().amax((1, 2, 3)) / bound
    assert bool(found.success.all())
    assert float(ratio.min()) > 0.99 and float(ratio.median()) < 1.25
