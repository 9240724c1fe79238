"""The transfer matrix."""

import json

import pytest
import torch
from tiny import Tiny, images, labelled

from darht.attacks import APGD, FGSM, PGD, Engine
from darht.attacks.transfer import balanced_rows, transfer_matrix
from darht.core.errors import ConfigError
from darht.core.stats import wilson


@pytest.fixture(scope="module")
def scene():
    models = {"a": Tiny(), "b": Tiny(seed=1), "twin": Tiny()}
    x = images(120)
    return models, x, labelled(models["a"], x)


def test_the_matrix_counts_what_it_says(scene):
    models, x, y = scene
    attack = PGD(eps=4, step=1, steps=8)
    seen = []
    found = transfer_matrix(models, x, y, attacks=[attack], count=40, on_cell=lambda s, t, cell: seen.append((s, t)))
    assert len(seen) == 9
    right = {name: labelled(model, x) == y for name, model in models.items()}
    for i, source in enumerate(models):
        for j, target in enumerate(models):
            chosen = balanced_rows(y, right[source] & right[target], 40)
            assert found.cells[i][j].count == len(chosen)
    assert found.cells[0][2] == found.cells[0][0] == found.cells[2][2] or found.cells[0][2].correct <= 3
    assert found.cells[0][0].accuracy < found.cells[0][1].accuracy or found.cells[0][1].count == 0
    low, high = found.cells[0][0].interval
    assert (low / 100, high / 100) == wilson(found.cells[0][0].correct, found.cells[0][0].count)


def test_worst_case_over_a_list_is_not_above_its_members(scene):
    models, x, y = scene
    attacks = [FGSM(eps=3), PGD(eps=3, step=1, steps=8)]
    both = transfer_matrix(models, x, y, attacks=attacks, count=40)
    one = transfer_matrix(models, x, y, attacks=attacks[:1], count=40)
    for i in range(3):
        for j in range(3):
            assert both.cells[i][j].correct <= one.cells[i][j].correct


def test_the_matrix_is_deterministic_and_default_attack_is_apgd(scene):
    models, x, y = scene
    first = transfer_matrix({"a": models["a"]}, x, y, count=20, seed=3)
    assert first == transfer_matrix({"a": models["a"]}, x, y, count=20, seed=3)
    assert first.record["attacks"][0]["kind"] == "APGD"
    assert first.record["attacks"][0]["steps"] == APGD().steps


def test_it_is_written_as_table_json_and_picture(scene, tmp_path):
    models, x, y = scene
    found = transfer_matrix(models, x, y, attacks=[FGSM(eps=2)], count=20)
    paths = found.save(tmp_path)
    assert [path.name for path in paths] == ["transfer.md", "transfer.json", "transfer.png"]
    assert paths[0].read_text().startswith("| made on \\ asked of | a | b | twin |")
    held = json.loads(paths[1].read_text())
    assert held["names"] == ["a", "b", "twin"] and len(held["cells"]) == 3
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_rows_are_balanced():
    y = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    chosen = balanced_rows(y, torch.ones(9, dtype=torch.bool), 6)
    assert chosen.tolist() == [0, 1, 3, 4, 5, 6]
    assert len(balanced_rows(y, y != 1, 6)) == 0


def test_refusals(scene):
    models, x, y = scene
    with pytest.raises(ConfigError):
        transfer_matrix({}, x, y)
    with pytest.raises(ConfigError):
        transfer_matrix(models, x, y, engine=Engine())
