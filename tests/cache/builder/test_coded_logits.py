"""Caches of coded logits: built, verified, grown, exported and trained from as any other, and near to a dense one."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from built import sealed_cache
from runs import changed

from darht.cache.admin.recompute import recompute
from darht.cache.admin.verify import verify
from darht.cache.builder.build import build, plan_build
from darht.cache.builder.extend import grow
from darht.cache.builder.seal import seal
from darht.cache.export.webdataset import export_webdataset
from darht.cache.read.draw import view_logits
from darht.cache.read.loader import load_training_set
from darht.cache.read.reader import Cache, open_cache
from darht.cache.read.sizes import row_bytes
from darht.cache.read.webdataset import open_shards
from darht.core.errors import ConfigError, CorruptError
from darht.trainer.student.targets import nearest_answer
from darht.trainer.student.train import train

CPU = torch.device("cpu")
CODES: dict[str, dict[str, Any]] = {
    "top-k": {"logits": "top-k", "top_k": 4, "by_view": True},
    "int8": {"logits": "int8"},
    "dense": {},
}
COMPANION = {"top-k": "logits/cnn/pgd-cnn-class", "int8": "logits/cnn/pgd-cnn-scale"}


def config_of(path: Path, code: str, views: int = 3) -> dict[str, Any]:
    config = copy.deepcopy(yaml.safe_load(path.read_text()))
    config["data"]["limit"], config["views"]["count"] = 40, views
    config["store"] = {"rows_per_shard": 16, "rows_per_chunk": 4, **CODES[code]}
    del config["attacks"]["pgd-vit"]
    return config


@pytest.fixture(scope="module")
def caches(tiny_cache_config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One cache in each code."""
    return {
        code: sealed_cache(config_of(tiny_cache_config, code), tmp_path_factory.mktemp(code), batch_size=7)
        for code in CODES
    }


@pytest.fixture(params=["top-k", "int8"])
def coded(request: pytest.FixtureRequest, caches: dict[str, Path]) -> Cache:
    return open_cache(caches[request.param])


def test_it_is_of_version_2_and_says_what_a_dense_one_says(coded: Cache, caches: dict[str, Path]) -> None:
    dense, code = open_cache(caches["dense"]), coded.spec.store.logits
    assert (dense.manifest.format_version, coded.manifest.format_version) == (1, 2)
    assert COMPANION[code] in coded.arrays
    for teacher, about, view in (("cnn", "clean", 2), ("vit", "pgd-cnn", 0)):
        exact, found = (cache.logits(teacher, about, view=view).astype(np.float32) for cache in (dense, coded))
        assert found.dtype == np.float32 and found.shape == exact.shape
        if code == "int8":
            assert np.abs(found - exact).max() < 0.05
        else:
            kept = np.argsort(-exact, axis=1, kind="stable")[:, :3]
            np.testing.assert_array_equal(np.take_along_axis(found, kept, 1), np.take_along_axis(exact, kept, 1))


def test_it_verifies_and_comes_out_the_same_again(coded: Cache, tmp_path: Path) -> None:
    assert verify(coded.folder) == []
    export_webdataset(coded, tmp_path / "tars", "samples")
    assert verify(tmp_path / "tars") == []
    found = recompute(coded, 40, device=CPU)
    assert all(diff.largest == 0 for diff in found.arrays.values()) and not found.beyond()


def test_the_trainer_sees_what_the_reader_sees(coded: Cache) -> None:
    data = load_training_set(coded, device=CPU, adversarial=True, budget_gib=1)
    held = sum(tensor[0].nbytes for tensor in data.tensors())
    assert held + 8 == row_bytes(coded, adversarial=True) + 8
    at, views = torch.arange(40).flip(0), torch.arange(40) % 3
    found = view_logits(data, at, views)
    for t, teacher in enumerate(coded.teachers):
        every = np.stack([coded.logits(teacher, view=view) for view in range(3)], axis=1)
        np.testing.assert_allclose(found[:, t], every[at, views], rtol=0, atol=1e-5)
    zeros = torch.zeros(3, dtype=torch.long)
    images = data.images[:3].float() / 255 + data.deltas[0][:3, 0].float() / 255
    quoted = nearest_answer(
        data, at[-3:].flip(0), data.offsets[zeros], data.images[:3].float() / 255, found[-3:].flip(0)
    )
    np.testing.assert_allclose(quoted(images)[:, 0], coded.logits("cnn", "pgd-cnn")[:3], rtol=0, atol=1e-5)


def test_an_export_holds_both_arrays(coded: Cache, tmp_path: Path) -> None:
    for layout in ("blocks", "samples"):
        export_webdataset(coded, tmp_path / layout, layout)  # type: ignore[arg-type]
        copied = open_shards(tmp_path / layout)
        np.testing.assert_array_equal(copied.logits("vit", "pgd-cnn"), coded.logits("vit", "pgd-cnn"))


def test_views_are_added_as_if_they_had_always_been_there(
    coded: Cache, tiny_cache_config: Path, tmp_path: Path
) -> None:
    code, (grown, whole) = coded.spec.store.logits, (tmp_path / "grown", tmp_path / "whole")
    roots = []
    for folder, counts in ((grown, (1, 3)), (whole, (3,))):
        for views in counts:
            path = tmp_path / f"{views}.yaml"
            path.write_text(yaml.safe_dump(config_of(tiny_cache_config, code, views)))
            plan = plan_build(path, device=CPU)
            if folder.exists():
                grow(folder, plan.spec)
            build(plan, folder, device=CPU, batch_size=7, on_unit=lambda array, shard, seconds: None)
        roots.append(seal(folder).root_hash)
    assert roots[0] == roots[1] == coded.root_hash


def test_recipes_train_from_it(coded: Cache, tmp_path: Path) -> None:
    for recipe in ("rslad", "ard", "kd", "darht"):
        short: dict[str, Any] = {"inner": {"steps": 1}, "optim": {"epochs": 1, "batch_size": 36}}
        train(changed(recipe=recipe, **short), coded, tmp_path / recipe, device=CPU)
        assert (tmp_path / recipe / "last" / "model.safetensors").is_file()


def test_raw_logits_of_all_classes_are_refused_of_top_k_alone(caches: dict[str, Path], tmp_path: Path) -> None:
    config = changed(loss={"kd": "mse"}, optim={"epochs": 1, "batch_size": 36})
    with pytest.raises(
        ConfigError, match=r"loss\.kd: mse compares raw logits of all classes, .* holds 4 of 10 \(store"
    ):
        train(config, open_cache(caches["top-k"]), tmp_path / "top", device=CPU)
    train(config, open_cache(caches["int8"]), tmp_path / "int8", device=CPU)


def test_a_class_that_is_not_there_is_refused_before_it_is_used(caches: dict[str, Path]) -> None:
    cache = open_cache(caches["top-k"])
    name = "logits/cnn/clean-class"
    values = cache.read(name)
    values[3, 1, 2] = 10
    with pytest.raises(CorruptError, match=r"clean-class names classes 0\.\.10 in rows 0\.\.39, there are 0\.\.9"):
        cache._check_values(name, values, slice(0, 40))
