"""The white-box set: the names it has always had, and AutoAttack equal to AutoAttack's own loop."""

import dataclasses

import pytest
import torch
from frauds import Around, noisy, quantised

from darht.attacks import AutoAttack, Threat
from darht.core.rng import RowRng
from darht.trainer.evaluation.eot import Expectation, draws_random_numbers
from darht.trainer.evaluation.measure import Measurement
from darht.trainer.evaluation.suite import run_autoattack, run_quick, step_of

CPU = torch.device("cpu")
SMALL = AutoAttack(eps=16, steps=5, queries=40)


def measurement(source, model, **options):
    return Measurement(**{"model": model, "source": source, "threat": Threat(eps=16), "device": CPU, **options})


def test_the_quick_set_asks_all_images(sound, digits):
    m = measurement(digits, Around())
    run_quick(m, {"other": quantised()})
    assert [score.name for score in m.scores] == ["clean", "fgsm", "pgd-20", "transfer:other"]
    assert {score.count for score in m.scores} == {120}
    assert m.scores[3].attack["against"] == "other"
    assert [score.family for score in m.scores] == ["", "white-box", "white-box", "transfer"]


@pytest.mark.parametrize("batch", [50, 120])
def test_autoattack_in_batches_is_autoattack(sound, digits, batch):
    m = measurement(digits, Around(), batch=batch)
    run_autoattack(m, SMALL)
    x, y = m.tensors(torch.arange(120).numpy())
    want = SMALL.run(Around(), x, y, generator=RowRng.create(0, "evaluate", rows=torch.arange(120)))
    assert (m.right["autoattack"] == 1).tolist() == want.robust.tolist()
    score = m.scores[-1]
    assert score.name == "autoattack"
    assert {"clean": m.scores[0].correct, **score.attack["after"]} == want.after
    assert m.alive.tolist() == want.robust.tolist()


def test_a_random_model_gets_the_random_version_in_expectation(sound, digits):
    source = dataclasses.replace(digits, images=digits.images[:20], labels=digits.labels[:20])
    m = measurement(source, Expectation(noisy().eval(), 4), random=True)
    run_autoattack(m, SMALL)
    assert list(m.scores[-1].attack["after"]) == ["apgd-ce", "apgd-dlr"]


def test_expectation_is_the_mean_of_draws(sound, digits):
    x = torch.from_numpy(digits.images[:8]).float() / 255
    model = noisy().eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        want = torch.stack([model(x) for _ in range(3)]).mean(0)
        torch.manual_seed(0)
        assert torch.equal(Expectation(model, 3)(x), want)
    assert draws_random_numbers(model, x) and not draws_random_numbers(Around(), x)
    assert not Expectation(model, 3).training


def test_the_step_is_a_quarter_of_epsilon_in_whole_levels():
    assert [step_of(Threat(eps=eps)) for eps in (1, 3, 8, 32)] == [1, 1, 2, 8]
    assert step_of(Threat(eps=128, norm="l2")) == 32
