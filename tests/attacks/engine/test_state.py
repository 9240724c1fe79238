"""A class for each row that the model shall answer: what counts as success."""

import pytest
import torch
from tiny import NAMES, SMALL, Tiny, images, labelled, rng

from darht.attacks import APGD, CW, PGD, CWLinf, Engine


@pytest.fixture(scope="module")
def scene():
    model, x = Tiny(), images(70)
    y = labelled(model, x)
    return model, x, y, (y + 1 + torch.arange(70) % 4) % 5


@pytest.mark.parametrize("attack", SMALL, ids=NAMES)
@pytest.mark.parametrize("rule", ["full", "first_hit"])
def test_success_is_the_target_and_nothing_else(attack, rule, scene):
    model, x, y, targets = scene
    found = Engine(rule=rule, slots=32).run(attack, model, x, y, generator=rng(70), targets=targets)
    assert torch.equal(found.success, labelled(model, found.x_adv) == targets)
    assert found.record["targeted"]
    assert float(attack.threat.distance(found.x_adv, x).max()) <= attack.threat.radius + 1e-6
    order = torch.randperm(70, generator=torch.Generator().manual_seed(2))
    moved = Engine(rule=rule, lanes=2, slots=16).run(
        attack, model, x[order], y[order], generator=rng(70)[order], targets=targets[order]
    )
    assert torch.equal(moved.x_adv, found.x_adv[order])
    assert torch.equal(moved.backwards, found.backwards[order])


def test_a_larger_ball_reaches_every_target(scene):
    model, x, y, targets = scene
    for attack in (
        PGD(eps=64, step=4, steps=30), PGD(eps=64, step=4, steps=30, objective="margin"), APGD(eps=64, steps=50),
        CWLinf(eps=64, step=4, steps=30), APGD(eps=64, steps=50, objective="margin"), CW(eps=4000, steps=80, rate=0.05),
    ):  # fmt: skip
        found = Engine().run(attack, model, x, y, generator=rng(70), targets=targets)
        assert float(found.success.float().mean()) > 0.9, attack
        other = Engine().run(attack, model, x, y, generator=rng(70))
        assert float((labelled(model, other.x_adv) == targets).float().mean()) < 0.6, attack


def test_rows_that_answer_the_target_already_are_left_alone(scene):
    model, x, y, _ = scene
    labels, targets = (y + 1) % 5, y
    found = Engine().run(PGD(steps=4), model, x, labels, generator=rng(70), targets=targets)
    assert bool(found.success.all()) and not bool(found.clean_correct.any())
    assert torch.equal(found.x_adv, x) and int(found.backwards.sum()) == 0 and int(found.first_hit.sum()) == 0


def test_restarts_stop_at_the_target(scene):
    model, x, y, targets = scene
    attack = PGD(eps=10, step=2, steps=4)
    once = Engine().run(attack, model, x, y, generator=rng(70), targets=targets)
    thrice = Engine(restarts=3).run(attack, model, x, y, generator=rng(70), targets=targets)
    assert 0 < int(once.success.sum()) <= int(thrice.success.sum())
    assert torch.equal(thrice.x_adv[once.success], once.x_adv[once.success])
