"""What people see while a student trains."""

import builtins
import itertools
import json
import os
import signal
import sys

import pytest
import torch

from darht.core.errors import ConfigError
from darht.trainer.progress import monitor
from darht.trainer.progress.metrics import Metrics, Reading
from darht.trainer.progress.monitor import EVENTS, Monitor, describe, epoch_line
from darht.trainer.state.checkpoint import write_run

ROW = {"epoch": 1, "loss": 1.25, "train_clean": 50.0, "train_adversarial": None, "holdout_clean": 60.0,
       "holdout_pgd": 30.0, "lr": 0.1, "seconds": 2.0}  # fmt: skip


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when it is told to."""
    now = [0.0]
    monkeypatch.setattr(monitor, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def drawings(monkeypatch, clock):
    """When the curves were drawn; each drawing takes one second."""
    times = []

    def draw(run):
        clock[0] += 1.0
        times.append(clock[0])

    monkeypatch.setattr(monitor, "write_curves", draw)
    monkeypatch.setattr(monitor, "event_writer", lambda folder, first: None)
    return times


def metrics():
    filled = Metrics(torch.device("cpu"))
    filled.counts += torch.tensor([2.0, 3.0, 4.0, 1.0, 8.0, 6.0])
    return filled


def test_figures_in_words():
    assert describe(Reading(1.5, 25.0, 75.0), 1234.4) == "loss 1.500, clean 25.0 %, adv. 75.0 %, 1234 images/s"
    assert describe(Reading(1.5, None, 75.0), 10) == "loss 1.500, adv. 75.0 %, 10 images/s"
    assert describe(Reading(1.5, 25.0, 75.0), 1234.4, 40) == "loss 1.500, clean 25.0 %, adv. 75.0 %"
    assert describe(Reading(1.5, 25.0, 75.0), 1234.4, 3) == "loss 1.500"
    line = epoch_line(ROW, 9)
    assert line == "epoch 1/9, loss 1.2500, training: clean 50.0 %, held out: clean 60.0 %, PGD 30.0 %"
    assert epoch_line({"epoch": 2, "loss": 1.0}, 9) == "epoch 2/9, loss 1.0000"


def test_the_bar_shows_figures_and_speed(tmp_path, clock, drawings, capsys):
    shown = Monitor(tmp_path, 4)
    with shown:
        for step in (1, 2, 3):
            clock[0] += 0.4
            shown.on_step(step, 12, 32, metrics())
        task = shown._bar.tasks[0]
        assert (task.completed, task.total) == (3, 12)
        assert task.description == "epoch 1/4"
        # two steps of 32 images in 0.8 s; the third came too soon after that for another look
        assert task.fields["note"] == "loss 1.500, clean 25.0 %, adv. 75.0 %, 80 images/s"
        assert shown.finished == 0
        shown.on_step(4, 12, 32, metrics())
        assert shown._bar.tasks[0].description == "epoch 2/4"
        assert shown.finished == 1
    assert capsys.readouterr().out == ""


def test_a_log_names_each_epoch_once(tmp_path, clock, drawings, capsys):
    with Monitor(tmp_path, 1) as shown:
        for step in (1, 2):
            clock[0] += 1.0
            shown.on_step(step, 2, 32, metrics())
        shown.on_epoch(ROW)
    said = capsys.readouterr().err
    assert said.count("epoch 1/1") == 1 and "loss 1.2500" in said and "1.500" not in said


def test_a_resumed_bar_begins_where_the_run_stands(tmp_path, clock, drawings):
    with Monitor(tmp_path, 4) as shown:
        shown.on_step(7, 12, 32, metrics())
        assert shown._bar.tasks[0].completed == 7
        assert shown.finished == 2


def test_curves_are_drawn_after_an_epoch_unless_they_take_more_than_a_twentieth(tmp_path, clock, drawings):
    with Monitor(tmp_path, 50) as shown:
        for epoch in range(1, 51):
            clock[0] += 5.0
            shown.on_epoch({**ROW, "epoch": epoch})
        assert drawings[0] == 6.0  # the first epoch has its picture at once
        gaps = {later - earlier for earlier, later in itertools.pairwise(drawings)}
        assert gaps == {21.0}  # 20 seconds of work for one of drawing
        before = len(drawings)
    assert len(drawings) == before + 1  # the last epoch is in the picture
    with Monitor(tmp_path, 50):
        pass
    assert len(drawings) == before + 1  # nothing new, nothing drawn


def test_a_mistake_wipes_the_bar_away(tmp_path, clock, drawings, capsys):
    with pytest.raises(ConfigError), Monitor(tmp_path, 4) as shown:
        raise ConfigError("no")
    assert shown._bar.live.transient


def test_events_for_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    write_run(tmp_path, {"recipe": {"recipe": "at", "student": {"arch": "a"}, "inner": {"kind": "pgd"},
                                    "optim": {"epochs": 1}}}, {})  # fmt: skip
    (tmp_path / "log.jsonl").write_text(json.dumps(ROW) + "\n")
    with Monitor(tmp_path, 1) as shown:
        shown.on_epoch(ROW)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / EVENTS)).Reload()
    assert sorted(events.Tags()["scalars"]) == [
        "accuracy/holdout_clean",
        "accuracy/holdout_pgd",
        "accuracy/train_clean",
        "training/loss",
        "training/lr",
        "training/seconds",
    ]
    assert [(event.step, event.value) for event in events.Scalars("training/loss")] == [(1, 1.25)]
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_without_tensorboard_nothing_is_missed(tmp_path, monkeypatch):
    original = builtins.__import__

    def absent(name, *rest, **options):
        if name.startswith(("tensorboard", "torch.utils.tensorboard")):
            raise ImportError(name)
        return original(name, *rest, **options)

    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setattr(builtins, "__import__", absent)
    assert monitor.event_writer(tmp_path / EVENTS, 1) is None
    assert not (tmp_path / EVENTS).exists()


def test_the_first_interrupt_waits_and_the_second_does_not(tmp_path, clock, drawings):
    before = signal.getsignal(signal.SIGINT)
    with Monitor(tmp_path, 4) as shown:
        assert signal.getsignal(signal.SIGINT) == before  # until something can be kept
        shown.on_step(1, 12, 32, metrics())
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == before
        with pytest.raises(KeyboardInterrupt):
            shown.on_step(2, 12, 32, metrics())
    with Monitor(tmp_path, 4) as shown:
        shown.on_step(1, 12, 32, metrics())
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            shown.on_epoch(ROW)
        assert shown.finished == 1
    assert signal.getsignal(signal.SIGINT) == before
    with Monitor(tmp_path, 4) as shown:
        shown.on_step(1, 12, 32, metrics())
    assert signal.getsignal(signal.SIGINT) == before
