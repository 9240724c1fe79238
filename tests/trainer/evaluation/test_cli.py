"""`darht-eval` on the command line: what it prints, and the one line that a mistake is answered with."""

import json
import os
import shutil
import signal
import subprocess
import sys
import types

import pytest
import torch
from click.testing import CliRunner

from darht.core.nets import build
from darht.trainer.evaluation import cli
from darht.trainer.evaluation import run as run_module
from darht.trainer.evaluation.checks.masking import check_masking
from darht.trainer.evaluation.cli import evaluate
from darht.trainer.evaluation.score import Score

SMALL = '{"width": 4, "blocks": [1, 1, 1, 1]}'


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(run_module, "_MASKING_IMAGES", dict.fromkeys(("quick", "standard", "full"), 5))
    monkeypatch.setattr(run_module, "check_masking", lambda m, rows, **options: check_masking(m, rows, queries=20))


def call(*arguments):
    return CliRunner().invoke(evaluate, [str(argument) for argument in arguments])


def succeed(*arguments):
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result


def fail(*arguments):
    result = call(*arguments)
    assert isinstance(result.exception, SystemExit), result.exception  # no traceback
    assert result.exit_code == 2
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.output
    assert lines[0].startswith("error: ") and result.stdout == ""
    return lines[0]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "net.pt"
    torch.save(build("resnet18", 10, json.loads(SMALL)).state_dict(), path)
    return path


def test_a_run(runs):
    result = succeed(runs / "pgd", "--limit", 40, "--device", "cpu")
    for part in ("clean", "fgsm", "pgd-20", "transfer:cnn", "transfer:vit", "worst case", "noise is weaker"):
        assert part in result.stdout
    assert "inner: pgd, 1 steps on the student" in result.stdout
    eps = json.loads((runs / "pgd" / "eval.json").read_text())["threat"]["eps"]
    assert result.stdout.splitlines()[0] == f"eps {eps:g} levels = {eps / 255:.4f}"
    assert f"written to {runs / 'pgd' / 'eval.json'}, .md, .npz and {runs / 'pgd' / 'report.html'}" in result.stdout
    assert "alive" in result.stderr


@pytest.mark.parametrize("width", [80, 140])
def test_the_table_says_who_was_asked_and_cuts_no_name(width, capsys, monkeypatch):
    about = {"norm": "linf", "eps": 8.0, "steps": 20, "against": "the evaluated model"}
    name = "transfer:a_teacher_of_quite_a_long_name_that_goes_on"
    right = "that are right when clean"
    scores = [
        Score("clean", 10_000, 10_000),
        Score(name, 5412, 10_000, about, "transfer"),
        Score("square", 400, 1000, about, "black-box", f"the first 1000 images {right}"),
        Score("adaptive:z, ce", 400, 410, about, "adaptive", "the images still alive"),
    ]
    masking = types.SimpleNamespace(passed=width == 80, checks=[])
    report = types.SimpleNamespace(scores=scores, masking=masking, record={"warnings": []}, note="", path="p", page="q")
    monkeypatch.setenv("COLUMNS", str(width))
    cli._print(report)
    said = capsys.readouterr().out
    table = [line.split("\u2502")[1:-1] for line in said.splitlines() if line.startswith("\u2502")]
    assert table and max(map(len, said.splitlines()[:-2])) <= width
    columns = [" ".join(cell.strip() for cell in column) for column in zip(*table, strict=True)]
    assert name in columns[0].replace(" ", "") and "5412/10000" in columns[3]
    assert "\u2026" not in said
    for words in ("all", "first 1000", "still alive"):
        assert words in columns[4]
    assert ("do not believe the robust accuracy" in said) == (not masking.passed)


def test_the_word_measure_may_be_said_or_not(runs, tmp_path):
    words = (runs / "pgd", "--limit", 40, "--device", "cpu", "--no-transfer", "--out", tmp_path)
    assert succeed("measure", *words).stdout == succeed(*words).stdout
    assert "transfer" not in (tmp_path / "eval.md").read_text().split("Left out")[0].split("inner")[0]


def test_best_and_last(runs):
    result = succeed(runs / "pgd", "--limit", 40, "--device", "cpu", "--no-transfer", "--which", "both")
    assert "eval.json" in result.stdout and "eval-last.json" in result.stdout
    assert json.loads((runs / "pgd" / "eval-last.json").read_text())["which"] == "last"


def test_both_of_a_run_that_has_one_is_told_before_anything_is_measured(runs, tmp_path):
    run = shutil.copytree(runs / "pgd", tmp_path / "run")
    shutil.rmtree(run / "last")
    assert "last" in fail(run, "--limit", 40, "--device", "cpu", "--which", "both")
    assert not (run / "eval.json").exists()


def test_plain_weights(weights, tmp_path):
    words = ("--arch", "resnet18", "--kwargs", SMALL, "--data", "digits", "--limit", 40, "--eps", "8/255")
    more = ("--mean", "0.5,0.5,0.5", "--std", "0.2,0.2,0.2", "--device", "cpu", "--out", tmp_path / "e")
    succeed(weights, *words, *more)
    record = json.loads((tmp_path / "e" / "eval.json").read_text())
    assert record["model"]["kind"] == "weights" and record["threat"]["eps"] == 8
    assert record["preprocessing"]["mean"] == [0.5, 0.5, 0.5]


def test_two_runs_are_compared(runs, tmp_path, monkeypatch):
    for kind in ("pgd", "cached"):
        succeed(runs / kind, "--limit", 40, "--device", "cpu", "--no-transfer")
    result = succeed("compare", runs / "pgd", runs / "cached", "--out", tmp_path)
    assert "pgd" in result.stdout and "cached" in result.stdout and "paired bootstrap" in result.stdout
    assert (tmp_path / "compare.html").is_file()
    monkeypatch.setenv("COLUMNS", "80")
    long = shutil.copytree(runs / "pgd", tmp_path / "a-folder-of-a-long-name" / "that-goes-on-and-on-beyond-its-column")
    said = succeed("compare", runs / "pgd", long).stdout
    names = "".join(line.split("\u2502")[1].strip() for line in said.splitlines() if line.startswith("\u2502"))
    assert str(long) in names and "\u2026" not in said


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("nowhere",), "there is no 'nowhere'"),
        (("{weights}",), "say with --arch"),
        (("{weights}", "--arch", "resnet18"), "give --data NAME"),
        (("{weights}", "--arch", "resnet19", "--data", "digits"), "did you mean 'resnet18'?"),
        (("{weights}", "--arch", "resnet18", "--data", "digits"), "does not fit the architecture"),
        (("{run}/run.json", "--arch", "resnet18", "--data", "digits"), "save model.state_dict() alone"),
        (("{weights}", "--arch", "resnet18", "--data", "digits", "--kwargs", "{{"), "--kwargs must be JSON"),
        (("{weights}", "--arch", "resnet18", "--data", "digits", "--kwargs", "[1]"), "--kwargs must be a JSON mapping"),
        (("{weights}", "--arch", "resnet18", "--data", "digits", "--mean", "1,2"), "--mean must be three numbers"),
        (("{weights}", "--arch", "resnet18", "--data", "digits", "--std", "a,b,c"), "numbers with commas"),
        (("{run}", "--teacher", "cnn"), "--teacher reads NAME=FOLDER"),
        (("{run}", "--eps", ".05"), "whole number of pixel levels"),
        (("{run}", "--eps", ".031"), "is 7.9 levels as a share of 1: write 8 or 8/255"),
        (("{run}", "--eps", "eight"), "epsilon reads 8 or 8/255"),
        (("{run}", "--norm", "l2", "--eps", "1.0"), "an L2 epsilon below 16 has two readings"),
        (("{run}", "--norm", "l2"), "an L2 radius has no default"),
        (("{run}", "--reference"), "add --tier standard"),
        (("{run}", "--tier", "full", "--shares", "0.1,0.1"), "shares of the training data must differ"),
        (("{run}", "--shares", "0.1"), "--shares is for the substitutes of --tier full; the tier is quick"),
        (("{run}", "--tier", "standard", "--shares", "0.1"), "the tier is standard"),
        (("{run}", "--teacher", "cnn=here", "--no-transfer"), "give one of them"),
        (("{run}", "--arch", "resnet18"), "is a run, which knows its network"),
        (("{run}/student", "--kwargs", '{{"width": 4}}'), "is a student, which knows its network"),
        (("{teacher}", "--mean", "0,0,0"), "is a teacher, which knows its network"),
        (("{teacher}", "--resize", "32"), "is a teacher, which knows its network"),
        (("{teacher}", "--which", "last"), "is no run but a teacher: --which chooses"),
        (("{teacher}", "--which", "both", "--limit", "40"), "is no run but a teacher: --which both"),
        (("{run}", "--tier", "full", "--shares", "0.1,2"), "shares of the training data lie in (0, 1]"),
        (("{run}", "--weights", "ema"), "is a run, which knows its network"),
        (("{run}", "--test-limit", "100000"), "limit must be at most the number of rows"),
        (("{run}", "--limit", "100000"), "limit must be at most the number of rows"),
        (("{run}", "--data", "cifar10"), "give the folder that holds them as root"),
        (("{run}", "--data", "cifra10"), "source must be one of"),
        (("{run}", "--surrogate", "nowhere", "--limit", "40"), "there is no 'nowhere'"),
        (("python:frauds:missing", "--data", "digits"), "has no callable 'missing'"),
        (("python:frauds:greys", "--data", "digits"), "python:frauds:greys cannot be built"),
        (("python:frauds:no_network", "--data", "digits"), "must return a torch.nn.Module; it returned Source"),
        (("python:frauds:answers_in_words", "--data", "digits"), "must return logits [B, C]; it returned dict"),
        (("{run}", "--eps", "0"), "epsilon reads 8 or 8/255, in pixel levels above 0"),
        (("python:frauds", "--data", "digits"), "python:package.module:callable"),
        (("timm:no_such_net", "--data", "digits"), "cannot be had with its published weights"),
        (("compare", "{run}"), "at least two evaluations"),
        (("compare", "nowhere", "{run}"), "is not an evaluation of this version"),
    ],
)
def test_a_mistake(words, part, runs, weights, sound, tiny_teachers):
    places = {"weights": weights, "run": runs / "pgd", "teacher": tiny_teachers["cnn"]}
    said = [word.format(**places) for word in words]
    assert part in fail(*said, *(() if words[0] == "compare" else ("--device", "cpu")))


def test_help_is_light_and_tells_the_forms():
    code = (
        "import sys, click.testing\n"
        "from darht.trainer.evaluation.cli import evaluate\n"
        "for words in (['--help'], ['measure', '--help'], ['compare', '--help']):\n"
        "    result = click.testing.CliRunner().invoke(evaluate, words)\n"
        "    assert result.exit_code == 0 and 'Usage' in result.output, result.output\n"
        "print([name for name in ('torch', 'zarr', 'timm', 'scipy', 'sklearn', 'jinja2') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_python_that_is_typed_is_looked_for_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "nets_evaluated_here.py").write_text("number = 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert "has no callable 'make'" in fail("python:nets_evaluated_here:make", "--data", "digits", "--device", "cpu")


def test_a_stopped_evaluation_says_how_to_go_on(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "run_quick", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    words = (weights, "--arch", "resnet18", "--kwargs", SMALL, "--data", "digits", "--limit", 60, "--out", tmp_path)
    stopped = call(*words)
    assert stopped.exit_code == 143, stopped.output
    kept, again = stopped.stderr.strip().splitlines()[-2:]
    assert kept == "stopped: what was measured is in eval-parts and is not measured again"
    assert again.startswith("go on with: evaluate measure") and f"--out {tmp_path}" in again
