"""Croissant metadata: mlcroissant validates it, loads from it what it can, and every file is as it says."""

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from darht.cache.admin.gc import find_leftovers
from darht.cache.admin.verify import verify
from darht.cache.export.croissant import CROISSANT, export_croissant
from darht.cache.export.webdataset import export_webdataset
from darht.cache.read.reader import open_cache


@pytest.fixture(scope="module")
def places(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The cache and its two exports, each with its metadata."""
    import shutil

    root = tmp_path_factory.mktemp("croissant")
    shutil.copytree(tiny_cache, root / "cache")
    for layout in ("samples", "blocks"):
        export_webdataset(open_cache(tiny_cache), root / layout, layout)
    found = {name: root / name for name in ("cache", "samples", "blocks")}
    for folder in found.values():
        export_croissant(folder)
    return found


@pytest.fixture
def mlc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Any]:
    """mlcroissant without network: what it would download, and where it unpacks, is the test's folder."""
    monkeypatch.setenv("CROISSANT_CACHE", str(tmp_path / "unpacked"))
    import warnings

    with warnings.catch_warnings(), caplog.at_level(logging.ERROR):
        warnings.simplefilter("ignore")  # its own imports warn
        import mlcroissant
        from mlcroissant._src.operation_graph.operations import extract

        monkeypatch.setattr(
            "mlcroissant._src.core.constants.EXTRACT_PATH", type(extract.EXTRACT_PATH)(tmp_path / "unpacked")
        )
        monkeypatch.setattr(extract, "EXTRACT_PATH", type(extract.EXTRACT_PATH)(tmp_path / "unpacked"))
        yield mlcroissant


@pytest.mark.parametrize("name", ["cache", "samples", "blocks"])
def test_it_validates_and_names_every_file_with_its_hash(name, places, mlc):
    folder = places[name]
    text = json.loads((folder / CROISSANT).read_text())
    metadata = mlc.Dataset(jsonld=folder / CROISSANT).metadata
    assert not metadata.ctx.issues.errors
    assert {"citeAs", "datePublished", "license"} == {
        warning.split('"')[1].rsplit("/", 1)[-1] for warning in metadata.ctx.issues.warnings
    }  # what only the owner of the images knows
    files = [item for item in text["distribution"] if item["@type"] == "cr:FileObject"]
    for item in files:
        data = (folder / item["contentUrl"]).read_bytes()
        assert item["sha256"] == hashlib.sha256(data).hexdigest() and item["contentSize"] == f"{len(data)} B"
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    unnamed = present - {item["contentUrl"] for item in files}
    assert all(path in (CROISSANT, "origin.json") or path.startswith("commits/") for path in unnamed)


def test_every_array_of_a_cache_has_its_type_and_shape(places, mlc):
    cache = open_cache(places["cache"])
    metadata = mlc.Dataset(jsonld=places["cache"] / CROISSANT).metadata
    found = {record.id: record.fields[0] for record in metadata.record_sets}
    assert list(found) == list(cache.arrays)
    for name, array in cache.arrays.items():
        shape = found[name].array_shape
        assert np.dtype(found[name].data_type) == array.dtype
        assert (tuple(map(int, shape.split(","))) if shape else ()) == array.shape[1:]


def test_mlcroissant_loads_images_and_labels_from_the_tars(places, mlc):
    cache = open_cache(places["samples"].parent / "cache")
    images, labels = cache.read("image"), cache.read("label")
    dataset = mlc.Dataset(jsonld=places["samples"] / CROISSANT)
    seen = set()
    for record in dataset.records("images"):
        key = record["images/key"]
        np.testing.assert_array_equal(np.asarray(record["images/image"]).transpose(2, 0, 1), images[key])
        seen.add(key)
    assert seen == set(range(cache.rows))
    assert {record["labels/key"]: record["labels/label"] for record in dataset.records("labels")} == dict(
        enumerate(labels.tolist())
    )


def test_the_same_cache_gives_the_same_metadata_and_is_still_whole(places):
    before = (places["cache"] / CROISSANT).read_bytes()
    export_croissant(places["cache"])
    assert (places["cache"] / CROISSANT).read_bytes() == before
    assert verify(places["cache"]) == []
    assert find_leftovers(places["cache"], young=True) == []


def test_the_command(places, invoke, tmp_path):
    done = invoke("export", places["blocks"], "--format", "croissant")
    assert done.exit_code == 0 and "croissant.json: 6 files and sets of files, 11 record sets" in done.output
    assert invoke("export", places["blocks"], "--format", "croissant", "--out", tmp_path / "x").exit_code == 2
    assert invoke("export", places["cache"], "--format", "webdataset").exit_code == 2
    assert invoke("export", tmp_path, "--format", "croissant").exit_code == 2
