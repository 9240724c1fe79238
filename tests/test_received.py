"""A cache, a run, a teacher and an export of a stranger: every command reads them, and none runs what they name."""

import shutil
import socket
from pathlib import Path

import click
import pytest
import torch
import yaml
from click.testing import CliRunner
from reseal import rewrite
from runs import write_student

import darht
from darht.cache.builder.teachers import CARD
from darht.cache.cli import cache
from darht.core.errors import ModelError
from darht.tools.cli import inspect
from darht.trainer.cli import evaluate, teacher, train
from darht.trainer.state.checkpoint import BEST, CONFIG, write_run

TRAP = "python:set_by_a_stranger:spring"
DIGITS = ("--data", "digits", "--limit", "60", "--device", "cpu")


@pytest.fixture(scope="module")
def received(tiny_teachers, tiny_cache, tmp_path_factory) -> Path:
    """A folder with `teacher`, `run` and `spec.yaml` whose cards name a callable, and the module that holds it."""
    folder = tmp_path_factory.mktemp("received")
    (folder / "set_by_a_stranger.py").write_text(
        "from pathlib import Path\n\nPath(__file__).with_name('sprung').touch()\n\n\ndef spring(**options):\n    pass\n"
    )
    shutil.copytree(tiny_teachers["cnn"], folder / "teacher")
    rewrite(folder / "teacher" / CARD, arch=TRAP)
    write_run(folder / "run", {"recipe": {"recipe": "at"}}, {"cache": str(tiny_cache)})
    write_student(folder / "run" / BEST, 0)
    rewrite(folder / "run" / BEST / CONFIG, arch=TRAP)
    spec = {"data": {"source": "digits", "limit": 60}, "teachers": {"one": {"path": "teacher"}}}
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    return folder


@pytest.fixture(autouse=True)
def importable(received, monkeypatch):
    monkeypatch.syspath_prepend(received)


def sprung(folder: Path) -> bool:
    return (folder / "sprung").exists()


def say(command: click.Command, *words: object) -> tuple[int, str]:
    done = CliRunner().invoke(command, [str(word) for word in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, " ".join(done.output.split())


def test_no_command_runs_what_a_card_names(received, tiny_cache, tiny_teachers, tmp_path):
    one, run, moved = received / "teacher", received / "run", f"cnn={received / 'teacher'}"
    own = tiny_teachers["cnn"]
    commands: list[tuple[click.Command, tuple[object, ...]]] = [
        (teacher, ("check", one, *DIGITS)),
        (teacher, ("transfer", one, one, *DIGITS, "--out", tmp_path / "transfer")),
        (evaluate, (one, *DIGITS)),
        (evaluate, (run, "--device", "cpu")),
        (evaluate, (run / BEST, *DIGITS)),
        (evaluate, (own, *DIGITS, "--surrogate", one)),
        (train, ("export", run, "--out", tmp_path / "hub")),
        (train, ("export", run, "--format", "onnx", "--out", tmp_path / "onnx")),
        (train, ("--shards", tiny_cache, "--out", tmp_path / "live", "--recipe", "darht", "--set", "teachers=live",
                 "--set", "optim.batch_size=8", "--teacher", moved, "--device", "cpu")),
        (cache, ("build", received / "spec.yaml", "--out", tmp_path / "built", "--device", "cpu")),
        (cache, ("verify", tiny_cache, "--recompute", "10", "--teacher", moved, "--device", "cpu")),
        (inspect, ("rows", tiny_cache, "--out", tmp_path / "rows.json", "--teacher", moved, "--device", "cpu")),
        (inspect, ("index", tiny_cache, "--out", tmp_path / "index", "--student", run)),
        (inspect, ("select", tiny_cache, "--size", "1", "--student", run, "--device", "cpu")),
    ]  # fmt: skip
    for command, words in commands:
        code, said = say(command, *words)
        assert code == 2 and "set_by_a_stranger:spring, which is code" in said and "--trust-code" in said, said
        assert not sprung(received), words


def test_urls_in_what_was_received_are_not_fetched(tiny_cache, tmp_path, monkeypatch):
    def connect(*arguments):
        raise AssertionError(f"connects to {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    url, copy = "http://127.0.0.1:1/x", shutil.copytree(tiny_cache, tmp_path / "cache")
    rewrite(copy / "origin.json", teachers={"cnn": url, "vit": url})
    write_run(tmp_path / "run", {"recipe": {"recipe": "at"}}, {"cache": url})
    write_student(tmp_path / "run" / BEST, 0)
    for command, words, answer in (
        (cache, ("verify", copy, "--recompute", "10", "--device", "cpu"), "is not a teacher folder"),
        (evaluate, (tmp_path / "run", "--device", "cpu"), "is not fetched"),
        (inspect, ("select", copy, "--size", "1", "--student", tmp_path / "run", "--device", "cpu"), "is left out"),
    ):
        assert answer in say(command, *words)[1]


@pytest.mark.parametrize("load", [darht.load_teacher, darht.load_student, darht.evaluate])
def test_python_refuses_as_the_commands_do(received, load):
    folder = received / ("teacher" if load is darht.load_teacher else "run")
    with pytest.raises(ModelError, match="asks to call set_by_a_stranger:spring"):
        load(folder)
    assert not sprung(received)


def test_who_trusts_it_gets_it_called(received, tmp_path, monkeypatch):
    """In a copy, so that the others' trap is not sprung."""
    trusted = Path(shutil.copytree(received, tmp_path / "trusted"))
    (trusted / "set_by_a_stranger.py").rename(trusted / "set_by_a_friend.py")
    rewrite(trusted / "teacher" / CARD, arch="python:set_by_a_friend:spring")
    monkeypatch.syspath_prepend(trusted)
    code, said = say(teacher, "check", trusted / "teacher", *DIGITS, "--trust-code")
    assert code == 2 and "must return a torch.nn.Module" in said and sprung(trusted)
    with pytest.raises(ModelError, match=r"must return a torch\.nn\.Module"):
        darht.load_teacher(trusted / "teacher", trust_code=True)
    with darht.trusting(), pytest.raises(ModelError, match=r"must return a torch\.nn\.Module"):
        darht.load_teacher(trusted / "teacher")


def test_what_was_made_here_is_taken_as_before(tmp_path, monkeypatch):
    (tmp_path / "nets_of_mine.py").write_text(
        "from torch import nn\n\n\ndef make():\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    arch = "python:nets_of_mine:make"
    assert say(teacher, "import", "--arch", arch, "--out", tmp_path / "mine")[0] == 0
    assert darht.load_teacher(tmp_path / "mine")(torch.zeros(1, 3, 8, 8)).shape == (1, 10)
    rewrite(tmp_path / "mine" / CARD, kwargs={"more": 1})
    with pytest.raises(ModelError, match="asks to call nets_of_mine:make"):
        darht.load_teacher(tmp_path / "mine")
