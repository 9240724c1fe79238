"""An evaluation that is shared: the numbers of one process, whoever made them and whoever was killed."""

import json
import multiprocessing
import os
import signal
import time

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from darht.attacks import AutoAttack
from darht.core.errors import ConfigError, ModelError
from darht.trainer.evaluation import run as run_module
from darht.trainer.evaluation.cli import evaluate as command
from darht.trainer.evaluation.config import EvalConfig
from darht.trainer.evaluation.run import assist, evaluate
from darht.trainer.evaluation.setup import setup_of
from darht.trainer.evaluation.workers import _device, helpers

CPU = torch.device("cpu")
CONFIG = EvalConfig(tier="standard", data="digits", limit=251, eps=24, teachers=None, autoattack=AutoAttack(
    steps=2, queries=10), queries=(5, 10))  # fmt: skip


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Checks on five images, with few queries."""
    tiers = ("quick", "standard", "full")
    monkeypatch.setattr(run_module, "_MASKING_IMAGES", dict.fromkeys(tiers, 5))
    monkeypatch.setattr(run_module, "_MASKING_QUERIES", dict.fromkeys(tiers, 10))


@pytest.fixture
def small_batches(monkeypatch):
    def small(*arguments):
        setup = setup_of(*arguments)
        object.__setattr__(setup, "batch", 16)
        return setup

    monkeypatch.setattr(run_module, "setup_of", small)


def workers():
    return [process for process in multiprocessing.active_children() if process.name.startswith("darht-eval")]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.*") if path.is_file()}


def test_a_worker_that_is_killed_leaves_the_numbers_of_one_process(sound, tmp_path):
    """The first batches are made by the other process, which then dies of SIGKILL in whatever it does."""
    notes, shown = [], []

    def on_batch(name, done, total, alive):
        shown.append((name, done, total))
        if (name, done) == ("clean", 0):
            deadline = time.monotonic() + 200
            while len(list((tmp_path / "shared" / "eval-parts").glob("clean-*.npz"))) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            (child,) = workers()
            os.kill(child.pid, signal.SIGKILL)
            child.join()

    evaluate(sound, CONFIG, out=tmp_path / "alone", device=CPU)
    evaluate(sound, CONFIG, out=tmp_path / "shared", device=CPU, workers=2, on_batch=on_batch, on_note=notes.append)
    assert files(tmp_path / "shared") == files(tmp_path / "alone")
    assert notes == ["worker 1 was killed by SIGKILL: the others go on"]
    assert ("clean", 251, 251) in shown
    assert workers() == []


def test_processes_of_torchrun_share_the_images(sound, small_batches, tmp_path, monkeypatch):
    """Run one after the other: the second process makes everything, the first one writes the report of it."""
    out = tmp_path / "out"
    words = ["python:frauds:honest", "--data", "digits", "--limit", "40", "--eps", "24", "--no-transfer",
             "--device", "cpu", "--out", str(out)]  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        result = CliRunner().invoke(command, words)
        assert result.exit_code == 0, result.output
        assert (out / "eval.json").exists() == (rank == "0") and bool(result.stdout) == (rank == "0")
        parts = (out / "eval-parts").glob("*.*")
        made = {path: path.stat().st_mtime_ns for path in parts if not path.name.startswith("fresh-copies")}
        if rank == "1":
            before = made
    assert made == before and {path.suffix for path in made} == {".npz"}
    monkeypatch.delenv("RANK")
    alone = [str(tmp_path / "alone") if word == str(out) else word for word in words]
    assert CliRunner().invoke(command, alone).exit_code == 0
    assert json.loads((out / "eval.json").read_text()) == json.loads((tmp_path / "alone" / "eval.json").read_text())
    monkeypatch.setenv("RANK", "0")
    result = CliRunner().invoke(command, [*words, "--workers", "2"])
    assert "torchrun has started 2 processes: leave --workers 2 out" in result.stderr


def test_a_model_that_no_seed_fixes_is_not_shared(sound, tmp_path):
    config = EvalConfig(data="digits", limit=24, eps=8)
    assist("python:frauds:entropy", CPU, config=config, out=tmp_path, world=2)
    assert not (tmp_path / "eval-parts").exists()


def test_what_cannot_be_shared():
    with (
        pytest.raises(ModelError, match=r"Around cannot be sent to workers .*python:module:callable"),
        helpers(print, Around(), CPU, 2),
    ):
        pass
    with pytest.raises(ConfigError, match="at least one worker; got 0"), helpers(print, "model", CPU, 0):
        pass


class Around(nn.Module):
    """Holds a function that has no name."""

    def __init__(self):
        super().__init__()
        self.function = lambda x: x


def test_workers_go_round_the_gpus_unless_one_was_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [_device(torch.device("cuda"), number).index for number in (1, 2, 3)] == [1, 0, 1]
    assert _device(torch.device("cuda", 1), 2).index == 1 and _device(CPU, 3) == CPU
