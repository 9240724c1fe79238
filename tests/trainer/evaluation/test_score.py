"""Accuracies of models whose answers are known, and their intervals."""

import numpy as np
import pytest
import torch
from torch import nn

from darht.attacks import FGSM, PGD, Threat
from darht.attacks.engine.engine import FULL
from darht.cache.sources.load import Source, load_source
from darht.core.nets import build
from darht.core.stats import wilson
from darht.trainer.evaluation.attacks.suite import from_other, pgd_20, white_box
from darht.trainer.evaluation.measure import EvalSetup, begin
from darht.trainer.evaluation.score import Score

CPU = torch.device("cpu")
THRESHOLD = 127.5
VALUES = np.array([100, 118, 121, 124, 127, 128, 131, 134, 137, 200])


class Says(nn.Module):
    """A function of pixels as a model in eval mode."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer
        self.eval()

    def forward(self, x):
        return self.answer(x)


def brightness(x):
    """Class 1 above the middle grey, by a margin that grows with the mean level."""
    margin = (x.flatten(1).mean(1) * 255 - THRESHOLD) * 0.1
    return torch.stack([-margin, margin], dim=1)


BRIGHT, DARK = Says(brightness), Says(lambda x: brightness(x).flip(1))


@pytest.fixture
def greys():
    """Uniform images; all labels are what `brightness` says but the last one's."""
    images = np.repeat(VALUES.astype(np.uint8), 3 * 4 * 4).reshape(-1, 3, 4, 4)
    labels = (VALUES > THRESHOLD).astype(np.int64)
    labels[-1] = 0
    return Source("npz", "test", images, labels, ("dark", "bright"), "0" * 64)


def beyond(eps):
    """Right on clean images, and still right when every pixel moves by `eps` levels against the answer."""
    return (np.abs(VALUES - THRESHOLD) > eps) & (np.arange(len(VALUES)) < len(VALUES) - 1)


def asked(model, source, attacks, **options):
    """A measurement after attacks by name: an attack on the model itself, or one and the model it is made on."""
    m = begin(EvalSetup(**{"model": model, "source": source, "threat": Threat(eps=32), "device": CPU, **options}))
    for name, one in attacks.items():
        step = from_other(name, *one, name) if isinstance(one, tuple) else white_box(m, name, one, engine=FULL)
        m.ask(step, m.correct, on="all images")
    return m


@pytest.mark.parametrize("eps", [1, 4, 8, 30])
@pytest.mark.parametrize("kind", ["fgsm", "pgd"])
def test_a_linear_model_is_right_exactly_where_its_margin_exceeds_epsilon(greys, eps, kind):
    attack = FGSM(eps=eps) if kind == "fgsm" else PGD(eps=eps, step=max(1, eps // 4), steps=20)
    m = asked(BRIGHT, greys, {kind: attack}, seed=3)
    assert (m.right["clean"] == 1).tolist() == beyond(0).tolist()
    assert (m.right[kind] == 1).tolist() == beyond(eps).tolist() == m.alive.tolist()


def test_scores_are_named_counted_and_described(greys):
    m = asked(BRIGHT, greys, {"pgd-20": pgd_20(Threat(eps=8)), "dark": (PGD(eps=8), DARK)}, seed=5)
    m.finish()
    assert [score.name for score in m.scores] == ["clean", "pgd-20", "dark", "worst case"]
    assert [score.correct for score in m.scores[:2]] == [9, beyond(8).sum()]
    assert {score.count for score in m.scores} == {10}
    assert m.scores[0].attack == {}
    about = {"kind": "pgd", "eps": 8, "step": 2.0, "steps": 20, "norm": "linf", "objective": "ce", "random_start": True,
             "against": "the evaluated model", "seed": 5}  # fmt: skip
    assert about.items() <= m.scores[1].attack.items()
    assert m.scores[2].attack["against"] == "dark"
    assert m.scores[3].attack["over"] == ["clean", "pgd-20", "dark"]


def test_transfer_climbs_the_other_model(greys):
    """Against the opposite model, climbing drives every image away from the boundary: all become or stay right."""
    attack = PGD(eps=8, step=2, steps=20)
    assert asked(BRIGHT, greys, {"dark": (attack, DARK)}).alive.tolist() == beyond(0).tolist()
    assert asked(BRIGHT, greys, {"same": (attack, BRIGHT)}).alive.tolist() == beyond(8).tolist()


def test_worst_case_is_taken_image_by_image():
    """Two attacks that break one image each: both leave half of them, together they leave none."""
    images = np.full((2, 3, 4, 4), 200, dtype=np.uint8)
    images[0, :, :, :2] = images[1, :, :, 2:] = 130
    source = Source("npz", "test", images, np.ones(2, dtype=np.int64), ("dark", "bright"), "0" * 64)
    left, right = Says(lambda x: brightness(x[..., :2])), Says(lambda x: brightness(x[..., 2:]))

    def both(x):  # bright where both halves are
        a, b = left(x), right(x)
        return torch.stack([torch.maximum(a[:, 0], b[:, 0]), torch.minimum(a[:, 1], b[:, 1])], 1)

    m = asked(Says(both), source, {"left": (PGD(eps=8), left), "right": (PGD(eps=8), right)})
    m.finish()
    found = [(score.name, score.correct) for score in m.scores]
    assert found == [("clean", 2), ("left", 1), ("right", 1), ("worst case", 0)]


@pytest.mark.parametrize(("eps", "step"), [(1, 1), (3, 1), (8, 2), (32, 8)])
def test_the_step_is_a_quarter_of_epsilon_and_at_least_one_level(eps, step):
    assert pgd_20(Threat(eps=eps)) == PGD(eps=eps, step=step, steps=20)


def test_neither_repetition_nor_batch_size_changes_the_answers():
    source = load_source("digits", None, "test", limit=45)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build("wrn-10-1", 10, {"width": 4}).double().eval()
    model = Says(lambda x: net(x.double()))

    def answers(**options):
        return asked(model, source, {"pgd": PGD(eps=16, step=4, steps=4)}, **options).right["pgd"].tolist()

    first = answers()
    assert answers() == answers(batch=7) == answers(batch=1) == first


def test_evaluation_leaves_the_model_alone(greys):
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).eval()
    asked(model, greys, {"pgd": PGD()})
    assert not model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("correct", "low", "high"), [(0, 0.0, 27.75), (5, 23.66, 76.34), (10, 72.25, 100.0)])
def test_wilson_interval_of_ten(correct, low, high):
    score = Score("clean", correct, 10)
    assert score.interval == pytest.approx((low, high), abs=5e-3)
    assert score.interval == tuple(100 * end for end in wilson(correct, 10))
    assert score.interval[0] <= score.accuracy <= score.interval[1] + 1e-9
