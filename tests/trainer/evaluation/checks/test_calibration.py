"""Calibration by hand, and the table of corruptions."""

import numpy as np
import pytest
import torch
from frauds import Around

from darht.attacks import Threat
from darht.trainer.evaluation.checks import calibration as module
from darht.trainer.evaluation.checks.calibration import calibration, run_corruptions
from darht.trainer.evaluation.ledger import Ledger
from darht.trainer.evaluation.measure import EvalSetup, begin


def test_the_error_is_the_mean_gap():
    sure = np.log(np.array([0.9] * 4 + [0.6] * 4))
    logits = np.stack([sure, np.log(1 - np.exp(sure))], 1)
    labels = np.array([0, 0, 0, 1, 0, 0, 0, 0])
    found = calibration(logits, labels)
    assert found.error == pytest.approx(100 * (0.5 * 0.15 + 0.5 * 0.4))
    assert found.counts == (4, 4)
    assert found.confidence == pytest.approx((0.6, 0.9))
    assert found.accuracy == (1.0, 0.75)


def test_huge_logits_are_certain():
    found = calibration(np.array([[1e5, 0.0], [0.0, 1e5]]), np.array([0, 0]))
    assert found.error == pytest.approx(50)


def test_corruptions_are_measured_once(sound, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CORRUPTIONS", dict.fromkeys(("gaussian noise", "contrast")))
    told = []
    m = begin(EvalSetup(
        model=Around(), source=digits, threat=Threat(eps=8), device=torch.device("cpu"), batch=70,
        ledger=Ledger(tmp_path, {}), on_batch=lambda *batch: told.append(batch),
    ))  # fmt: skip
    table = run_corruptions(m)
    assert list(table["accuracy"]) == ["gaussian noise", "contrast"]
    assert all(len(values) == 5 for values in table["accuracy"].values())
    assert table["mean_accuracy"] == pytest.approx(np.mean(list(table["accuracy"].values())), abs=1e-3)
    assert told[-1][:3] == ("corruption: contrast", 600, 600)
    monkeypatch.setattr(module, "corrupt", None)
    assert run_corruptions(m) == table
