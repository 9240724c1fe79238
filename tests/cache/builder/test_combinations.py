"""Encoded images, resized crops, coded logits and views apart, all together: built, extended and streamed."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from built import sealed_cache
from PIL import Image
from runs import CPU, changed, log

from darht.cache.admin.verify import verify
from darht.cache.builder.build import build, plan_build
from darht.cache.builder.extend import grow
from darht.cache.builder.pixels import ShardImages
from darht.cache.builder.seal import seal
from darht.cache.builder.teachers import load_teacher
from darht.cache.format.resample import resample_all
from darht.cache.read.draw import choose_views, view_logits, view_pixels
from darht.cache.read.feed_plan import plan_feed
from darht.cache.read.loader import GIB, load_training_set
from darht.cache.read.reader import Cache, open_cache
from darht.cache.read.sizes import needed_bytes
from darht.cache.read.stream import Feed
from darht.trainer.student.train import train

ROWS, SIZE = 40, 8
CODES: dict[str, dict[str, Any]] = {
    "float16": {},
    "top-k": {"logits": "top-k", "top_k": 4},
    "int8": {"logits": "int8"},
}
ERRORS = {"float16": 2e-3, "int8": 0.05}  # of a logit near 1; what top-k leaves out is not compared


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEG files of 18 to 24 by 19 to 23 pixels."""
    folder, random = tmp_path_factory.mktemp("jpegs"), np.random.default_rng(0)
    for number in range(ROWS):
        file, size = io.BytesIO(), (18 + number % 7, 19 + number % 5, 3)
        Image.fromarray(random.integers(0, 256, size, dtype=np.uint8)).save(file, "JPEG", quality=90)
        path = folder / "train" / str(number // 4) / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.getvalue())
    return folder


def config_of(root: Path, teachers: dict[str, Path], store: dict[str, Any], views: int) -> dict[str, Any]:
    return {
        "data": {"source": "imagefolder", "root": str(root), "holdout": 0.1},
        "teachers": {name: {"path": str(path)} for name, path in teachers.items()},
        "attacks": {"pgd": {"kind": "pgd", "teacher": "cnn", "eps": 32, "step": 8, "steps": 2, "views": 2}},
        "views": {"kind": "resized-crop", "count": views, "size": SIZE},
        "store": {"rows_per_shard": 8, "rows_per_chunk": 4, **store},
    }


def extended(folder: Path, config: dict[str, Any]) -> Path:
    """The cache in `folder` with what `config` has beyond it."""
    (folder / "more.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    plan = plan_build(folder / "more.yaml", device=CPU)
    grow(folder / "cache", plan.spec)
    build(plan, folder / "cache", device=CPU, on_unit=lambda array, shard, seconds: None)
    seal(folder / "cache")
    return folder / "cache"


def assert_streams_what_it_holds(cache: Cache) -> None:
    """Every row of a streamed epoch has the pixels and answers, in the view that it drew, of one that is in memory."""
    whole = load_training_set(cache, device=CPU, adversarial=False, budget_gib=1)
    budget = 0.95 * needed_bytes(cache, adversarial=False) / GIB
    plan = plan_feed(cache, device=CPU, adversarial=False, batch=4, budget_gib=budget, logits="drawn")
    assert plan.kind == "streamed"
    seen = []
    with Feed(cache, plan, seed=1, epochs=1) as feed:
        for data, at in feed.batches(0):
            views, rows = choose_views(data, at, seed=1, epoch=0), data.rows[at]
            assert torch.equal(views, choose_views(whole, rows, seed=1, epoch=0))
            assert torch.equal(view_pixels(data, at, views), view_pixels(whole, rows, views))
            assert torch.equal(view_logits(data, at, views), view_logits(whole, rows, views))
            seen += rows.tolist()
    assert len(seen) == len(set(seen)) == feed.steps * 4


@pytest.mark.parametrize(
    ("images", "code", "by_view"),  # every two of them meet; all twelve were tried once, and cost twice the time
    [
        ("jpeg", "float16", True),
        ("jpeg", "top-k", False),
        ("jpeg", "int8", True),
        ("png", "float16", False),
        ("png", "top-k", True),
        ("png", "int8", False),
    ],
)
def test_it_grows_to_the_cache_built_at_once_and_streams_what_teachers_said(
    images, code, by_view, root, tiny_teachers, tmp_path
):
    store = {"images": images, "by_view": by_view, **CODES[code]}
    (tmp_path / "once").mkdir()
    once = sealed_cache(config_of(root, tiny_teachers, store, 3), tmp_path / "once")
    sealed_cache(config_of(root, {"cnn": tiny_teachers["cnn"]}, store, 2), tmp_path)
    grown = extended(tmp_path, config_of(root, tiny_teachers, store, 3))
    cache = open_cache(grown)
    assert cache.root_hash == open_cache(once).root_hash and verify(grown) == []
    assert_streams_what_it_holds(cache)

    whole, rows = load_training_set(cache, device=CPU, adversarial=True, budget_gib=1), torch.arange(ROWS)
    views = torch.full_like(rows, 2)
    said = load_teacher(tiny_teachers["vit"], CPU)[0](view_pixels(whole, rows, views).float() / 255)
    stored = view_logits(whole, rows, views)[:, 1]
    assert (stored.argmax(1) == said.argmax(1)).float().mean() > 0.9
    if code in ERRORS:
        torch.testing.assert_close(stored, said, atol=ERRORS[code], rtol=0)


def test_a_student_trains_from_a_stream_of_all_of_it(root, tiny_teachers, tmp_path):
    store = {"images": "jpeg", "by_view": True, **CODES["int8"]}
    cache = open_cache(sealed_cache(config_of(root, tiny_teachers, store, 3), tmp_path))
    short = changed(recipe="rslad", inner={"steps": 1}, optim={"epochs": 1, "batch_size": 4})
    budget = 0.95 * needed_bytes(cache, adversarial=False) / GIB
    train(short, cache, tmp_path / "run", device=CPU, memory_gib=budget)
    assert "streamed" in (tmp_path / "run" / "run.json").read_text()
    assert "holdout_pgd" in log(tmp_path / "run")[-1]


def test_crops_are_the_same_whether_images_are_kept_or_cut_at_once(root, tiny_teachers, tmp_path):
    config = config_of(root, tiny_teachers, {"images": "jpeg"}, 3)
    (tmp_path / "cache.yaml").write_text(yaml.safe_dump(config))
    plan = plan_build(tmp_path / "cache.yaml", device=CPU)
    held, rows, part = ShardImages(plan.source.images, plan.spec), slice(12, 16), slice(1, 3)
    for view in range(3):
        expected = resample_all(held.pixels(rows)[part], held.boxes(rows)[part, view], SIZE)
        np.testing.assert_array_equal(ShardImages(plan.source.images, plan.spec).crops(rows, part, view), expected)
