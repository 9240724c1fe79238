"""RayS: hard labels only, inside the ball, and as near as the boundary of a linear model allows."""

import pytest
import torch
from tiny import LinearModel, Tiny, images, labelled, rng

from darht.attacks import Engine
from darht.attacks.rays import RayS
from darht.core.errors import ConfigError


class OnlyLabels(torch.nn.Module):
    """The class as a one-hot vector, without a gradient."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, x):
        with torch.no_grad():
            logits = self.model(x)
        return torch.nn.functional.one_hot(logits.argmax(1), logits.shape[1]).to(x.dtype)


def test_labels_are_all_it_needs():
    model, x = Tiny(), images(20)
    y = labelled(model, x)
    attack = RayS(eps=24, queries=300)
    seen = Engine().run(attack, model, x, y, generator=rng(20))
    blind = Engine().run(attack, OnlyLabels(model), x, y, generator=rng(20))
    assert torch.equal(seen.x_adv, blind.x_adv)
    assert int(seen.success.sum()) > 10
    assert int(seen.backwards.sum()) == 0
    assert bool((attack.threat.distance(seen.x_adv, x) <= attack.threat.radius + 1e-6).all())


def test_it_finds_what_the_closed_form_allows_and_nothing_else():
    model, x = LinearModel(), images(40, side=6).clamp(0.3, 0.7)  # the pixel range never cuts
    y = labelled(model, x)
    nearest = model.distance(x, y, "linf") * 255
    found = Engine().run(RayS(eps=20, queries=400), model, x, y, generator=rng(40))
    assert not bool(found.success[nearest > 20].any())
    longer = Engine().run(RayS(eps=30, queries=1500), model, x, y, generator=rng(40))
    assert bool((nearest < 30).all()) and bool(longer.success.all())


def test_more_queries_never_lose_an_image():
    model, x = Tiny(), images(20)
    y = labelled(model, x)
    few, many = (Engine().run(RayS(eps=8, queries=n), model, x, y, generator=rng(20)).success for n in (50, 400))
    assert bool((many | ~few).all())
    assert int(many.sum()) > int(few.sum())


def test_with_its_whole_budget_it_ends_in_the_ball():
    model, x = Tiny(), images(10)
    y = labelled(model, x)
    attack = RayS(eps=2, queries=50)
    x_adv = attack(model, x, y, generator=rng(10))
    assert bool((attack.threat.distance(x_adv, x) <= attack.threat.radius + 1e-6).all())
    assert torch.equal(x_adv, attack(model, x, y, generator=rng(10, seed=5)))  # nothing is drawn


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"norm": "l2"}, "only L-inf"),
        ({"queries": 0}, "at least 1"),
        ({"tolerance": 0.0}, "above 0"),
        ({"eps": 0.03}, "write eps: 8"),
    ],
)
def test_what_is_refused(options, part):
    with pytest.raises(ConfigError, match=part):
        RayS(**options)
