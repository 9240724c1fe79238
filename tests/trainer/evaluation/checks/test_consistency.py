"""Answers that depend on something else than the pixels are found; honest ones are not suspected."""

import dataclasses

import frauds
import pytest
import torch

from darht.attacks import Threat
from darht.trainer.evaluation.checks.consistency import check_memory, check_probe, probe
from darht.trainer.evaluation.checks.fresh import Fresh
from darht.trainer.evaluation.measure import EvalSetup, begin

CPU = torch.device("cpu")


def setup_of(model, digits):
    return EvalSetup(model=model, source=digits, threat=Threat(eps=24), device=CPU)


@pytest.mark.parametrize("name", ["honest", "half", "low_confidence", "scaled", "never"])
def test_an_answer_that_depends_on_the_pixels_passes(sound, digits, name):
    model = getattr(frauds, name)()
    check = check_probe(model, probe(model, setup_of(model, digits)))
    assert check.passed and set(check.figures.values()) == {0.0, 32.0}


@pytest.mark.parametrize(
    ("name", "way"),
    [("batch_statistics", "alone"), ("by_place", "in another order"), ("dull_without_gradients", "with gradients"),
     ("entropy", "again"), ("noisy", "again")],
)  # fmt: skip
def test_an_answer_that_depends_on_more_is_found(sound, digits, name, way):
    model = getattr(frauds, name)()
    check = check_probe(model, probe(model, setup_of(model, digits)))
    assert check.status == "FAIL" and check.figures[way] >= 3


def test_a_model_that_changes_while_it_is_evaluated_is_found(sound, digits):
    asked = [0]

    def tired(z):
        asked[0] += len(z)
        return z if asked[0] < 500 else z.flip(1)

    model = frauds.Around(after=tired)
    found = probe(model, setup_of(model, digits))
    asked[0] += 500
    check = check_probe(model, found)
    assert check.status == "FAIL" and check.figures["at the end"] == 32 and check.figures["again"] == 0


def memory(model, digits):
    with Fresh(model) as fresh:
        few = dataclasses.replace(digits, images=digits.images[:20], labels=digits.labels[:20])
        m = begin(setup_of(model, few))
        return check_memory(m, fresh)


def test_an_honest_model_has_no_memory(sound, digits):
    assert memory(frauds.honest(), digits).passed


@pytest.mark.parametrize("make", [frauds.Remembers, frauds.Global])
def test_a_memory_is_found_wherever_it_lies(sound, digits, make):
    frauds.SEEN.clear()
    check = memory(make(), digits)
    assert check.status == "FAIL"
    assert check.figures["examples of a fresh copy"] >= 3 or check.figures["pgd-20 examples"] >= 3
    frauds.SEEN.clear()
