"""The files under `recipes/`: each parses, says how it is run and what to expect, and every recipe has one."""

import dataclasses
import itertools
from pathlib import Path

import pytest

from darht.core.config import load_mapping, parse, to_plain
from darht.tools.experiment import load_experiment
from darht.trainer.config import TrainConfig, load_recipe
from darht.trainer.losses import RECIPES

FILES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))
EXPERIMENTS = [path for path in FILES if "students" in load_mapping(path)]
SINGLE = [path for path in FILES if path not in EXPERIMENTS]


@pytest.mark.parametrize("path", SINGLE, ids=lambda path: path.stem)
def test_a_recipe_parses(path):
    config = load_recipe(path, ())
    assert config.recipe == path.stem.removesuffix("-warm")
    assert parse(TrainConfig, to_plain(config), "recipe") == config
    for field in dataclasses.fields(config.objective()):  # what the file writes is what the paper has
        assert getattr(config.objective(), field.name) == getattr(RECIPES[config.recipe](), field.name) or (
            config.recipe,
            field.name,
        ) == ("adaad", "igdm")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_student_of_an_experiment_parses(path):
    students = load_experiment(path).students
    assert students
    for name, student in students.items():
        parse(TrainConfig, student, name)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_begins_with_its_command_and_what_to_expect(path):
    lines = path.read_text().splitlines()
    head = "\n".join(itertools.takewhile(lambda line: line.startswith("# "), lines))
    assert f"recipes/{path.name}" in head
    assert ("darht-train --shards CACHE --recipe" in head) is (path in SINGLE)
    if path in SINGLE:
        assert "GPU" in head and ("not measured" in head or "Not measured" in head)


def test_every_recipe_has_a_file():
    assert {load_recipe(path, ()).recipe for path in SINGLE} == set(RECIPES)
