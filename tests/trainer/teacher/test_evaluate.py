"""Accuracies of models whose answers are known."""

import numpy as np
import pytest
import torch
from torch import nn

from darht.attacks import FGSM, PGD
from darht.cache.sources.load import Source, load_source
from darht.core.nets import build
from darht.core.stats import wilson
from darht.trainer.teacher.evaluate import AttackOn, Score, correct_rows, evaluate, quick_attacks

CPU = torch.device("cpu")
THRESHOLD = 127.5
VALUES = np.array([100, 118, 121, 124, 127, 128, 131, 134, 137, 200])


def brightness(x):
    """Class 1 above the middle grey, by a margin that grows with the mean level."""
    margin = (x.flatten(1).mean(1) * 255 - THRESHOLD) * 0.1
    return torch.stack([-margin, margin], dim=1)


def darkness(x):
    return brightness(x).flip(1)


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


@pytest.mark.parametrize("eps", [1, 4, 8, 30])
@pytest.mark.parametrize("kind", ["fgsm", "pgd"])
def test_a_linear_model_is_right_exactly_where_its_margin_exceeds_epsilon(greys, eps, kind):
    attack = FGSM(eps=eps) if kind == "fgsm" else PGD(eps=eps, step=max(1, eps // 4), steps=20)
    assert correct_rows(brightness, greys, None, device=CPU).tolist() == beyond(0).tolist()
    found = correct_rows(brightness, greys, AttackOn(attack), device=CPU, seed=3)
    assert found.tolist() == beyond(eps).tolist()


def test_evaluate_names_counts_and_describes_each_score(greys):
    told = []
    attacks = quick_attacks(8, {"dark": darkness})
    scores = evaluate(
        brightness, greys, attacks, device=CPU, seed=5, on_batch=lambda name, images: told.append((name, images))
    )
    assert [score.name for score in scores] == ["clean", "fgsm", "pgd-20", "transfer:dark", "worst case"]
    assert [score.correct for score in scores[:3]] == [9, beyond(8).sum(), beyond(8).sum()]
    assert {score.count for score in scores} == {10}
    assert told == [(name, 10) for name in ("clean", "fgsm", "pgd-20", "transfer:dark")]
    assert scores[0].attack == {}
    assert scores[2].attack == {
        "kind": "pgd",
        "eps": 8,
        "step": 2.0,
        "steps": 20,
        "norm": "linf",
        "objective": "ce",
        "random_start": True,
        "against": "the evaluated model",
        "seed": 5,
    }
    assert scores[3].attack["against"] == "dark"
    assert scores[4].attack == {"over": ["clean", "fgsm", "pgd-20", "transfer:dark"], "eps": 8}


def test_transfer_climbs_the_other_model(greys):
    """Against the opposite model, climbing drives every image away from the boundary: all become or stay right."""
    attack = PGD(eps=8, step=2, steps=20)
    opposed = correct_rows(brightness, greys, AttackOn(attack, darkness, "dark"), device=CPU)
    assert opposed.tolist() == beyond(0).tolist()
    same = correct_rows(brightness, greys, AttackOn(attack, brightness, "same"), device=CPU)
    assert same.tolist() == beyond(8).tolist()


def test_worst_case_is_taken_image_by_image():
    """Two attacks that break one image each: both leave half of them, together they leave none."""
    images = np.full((2, 3, 4, 4), 200, dtype=np.uint8)
    images[0, :, :, :2] = images[1, :, :, 2:] = 130
    source = Source("npz", "test", images, np.ones(2, dtype=np.int64), ("dark", "bright"), "0" * 64)

    def left(x):
        return brightness(x[..., :2])

    def right(x):
        return brightness(x[..., 2:])

    def both(x):  # bright where both halves are
        return torch.stack(
            [torch.maximum(left(x)[:, 0], right(x)[:, 0]), torch.minimum(left(x)[:, 1], right(x)[:, 1])], 1
        )

    attacks = {name: AttackOn(PGD(eps=8), model, name) for name, model in (("left", left), ("right", right))}
    scores = evaluate(both, source, attacks, device=CPU)
    assert [(score.name, score.correct) for score in scores] == [
        ("clean", 2),
        ("left", 1),
        ("right", 1),
        ("worst case", 0),
    ]


def test_without_attacks_there_is_no_worst_case(greys):
    assert [score.name for score in evaluate(brightness, greys, {}, device=CPU)] == ["clean"]


@pytest.mark.parametrize(("eps", "step"), [(1, 1), (3, 1), (8, 2), (32, 8)])
def test_the_step_is_a_quarter_of_epsilon_and_at_least_one_level(eps, step):
    attacks = quick_attacks(eps, {})
    assert list(attacks) == ["fgsm", "pgd-20"]
    assert attacks["pgd-20"].attack == PGD(eps=eps, step=step, steps=20)
    assert attacks["fgsm"].attack == FGSM(eps=eps)


def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build("wrn-10-1", 10, {"width": 4}).double().eval()


def test_neither_repetition_nor_batch_size_changes_the_answers():
    source, model = load_source("digits", None, "test", limit=45), net()
    attack = AttackOn(PGD(eps=16, step=4, steps=4))

    def answers(**options):
        return correct_rows(lambda x: model(x.double()), source, attack, device=CPU, **options).tolist()

    first = answers()
    assert answers() == first
    assert answers(batch_size=7) == first
    assert answers(batch_size=1) == first


def test_batches_are_told_as_they_are_done(greys):
    told = []
    correct_rows(brightness, greys, None, device=CPU, batch_size=4, on_batch=told.append)
    assert told == [4, 4, 2]


def test_evaluation_leaves_the_model_alone(greys):
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).eval()
    correct_rows(model, greys, AttackOn(PGD()), device=CPU)
    assert not model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("correct", "low", "high"), [(0, 0.0, 27.75), (5, 23.66, 76.34), (10, 72.25, 100.0)])
def test_wilson_interval_of_ten(correct, low, high):
    score = Score("clean", correct, 10)
    assert score.interval == pytest.approx((low, high), abs=5e-3)
    assert score.interval == tuple(100 * end for end in wilson(correct, 10))
    assert score.interval[0] <= score.accuracy <= score.interval[1] + 1e-9
