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
    found = transfer_matrix(models, x, y, attacks=[attack], count=40)
    assert found.counted.shape == (3, 3)
    right = {name: labelled(model, x) == y for name, model in models.items()}
    for i, source in enumerate(models):
        for j, target in enumerate(models):
            chosen = balanced_rows(y, right[source] & right[target], 40)
            assert found.counted[i, j] == len(chosen)
    assert found.right[0, 2] == found.right[0, 0] == found.right[2, 2]
    assert found.accuracy[0, 0] < found.accuracy[0, 1] or not found.counted[0, 1]
    low, high = found.interval(0, 0)
    assert (low / 100, high / 100) == wilson(found.right[0, 0], found.counted[0, 0])


def test_worst_case_over_a_list_is_not_above_its_members(scene):
    models, x, y = scene
    attacks = [FGSM(eps=3), PGD(eps=3, step=1, steps=8)]
    both = transfer_matrix(models, x, y, attacks=attacks, count=40)
    one = transfer_matrix(models, x, y, attacks=attacks[:1], count=40)
    assert (both.right_by_class <= one.right_by_class).all()


def test_the_matrix_is_deterministic_and_default_attack_is_apgd(scene):
    models, x, y = scene
    first = transfer_matrix({"a": models["a"]}, x, y, count=20, seed=3)
    assert first.plain() == transfer_matrix({"a": models["a"]}, x, y, count=20, seed=3).plain()
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
    assert balanced_rows(y, y != 1, 6).tolist() == [0, 1, 2, 5, 6, 7]  # a class without a right answer is left out
    assert len(balanced_rows(y, y > 2, 6)) == 0


def test_stored_pixels_are_taken_as_they_are():
    """No floating point copy of a whole split is made, and the answers are those of one."""
    model, x = Tiny(), images(70)
    y, stored = labelled(model, x), (x * 255).round().to(torch.uint8)
    options = {"attacks": (FGSM(eps=8),), "count": 40}
    once, other = (transfer_matrix({"a": model}, pixels, y, **options) for pixels in (x, stored))
    assert (once.right_by_class == other.right_by_class).all() and once.counted.sum() > 0


def test_refusals(scene):
    models, x, y = scene
    with pytest.raises(ConfigError):
        transfer_matrix({}, x, y)
    with pytest.raises(ConfigError):
        transfer_matrix(models, x, y, engine=Engine())
