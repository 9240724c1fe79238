"""What a cache cost and when it pays, from records with seconds that the test has chosen."""

import dataclasses
import json
from pathlib import Path

import pytest

from darht.cache.admin.cost import cost_facts, cost_of, run_cost
from darht.cache.admin.info import summarise
from darht.cache.format.commit import read_commit, write_commit
from darht.cache.read.reader import Cache, open_cache
from darht.core.errors import CacheError


@pytest.fixture
def priced(copied: Path) -> Cache:
    """100 rows (10 held out), 9 views: each shard of clean logits took 9 s, of a perturbation 2 s, of others 0 s."""
    cache = open_cache(copied)
    for name, array in cache.arrays.items():
        seconds = 9.0 if name.endswith("/clean") else 2.0 if name.startswith("delta/") else 0.0
        for shard in range(array.shards):
            commit = read_commit(cache.folder, array, shard)
            assert commit is not None
            write_commit(cache.folder, array, dataclasses.replace(commit, seconds=seconds))
    return cache


def make_run(folder: Path, cache: Cache, *, teachers: str = "cached", epochs: int = 10) -> Path:
    folder.mkdir()
    identity = {"recipe": {"teachers": teachers}, "cache_root_hash": cache.root_hash}
    (folder / "run.json").write_text(json.dumps({"identity": identity}))
    (folder / "log.jsonl").write_text("".join(json.dumps({"seconds": 0.5}) + "\n" for _ in range(epochs)))
    return folder


def test_the_cost_by_hand(priced: Cache):
    cost = cost_of(priced)
    assert cost.attacks == {"pgd-cnn": 8.0, "pgd-vit": 8.0}  # 4 shards
    assert cost.teachers == {"cnn": 36.0, "vit": 36.0}
    assert (cost.others, cost.total) == (0.0, 88.0)
    assert cost.epoch == pytest.approx(72 / (100 * 9) * 90)
    assert cost.epochs == pytest.approx(88 / 7.2)


def test_a_run_says_from_how_many_students_on_the_cache_pays(priced: Cache, tmp_path: Path):
    run = run_cost(make_run(tmp_path / "short", priced), priced)
    assert (run.epochs, run.seconds, run.live) == (10, 5.0, False)
    pays = dict(cost_facts(cost_of(priced), run))["pays"]
    assert pays == (
        "as much as 12.2 epochs with these teachers in the loop, 7.20 s an epoch; a student of 10 epochs took 5.0 s, "
        "with teachers in the loop 77.0 s: the cache is the cheaper way from 2 students on"
    )
    facts = dict(summarise(priced, make_run(tmp_path / "long", priced, epochs=20, teachers="live")).facts)
    assert facts["pays"].endswith(
        "a student of 20 epochs took 10.0 s with teachers in the loop: the cache is the cheaper way from 1 student on"
    )


def test_a_cache_whose_teachers_cost_nothing_measurable_says_what_it_cost_alone(priced: Cache):
    free = dataclasses.replace(cost_of(priced), epoch=0.0)
    assert [name for name, _ in cost_facts(free)] == ["cost"]


def test_a_folder_that_is_no_run_of_this_cache_is_refused(priced: Cache, tmp_path: Path):
    with pytest.raises(CacheError, match="is not a run of darht-train"):
        run_cost(tmp_path, priced)
    with pytest.raises(CacheError, match="has no epoch in its log yet"):
        run_cost(make_run(tmp_path / "new", priced, epochs=0), priced)
    other = make_run(tmp_path / "other", priced)
    (other / "run.json").write_text((other / "run.json").read_text().replace(priced.root_hash, "f" * 64))
    with pytest.raises(CacheError, match="was trained from the cache ffffffffffff"):
        run_cost(other, priced)
    (other / "run.json").write_text("[]")
    with pytest.raises(CacheError, match="is not a run of darht-train"):
        run_cost(other, priced)
