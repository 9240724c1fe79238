"""What is refused before an attack starts."""

import pytest
import torch
from tiny import Tiny, images, labelled, rng

from darht.attacks import PGD, SAGA, Square
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
