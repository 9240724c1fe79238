"""Recipes by name: those that come with darht, files before them, and what is neither."""

import tomllib
from pathlib import Path

import pytest

from darht.core.errors import ConfigError
from darht.core.recipes import built_in_recipes, find_recipe

FOLDER = Path(__file__).resolve().parents[2] / "recipes"


def test_every_file_of_the_folder_has_a_name():
    assert set(built_in_recipes()) == {path.stem for path in FOLDER.glob("*.yaml")} >= {"darht", "rslad", "digits-demo"}
    assert find_recipe(Path("darht")).read_text() == (FOLDER / "darht.yaml").read_text()


def test_the_package_holds_them():
    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())
    assert "recipes/*.yaml" in project["tool"]["setuptools"]["package-data"]["darht"]
    assert (FOLDER.parent / "src" / "darht" / "recipes").resolve() == FOLDER


def test_a_file_comes_before_a_name_and_a_folder_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rslad").mkdir()
    assert find_recipe(Path("rslad")) == built_in_recipes()["rslad"]
    (tmp_path / "darht").write_text("recipe: at\n")
    assert find_recipe(Path("darht")) == Path("darht")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("drht", "no file drht, and no recipe of that name comes with darht; did you mean darht"),
        ("%", "they are adaad-warm, adaad, adr, ard-warm, ard, at, "),
        ("recipes/rslad.yaml", "cannot read recipes/rslad.yaml: there is no such file; the recipe that comes .* rslad"),
        ("own.yaml", r"cannot read own.yaml: there is no such file$"),
        ("some/darht", "cannot read some/darht"),
    ],
)
def test_what_is_neither(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        find_recipe(Path(text))
