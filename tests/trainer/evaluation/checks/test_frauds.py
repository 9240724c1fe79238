"""Planted frauds are caught: what looks robust to a weak attack fails the checks; the worst case tells the truth."""

import dataclasses
import inspect
import json

import pytest
import torch
from built import sealed_cache

from darht.attacks import AutoAttack
from darht.cache.read.reader import open_cache
from darht.trainer.cli import train
from darht.trainer.config import InnerConfig, OptimConfig, StudentConfig, TrainConfig
from darht.trainer.evaluation.config import EvalConfig
from darht.trainer.evaluation.run import evaluate
from darht.trainer.student import train as train_module

CPU = torch.device("cpu")
SMALL = AutoAttack(steps=20, queries=300)


def ask(name, tmp_path, **options):
    config = EvalConfig(
        **{"data": "digits", "limit": 60, "eps": 24, "autoattack": SMALL, "queries": (300, 1500), **options}
    )
    return evaluate(f"python:frauds:{name}", config, out=tmp_path / name, device=CPU)


def failed(report):
    return {check.name for check in report.masking.checks if not check.passed}


def score(report, name):
    return next(one for one in report.scores if one.name == name)


@pytest.fixture(scope="module")
def honest(sound, tmp_path_factory):
    return ask("honest", tmp_path_factory.mktemp("honest"), tier="standard")


def test_the_honest_model_passes_every_check(honest):
    assert failed(honest) == set()
    assert honest.record["masking"]["passed"]
    assert honest.record["warnings"] == []
    assert score(honest, "worst case").accuracy < 50 < score(honest, "clean").accuracy


def test_a_quantised_input_is_caught(honest, tmp_path):
    report = ask("quantised", tmp_path, tier="standard")
    assert "the gradient leads uphill" in failed(report)
    assert "black-box is weaker than white-box" in failed(report)
    assert score(report, "pgd-20").correct > score(honest, "pgd-20").correct + 15  # what a weak evaluation reports
    assert score(report, "worst case").correct < score(report, "pgd-20").correct - 15  # Square needs no gradient


@pytest.mark.parametrize("name", ["low_confidence", "half"])
def test_unusual_honest_models_are_not_condemned(sound, tmp_path, name):
    report = ask(name, tmp_path, limit=40, queries=(50, 50))
    assert report.masking.passed and "nothing found" in report.masking.verdict


@pytest.mark.parametrize(
    ("name", "check"),
    [("turned", "the gradient leads uphill"), ("constant", "there is a gradient"),
     ("thermometer", "there is a gradient"), ("Remembers", "the answer does not depend on what was asked before"),
     ("batch_statistics", "the answer depends on the pixels alone")],
)  # fmt: skip
def test_other_frauds_are_condemned(sound, tmp_path, name, check):
    report = ask(name, tmp_path, limit=100 if name == "constant" else 30, queries=(20, 20))
    assert check in {one.name for one in report.masking.checks if one.status == "FAIL"}


def test_what_no_seed_fixes_is_measured_with_few_draws(sound, tmp_path):
    report = ask("entropy", tmp_path, limit=40, tier="standard", queries=(50, 50))
    assert "the answer is not random" in failed(report)
    assert "the mean of 2 draws" in report.record["warnings"][0]
    assert "no seed fixes" in report.record["left_out"]["tier standard"]


def test_logits_times_ten_thousand_are_caught(honest, tmp_path):
    report = ask("scaled", tmp_path, tier="standard")
    assert "cross-entropy is no weaker than the logit ratio" in failed(report)
    assert score(report, "pgd-20").correct > score(honest, "pgd-20").correct + 15
    assert abs(score(report, "autoattack").correct - score(honest, "autoattack").correct) <= 1  # DLR stays sound


def test_a_random_noise_layer_is_caught_and_attacked_in_expectation(honest, tmp_path):
    report = ask("noisy", tmp_path, limit=40, samples=3, queries=(300, 200))
    assert "the answer is not random" in failed(report)
    assert any("random" in text for text in report.record["warnings"])
    assert score(report, "pgd-20").accuracy < score(report, "clean").accuracy - 20
    again = ask("noisy", tmp_path / "again", limit=40, samples=3, queries=(300, 200))
    assert again.record == report.record  # its draws are seeded


def test_a_model_without_any_gradient_is_still_attacked(sound, tmp_path):
    report = ask("detached", tmp_path, tier="standard")
    assert "no gradient reaches the pixels" in report.record["left_out"]["pgd-20"]
    assert "black-box is weaker than white-box" in failed(report)
    assert score(report, "worst case").accuracy < score(report, "clean").accuracy - 20


def test_probabilities_are_told(sound, tmp_path):
    assert any("remove the softmax" in text for text in ask("probabilities", tmp_path).record["warnings"])


def test_the_page_says_that_a_fraud_is_not_to_be_believed(sound, tmp_path):
    report = ask("scaled", tmp_path)
    assert "Do not believe the robust accuracy" in report.page.read_text()
    assert "do not believe the numbers" in report.path.with_suffix(".md").read_text()
    assert not json.loads(report.path.read_text())["masking"]["passed"]


def test_the_trainer_has_no_way_to_select_on_test_images():
    """It gets a cache and a recipe: no option names a data set or a split, and selection is on the cache's holdout."""
    named = {parameter.name for parameter in train.params}
    named |= {field.name for kind in (TrainConfig, OptimConfig, InnerConfig) for field in dataclasses.fields(kind)}
    assert not {name for name in named if "test" in name or name in ("data", "root", "split", "validation")}
    assert "load_source" not in inspect.getsource(train_module)


def test_a_cache_of_test_images_is_told(tiny_teachers, tmp_path):
    """The one way around it: a cache built from the test split. The report says so."""
    config = {
        "data": {"source": "digits", "split": "test", "limit": 60, "holdout": 0.3},
        "teachers": {"cnn": {"path": str(tiny_teachers["cnn"])}},
        "views": {"kind": "identity"},
    }
    sealed_cache(config, tmp_path)
    network = StudentConfig(arch="resnet18", kwargs={"width": 4, "blocks": [1, 1, 1, 1]})
    recipe = TrainConfig(
        student=network,
        inner=InnerConfig(kind="pgd", steps=1),
        optim=OptimConfig(epochs=1, batch_size=16),
    )
    train_module.train(recipe, open_cache(tmp_path / "cache"), tmp_path / "run", device=CPU)
    report = evaluate(str(tmp_path / "run"), EvalConfig(limit=60, queries=(10, 50)), device=CPU)
    assert any("60 of 60 test images lie in the cache" in text for text in report.record["warnings"])
    assert "training accuracy, not test accuracy" in report.page.read_text()
