"""A cache in words."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from starlette.testclient import TestClient

from darht.cache.admin.info import summarise
from darht.cache.builder.build import plan_build
from darht.cache.builder.seal import seal
from darht.cache.export.dataset_card import dataset_card
from darht.cache.format.mixture import SourceSpec, describe_sources
from darht.cache.read.reader import open_cache
from darht.cache.serve.app import make_app
from darht.cache.serve.catalogue import Catalogue


def test_the_facts(tiny_cache: Path):
    cache = open_cache(tiny_cache)
    facts = dict(summarise(cache).facts)
    total = sum(
        path.stat().st_size for path in (tiny_cache / "data.zarr").rglob("*") if path.name.isdigit() and path.is_file()
    )
    assert facts["data"] == "digits train, 100 rows, 10 of them held out"
    assert facts["classes"] == "10: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert facts["views"] == "9 (crop-flip, padding 1, mirrored: False)"
    assert facts["teacher cnn"] == f"resnet18, robust, weights {cache.spec.teachers['cnn'].weights_sha256[:12]}"
    assert facts["attack pgd-vit"] == (
        "pgd on vit, 2 views, eps 32.0, norm linf, objective ce, random_start True, step 8.0, steps 2"
    )
    assert facts["size"] == f"{total / 1e6:.2f} MB, {total / 100:.0f} bytes a row"
    assert facts["root hash"] == cache.root_hash


def test_each_of_several_sources_has_a_line_everywhere(blend: Path):
    cache = open_cache(blend)
    facts, held = dict(summarise(cache).facts), len(cache.manifest.holdout)
    assert facts["data"] == f"several sources, 130 rows, {held} of them held out"
    digits = "digits train, 60 rows with labels, 10 % of them held out, 50 % of a batch, 9 views"
    generated = "npz train, 70 rows without labels, 50 % of a batch, 1 view"
    assert facts["source 0"] == digits
    assert facts["source 1"] == f"{generated}, from generated.npz"
    card = dataset_card(cache, "hf://a/b")
    page = TestClient(make_app(Catalogue([blend]))).get("/").text
    assert f"- {digits}" in card and f"- {generated}\n" in card
    assert digits in page and f"{generated}<" in page and "generated.npz" not in card + page


def test_sources_without_a_share_have_theirs_by_their_rows():
    def source(rows, share=None, labelled=True):
        return SourceSpec("npz", "train", rows, "0" * 64, labelled, share, 0.0, 2, skipped=0 if labelled else 3)

    first, second, third = describe_sources([source(300), source(100), source(9, 0.6, labelled=False)])
    assert "300 rows with labels, 30 % of a batch" in first and "10 % of a batch" in second
    assert third == (
        "npz train, 9 rows without labels, 60 % of a batch, 2 views; 3 files that cannot be decoded were left out"
    )


def test_names_of_classes_are_no_markup(build_into, variant, tmp_path, invoke):
    images = tmp_path / "images"
    for name, level in (("cat [small]", 0), ("x[", 90), (":cat:", 200)):
        (images / "train" / name).mkdir(parents=True)
        for number in range(2):
            Image.fromarray(np.full((8, 8, 3), level + number, dtype=np.uint8)).save(
                images / "train" / name / f"{number}.png"
            )

    def change(config):
        config["data"] = {"source": "imagefolder", "root": str(images)}
        config["teachers"], config["attacks"] = {}, {}
        config["store"] = {"rows_per_shard": 4, "rows_per_chunk": 4}

    seal(build_into(plan_build(variant(change), device=torch.device("cpu")), tmp_path / "cache"))
    assert "classes  3: :cat:, cat [small], x[\n" in invoke("info", tmp_path / "cache").output


def test_a_line_for_every_array(tiny_cache: Path):
    cache = open_cache(tiny_cache)
    rows = {row[0]: row[1:] for row in summarise(cache).arrays}
    assert list(rows) == list(cache.arrays)
    kind, shape, megabytes, per_row, share, seconds = rows["logits/cnn/clean"]
    size = cache.size("logits/cnn/clean")
    assert (kind, shape) == ("float16", "100 x 9 x 10")
    assert (megabytes, per_row) == (f"{size / 1e6:.2f}", f"{size / 100:.1f}")
    assert share == f"{100 * size / (100 * 9 * 10 * 2):.0f} %"
    assert float(seconds) >= 0


def test_records_that_are_gone_cost_only_the_seconds(copied: Path):
    (copied / "commits/label/00000.json").unlink()
    assert summarise(open_cache(copied)).arrays
