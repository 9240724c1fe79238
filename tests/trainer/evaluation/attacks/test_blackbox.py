"""Attacks by questions alone, and substitutes trained on the answers."""

import numpy as np
import pytest
import torch
from frauds import Around, quantised

from darht.attacks import Threat
from darht.cache.sources.load import load_source
from darht.core.errors import ConfigError
from darht.trainer.evaluation.attacks import blackbox
from darht.trainer.evaluation.attacks.substitute import Substitution, label_by_asking, train_substitute
from darht.trainer.evaluation.ledger import Ledger
from darht.trainer.evaluation.measure import EvalSetup, begin

CPU = torch.device("cpu")
FEW = Substitution(shares=(0.05, 0.75), rounds=2, epochs=12, width=8, lr=0.01)


def measurement(source, **options):
    return begin(EvalSetup(**{"model": Around(), "source": source, "threat": Threat(eps=32), "device": CPU, **options}))


def test_queries_fool_a_model_that_hides_its_gradient(sound, digits):
    m = measurement(digits, model=quantised())
    blackbox.run_queries(m, m.correct[:30], square=200, rays=400)
    square, rays = m.scores[1:]
    assert (square.name, rays.name) == ("square", "rays")
    assert square.count == rays.count == 30 and "first 30 images" in square.on
    assert square.correct < 20 and rays.correct < 25


def test_without_a_surrogate_it_is_said(sound, digits):
    m = measurement(digits)
    blackbox.run_surrogates(m, {})
    assert "--surrogate" in m.left_out["surrogate"]
    blackbox.run_surrogates(m, {"twin": Around()})
    assert m.scores[-1].name == "surrogate:twin" and m.scores[-1].accuracy < 50


def test_a_substitute_learns_from_answers_alone(sound):
    train = load_source("digits", None, "train", limit=300)
    blind = type(train)("digits", "train", train.images, np.zeros_like(train.labels), train.classes, "")
    asked = []

    def ask(x):
        asked.append(len(x))
        return label_by_asking(Around(), x)

    net = train_substitute(FEW, blind, 0.5, ask, seed=0, device=CPU)
    assert sum(asked) == 150 + 150  # the share, and its augmentation
    x = torch.from_numpy(train.images[150:]).float() / 255
    with torch.no_grad():
        agreement = (net(x).argmax(1) == Around()(x).argmax(1)).float().mean()
    assert agreement > 0.6
    again = train_substitute(FEW, blind, 0.5, ask, seed=0, device=CPU)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True))


def test_no_round_trains_on_more_images_than_allowed(sound):
    train = load_source("digits", None, "train", limit=100)
    asked, config = [], Substitution(shares=(1.0,), rounds=2, epochs=1, width=8, most=40)

    def ask(x):
        asked.append(len(x))
        return label_by_asking(Around(), x)

    train_substitute(config, train, 1.0, ask, seed=0, device=CPU)
    assert asked == [40, 40]  # what the first round trains on, and its augmentation
    assert config.record(1.0, 100)["training_images"] == 40
    assert config.record(0.1, 100)["training_images"] == 10


def test_more_data_make_a_better_attack_and_nothing_is_trained_twice(sound, digits, tmp_path, monkeypatch):
    train = load_source("digits", None, "train", limit=400)
    wide = Threat(eps=64)  # where the two differ by twenty images, whatever the rounding; at 32 by two
    m = measurement(digits, ledger=Ledger(tmp_path, {}), threat=wide)
    blackbox.run_substitutes(m, train, FEW, m.correct[:50])
    few, many = m.scores[1:]
    assert (few.name, many.name) == ("substitute:5% of data", "substitute:75% of data")
    assert many.correct < few.correct <= 50
    assert many.attack["substitute"]["training_images"] == 300 and many.attack["step"] == 8
    monkeypatch.setattr(blackbox, "train_substitute", None)
    second = measurement(digits, ledger=Ledger(tmp_path, {}), threat=wide)
    blackbox.run_substitutes(second, train, FEW, m.correct[:50])
    assert second.scores == m.scores


def test_without_training_images_it_is_said(sound, digits):
    m = measurement(digits)
    blackbox.run_substitutes(m, "they are not there", FEW, m.correct)
    assert "they are not there" in m.left_out["substitute"]


@pytest.mark.parametrize(
    "options", [{"shares": ()}, {"shares": (0.0,)}, {"shares": (1.5,)}, {"rounds": 0}, {"most": 0}]
)
def test_what_is_refused(options):
    with pytest.raises(ConfigError):
        Substitution(**options)


def test_at_least_one_image_is_held():
    assert Substitution().images(0.01, 20) == 1
    assert Substitution().images(1.0, 20) == 20
