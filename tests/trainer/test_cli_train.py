"""`darht-train` as people use it: its options, Ctrl-C and going on, and the export of what came out."""

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import pytest
from click.testing import CliRunner
from runs import assert_same_bits

from darht.core.errors import DarhtError
from darht.trainer.cli import train
from darht.trainer.config import InnerConfig, OptimConfig, StudentConfig, TrainConfig
from darht.trainer.state.checkpoint import CHECKPOINT
from darht.trainer.student import checkpoints
from darht.trainer.student import train as trainer
from darht.trainer.student.run import kept_epochs

SETTINGS = ("student.kwargs.width=4", "student.kwargs.blocks=[1, 1, 1, 1]", "inner.steps=1", "optim.batch_size=32")


def words(cache, out, *settings):
    assignments = [word for setting in (*SETTINGS, *settings) for word in ("--set", setting)]
    return ["--shards", str(cache), "--out", str(out), *assignments, "--device", "cpu"]


def call(*arguments):
    return CliRunner().invoke(train, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def run(tiny_cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    result = call("run", *words(tiny_cache, out, "optim.epochs=2"))
    assert result.exit_code == 0, result.output
    return out


def test_a_run_leaves_logs_curves_and_students_behind(run):
    names = {path.name for path in run.iterdir()} - {"tensorboard"}
    assert names == {"student", "last", "run.json", "checkpoint.pt", "log.jsonl", "log.csv", "curves.png"}
    for folder in ("student", "last"):  # best and last, each whole in the layout of the hub
        assert {path.name for path in (run / folder).iterdir()} == {"model.safetensors", "config.json", "README.md"}
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]


def test_both_words_and_none_mean_training(run, tiny_cache):
    assert call(*words(tiny_cache, run, "optim.epochs=2"), "--resume").exit_code == 0
    said = call("--out", run)
    assert said.exit_code == 2 and "Missing option '--shards'" in said.stderr
    help_text = call("--help").stdout
    assert "--shards" in help_text and "export" in help_text


@pytest.mark.parametrize(("kind", "file"), [("hub", "model.safetensors"), ("plain", "plain.safetensors")])
def test_export_says_what_it_wrote(kind, file, run, tmp_path):
    result = call("export", run, "--out", tmp_path / "out", "--format", kind, "--which", "last")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{tmp_path / 'out'}: {file}, config.json, README.md; ")
    assert (tmp_path / "out" / file).is_file()
    again = call("export", run, "--out", tmp_path / "out", "--format", kind)
    assert again.exit_code == 2 and again.stderr.startswith("error: ") and "is not empty" in again.stderr


def test_control_c_says_how_to_go_on(tiny_cache, tmp_path, monkeypatch):
    out, descend, steps = tmp_path / "a run", trainer.take_step, []

    def interrupted(*arguments):
        steps.append(0)
        if len(steps) == 3:  # in the second epoch of two steps each
            raise KeyboardInterrupt
        descend(*arguments)

    monkeypatch.setattr(trainer, "take_step", interrupted)
    stopped = call(*words(tiny_cache, out, "optim.epochs=3"))
    monkeypatch.undo()
    assert stopped.exit_code == 130
    assert stopped.stdout == ""
    last = stopped.stderr.strip().splitlines()[-2:]
    assert last[0] == "stopped: 1 of 3 epochs are kept, nothing is half written"
    assert last[1].startswith(f"go on with: darht-train --shards {tiny_cache} --out ")
    again = shlex.split(last[1].removeprefix("go on with: "))
    assert again[-1] == "--resume"
    result = call(*again[1:])
    assert result.exit_code == 0, result.output
    assert "3 epochs" in result.stdout


@pytest.mark.parametrize("kept", [0, 1])
def test_epochs_that_no_checkpoint_holds_are_not_called_kept(tiny_cache, tmp_path, monkeypatch, kept):
    """Checkpoints come by the minute: in the third epoch, two of which were done, there is the first, or none."""
    out, descend, steps = tmp_path / "run", trainer.take_step, []

    def interrupted(*arguments):
        steps.append(0)
        if len(steps) == 3:
            monkeypatch.setattr(checkpoints, "EVERY", 1e6)
        if len(steps) == 5:
            raise KeyboardInterrupt
        descend(*arguments)

    monkeypatch.setattr(checkpoints, "EVERY", 0.0 if kept else 1e6)
    monkeypatch.setattr(trainer, "take_step", interrupted)
    stopped = call(*words(tiny_cache, out, "optim.epochs=4"))
    said = stopped.stderr.strip().splitlines()[-2]
    assert said == f"stopped: {kept} of 4 epochs are kept (2 were done), nothing is half written"
    assert (out / CHECKPOINT).is_file() == bool(kept) and kept_epochs(out) == kept


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_real_interrupt_waits_for_the_step_and_loses_nothing(tiny_cache, tmp_path, monkeypatch, number, code):
    """A signal within a step of the second epoch: the step is finished, and the bits are the same in the end."""
    assert call(*words(tiny_cache, tmp_path / "whole", "optim.epochs=3")).exit_code == 0
    take_step, steps = trainer.take_step, []

    def interrupted(*arguments):
        steps.append(0)
        if len(steps) == 3:
            os.kill(os.getpid(), number)
        take_step(*arguments)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(trainer, "take_step", interrupted)
    monkeypatch.setattr(checkpoints, "EVERY", 1e6)  # the pause alone has the first epoch
    stopped = call(*words(tiny_cache, tmp_path / "cut", "optim.epochs=3"))
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) == before
    assert stopped.exit_code == code
    assert "stopping at the end of this step" in stopped.stderr
    assert "kept: epoch 2 up to its step 1 of 2" in stopped.stderr
    assert "stopped: 1 of 3 epochs are kept, nothing is half written" in stopped.stderr
    again = shlex.split(stopped.stderr.strip().splitlines()[-1].removeprefix("go on with: "))
    assert call(*again[1:]).exit_code == 0
    assert_same_bits(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_real_interrupt_ends_with_130_and_leaves_nothing_half(tiny_cache, tmp_path):
    code = "from darht.trainer.cli import train; train()"
    out = tmp_path / "run"
    command = [sys.executable, "-c", code, *words(tiny_cache, out, "optim.epochs=100000")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(1200):
        if (out / "log.jsonl").is_file() or process.poll() is not None:  # checkpoints come by the minute
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert "Traceback" not in told
    assert "--resume" in told.strip().splitlines()[-1]
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp")]


def options(cls, where=""):
    """Every key of a recipe, as `--set` takes it."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        yield f"{where}{field.name}"
        if dataclasses.is_dataclass(hints[field.name]):
            yield from options(hints[field.name], f"{where}{field.name}.")


def test_no_option_lets_test_images_choose(run, tiny_cache, monkeypatch, tmp_path):
    """Selection reads rows held out of the training split; there is no word for anything else."""
    told = {name for parameter in train.commands["run"].params for name in parameter.opts}
    assert told == {
        "--shards",
        "--out",
        "--recipe",
        "--set",
        "--memory",
        "--exclude",
        "--resume",
        "--teacher",
        "--device",
        "--cache-dir",
        "--cache-size",
        "--retry-for",
        "--trust-code",
    }
    keys = set(options(TrainConfig))
    assert {f"optim.{field.name}" for field in dataclasses.fields(OptimConfig)} <= keys
    assert {f"student.{field.name}" for field in dataclasses.fields(StudentConfig)} <= keys
    assert {f"inner.{field.name}" for field in dataclasses.fields(InnerConfig)} <= keys
    suspicious = ("test", "select", "best", "valid", "split", "eval", "data", "holdout")
    assert [key for key in keys if any(word in key for word in suspicious)] == [
        "select"
    ]  # of the cache's training rows

    def refuse(*_, **__):
        raise DarhtError("training loads no data source: it reads the cache alone")

    import darht.cache.sources.load

    monkeypatch.setattr(darht.cache.sources.load, "load_source", refuse)
    assert call(*words(tiny_cache, tmp_path / "new", "optim.epochs=1")).exit_code == 0
    spec = json.loads((Path(tiny_cache) / "spec.json").read_text())
    assert spec["data"]["split"] == "train"
