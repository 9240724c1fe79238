"""What is refused before an attack starts."""

import warnings

import pytest
import torch
from tiny import NAMES, SMALL, Tiny, images, labelled, rng
from torch import nn

from darht.attacks import CW, FABT, PGD, SAGA, AttackWarning, AutoAttack, Engine, Square, Threat
from darht.core.errors import ConfigError


@pytest.fixture(scope="module")
def scene():
    model, x = Tiny(), images(70)
    y = labelled(model, x)
    return model, x, y, (y + 1 + torch.arange(70) % 4) % 5


def test_no_images_are_refused(scene):
    model, x, y, _ = scene
    for attack in (PGD(steps=1), Square(queries=2)):
        with pytest.raises(ConfigError, match=r"an attack needs at least 1 image; got x \[0, 3, "):
            attack(model, x[:0], y[:0], generator=rng(0))
    with pytest.raises(ConfigError, match="an attack needs at least 1 image"):
        SAGA(steps=1)([model], x[:0], y[:0], generator=rng(0))


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


class InPlace(nn.Module):
    """Normalises its pixels in place, as some published code does."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x.sub_(0.5).div_(0.05))


@pytest.mark.parametrize("attack", SMALL, ids=NAMES)
def test_a_model_that_works_in_place_gets_copies(attack):
    model, x = InPlace(Tiny()).eval(), images(6)
    kept, y = x.clone(), torch.arange(6) % 5
    x_adv = attack(model, x, y)
    assert torch.equal(x, kept)
    assert bool(((x_adv >= 0) & (x_adv <= 1)).all())
    if not isinstance(attack, CW | FABT):  # these look for the smallest perturbation, not for one in the ball
        assert bool((attack.threat.distance(x_adv, x) <= attack.threat.radius + 1e-5).all())
    by_hand = attack(lambda z: model.net((z - 0.5) / 0.05), x, y)
    torch.testing.assert_close(x_adv, by_hand, atol=1e-4, rtol=0)


def test_sets_suites_and_engines_hand_out_copies_too():
    model, x, y = InPlace(Tiny()).eval(), images(6), torch.arange(6, dtype=torch.uint8) % 5
    kept = x.clone()
    made = [SAGA(eps=4, steps=2)([model], x, y), Engine().run(PGD(eps=4, step=1, steps=2), model, x, y).x_adv]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttackWarning)
        made.append(AutoAttack(eps=4, steps=2, queries=5).run(model, x, y).x_adv)
    assert torch.equal(x, kept)
    for x_adv in made:
        assert bool((Threat(eps=4).distance(x_adv, x) <= 4 / 255 + 1e-6).all())


def test_an_attack_needs_no_generator_and_takes_the_labels_of_a_cache(scene):
    model, x, y, _ = scene
    attack = PGD(eps=4, step=1, steps=2)
    first = attack(model, x, y)
    for kind in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert torch.equal(attack(model, x, y.to(kind)), first)
    assert torch.equal(attack(model, x, y, seed=0), first) and not torch.equal(attack(model, x, y, seed=1), first)
    given = rng(70)
    assert torch.equal(attack(model, x, y, generator=given, seed=1), attack(model, x, y, generator=given))
    with pytest.raises(ConfigError, match="y must be int64 class indices, or of another integer type"):
        attack(model, x, y.float())
