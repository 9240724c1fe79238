"""A class for each row that the model shall answer: what counts as success, and what is refused."""

import pytest
import torch
from tiny import NAMES, SMALL, LinearModel, Tiny, images, labelled, rng

from darht.attacks import APGD, APGDT, CW, FABT, FGSM, PGD, SAGA, AutoSAGA, CWLinf, Engine, Transfer
from darht.attacks.objectives import OBJECTIVES, aimed
from darht.core.errors import ConfigError


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


def test_attacks_on_several_classes_take_the_chosen_one_alone(scene):
    model, x, y, targets = scene
    for attack in (APGDT(eps=24, steps=20, objective="margin"), FABT(eps=24, steps=20)):
        found = Engine(rule="full").run(attack, model, x, y, generator=rng(70), targets=targets)
        assert int(found.backwards.max()) <= 21
        assert float(found.success.float().mean()) > 0.6, attack


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


def test_one_step_goes_down_the_targets_loss(scene):
    model, x, y, targets = scene
    pixels = x.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(model(pixels), targets, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, pixels)
    want = ((x * 255).round() - 4 * gradient.sign()).clamp(0, 255) / 255
    torch.testing.assert_close(FGSM(eps=4)(model, x, y, generator=rng(70), targets=targets), want)


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


def test_sets_and_surrogates_take_targets(scene):
    model, x, y, targets = scene
    for attack in (SAGA(eps=48, step=4, steps=20), AutoSAGA(eps=48, step=4, steps=20)):
        made = attack([model, Tiny()], x, y, generator=rng(70), targets=targets)
        assert float((labelled(model, made) == targets).float().mean()) > 0.8
    transfer = Transfer(attack=PGD(eps=48, step=4, steps=20))
    found = transfer.run(model, x, y, surrogates=[Tiny(seed=1), Tiny()], generator=rng(70), targets=targets)
    assert torch.equal(found.success, labelled(model, found.x_adv) == targets)
    assert float(found.success.float().mean()) > 0.8


def test_targets_are_checked(scene):
    model, x, y, targets = scene
    attack = PGD(steps=1)
    for wrong, message in (
        (y, "another class than the label; 70 of 70 rows"),
        (targets.clone().fill_(5), r"classes from 0 to 4; got 5"),
        (targets.clone().fill_(-1), r"classes from 0 to 4; got -1"),
        (targets[:3], "targets must be int64"),
        (targets.float(), "targets must be int64"),
    ):
        with pytest.raises(ConfigError, match=message):
            attack(model, x, y, generator=rng(70), targets=wrong)
        with pytest.raises(ConfigError, match=message):
            SAGA(steps=1)([model], x, y, generator=rng(70), targets=wrong)
    with pytest.raises(ConfigError, match="below the model's 5 classes"):
        SAGA(steps=1)([model], x, y + 7, generator=rng(70))


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_targeted_objectives_rise_with_the_targets_logit(name):
    torch.manual_seed(0)
    logits, y, target = torch.randn(8, 5), torch.zeros(8, dtype=torch.long), torch.ones(8, dtype=torch.long)
    logits[:, 0] = 4.0  # the label leads, as it does where an attack begins
    more = logits.clone()
    more[:, 1] += 0.5
    assert bool((aimed(name, more, y, target) > aimed(name, logits, y, target)).all())
    assert torch.equal(aimed(name, logits, y, None), OBJECTIVES[name](logits, y))
