"""The mean of the weights: its default, its update against plain arithmetic, and a run that goes on with it."""

import dataclasses
import json
import tarfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import CONFIG, CPU, changed
from torch import nn

from darht.cache.read.reader import open_cache
from darht.trainer.config import AverageConfig, load_recipe
from darht.trainer.state.checkpoint import identity_diff, load_student, read_run, write_run
from darht.trainer.student.averaging import averaged_model, default_average, is_due
from darht.trainer.student.losses import RECIPES
from darht.trainer.student.setup import with_average
from darht.trainer.student.train import train


@given(steps=st.integers(1, 10**7))
def test_the_mean_looks_back_over_a_twentieth_of_the_run_and_2000_steps_at_most(steps):
    average = default_average(RECIPES["darht"](), steps)
    horizon = 1 / (1 - average.decay)
    assert average.kind == "ema" and horizon == pytest.approx(min(2000, steps / 20 + 1))
    assert average.decay**steps < 0.3  # what it began with is forgotten


def test_a_recipe_without_adversarial_images_averages_nothing():
    kinds = {name: default_average(recipe(), 100).kind for name, recipe in RECIPES.items()}
    assert {name for name, kind in kinds.items() if kind == "none"} == {"kd"}


@pytest.mark.parametrize("config", [AverageConfig(kind="ema", decay=0.7), AverageConfig(kind="swa")])
def test_all_tensors_follow_the_formula_and_counters_are_copied(config):
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double()
    average, history = averaged_model(net, config), []
    for number in range(4):
        with torch.no_grad():
            net(torch.randn(5, 2, dtype=torch.float64))
            net[0].weight.add_(number)
        history.append({name: value.clone() for name, value in net.state_dict().items()})
        average.update_parameters(net)
    for name, found in average.module.state_dict().items():
        want = history[0][name]
        for count, state in enumerate(history[1:], start=1):
            rate = 1 - config.decay if config.kind == "ema" else 1 / (count + 1)
            want = want + rate * (state[name] - want) if want.is_floating_point() else state[name]
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    assert int(average.module[1].num_batches_tracked) == 4


def test_when_the_mean_is_taken():
    ema, swa = AverageConfig(kind="ema"), AverageConfig(kind="swa", start=0.5)
    assert is_due(ema, step=True, done=0.0) and not is_due(ema, step=False, done=1.0)
    assert is_due(swa, step=False, done=0.5) and not is_due(swa, step=False, done=0.4)
    assert not is_due(swa, step=True, done=1.0) and not is_due(AverageConfig(kind="none"), step=True, done=1.0)
    assert averaged_model(nn.Linear(1, 1), AverageConfig(kind="none")) is None


def test_a_run_records_what_the_default_came_to_and_goes_on_with_it(tiny_cache, tmp_path):
    cache, config = open_cache(tiny_cache), changed(average=None, optim={"epochs": 1})
    train(config, cache, tmp_path, device=CPU)
    recorded = read_run(tmp_path)["identity"]["recipe"]["average"]
    assert recorded["kind"] == "ema" and recorded["decay"] == pytest.approx(2 / 22)  # two batches of 32 of 89 rows
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    kept = load_student(tmp_path / "last", CPU)[0].state_dict()
    assert all(torch.equal(checkpoint["average"][f"module.{name}"], value) for name, value in kept.items())
    assert not torch.equal(checkpoint["student"]["head.weight"], kept["head.weight"])
    identity = read_run(tmp_path)["identity"]
    identity["recipe"]["average"] = {"kind": "ema", "decay": 0.5, "start": 0.75}  # the rule of another day
    write_run(tmp_path, identity, {})
    assert with_average(config, cache, tmp_path).average == AverageConfig(kind="ema", decay=0.5)
    assert with_average(CONFIG, cache, tmp_path).average == AverageConfig(kind="none")


def test_a_run_from_before_goes_on_without_a_mean(tmp_path):
    with tarfile.open(Path(__file__).parents[2] / "before_rooms.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    config = load_recipe(tmp_path / "recipe.yaml", ())
    assert config.average is None
    assert with_average(config, open_cache(tmp_path / "cache"), tmp_path / "run").average == AverageConfig()


def test_a_setting_that_a_record_does_not_know_has_its_default():
    recipe = json.loads(json.dumps(dataclasses.asdict(CONFIG)))
    recipe |= {"loss": dataclasses.asdict(CONFIG.objective()) | {"phases": [0.2, 0.6]}}
    now = {"recipe": recipe, "cache_root_hash": "c"}
    old = json.loads(json.dumps(now))
    del old["recipe"]["inner"]["warm"]["momentum"], old["recipe"]["loss"]["kd"], old["recipe"]["targets"]
    assert identity_diff(old, now) == []
    now["recipe"]["inner"]["warm"]["momentum"] = 0.1
    assert identity_diff(old, now) == ["recipe.inner.warm.momentum: 0.3 -> 0.1"]
