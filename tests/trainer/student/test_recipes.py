"""The files under `recipes/` that train one student: the papers' settings, what to expect, and one for every recipe."""

import dataclasses
import itertools
from pathlib import Path

import pytest
from runs import CONFIG, CPU, changed

import darht.trainer.student.train as trainer
from darht.core.config import load_mapping, parse, to_plain
from darht.trainer.config import ComputeConfig, TrainConfig, WarmConfig, load_recipe
from darht.trainer.student.losses import RECIPES

FOLDER = Path(__file__).resolve().parents[3] / "recipes"
FILES = [path for path in sorted(FOLDER.glob("*.yaml")) if "students" not in load_mapping(path)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_a_file_writes_is_what_the_paper_has(path):
    config = load_recipe(path, ())
    assert parse(TrainConfig, to_plain(config), "recipe") == config
    defaults = RECIPES[config.recipe]()
    changed = {
        field.name
        for field in dataclasses.fields(defaults)
        if getattr(config.objective(), field.name) != getattr(defaults, field.name)
    }
    assert changed == {"adaad": {"igdm"}, "ard-warm": {"tau"}}.get(path.stem, set())  # as its head says


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_says_what_it_needs_and_what_to_expect(path):
    head = "\n".join(itertools.takewhile(lambda line: line.startswith("# "), path.read_text().splitlines()))
    assert f"recipes/{path.name}" in head
    assert ("GPU" in head and "ot measured" in head) or "docs/results.md" in head


def test_every_recipe_has_a_file():
    assert {load_recipe(path, ()).recipe for path in FILES} == set(RECIPES)


@pytest.mark.parametrize("inner", ["pgd", "warm"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_in_bfloat16_every_parameter_has_a_gradient_after_one_step(recipe, inner, mixed_cache, tmp_path, monkeypatch):
    """Examples are made inside autocast, whose cache of weights could keep them without gradients before torch 2.11."""
    if RECIPES[recipe].adversarial_when == "never" and inner != "pgd":
        pytest.skip("makes no examples")
    needs_map = RECIPES[recipe].needs_feature_map
    config = changed(
        recipe=recipe,
        average=None,
        targets="first-order" if RECIPES[recipe]().compares_points() else None,
        inner={"kind": inner, "warm": WarmConfig(check_rows=0)} if inner == "warm" else {},
        student=dataclasses.replace(CONFIG.student, feature_map=needs_map),
        compute=ComputeConfig(precision="bf16"),
    )
    without = []

    def look(model, *_):
        without.extend(name for name, value in model.named_parameters() if value.grad is None)
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "take_step", look)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(config, mixed_cache, tmp_path, device=CPU)
    assert without == []
