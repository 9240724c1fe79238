"""The trials of clusters train a student that the demo's experiment has."""

from pathlib import Path

import pytest
from scripts import ROOT, load_script

from darht.tools.experiment_config import load_experiment


def test_the_student_is_one_of_the_experiment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    clusters = load_script(Path("bench/clusters.py"))
    assert clusters.STUDENT in load_experiment(clusters.EXPERIMENT).students
