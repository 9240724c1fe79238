"""What `inner: warm` does when the student collapses, as single-step training can: planted in the scores."""

import dataclasses

import pytest
import torch
from runs import CPU, Stopped, assert_same_bits, changed, log, stop_after

import darht.trainer.student.train as trainer
from darht.trainer.config import AverageConfig, WarmConfig
from darht.trainer.state.checkpoint import CHECKPOINT, PAUSED, Progress
from darht.trainer.student.inner import Examples
from darht.trainer.student.train import Callbacks, train

CONFIG = changed(
    recipe="at",
    loss={"clean_share": 0.25},
    inner={"kind": "warm", "warm": WarmConfig(check_rows=40)},
    optim={"epochs": 4, "batch_size": 20},
)


@pytest.fixture
def plant(monkeypatch):
    """`plant(robust)` makes the check after epoch e give `robust(e, pgd_share)`, and lists both, step by step."""

    def put(robust):
        steps, draw = [], Examples.draw

        def spy(examples, *rest, epoch, pgd_share, **options):
            steps.append((epoch, pgd_share))
            return draw(examples, *rest, epoch=epoch, pgd_share=pgd_share, **options)

        def score(student, source, attack, device, seed):
            return 90.0, float(robust(*steps[-1])) if source.name == "training" else 30.0

        monkeypatch.setattr(Examples, "draw", spy)
        monkeypatch.setattr(trainer, "score", score)
        return steps

    return put


def in_the_third_epoch(share_enough):
    return lambda epoch, pgd_share: 10 if epoch == 2 and pgd_share < share_enough else 60


@pytest.mark.parametrize(
    ("before", "now", "classes", "rows", "expected"),
    [
        ([60.0, 50.0], 29.0, 10, 512, True),
        ([60.0, 50.0], 31.0, 10, 512, False),
        ([100.0], 0.0, 10, 8, True),
        ([10.0, 30.0], 0.0, 10, 4, False),  # of 4 rows at 30 % chance leaves none right once in 4 times
        ([1.5625], 0.78125, 200, 128, False),  # two rows right, then one
        ([6.25], 0.0, 200, 128, True),
        ([19.0], 0.0, 10, 512, False),
        ([22.0], 2.0, 10, 64, False),  # a network that says one class of ten always
        ([45.0], 2.0, 10, 64, True),
        ([90.0], 20.0, 2, 512, True),
        ([], 0.0, 10, 512, False),
    ],
)
def test_a_fall_counts_where_chance_does_not_make_it(before, now, classes, rows, expected):
    progress = Progress(epoch=len(before), history=[{"training_pgd": value} for value in before])
    assert trainer._collapsed({"training_pgd": now}, progress, classes, rows) is expected


def run(cache, out, callbacks=None, **options):
    notes = []
    told = dataclasses.replace(callbacks or Callbacks(), on_note=notes.append)
    progress = train(CONFIG, cache, out, device=CPU, callbacks=told, **options)
    return progress, [note for note in notes if "collapsed" in note]


def test_a_collapsed_run_goes_back_to_the_last_good_epoch_and_mixes_pgd_steps_in(mixed_cache, tmp_path, plant):
    steps = plant(in_the_third_epoch(0.5))
    progress, notes = run(mixed_cache, tmp_path)
    assert notes == [
        "epoch 3: PGD accuracy on training rows collapsed to 10.0 %; back to epoch 2, and half of the adversarial "
        "steps are PGD steps from here on"
    ]
    seen = list(dict.fromkeys(steps))
    assert seen == [(0, 0.0), (1, 0.0), (2, 0.0), (2, 0.5), (3, 0.5)]
    assert (progress.epoch, progress.collapses) == (4, 1)
    assert [(row["epoch"], row["training_pgd"]) for row in log(tmp_path)] == [(1, 60), (2, 60), (3, 60), (4, 60)]


def test_weights_optimizer_and_memory_are_those_of_the_good_epoch(mixed_cache, tmp_path, plant):
    """The same bits as a run that stopped after the good epoch and was told to take PGD steps from there on."""
    plant(in_the_third_epoch(0.5))
    run(mixed_cache, tmp_path / "collapsed")
    with pytest.raises(Stopped):
        run(mixed_cache, tmp_path / "told", callbacks=Callbacks(on_epoch=stop_after(2)))
    kept = torch.load(tmp_path / "told" / CHECKPOINT, weights_only=True)
    kept["progress"]["collapses"] = 1
    torch.save(kept, tmp_path / "told" / CHECKPOINT)
    assert run(mixed_cache, tmp_path / "told", resume=True)[1] == []
    assert_same_bits(tmp_path / "told", tmp_path / "collapsed")


def test_a_second_collapse_leaves_pgd_steps_only_and_there_is_no_third(mixed_cache, tmp_path, plant):
    steps = plant(lambda epoch, pgd_share: 10 if epoch == 2 else 60)
    progress, notes = run(mixed_cache, tmp_path)
    assert [note.split("and ")[1].split(" the")[0] for note in notes] == ["half of", "all"]
    assert list(dict.fromkeys(steps))[2:] == [(2, 0.0), (2, 0.5), (2, 1.0), (3, 1.0)]
    assert (progress.epoch, progress.collapses) == (4, 2)
    assert log(tmp_path)[2]["training_pgd"] == 10  # it is what it is


@pytest.mark.parametrize(("step", "where"), [(5, (2, 0.0)), (7, (2, 0.5)), (9, (3, 0.5))])
def test_a_run_stopped_around_a_collapse_goes_on_to_the_same_bits(mixed_cache, tmp_path, plant, step, where):
    """In the epoch that collapses, while it is done again, and after it."""
    steps = plant(in_the_third_epoch(0.5))
    run(mixed_cache, tmp_path / "whole")
    with pytest.raises(Stopped):
        run(mixed_cache, tmp_path / "cut", callbacks=Callbacks(on_step=stop_after(step)))
    assert steps[-1] == where
    run(mixed_cache, tmp_path / "cut", resume=True)
    assert_same_bits(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize(("step", "where"), [(5, (2, 0.0)), (7, (2, 0.5))])
def test_a_run_paused_around_a_collapse_goes_on_to_the_same_bits(mixed_cache, tmp_path, plant, step, where):
    """The good epoch that a collapse goes back to is the checkpoint's, never the pause's."""
    steps = plant(in_the_third_epoch(0.5))
    run(mixed_cache, tmp_path / "whole")
    seen = []

    def pause(*_):
        seen.append(0)
        if len(seen) == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(mixed_cache, tmp_path / "cut", callbacks=Callbacks(on_step=pause))
    assert steps[-1] == where and (tmp_path / "cut" / PAUSED).is_file()
    run(mixed_cache, tmp_path / "cut", resume=True)
    assert_same_bits(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize(
    ("accuracies", "collapses"),
    [
        ([12, 3, 18, 1], 0),  # of ten classes: below twice chance there is nothing to fall from
        ([60, 45, 31, 23], 0),  # slowly
        ([60, 30, 31, 30], 0),  # half is not below half
        ([60, 40, 29, 29], 1),  # within two epochs
        ([60, 29, 29, 29], 1),
        ([60, 60, 60, 10], 1),
        ([1, 50, 49, 20], 1),
    ],
)
def test_what_counts_as_a_collapse(mixed_cache, tmp_path, plant, accuracies, collapses):
    plant(lambda epoch, pgd_share: accuracies[epoch] if pgd_share == 0 else 60)
    progress, notes = run(mixed_cache, tmp_path)
    assert progress.collapses == len(notes) == collapses


def test_without_rows_to_check_nobody_looks(mixed_cache, tmp_path, plant):
    plant(lambda epoch, pgd_share: pytest.fail("nobody asked"))
    config = changed(CONFIG, inner={"warm": WarmConfig(check_rows=0)}, optim={"epochs": 2})
    progress = train(config, mixed_cache, tmp_path, device=CPU)
    assert all("training_pgd" not in row for row in progress.history)


def test_the_check_is_pgd_10_on_the_first_rows_that_are_trained_on(mixed_cache, tmp_path, monkeypatch):
    asked = []

    def score(student, source, attack, device, seed):
        asked.append((source, attack))
        return 50.0, 40.0

    monkeypatch.setattr(trainer, "score", score)
    config = changed(CONFIG, inner={"steps": 10, "eps": 32}, optim={"epochs": 1})
    train(config, mixed_cache, tmp_path, device=CPU)
    (held, _), (collapse_probe, attack) = asked
    assert (attack.steps, attack.step, attack.eps) == (10, 8, 32)
    training = sorted(set(range(60)) - set(mixed_cache.manifest.holdout))
    assert (collapse_probe.images == mixed_cache.read("image")[training[:40]]).all()
    assert (collapse_probe.labels == mixed_cache.read("label")[training[:40]]).all()
    assert len(held.images) == len(mixed_cache.manifest.holdout)


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_a_mean_of_weights_does_not_hide_a_collapse(mixed_cache, tmp_path, monkeypatch, kind):
    """The rows that are trained on are asked of the student that is trained, held-out ones of what is kept."""
    asked = []

    def score(student, source, *rest):
        asked.append((source.name, student))
        return 90.0, 30.0

    monkeypatch.setattr(trainer, "score", score)
    config = changed(CONFIG, average=AverageConfig(kind=kind, start=0.0), optim={"epochs": 2})
    train(config, mixed_cache, tmp_path, device=CPU)
    by_name = {name: {id(student) for other, student in asked if other == name} for name, _ in asked}
    assert by_name.keys() == {"holdout", "training"} and not by_name["holdout"] & by_name["training"]
