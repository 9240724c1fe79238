"""The page about GPUs is written a section at a time, and again to the same bytes."""

import sys
from pathlib import Path

import pytest
from scripts import ROOT, load_script

import darht.trainer.student.train as trainer
from darht.trainer.evaluation.attacks import adaptive


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return load_script(Path("bench/gpu_page.py"))


def test_a_page_is_written_a_section_at_a_time_in_any_order(driver, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    counts = iter(range(100))
    sections = {name: (title, lambda name=name: f"{name} {next(counts)}\n") for name, (title, _) in driver.MADE.items()}
    monkeypatch.setattr(driver, "MADE", sections)
    monkeypatch.setattr(driver.epoch_gap, "section", lambda cache, before: f"gap of {cache} and {before}\n")

    def write(*words):
        monkeypatch.setattr(sys, "argv", ["bench/gpu_page.py", "--out", str(page), *words])
        assert driver.main() == 0
        return page.read_text()

    write("--only", "kept")
    write("--cache", "a", "--before", "b")
    text = write()
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == [f"## {title}" for title in driver.TITLES]
    assert text.startswith("# ") and text.endswith("gap of a and b\n") and "kept 0" not in text
    assert driver.page(driver.sections_of(text)) == text
    again = write("--only", "engine")
    assert "engine 2" in text and again == text.replace("engine 2", "engine 5")


def test_the_page_of_the_docs_is_one_that_the_driver_writes(driver):
    text = (ROOT / "docs" / "benchmarks-gpu.md").read_text()
    assert driver.page(driver.sections_of(text)) == text


def test_two_options_belong_together(driver, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["bench/gpu_page.py", "--out", str(tmp_path / "page"), "--cache", "a"])
    with pytest.raises(SystemExit):
        driver.main()


def test_folding_is_timed_in_miniature(monkeypatch):
    folding = load_script(Path("bench/folding.py"))
    monkeypatch.setattr(folding, "ROWS", 4)
    monkeypatch.setattr(adaptive, "STEPS", 2)
    found = folding.measured({"width": 2, "blocks": [1, 1, 1, 1]}, steps=1, rounds=1)
    assert len(found) == 4 and min(found.values()) > 0 and folding.page(found).count("\n") == 5


def test_gaps_of_a_run_are_timed_and_told(fine_cache, monkeypatch):
    gap = load_script(Path("bench/epoch_gap.py"))
    student = gap.SETTINGS["student"] | {"kwargs": {"width": 2, "blocks": [1, 1, 1, 1]}}
    optim = gap.SETTINGS["optim"] | {"batch_size": 16}
    monkeypatch.setattr(gap, "SETTINGS", gap.SETTINGS | {"student": student, "optim": optim})
    for name in ("compute_gradients", "take_step", "_scores", "check_finite"):
        monkeypatch.setattr(trainer, name, getattr(trainer, name))  # put back at the end
    found = gap.run(fine_cache)
    assert len(found["gap"]) == len(found["scoring"]) == gap.EPOCHS - 1
    assert all(whole > part > 0 for whole, part in zip(found["gap"], found["scoring"], strict=True))
    one = {"gap": 2.0, "scoring": 0.5, "rest": 1.5}
    assert "| in all | 1.00 | 0.50 |" in gap.page({"before": one, "after": one | {"gap": 1.0}})
