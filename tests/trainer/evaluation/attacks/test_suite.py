"""The white-box set: the names it has always had, and AutoAttack equal to AutoAttack's own loop."""

import dataclasses
import importlib.util
import sys
import types
import warnings

import pytest
import torch
from frauds import Around, Brightness, noisy, quantised

from darht.attacks import AutoAttack, Threat
from darht.core.errors import ConfigError
from darht.core.rng import RowRng
from darht.trainer.evaluation.attacks import suite
from darht.trainer.evaluation.attacks.eot import Expectation, draws_random_numbers
from darht.trainer.evaluation.attacks.suite import check_reference, run_autoattack, run_quick, run_reference, step_of
from darht.trainer.evaluation.checks.masking import check_masking
from darht.trainer.evaluation.config import EvalConfig
from darht.trainer.evaluation.measure import EvalSetup, begin
from darht.trainer.evaluation.report.write import describe
from darht.trainer.evaluation.run import evaluate

CPU = torch.device("cpu")
SMALL = AutoAttack(eps=16, steps=5, queries=40)


def measurement(source, model, **options):
    return begin(EvalSetup(**{"model": model, "source": source, "threat": Threat(eps=16), "device": CPU, **options}))


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
    x, y = m.setup.tensors(torch.arange(120).numpy())
    want = SMALL.run(Around(), x, y, generator=RowRng.create(0, "evaluate", rows=torch.arange(120)))
    assert (m.right["autoattack"] == 1).tolist() == want.robust.tolist()
    score = m.scores[-1]
    assert score.name == "autoattack"
    assert {"clean": m.scores[0].correct, **score.attack["after"]} == want.after
    assert m.alive.tolist() == want.robust.tolist()


def test_square_that_wins_is_a_warning(sound, digits):
    """The authors' threshold, 0.2 % of all images, where that is more than two."""
    honest, hidden = measurement(digits, Around()), measurement(digits, quantised())
    for m in (honest, hidden):
        run_autoattack(m, AutoAttack(eps=24, steps=20, queries=300))
    after = hidden.scores[-1].attack["after"]
    taken = after["fab-t"] - after["square"]
    assert taken > 2 and honest.warnings == []
    assert hidden.warnings == [
        f"square fooled {taken} of 120 images that withstood the white-box attacks: the gradients mislead, so the true "
        "accuracy is lower still; attack adaptively"
    ]


def test_below_four_classes_the_margin_is_named(greys):
    m = measurement(greys, Brightness().eval())
    run_autoattack(m, SMALL)
    assert "the margin stands in for DLR" in describe(m.scores[-1].attack)
    check = next(one for one in check_masking(m, m.correct, queries=5).checks if "logit ratio" in one.name)
    assert set(check.figures) == {"only margin", "of"}
    assert "PGD on the margin, which stands in for DLR" in check.rule


def test_with_ten_classes_dlr_is_named(sound, digits):
    m = measurement(digits, Around())
    check = next(one for one in check_masking(m, m.correct[:5], queries=5).checks if "logit ratio" in one.name)
    assert set(check.figures) == {"only dlr", "of"} and "PGD on DLR fools" in check.rule


def test_a_random_model_gets_the_random_version_in_expectation(sound, digits):
    source = dataclasses.replace(digits, images=digits.images[:20], labels=digits.labels[:20])
    m = measurement(source, Expectation(noisy().eval(), 4), random=True)
    run_autoattack(m, SMALL)
    assert list(m.scores[-1].attack["after"]) == ["apgd-ce", "apgd-dlr"]


def test_the_reference_agrees_with_ours(sound, digits):
    pytest.importorskip("pyautoattack", reason="the authors' AutoAttack is an extra: pip install 'darht[eval]'")
    source = dataclasses.replace(digits, images=digits.images[:24], labels=digits.labels[:24])
    found = {}
    for run in (run_autoattack, run_reference):
        m = measurement(source, Around())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the package's own, about torch
            run(m, AutoAttack(eps=16))
        found[run] = m
    ours, theirs = (found[run].right["autoattack"] == 1 for run in (run_autoattack, run_reference))
    assert 0 < theirs.sum() < 24 and (ours != theirs).sum() <= 1
    m = found[run_reference]
    score = m.scores[-1]
    assert (score.name, score.correct, score.count) == ("autoattack", theirs.sum(), 24)
    assert (score.attack["by"], score.attack["version"], score.attack["eps"]) == ("pyautoattack", "standard", 16)
    assert m.alive.tolist() == theirs.tolist() and m.ran == ["autoattack:reference"]


def test_the_reference_s_examples_are_judged_by_us(sound, digits, monkeypatch):
    """What a package says about itself is not believed: only pixels count, and only inside the ball."""
    asked = []

    def fake(model, x, y, **options):
        asked.append({**options, "rows": len(x)})
        return x.clone()

    monkeypatch.setattr(suite, "reference", fake)
    m = measurement(digits, Around(), seed=3)
    run_reference(m, AutoAttack(eps=16))
    assert asked == [{"eps": 16, "norm": "linf", "version": "standard", "seed": 3, "rows": m.scores[0].correct}]
    assert m.scores[-1].correct == m.scores[0].correct  # nothing was changed, so nothing fell
    random = measurement(digits, Around(), random=True)
    run_reference(random, AutoAttack(eps=16))
    assert asked[-1]["version"] == random.scores[-1].attack["version"] == "rand"
    monkeypatch.setattr(suite, "reference", lambda model, x, y, **options: x + 0.1)
    with pytest.raises(AssertionError):
        run_reference(measurement(digits, Around()), AutoAttack(eps=16))


def test_a_reference_that_cannot_run_is_refused_before_anything_is_measured(sound, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", types.SimpleNamespace(__spec__=object()))
    check_reference(10)
    with pytest.raises(ConfigError, match="at least 10; the data has 4"):
        check_reference(4)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package pyautoattack: pip install 'darht\[eval\]'"):
        check_reference(10)
    told = []
    config = EvalConfig(tier="standard", reference=True, data="digits", limit=40)
    with pytest.raises(ConfigError, match="pyautoattack"):
        evaluate("python:frauds:honest", config, device=CPU, on_batch=lambda *batch: told.append(batch))
    assert told == []


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
