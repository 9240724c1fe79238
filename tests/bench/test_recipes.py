"""The table of settings: every student has files of its own, and a change reaches only what it names."""

from pathlib import Path
from types import ModuleType

import pytest
from scripts import load_script


@pytest.fixture(scope="module")
def recipes() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).resolve().parents[2] / "bench")  # it imports files that lie beside it
        return load_script(Path("bench/recipes.py"))


def test_every_student_and_seed_has_files_of_its_own(recipes: ModuleType) -> None:
    slugs = [recipes.slug(name, seed) for name in recipes.variants() for seed in range(3)]
    files = {Path(slug).with_suffix(".json") for slug in slugs}
    assert len(files) == len(slugs) == 3 * len(recipes.variants()) > 80
    assert recipes.slug("at, smoothing 0.4", 2) == "at-smoothing-0-4-2"


def test_a_change_leaves_the_rest_of_a_recipe_alone(recipes: ModuleType) -> None:
    base = {"inner": {"kind": "warm", "warm": {"start": "noise"}}, "optim": {"epochs": 6, "lr": 0.1}}
    changed = recipes.merge(base, {"inner": {"warm": {"reset": 3}}, "optim": {"lr": 0.3}})
    assert changed == {
        "inner": {"kind": "warm", "warm": {"start": "noise", "reset": 3}}, "optim": {"epochs": 6, "lr": 0.3},
    }  # fmt: skip
    assert base["inner"]["warm"] == {"start": "noise"} and base["optim"]["lr"] == 0.1


def test_rows_without_labels_are_held_against_as_many_steps(recipes: ModuleType) -> None:
    variants = recipes.variants()
    for name in ("darht", "rslad"):
        unlabelled, longer = variants[f"{name}, lr 0.3, unlabelled"], variants[f"{name}, lr 0.3, longer"]
        assert unlabelled.against == f"{name}, lr 0.3, longer" and unlabelled.recipe == longer.recipe
        assert unlabelled.cache == "mixed" and longer.cache == "cache"
        labelled = 128 - round(128 * recipes.SHARE)
        assert longer.longer * unlabelled.longer * labelled == pytest.approx(128, rel=0.02)
