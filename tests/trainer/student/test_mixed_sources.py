"""Students trained on labelled rows beside generated ones, about which only teachers say something."""

import json
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
import yaml
from runs import CPU, assert_same_bits, changed, log

from darht.cache.builder.build import build, plan_build
from darht.cache.builder.extend import grow
from darht.cache.builder.seal import seal
from darht.cache.format.commit import COMMITS
from darht.cache.format.manifest import MANIFEST
from darht.cache.read.draw import choose_views, view_logits
from darht.cache.read.feed_plan import plan_feed
from darht.cache.read.loader import GIB
from darht.cache.read.reader import open_cache
from darht.cache.read.select import Selection
from darht.cache.read.sizes import needed_bytes
from darht.cache.read.stream import Feed
from darht.core.config import to_plain
from darht.core.errors import ConfigError
from darht.trainer.progress.metrics import Metrics
from darht.trainer.student.distances import correct_targets
from darht.trainer.student.inner import Examples
from darht.trainer.student.model import StudentOutput
from darht.trainer.student.targets import pseudo_labels
from darht.trainer.student.train import Callbacks, train

SHORT = {"optim": {"epochs": 2, "batch_size": 8, "lr": 0.05}}
WARM = {"kind": "warm", "eps": 32.0, "step": 8.0}


@pytest.fixture(scope="module")
def cache(blend):
    return open_cache(blend)


def test_a_batch_has_its_share_and_rows_without_a_label_the_teachers_answer(cache):
    config = changed(recipe="kd", inner={"step": None, "steps": 10}, **SHORT)
    plan = plan_feed(cache, device=CPU, adversarial=False, batch=8, budget_gib=1)
    with Feed(cache, plan, seed=1, epochs=1) as feed:
        assert (len(feed.training), feed.steps) == (54, 54 // 4)
        for data, at in feed.batches(0):
            step = Examples(config, config.objective(), rows=cache.rows).draw(
                torch.nn.Identity(), data, at, epoch=0, number=0, done=0.0, pgd_share=0.0
            )
            made = data.rows[at] >= 60
            assert int(made.sum()) == 4 and torch.equal(step.known, ~made)
            said = view_logits(data, at, choose_views(data, at, seed=config.seed, epoch=0))
            assert torch.equal(step.y, torch.where(made, said[:, 0].argmax(1), data.labels[at]))
            assert torch.equal(step.targets, said)


def test_robust_teachers_say_what_a_row_is_together():
    logits = torch.tensor([[[0.0, 4.0], [0.1, 0.0], [3.0, 0.0]]])  # [1, 3, 2]
    assert pseudo_labels(logits, torch.tensor([True, False, False])).tolist() == [1]
    assert pseudo_labels(logits, torch.tensor([False, True, True])).tolist() == [0]
    assert pseudo_labels(logits, torch.tensor([False, False, False])).tolist() == [1]


@pytest.mark.parametrize("how", ["drop", "mix"])
def test_teachers_are_corrected_only_where_there_is_a_label(how):
    logits, y, known = torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([1, 1]), torch.tensor([True, False])
    targets, kept = correct_targets(logits, y, how, known)
    assert torch.equal(targets[1], logits[1])
    assert kept.tolist() == [0, 1] if how == "drop" else targets[0].argmax() == 1


def test_accuracy_is_counted_on_rows_with_labels():
    metrics, logits = Metrics(CPU), torch.eye(3)
    x, moved = torch.zeros(3, 3, 2, 2), torch.ones(3, 3, 2, 2)
    step = type("Batch", (), {"x": x, "clean": x, "y": torch.tensor([0, 0, 2])})
    known = torch.tensor([True, True, False])
    metrics.count(StudentOutput(logits, logits), step, known)
    step.x = moved
    metrics.count(StudentOutput(logits, logits), step, known)
    assert metrics.counts[2:].tolist() == [2, 1, 2, 1]


@pytest.mark.parametrize(("recipe", "inner"), [("darht", {}), ("rslad", {}), ("at", WARM)])
def test_recipes_train(cache, tmp_path, recipe, inner):
    config = changed(
        recipe=recipe, inner={"steps": 1} | inner, loss={"phases": (0.2, 0.6)} if recipe == "darht" else {}, **SHORT
    )
    train(config, cache, tmp_path / "run", device=CPU)
    assert len(log(tmp_path / "run")) == 2
    assert set(log(tmp_path / "run")[-1]) >= {"holdout_clean", "holdout_pgd"}


def test_a_streamed_run_that_was_killed_ends_with_the_bits_of_one_that_was_not(cache, tmp_path):
    config = changed(recipe="rslad", inner={"steps": 1}, optim={"epochs": 2, "batch_size": 4, "lr": 0.05})
    options = {"device": CPU, "memory_gib": 0.9 * needed_bytes(cache, adversarial=False) / GIB}
    train(config, cache, tmp_path / "one", **options)
    assert "streamed" in json.loads((tmp_path / "one" / "run.json").read_text())["feed"]

    def kill(step, total, images, metrics):
        if step == 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, cache, tmp_path / "killed", callbacks=Callbacks(on_step=kill), **options)
    train(config, cache, tmp_path / "killed", resume=True, **options)
    assert_same_bits(tmp_path / "one", tmp_path / "killed")


def test_a_build_that_is_killed_goes_on_grows_and_is_trained_from(blend, blend_config, tmp_path):
    """SIGKILL in the middle; the same root hashes as of builds that nobody killed."""
    out, quiet = tmp_path / "cache", {"device": CPU, "on_unit": lambda array, shard, seconds: None}
    command = [sys.executable, "-c", "from darht.cache.cli import cache; cache()", "build", blend_config, "--out", out]
    with subprocess.Popen([*command, "--device", "cpu", "--allow", "cnn"], stdout=subprocess.DEVNULL) as builder:
        while builder.poll() is None and len(list((out / COMMITS).rglob("*.json"))) < 5:
            time.sleep(0.01)
        builder.kill()
    assert builder.returncode == -signal.SIGKILL and not (out / MANIFEST).exists()
    report = build(plan_build(blend_config, device=CPU), out, **quiet)
    assert report.reused >= 5 and report.computed > 0
    assert seal(out).root_hash == open_cache(blend).root_hash

    config: dict[str, Any] = yaml.safe_load(blend_config.read_text())
    config["data"][1]["views"] = 4
    more = tmp_path / "more.yaml"
    more.write_text(yaml.safe_dump(config, sort_keys=False))
    plan = plan_build(more, device=CPU)
    grow(out, plan.spec)
    for folder in (out, tmp_path / "once"):
        build(plan, folder, **quiet)
    assert seal(out).root_hash == seal(tmp_path / "once").root_hash

    grown = open_cache(out)
    options = {"device": CPU, "memory_gib": 0.9 * needed_bytes(grown, adversarial=False) / GIB}
    short = changed(recipe="rslad", inner={"steps": 1}, optim={"epochs": 1, "batch_size": 4, "lr": 0.05})
    train(short, grown, tmp_path / "run", **options)
    assert "streamed" in json.loads((tmp_path / "run" / "run.json").read_text())["feed"]
    assert "holdout_pgd" in log(tmp_path / "run")[-1]


def test_a_recipe_chooses_rows_and_says_so(cache, tmp_path):
    config = changed(recipe="kd", inner={"step": None, "steps": 10}, select=Selection(keep=0.2), **SHORT)
    train(config, cache, tmp_path / "run", device=CPU)
    identity = json.loads((tmp_path / "run" / "run.json").read_text())["identity"]
    assert identity["recipe"]["select"] == {"by": "entropy", "keep": 0.2, "end": "lowest"}
    assert "excluded_rows" in identity and cache.excluded == ()
    assert "select" not in to_plain(changed(recipe="kd"))


def test_batches_that_do_not_hold_the_shares_are_refused(cache, tmp_path):
    with pytest.raises(ConfigError, match="batches of 1 rows do not hold the 2 sources"):
        train(changed(recipe="rslad", optim={"batch_size": 1}), cache, tmp_path / "run", device=CPU)
    with pytest.raises(ConfigError, match=r"got 120, of which 60 are theirs for 54 rows: set optim.batch_size to 108"):
        train(changed(recipe="rslad", optim={"batch_size": 120}), cache, tmp_path / "run", device=CPU)
