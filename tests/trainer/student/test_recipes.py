"""The files under `recipes/` that train one student: the papers' settings, what to expect, and one for every recipe."""

import dataclasses
import itertools
from pathlib import Path

import pytest

from darht.core.config import load_mapping, parse, to_plain
from darht.trainer.config import TrainConfig, load_recipe
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
    assert changed == ({"igdm"} if config.recipe == "adaad" else set())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_says_what_it_needs_and_what_to_expect(path):
    head = "\n".join(itertools.takewhile(lambda line: line.startswith("# "), path.read_text().splitlines()))
    assert f"recipes/{path.name}" in head
    assert "GPU" in head and "ot measured" in head


def test_every_recipe_has_a_file():
    assert {load_recipe(path, ()).recipe for path in FILES} == set(RECIPES)
