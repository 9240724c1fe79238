"""A cache whose views are resized crops: teachers, perturbations and students all see the same whole-level pixels."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from built import sealed_cache
from reseal import reseal
from runs import CPU, changed

from darht.cache.admin.diff import diff_caches
from darht.cache.admin.info import summarise
from darht.cache.admin.recompute import recompute
from darht.cache.admin.verify import verify
from darht.cache.builder.build import build, plan_build
from darht.cache.builder.extend import grow
from darht.cache.builder.seal import seal
from darht.cache.builder.teachers import load_teacher
from darht.cache.export.webdataset import export_webdataset
from darht.cache.format.resample import resample
from darht.cache.read.dataset import CacheDataset
from darht.cache.read.loader import GIB
from darht.cache.read.reader import Cache, open_cache
from darht.cache.read.sizes import needed_bytes
from darht.cache.read.webdataset import open_shards
from darht.core.errors import ConfigError
from darht.trainer.config import TrainConfig, WarmConfig
from darht.trainer.student.train import train

SHORT: dict[str, Any] = {"inner": {"steps": 1}, "optim": {"epochs": 1, "batch_size": 16}}


@pytest.fixture(scope="module")
def config(tiny_teachers: dict[str, Path]) -> dict[str, Any]:
    return {
        "data": {"source": "digits", "limit": 40, "holdout": 0.1},
        "teachers": {"cnn": {"path": str(tiny_teachers["cnn"])}},
        "attacks": {"pgd": {"kind": "pgd", "teacher": "cnn", "eps": 32, "step": 8, "steps": 2, "views": 2}},
        "views": {"kind": "resized-crop", "count": 4, "size": 6, "scale": [0.25, 1], "ratio": [0.75, 1.333]},
        "store": {"rows_per_shard": 8, "rows_per_chunk": 4},
    }


@pytest.fixture(scope="module")
def folder(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sealed_cache(config, tmp_path_factory.mktemp("resized"))


@pytest.fixture(scope="module")
def cache(folder: Path) -> Cache:
    return open_cache(folder)


def shown(cache: Cache, view: int) -> np.ndarray:
    images, boxes = cache.read("image"), cache.read("views/box")[:, view]
    return np.stack([resample(image, box, 6) for image, box in zip(images, boxes, strict=True)])


def test_the_spec_is_of_version_2_and_says_how_boxes_are_drawn(folder: Path, cache: Cache) -> None:
    spec = json.loads((folder / "spec.json").read_text())
    assert spec["format_version"] == json.loads((folder / "manifest.json").read_text())["format_version"] == 2
    assert spec["views"] == {"kind": "resized-crop", "padding": 0, "flip": True, "count": 4, "size": 6,
                             "scale": [0.25, 1.0], "ratio": [0.75, 1.333]}  # fmt: skip
    assert cache.arrays["views/box"].shape == (40, 4, 5) and "views/offset" not in cache.arrays
    assert ("views", "4 (resized-crop, 6 pixels, 0.25 to 1 of the area, ratios 0.75 to 1.333, mirrored: True)") in (
        summarise(cache).facts
    )


def test_teachers_were_asked_about_the_boxes_and_the_perturbed_boxes(
    cache: Cache, tiny_teachers: dict[str, Path]
) -> None:
    teacher = load_teacher(tiny_teachers["cnn"], CPU)[0]
    delta = cache.read("delta/pgd")
    assert delta.shape == (40, 2, 3, 6, 6)
    for view in range(2):
        clean = shown(cache, view)
        moved = clean.astype(np.int16) + delta[:, view]
        assert moved.min() >= 0 and moved.max() <= 255 and np.abs(delta[:, view]).max() <= 32
        for pixels, name in ((clean, "clean"), (moved, "pgd")):
            with torch.no_grad():
                asked = teacher(torch.from_numpy(pixels).float() / 255)
            np.testing.assert_allclose(cache.read(f"logits/cnn/{name}")[:, view], asked, atol=2e-3)
    np.testing.assert_array_equal(cache.clean(), shown(cache, 0))


def test_it_verifies_and_boxes_that_the_spec_does_not_draw_are_noticed(folder: Path, tmp_path: Path) -> None:
    assert verify(folder) == []
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    reseal(copy, "views/box", lambda boxes: np.put(boxes, 8, boxes.ravel()[8] + 1))
    assert [line for line in verify(copy) if "the boxes are not those that the spec draws" in line]


def test_it_is_recomputed_without_a_difference(cache: Cache) -> None:
    found = recompute(cache, 20, device=CPU)
    assert all(diff.largest == 0 for diff in found.arrays.values())


def test_more_views_extend_it_to_the_cache_built_at_once(config: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    larger = config | {"views": config["views"] | {"count": 6}}
    (tmp_path / "cache.yaml").write_text(yaml.safe_dump(larger))
    grown = Path(shutil.copytree(folder, tmp_path / "grown"))
    plan = plan_build(tmp_path / "cache.yaml", device=CPU)
    grow(grown, plan.spec)
    build(plan, grown, device=CPU, on_unit=lambda *_: None)
    seal(grown)
    other = sealed_cache(larger, tmp_path)
    assert open_cache(grown).root_hash == open_cache(other).root_hash
    found = {array.name: array.values for array in diff_caches(folder, grown, values=True).arrays}
    boxes, logits = found["views/box"], found["logits/cnn/clean"]
    assert boxes is not None and logits is not None and boxes.largest == logits.largest == 0


@pytest.mark.parametrize("layout", ["samples", "blocks"])
def test_its_export_is_read_as_the_cache(cache: Cache, tmp_path: Path, layout: Any) -> None:
    export_webdataset(cache, tmp_path / layout, layout)
    other = open_shards(tmp_path / layout)
    for name in cache.arrays:
        np.testing.assert_array_equal(other.read(name), cache.read(name))


def test_batches_hold_the_pixels_that_teachers_saw(cache: Cache) -> None:
    for share in (1, 0.75):
        budget = share * needed_bytes(cache, adversarial=True) / GIB
        dataset = CacheDataset(cache, batch_size=4, adversarial="pgd", memory_gib=budget)
        assert (dataset.plan.kind == "streamed") == (share < 1)
        for batch in dataset:
            assert batch.x_adv is not None
            for x, x_adv, row, view in zip(batch.x, batch.x_adv, batch.rows, batch.views, strict=True):
                clean = shown(cache, int(view))[row]
                np.testing.assert_array_equal(x, clean)
                np.testing.assert_array_equal(x_adv, clean + cache.read("delta/pgd")[row, view])


@pytest.mark.parametrize("inner", [{"kind": "pgd"}, {"kind": "cached", "eps": 32.0}, {"kind": "n-fgsm"}])
def test_students_train_from_it(cache: Cache, tmp_path: Path, inner: dict[str, Any]) -> None:
    train(changed(**(SHORT | {"inner": inner | {"steps": 1}})), cache, tmp_path / "run", device=CPU)
    card = json.loads((tmp_path / "run" / "last" / "config.json").read_text())
    assert card["image_size"] == [6, 6]


def test_what_moves_perturbations_between_views_is_refused(cache: Cache, tmp_path: Path) -> None:
    refused: list[tuple[TrainConfig, str]] = [
        (
            changed(**SHORT, targets="nearest"),
            "targets: nearest moves perturbations between views, .*use targets: clean",
        ),
        (changed(inner={"kind": "warm", "warm": WarmConfig(start="noise")}), "warm.start: label, n-fgsm or pgd"),
    ]
    for recipe, message in refused:
        with pytest.raises(ConfigError, match=message):
            train(recipe, cache, tmp_path / "run", device=CPU)
