"""Answers that are looked up among the test images are found."""

import dataclasses

import frauds
import numpy as np
import torch

from darht.attacks import Threat
from darht.trainer.evaluation.attacks.suite import run_quick
from darht.trainer.evaluation.checks.memorised import check_memorised
from darht.trainer.evaluation.measure import EvalSetup, begin

SEEN, NEAR = "what cannot be seen changes nothing", "robustness is not of these very images"


def looked_up(source, levels):
    """The label of a test image to everything near it, with a slope that attacks can follow."""
    table = torch.from_numpy(source.images).float() / 255

    def after(x, z):
        far, at = (x.detach()[:, None] - table[None]).abs().flatten(2).amax(2).min(1)
        known = 9.0 * torch.eye(10)[torch.from_numpy(source.labels)[at]] + 0.1 * z
        return torch.where((far <= levels / 255)[:, None], known, z)

    class Table(frauds.Around):
        def forward(self, x):
            return after(x, self.net(x))

    return Table()


class Inverted(torch.nn.Module):
    def forward(self, x):
        return 1 - x


def statuses(model, digits):
    few = dataclasses.replace(digits, images=digits.images[:30], labels=digits.labels[:30])
    m = begin(EvalSetup(model=model, source=few, threat=Threat(eps=48), device=torch.device("cpu")))
    run_quick(m, {})
    return {check.name: check.status for check in check_memorised(m, m.correct)}


def test_an_honest_model_knows_more_than_these_images(sound, digits):
    assert statuses(frauds.honest(), digits) == {SEEN: "pass", NEAR: "pass"}


def test_a_table_of_the_test_images_is_found(sound, digits):
    assert statuses(looked_up(digits, 50), digits)[NEAR] == "FAIL"


def test_a_table_of_hashes_is_found(sound, digits):
    """The net sees inverted images, so that only the table knows their labels."""
    model = looked_up(digits, 0.01)
    model.net = torch.nn.Sequential(Inverted(), model.net)
    assert statuses(model, digits)[SEEN] == "FAIL"


def test_without_images_there_is_nothing_to_say(sound, digits):
    m = begin(EvalSetup(model=frauds.honest(), source=digits, threat=Threat(eps=8), device=torch.device("cpu")))
    assert check_memorised(m, np.zeros(0, dtype=np.int64)) == ()
