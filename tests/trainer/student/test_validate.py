"""Caches without teachers: what trains from them, what is refused, and that nothing else about them differs."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from built import sealed_cache
from runs import CPU, changed

from darht.cache.admin.info import summarise
from darht.cache.admin.recompute import recompute
from darht.cache.admin.verify import verify
from darht.cache.builder.build import build, plan_build
from darht.cache.builder.extend import grow
from darht.cache.builder.seal import seal
from darht.cache.export.croissant import export_croissant
from darht.cache.export.webdataset import export_webdataset
from darht.cache.read.dataset import CacheDataset
from darht.cache.read.loader import GIB
from darht.cache.read.reader import Cache, open_cache
from darht.cache.read.sizes import needed_bytes
from darht.cache.read.webdataset import open_shards
from darht.core.errors import ConfigError
from darht.trainer.config import TrainConfig, WarmConfig
from darht.trainer.student.losses import RECIPES
from darht.trainer.student.train import train
from darht.trainer.student.validate import check_recipe
from darht.trainer.student.warm import memory_bytes

SHORT: dict[str, Any] = {"inner": {"steps": 1}, "optim": {"epochs": 1, "batch_size": 27}}
BARE: dict[str, Any] = {
    "data": {"source": "digits", "limit": 60, "holdout": 0.1},
    "teachers": {},
    "views": {"padding": 1, "flip": False},
    "store": {"rows_per_shard": 16, "rows_per_chunk": 4},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sealed_cache(BARE, tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="module")
def bare(folder: Path) -> Cache:
    return open_cache(folder)


def weights(run: Path) -> bytes:
    return (run / "last" / "model.safetensors").read_bytes()


def test_a_cache_without_teachers_holds_images_labels_and_views(folder: Path, bare: Cache) -> None:
    assert list(bare.arrays) == ["source_index", "label", "image", "views/offset"]
    assert verify(folder) == []
    assert all(": ," not in value for _, value in summarise(bare).facts)
    found = recompute(bare, 4, device=CPU)
    assert all(diff.largest == 0 for diff in found.arrays.values())


def test_recipes_without_teachers_train_from_it(bare: Cache, tmp_path: Path) -> None:
    for recipe in ("at", "trades"):
        assert train(changed(recipe=recipe, **SHORT), bare, tmp_path / recipe, device=CPU).epoch == 1


@pytest.mark.parametrize("layout", ["samples", "blocks"])
def test_its_exports_are_whole_and_train_the_same(bare: Cache, layout: str, tmp_path: Path) -> None:
    export_webdataset(bare, tmp_path / "export", layout)
    assert verify(tmp_path / "export") == []
    again = open_shards(tmp_path / "export")
    assert again.root_hash == bare.root_hash
    if layout == "blocks":
        for name, cache in (("one", bare), ("two", again)):
            train(changed(recipe="at", **SHORT), cache, tmp_path / name, device=CPU)
        assert weights(tmp_path / "one") == weights(tmp_path / "two")


def test_it_is_streamed_as_others_are(bare: Cache, tmp_path: Path) -> None:
    gib = 0.9 * needed_bytes(bare, adversarial=False) / GIB
    config = changed(recipe="at", inner={"steps": 1}, optim={"epochs": 1, "batch_size": 2})
    for name in ("one", "two"):
        train(config, bare, tmp_path / name, device=CPU, memory_gib=gib)
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    assert "streamed" in (tmp_path / "one" / "run.json").read_text()


def test_warm_starts_from_noise(bare: Cache, tmp_path: Path) -> None:
    warm = changed(recipe="at", inner={"kind": "warm", "warm": WarmConfig(start="noise")}, optim=SHORT["optim"])
    assert train(warm, bare, tmp_path / "run", device=CPU).epoch == 1
    with pytest.raises(ConfigError, match="has no attacks; use start: noise"):
        train(changed(recipe="at", inner={"kind": "warm"}), bare, tmp_path / "no", device=CPU)
    with pytest.raises(ConfigError, match=r"has no attacks; use inner\.kind: pgd"):
        train(changed(recipe="at", inner={"kind": "cached"}), bare, tmp_path / "no", device=CPU)


def needy() -> list[TrainConfig]:
    names = [name for name, recipe in RECIPES.items() if recipe.teachers_needed != "none"]
    configs = [changed(recipe=name) for name in names]
    return [*configs, changed(recipe="rslad", teachers="live"), changed(recipe="rslad", inner={"kind": "cached"})]


@pytest.mark.parametrize("config", needy(), ids=lambda config: f"{config.recipe}-{config.teachers}-{config.inner.kind}")
def test_every_other_recipe_is_refused_in_one_line(bare: Cache, config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"learns from teachers, and .* has none: use recipe at or trades") as caught:
        train(config, bare, tmp_path / "run", device=CPU)
    assert "\n" not in str(caught.value) and "vanilla" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_teachers_can_be_added_later(folder: Path, bare: Cache, tiny_teachers: dict[str, Path], tmp_path: Path) -> None:
    more = {
        **BARE,
        "teachers": {"cnn": {"path": str(tiny_teachers["cnn"])}},
        "attacks": {"pgd": {"teacher": "cnn", "eps": 32, "step": 8, "steps": 1}},
    }
    at_once = sealed_cache(more, tmp_path)
    (tmp_path / "grown").mkdir()
    grown = sealed_cache(BARE, tmp_path / "grown")
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(more))
    plan = plan_build(tmp_path / "more.yaml", device=CPU)
    grow(grown, plan.spec)
    build(plan, grown, device=CPU, batch_size=256, on_unit=lambda array, shard, seconds: None)
    assert seal(grown).root_hash == open_cache(at_once).root_hash != bare.root_hash


def test_what_reads_it_gets_no_logits(folder: Path, bare: Cache, tmp_path: Path) -> None:
    batch = next(iter(CacheDataset(bare, batch_size=8)))
    assert batch.teacher_logits.shape == (8, 0, 10)
    assert "Images of digits" in export_croissant(folder)["description"]
    (folder / "croissant.json").unlink()


def test_an_attack_needs_a_teacher(tmp_path: Path) -> None:
    config = {**BARE, "attacks": {"pgd": {"teacher": "cnn"}}}
    with pytest.raises(ConfigError, match="names teacher 'cnn', which is not there; teachers are none"):
        sealed_cache(config, tmp_path)


BALLS = {"small": ("linf", 8.0), "large": ("linf", 16.0), "round": ("l2", 128.0)}


def check_cached(cache: Cache, eps: float, *names: str) -> None:
    """Check `inner: cached` at a radius against a cache with attacks in these balls."""
    known = next(iter(cache.spec.attacks.values()))
    balls = {name: {"norm": BALLS[name][0], "eps": BALLS[name][1]} for name in names}
    attacks = {name: replace(known, parameters={**known.parameters, **ball}) for name, ball in balls.items()}
    spec = replace(cache.spec, attacks=attacks)
    there = cast(Cache, SimpleNamespace(spec=spec, rows=cache.rows, folder=cache.folder, classes=cache.classes))
    check_recipe(changed(recipe="rslad", inner={"kind": "cached", "eps": eps}), there)


def test_cached_examples_are_selected_by_their_largest_radius_in_l_inf(tiny_cache: Path) -> None:
    cache = open_cache(tiny_cache)
    check_cached(cache, 16.0, "small", "large")
    check_cached(cache, 16.0, "large", "round")
    check_cached(cache, 8.0, "small", "round")
    for eps, names, largest in (
        (8.0, ("small", "large"), 16),
        (32.0, ("large",), 16),
        (128.0, ("small", "round"), 8),
    ):
        with pytest.raises(ConfigError, match=rf"L-inf attacks, {largest}; got {eps:g}: set inner\.eps: {largest}$"):
            check_cached(cache, eps, *names)
    with pytest.raises(ConfigError, match=r"the attacks of .* are all L2: use inner\.kind: pgd, or add"):
        check_cached(cache, 128.0, "round")


def test_a_memory_of_rows_above_the_budget_is_refused(bare: Cache, tmp_path: Path) -> None:
    recipe = changed(recipe="at", **{**SHORT, "inner": {"kind": "warm", "warm": WarmConfig(start="noise")}})
    needed = memory_bytes(60, (3, 8, 8), 1)
    assert needed == 2 * 60 * 3 * 10 * 10
    with pytest.raises(
        ConfigError, match=r"inner: warm remembers .* of 60 rows of 8x8 pixels, 3.35e-05 GiB; .* label or"
    ):
        train(recipe, bare, tmp_path / "run", device=CPU, memory_gib=0.9 * needed / GIB)
