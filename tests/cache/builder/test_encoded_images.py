"""Caches that keep images encoded: what is kept as it is, that nothing else changes, and what is refused."""

import io
import json
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from built import sealed_cache
from PIL import Image
from reseal import reseal
from runs import CPU, changed

from darht.cache.admin.diff import diff_caches
from darht.cache.admin.info import summarise
from darht.cache.admin.recompute import recompute
from darht.cache.admin.verify import verify
from darht.cache.export.croissant import export_croissant
from darht.cache.export.webdataset import export_webdataset
from darht.cache.format import images as format_images
from darht.cache.read.dataset import CacheDataset
from darht.cache.read.loader import GIB
from darht.cache.read.reader import Cache, open_cache
from darht.cache.read.sizes import needed_bytes
from darht.cache.read.webdataset import open_shards
from darht.cache.sources.open import load_centred
from darht.core.errors import ConfigError
from darht.trainer.student.train import train

ROTATED = 7  # the row whose EXIF orientation turns it


def jpeg(number: int) -> bytes:
    """A small image of its own size; one of them stands on its side."""
    height, width = 8 + number % 5, 9 + number % 3
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file, exif = io.BytesIO(), Image.Exif()
    if number == ROTATED:
        exif[0x0112] = 6
    Image.fromarray(pixels).save(file, "JPEG", quality=90, exif=exif)
    return file.getvalue()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jpegs")
    for number in range(40):
        for split in ("train", "test"):
            path = folder / split / str(number // 4) / f"{number:02d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(number))
    Image.open(folder / "train/9/39.jpg").save(folder / "train/9/39.png", compress_level=1)
    (folder / "train/9/39.jpg").unlink()
    return folder


@pytest.fixture(scope="module")
def config(tiny_teachers: dict[str, Path], root: Path) -> dict[str, Any]:
    return {
        "data": {"source": "imagefolder", "root": str(root), "holdout": 0.1},
        "teachers": {"cnn": {"path": str(tiny_teachers["cnn"])}},
        "attacks": {"pgd": {"kind": "pgd", "teacher": "cnn", "eps": 32, "step": 8, "steps": 2}},
        "views": {"kind": "resized-crop", "count": 3, "size": 8},
        "store": {"rows_per_shard": 8, "rows_per_chunk": 4, "images": "jpeg"},
    }


@pytest.fixture(scope="module")
def folder(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sealed_cache(config, tmp_path_factory.mktemp("encoded"))


@pytest.fixture(scope="module")
def cache(folder: Path) -> Cache:
    return open_cache(folder)


def test_files_are_kept_as_they_are_and_others_as_png(cache: Cache, root: Path) -> None:
    stored = cache.read("image")
    names = sorted((root / "train").rglob("*.*g"), key=lambda path: path.name)
    for row, (value, path) in enumerate(zip(stored, names, strict=True)):
        assert (value == path.read_bytes()) == (path.suffix == ".jpg" and row != ROTATED)
        assert value.startswith(b"\x89PNG") == (row in (ROTATED, 39))
    assert format_images.image_size(stored[ROTATED]) == (10, 10) and format_images.image_size(stored[3]) == (11, 9)


def test_the_spec_says_how_images_are_stored_and_decoded(folder: Path, cache: Cache) -> None:
    spec = json.loads((folder / "spec.json").read_text())
    assert spec["format_version"] == 2 and spec["store"]["images"] == "jpeg" and spec["data"]["image_shape"] == [3]
    assert spec["data"]["decoder"] == format_images.decoder_identity()
    row = next(row for row in summarise(cache).arrays if row[0] == "image")
    assert row[1] == "jpeg" and row[5] == "100 %"


def test_view_0_is_the_centred_square_of_the_file(cache: Cache, root: Path) -> None:
    source = load_centred(8, "imagefolder", root, "train", rules=3)
    np.testing.assert_array_equal(cache.clean(), source.images)
    assert cache.clean(slice(3, 3)).shape == (0, 3, 8, 8)


def test_it_verifies_and_is_recomputed_without_a_difference(folder: Path, cache: Cache) -> None:
    assert verify(folder) == []
    assert all(diff.largest == 0 for diff in recompute(cache, 16, device=CPU).arrays.values())


@pytest.mark.parametrize("layout", ["samples", "blocks"])
def test_an_export_verifies_and_images_that_do_not_decode_are_named(
    layout: Literal["samples", "blocks"], folder: Path, tmp_path: Path
) -> None:
    export_webdataset(open_cache(folder), tmp_path / "whole", layout)
    assert verify(tmp_path / "whole") == []
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))

    def cut(values: np.ndarray) -> None:
        values[2] = values[2][:-20]

    reseal(copy, "image", cut)
    export_webdataset(open_cache(copy), tmp_path / "cut", layout)
    says = verify(tmp_path / "cut")
    assert any("shard-00000.tar, image, rows 0.." in line and "row 2: an image does not" in line for line in says)


def test_images_that_do_not_decode_are_named(config: dict[str, Any], tmp_path: Path) -> None:
    broken = sealed_cache(config | {"teachers": {}, "attacks": {}}, tmp_path)

    def cut(values: np.ndarray) -> None:
        values[2] = values[2][:-20]

    reseal(broken, "image", cut)
    assert any("row 2: an image does not decode" in line for line in verify(broken))


@pytest.mark.parametrize("layout", ["samples", "blocks"])
def test_its_export_is_read_as_the_cache(cache: Cache, tmp_path: Path, layout: Any) -> None:
    export_webdataset(cache, tmp_path / layout, layout)
    other = open_shards(tmp_path / layout)
    for name in cache.arrays:
        np.testing.assert_array_equal(other.read(name), cache.read(name))
    assert diff_caches(tmp_path / layout, cache.folder).same
    assert export_croissant(tmp_path / layout)["recordSet"]


def test_batches_are_the_same_in_memory_and_streamed(cache: Cache) -> None:
    whole = needed_bytes(cache, adversarial=False) / GIB
    seen: list[dict[tuple[int, int], bytes]] = []
    for share in (1.0, 0.8):
        dataset = CacheDataset(cache, batch_size=4, memory_gib=share * whole)
        assert (dataset.plan.kind == "streamed") == (share < 1)
        rows = [(int(b.rows[i]), int(b.views[i]), b.x[i].numpy().tobytes()) for b in dataset for i in range(len(b.x))]
        seen.append({(row, view): x for row, view, x in rows})
    common = seen[0].keys() & seen[1].keys()
    assert len(common) > 20 and all(seen[0][key] == seen[1][key] for key in common)


def test_a_student_trains_from_it(cache: Cache, tmp_path: Path) -> None:
    train(changed(inner={"steps": 1}, optim={"epochs": 1, "batch_size": 16}), cache, tmp_path / "run", device=CPU)
    assert json.loads((tmp_path / "run/last/config.json").read_text())["image_size"] == [8, 8]


def test_png_says_what_raw_says(tiny_teachers: dict[str, Path], tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "data": {"source": "digits", "limit": 40},
        "teachers": {"cnn": {"path": str(tiny_teachers["cnn"])}},
        "views": {"padding": 1, "flip": False, "count": 2},
        "store": {"rows_per_shard": 16, "rows_per_chunk": 4},
    }
    caches = []
    for images in ("raw", "png"):
        (tmp_path / images).mkdir()
        made = sealed_cache(config | {"store": {**config["store"], "images": images}}, tmp_path / images)
        assert verify(made) == []
        caches.append(open_cache(made))
    raw, png = caches
    assert (raw.spec.format_version, png.spec.format_version) == (1, 2) and png.spec.data.decoder == ""
    np.testing.assert_array_equal(raw.clean(), png.clean())
    np.testing.assert_array_equal(raw.read("logits/cnn/clean"), png.read("logits/cnn/clean"))
    batches = [next(iter(CacheDataset(cache, batch_size=8))) for cache in caches]
    assert (batches[0].x == batches[1].x).all()


def test_another_decoder_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = open_cache(folder)
    monkeypatch.setattr("darht.cache.read.files.decoder_identity", lambda: "0" * 64)
    for read in (cache.clean, lambda: CacheDataset(cache, batch_size=4)):
        with pytest.raises(
            ConfigError, match=r"a JPEG decoder that makes pixels 422f989a34b4 .*install the Pillow that"
        ):
            read()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"data": {"source": "digits", "limit": 40}},
            "jpeg keeps the bytes of image files, and digits has none; use png",
        ),
        ({"image_size": 8}, "and data.image_size resizes them; use png, or leave image_size out"),
        ({"views": {"kind": "identity"}}, "all images must have one size"),
        (
            {"size": 12},
            "views.size must be at most the image side; got 12 for images of 11 x 11 pixels: write at most 11",
        ),
    ],
)
def test_what_cannot_be_is_refused(config: dict[str, Any], refusal: Any, change: dict[str, Any], message: str) -> None:
    def apply(spec: dict[str, Any]) -> None:
        spec.clear()
        spec.update(config | {"data": dict(config["data"]), "views": dict(config["views"])})
        for key, value in change.items():
            if key == "image_size":
                spec["data"][key] = value
            elif key == "size":
                spec["views"][key] = value
            else:
                spec[key] = value

    assert message in refusal(apply)
