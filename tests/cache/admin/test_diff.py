"""What differs between two caches, down to the logit."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from built import sealed_cache

from darht.cache.admin.compare import compare
from darht.cache.admin.diff import diff_caches, diff_spec
from darht.cache.builder.seal import seal
from darht.cache.export.webdataset import export_webdataset
from darht.cache.format.commit import read_commit, write_commit
from darht.cache.format.layout import layouts
from darht.cache.format.manifest import read_spec
from darht.cache.format.store import Store
from darht.cache.read.reader import open_cache
from darht.core.storage import open_storage

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def wider(tiny_cache_config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A cache with fewer views, another attack and one teacher less than the tiny one, and its YAML."""
    import yaml

    config = yaml.safe_load(tiny_cache_config.read_text())
    config["views"] = {"padding": 1, "flip": False, "count": 4}
    config["attacks"] = {"pgd-cnn": {**config["attacks"]["pgd-cnn"], "steps": 1}}
    folder = tmp_path_factory.mktemp("other")
    return sealed_cache(config, folder), folder / "cache.yaml"


def change(folder: Path, name: str, index: tuple[int, ...], value: float) -> None:
    """Change one number of the first unit of an array, with records and manifest that fit."""
    array, store = layouts(read_spec(folder))[name], Store(folder)
    values = store.read(array, array.rows(0)).copy()
    values[index] = value
    size, sha256, _ = store.write(array, 0, values)
    commit = read_commit(open_storage(folder), array, 0)
    assert commit is not None
    write_commit(open_storage(folder), array, type(commit)(**{**vars(commit), "size": size, "sha256": sha256}))
    seal(folder)


def test_a_copy_and_an_export_are_the_same(tiny_cache, copied, tmp_path):
    export_webdataset(open_cache(tiny_cache), tmp_path / "tars", "blocks")
    for other in (copied, tmp_path / "tars"):
        found = diff_caches(tiny_cache, other, values=True)
        assert found.same and not found.spec
        assert [array.name for array in found.arrays] == list(open_cache(tiny_cache).arrays)


def test_one_number_is_found_and_measured(tiny_cache, copied):
    logits = open_cache(tiny_cache).read("logits/vit/clean")[5, 2]
    change(copied, "logits/vit/clean", (5, 2, int(logits.argmin())), float(logits.max()) + 2)
    delta = open_cache(tiny_cache).read("delta/pgd-vit")[3, 1, 0, 0, 0]
    change(copied, "delta/pgd-vit", (3, 1, 0, 0, 0), int(delta) + (1 if delta < 0 else -1 if delta > 0 else 2))
    found = {array.name: array for array in diff_caches(tiny_cache, copied, values=True).arrays if not array.equal}
    assert set(found) == {"logits/vit/clean", "delta/pgd-vit"}
    assert found["logits/vit/clean"].shards == (0,) and found["delta/pgd-vit"].found == "both"
    values = found["logits/vit/clean"].values
    assert values.compared == 100 * 9 and values.rows == 1 / 100 and values.argmax_flips == pytest.approx(1 / 900)
    assert values.largest == pytest.approx(float(logits.max() + 2 - logits.min()), rel=1e-3)
    moved = found["delta/pgd-vit"].values
    assert moved.argmax_flips is None and moved.rows == 1 / 100
    assert moved.largest == (1 if delta else 2)
    assert diff_caches(tiny_cache, copied).arrays[4].values is None  # nobody asked


def test_views_are_matched_by_their_offsets(tiny_cache, wider):
    found = {array.name: array for array in diff_caches(tiny_cache, wider[0], values=True).arrays}
    assert found["logits/cnn/pgd-vit"].found == "first" and not found["logits/cnn/pgd-vit"].equal
    assert found["label"].equal and found["image"].equal
    clean = found["logits/vit/clean"]
    assert clean.shards == (0, 1, 2, 3)
    assert clean.values.compared == 100 * 4 and clean.values.largest == 0  # the common views have the same answers
    assert found["delta/pgd-cnn"].values.largest > 0
    assert found["views/offset"].values is None  # another number of views


def test_the_specs_are_told_field_by_field(tiny_cache, wider):
    found = diff_caches(tiny_cache, wider[0])
    assert "views.count: 9 -> 4" in found.spec and "attacks.pgd-cnn.parameters.steps: 2 -> 1" in found.spec
    assert not found.same


def test_a_cache_and_a_spec(tiny_cache, tiny_cache_config, wider, copied):
    (copied / "manifest.json").unlink()  # it need not be sealed
    same = diff_spec(copied, tiny_cache_config)
    assert same.same and all(array.equal for array in same.arrays)
    other = diff_spec(copied, wider[1])
    equal = {array.name for array in other.arrays if array.equal}
    assert equal == {"source_index", "label", "image"} and other.spec == diff_caches(tiny_cache, wider[0]).spec


def test_the_command_and_its_codes(tiny_cache, tiny_cache_config, copied, wider, invoke, tmp_path):
    same = invoke("diff", tiny_cache, copied)
    assert same.exit_code == 0 and "the same spec and the same bytes" in same.output
    other = invoke("diff", tiny_cache, wider[0], "--values")
    assert other.exit_code == 1 and "views.count: 9 -> 4" in other.output
    as_json = json.loads(invoke("diff", tiny_cache, wider[0], "--values", "--json").output)
    assert as_json["same"] is False
    assert next(a for a in as_json["arrays"] if a["name"] == "logits/vit/clean")["values"]["compared"] == 400
    assert invoke("diff", tiny_cache, tiny_cache_config).exit_code == 0
    assert invoke("diff", tiny_cache, wider[1]).exit_code == 1
    assert invoke("diff", tiny_cache, wider[1], "--values").exit_code == 2
    assert invoke("diff", tiny_cache, tmp_path / "nothing").exit_code == 2
    (copied / "manifest.json").unlink()
    assert invoke("diff", tiny_cache, copied).exit_code == 3
    shutil.copyfile(wider[0] / "manifest.json", copied / "manifest.json")
    assert invoke("diff", tiny_cache, copied).exit_code == 4


def test_the_measures_on_numbers_that_are_easy_to_check():
    one, other = np.zeros((4, 2, 3), np.float16), np.zeros((4, 2, 3), np.float16)
    one[:, :, 0], other[:, :, 0] = 1, 1
    other[1, 0] = (1, 3, 0)
    blocks = [(one[:2], other[:2]), (one[2:], other[2:])]
    found = compare("logits", blocks)
    assert (found.compared, found.largest, found.rows, found.values, found.argmax_flips) == (8, 3, 1 / 4, 1 / 24, 1 / 8)
    moved = compare("delta", [(np.int8([[[[[100]]]]]), np.int8([[[[[-100]]]]]))], scale=0.5)
    assert (moved.largest, moved.rows, moved.argmax_flips) == (100, 1, None)
    assert compare("label", []).largest == 0
