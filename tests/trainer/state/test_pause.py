"""Ctrl-C between two steps: the run goes on with the next step, to the bits of a run that nobody stopped."""

import pytest
import torch
from runs import CPU, STATEFUL, Stopped, assert_same_bits, changed

from darht.cache.read.reader import open_cache
from darht.trainer.config import AverageConfig
from darht.trainer.progress.metrics import Metrics
from darht.trainer.state.checkpoint import CHECKPOINT, PAUSED
from darht.trainer.state.pause import Pause
from darht.trainer.student import train as trainer
from darht.trainer.student.train import Callbacks, train

STEPS = 5  # of an epoch


@pytest.fixture(scope="module")
def cache(tiny_cache):
    return open_cache(tiny_cache)


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    train(STATEFUL, cache, out, device=CPU)
    return out


def interrupt(cache, out, at, config=STATEFUL, error=KeyboardInterrupt):
    """Begin or go on with a run and stop it after this step; the steps that it made."""
    made = []

    def on_step(step, total, images, metrics):
        made.append(step)
        if step == at:
            raise error

    with pytest.raises(error):
        train(config, cache, out, device=CPU, resume=True, callbacks=Callbacks(on_step=on_step))
    return made


def finish(cache, out, config=STATEFUL):
    made = []
    train(config, cache, out, device=CPU, resume=True, callbacks=Callbacks(on_step=lambda step, *_: made.append(step)))
    assert not (out / PAUSED).exists()
    return made


@pytest.mark.parametrize("at", [2, STEPS, STEPS + 3], ids=["first epoch", "its last step", "second epoch"])
def test_a_paused_run_goes_on_with_the_next_step(at, cache, whole, tmp_path):
    assert interrupt(cache, tmp_path, at)[-1] == at
    assert (tmp_path / PAUSED).is_file()
    assert finish(cache, tmp_path) == list(range(at + 1, 4 * STEPS + 1))
    assert_same_bits(tmp_path, whole)


def test_a_run_paused_and_killed_several_times(cache, whole, tmp_path):
    assert interrupt(cache, tmp_path, 6) == list(range(1, 7))
    assert interrupt(cache, tmp_path, 8) == [7, 8]  # again in the same epoch
    assert interrupt(cache, tmp_path, 9, error=Stopped) == [9]  # as a kill: the pause is what is left
    assert interrupt(cache, tmp_path, 13) == list(range(9, 14))
    assert finish(cache, tmp_path)[0] == 14
    assert_same_bits(tmp_path, whole)


def test_a_run_that_averages_epochs_and_draws_in_its_backbone(cache, tmp_path):
    student = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "proj_drop_rate": 0.3}
    config = changed(
        STATEFUL,
        student={"arch": "timm:vit_tiny_patch16_224", "kwargs": student},
        average=AverageConfig(kind="swa", start=0.3),
        optim={"epochs": 2},
    )
    train(config, cache, tmp_path / "whole", device=CPU)
    interrupt(cache, tmp_path / "cut", STEPS + 2, config)
    finish(cache, tmp_path / "cut", config)
    assert_same_bits(tmp_path / "cut", tmp_path / "whole")


def test_what_is_told_and_kept(cache, tmp_path):
    notes = []

    def on_step(step, total, images, metrics):
        if step == STEPS + 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(STATEFUL, cache, tmp_path, device=CPU, callbacks=Callbacks(on_step=on_step, on_note=notes.append))
    assert notes[-1] == "kept: epoch 2 up to its step 3 of 5"
    kept = torch.load(tmp_path / PAUSED, weights_only=True)
    assert kept["pause"]["steps"] == 3 and kept["pause"]["images"] == 48 and kept["pause"]["counts"][0] == 3
    assert kept["progress"]["epoch"] == torch.load(tmp_path / CHECKPOINT, weights_only=True)["progress"]["epoch"] == 1


def test_an_interrupt_within_a_step_leaves_the_last_epoch(cache, tmp_path, monkeypatch):
    steps, take_step = [], trainer.take_step

    def interrupted(*arguments):
        steps.append(0)
        if len(steps) == STEPS + 2:
            raise KeyboardInterrupt
        take_step(*arguments)

    monkeypatch.setattr(trainer, "take_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(STATEFUL, cache, tmp_path, device=CPU)
    assert (tmp_path / CHECKPOINT).is_file() and not (tmp_path / PAUSED).exists()


def test_generators_go_on_where_they_stood():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        torch.rand(5)
        kept = Pause.read(vars(Pause.here(1, 8, (0.5, 0.4), Metrics(CPU))))
        expected = torch.rand(5)
        torch.manual_seed(4)
        kept.set_generators()
        assert torch.equal(torch.rand(5), expected)
        torch.manual_seed(4)
        before = torch.get_rng_state()
        Pause().set_generators()
        assert torch.equal(torch.get_rng_state(), before)
