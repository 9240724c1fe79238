"""The experiment for a GPU: in miniature on a CPU, stopped, gone on with, and refused where there is no GPU."""

import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from scripts import load_script

from darht.tools.experiment import load_experiment, read_stages


@pytest.fixture(scope="module")
def gpu():
    return load_script(Path("bench/gpu.py"))


def call(gpu, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["bench/gpu.py", *map(str, words)])
    return gpu.main()


def test_every_step_in_miniature(gpu, monkeypatch, tmp_path, capsys):
    work = tmp_path / "work"
    assert call(gpu, monkeypatch, "--smoke", "--work", work) == 0
    done = read_stages(work)
    kinds = sorted(name.split()[0] for name in done)
    assert kinds == ["cache", "eval", "eval", "teacher", "teacher", "teacher", "train", "train"]
    assert all(step["done"] for step in done.values())
    page = (work / "results.md").read_text()
    assert "whose figures say nothing" in page and page.count("| yes |") == len(done)
    for student in ("darht-warm", "darht-pgd"):
        report = json.loads((work / "run" / student / "eval.json").read_text())
        names = [score["name"] for score in report["scores"]]
        assert "autoattack" in names and f"| {student} | {report['recipe']['inner']['kind']} |" in page
    capsys.readouterr()
    assert call(gpu, monkeypatch, "--smoke", "--work", work) == 0
    out = capsys.readouterr().out
    assert out.count("# done before: ") == len(done) and "\n$ " not in out


def test_a_step_that_takes_too_long_is_stopped_and_gone_on_with(gpu, monkeypatch, tmp_path, capsys):
    steps = gpu.steps_of(gpu.miniature(load_experiment(gpu.RECIPE)), tmp_path, None)
    ran = []

    class Slow:
        def main(self, words, **_):
            ran.append(words)
            if len(ran) == 1:
                raise KeyboardInterrupt

    monkeypatch.setitem(gpu.PROGRAMS, "darht-train", Slow())
    names = ["train darht-warm"]
    assert gpu.work_off(names, steps, tmp_path, 0.0) == gpu.STOPPED
    assert "go on with: python" in capsys.readouterr().err
    assert not read_stages(tmp_path)[names[0]]["done"]
    assert gpu.work_off(names, steps, tmp_path, 0.0) == 0
    assert read_stages(tmp_path)[names[0]]["done"]
    assert gpu.work_off(names, steps, tmp_path, 0.0) == 0
    assert len(ran) == 2 and "--resume" in ran[0]


def test_the_minutes_end_a_command(gpu):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), gpu.at_most(1e-4):
        while True:
            pass
    assert signal.getsignal(signal.SIGINT) == before


def test_the_steps_use_all_views_and_the_whole_test_split(gpu, tmp_path):
    config = load_experiment(gpu.RECIPE)
    steps = gpu.steps_of(config, tmp_path, Path("somewhere"))
    assert list(steps)[:4] == ["teacher resnet", "teacher vit", "teacher bit", "cache"]
    assert all(stage.words[-1] == "--resume" for name, stage in steps.items() if name.startswith(("teacher", "train")))
    for name in config.students:
        assert steps[f"eval {name}"].line.endswith("--tier standard") and "--limit" not in steps[f"eval {name}"].line
    assert "count" not in config.cache["views"] and "limit" not in config.data


def test_mistakes_are_one_line(gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words, said in ((("--all",), "needs a GPU"), (("--smoke", "--step", "nothing"), "no step is called nothing")):
        assert call(gpu, monkeypatch, *words, "--work", tmp_path) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and len(error.splitlines()) == 1 and said in error
