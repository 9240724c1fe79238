"""A cache of labelled digits and generated ones: built, stopped, extended, verified, exported, computed again."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from generated import generated_digits
from reseal import reseal

from darht.cache.admin.recompute import recompute
from darht.cache.admin.verify import verify
from darht.cache.builder.build import build, plan_build
from darht.cache.builder.compute import Worker
from darht.cache.builder.extend import grow
from darht.cache.builder.seal import held_out, holdout_rows, seal
from darht.cache.builder.teachers import load_teacher
from darht.cache.export.webdataset import export_webdataset
from darht.cache.format.manifest import read_spec
from darht.cache.format.store import Store
from darht.cache.read.loader import load_training_set
from darht.cache.read.reader import open_cache
from darht.cache.read.webdataset import open_shards
from darht.core.errors import ConfigError, SpecMismatchError

CPU = torch.device("cpu")
QUIET: dict[str, Any] = {"device": CPU, "on_unit": lambda array, shard, seconds: None}


@pytest.fixture
def changed(blend_config: Path, tmp_path: Path) -> Callable[..., Path]:
    """`changed(change)` writes the blend's config after a change in place."""

    def write(change: Callable[[dict[str, Any]], object]) -> Path:
        config = yaml.safe_load(blend_config.read_text())
        change(config)
        (tmp_path / "changed.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        return tmp_path / "changed.yaml"

    return write


def test_rows_follow_one_another_and_those_without_labels_have_none(blend, tmp_path):
    cache = open_cache(blend)
    images, labels = cache.read("image"), cache.read("label")
    np.testing.assert_array_equal(images[60:], generated_digits(70)[0].transpose(0, 3, 1, 2))
    assert (labels[:60] >= 0).all() and (labels[60:] == -1).all()
    export_webdataset(cache, tmp_path / "tars", "samples")
    assert verify(blend) == verify(tmp_path / "tars") == []
    assert cache.manifest.holdout == held_out(cache.spec) == holdout_rows(60, 0.1, 10)


def test_an_attack_on_a_row_without_a_label_is_on_the_teachers_own_answer(blend, blend_config):
    cache, spec = open_cache(blend), read_spec(blend)
    teacher = load_teacher(Path(yaml.safe_load(blend_config.read_text())["teachers"]["cnn"]["path"]), CPU)[0]
    plan = plan_build(blend_config, device=CPU)
    said = teacher(torch.from_numpy(cache.read("image")[60:]).float() / 255).argmax(1).numpy()
    plan.source.labels[60:] = said  # as if the teacher's answers were the labels
    data = dataclasses.replace(spec.data, sources=())
    labelled = dataclasses.replace(spec, data=data, format_version=1)
    worker = Worker(dataclasses.replace(plan, spec=labelled), Store(blend), CPU, 256)
    array = cache.arrays["delta/pgd-cnn"]
    for rows in (slice(48, 64), slice(112, 128)):
        np.testing.assert_array_equal(worker.values(array, rows), cache.read(array.name, rows))


def test_a_build_that_was_stopped_goes_on_to_the_same_root_hash(blend, blend_config, tmp_path):
    units = []

    def stop(array, shard, seconds):
        units.append(array.name)
        if len(units) == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(plan_build(blend_config, device=CPU), tmp_path / "cache", device=CPU, on_unit=stop)
    left = tmp_path / "cache" / "data.zarr/logits/cnn/clean-from-1/c/0/0/0"
    left.write_bytes(left.read_bytes()[:-3])
    report = build(plan_build(blend_config, device=CPU), tmp_path / "cache", **QUIET)
    assert report.reused >= 19
    assert seal(tmp_path / "cache").root_hash == open_cache(blend).root_hash


def more(config: dict[str, Any]) -> None:
    config["teachers"]["vit"] = {"path": str(Path(config["teachers"]["cnn"]["path"]).with_name("vit"))}
    config["jacobians"] = {"cnn": {"classes": 3}}


def more_views(config: dict[str, Any]) -> None:
    config["data"][1]["views"] = 4


@pytest.mark.parametrize("change", [more, more_views])
def test_an_extended_cache_is_the_one_built_at_once(blend, changed, tmp_path, change):
    path = changed(change)
    shutil.copytree(blend, tmp_path / "grown")
    plan = plan_build(path, device=CPU)
    grow(tmp_path / "grown", plan.spec)
    build(plan, tmp_path / "grown", **QUIET)
    build(plan_build(path, device=CPU), tmp_path / "once", **QUIET)
    assert seal(tmp_path / "grown").root_hash == seal(tmp_path / "once").root_hash
    assert verify(tmp_path / "grown") == []


def test_views_of_a_source_are_not_taken_away_and_shares_stay(blend, changed, tmp_path):
    shutil.copytree(blend, tmp_path / "cache")

    def other_share(config):
        config["data"][1]["share"] = 0.6

    with pytest.raises(SpecMismatchError, match=r"data\.sources"):
        grow(tmp_path / "cache", plan_build(changed(other_share), device=CPU).spec)
    more_of_them = plan_build(changed(more_views), device=CPU)
    grow(tmp_path / "cache", more_of_them.spec)
    with pytest.raises(SpecMismatchError, match="npz has 4 views, of which 1 would leave some out"):
        grow(tmp_path / "cache", read_spec(blend))


@pytest.mark.parametrize("layout", ["blocks", "samples"])
def test_an_export_holds_what_the_cache_does(blend, tmp_path, layout):
    cache = open_cache(blend)
    export_webdataset(cache, tmp_path / "out", layout)
    assert verify(tmp_path / "out") == []
    out = open_shards(tmp_path / "out")
    assert out.root_hash == cache.root_hash
    for name in cache.arrays:
        np.testing.assert_array_equal(out.read(name), cache.read(name))
    here, there = (load_training_set(c, device=CPU, adversarial=True, budget_gib=1) for c in (cache, out))
    assert torch.equal(here.more[0].values, there.more[0].values)


def test_a_sample_of_it_is_computed_again(blend, tmp_path):
    result = recompute(open_cache(blend), 130, device=CPU)
    assert result.rows == 130 and result.beyond(0.0, 0.0) == []
    origin = json.loads((blend / "origin.json").read_text())
    assert origin["data_root"] is None and set(origin["data_roots"]) == {"1"}


@pytest.mark.parametrize(
    ("shard", "value", "expected"), [(5, 3, "rows without labels"), (0, -1, "labels lie in -1..8")]
)
def test_labels_where_none_belong_are_found(blend, tmp_path, shard, value, expected):
    folder = Path(shutil.copytree(blend, tmp_path / "cache"))
    reseal(folder, "label", lambda labels: labels.__setitem__(2, value), shard)
    (problem,) = verify(folder)
    assert expected in problem


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c["data"].reverse(), "list sources with labels first"),
        (lambda c: c["data"][1].pop("share"), "give each source with labels: none its share"),
        (lambda c: c["data"].__setitem__(1, {**c["data"][1], "root": "x"}), "path is another name for root"),
        (lambda c: c["data"][1].__setitem__("views", 12), "data[1].views is 12, the cache has 9"),
        (lambda c: c["data"][1].__setitem__("sare", 1), "spec.data[1]: unknown key 'sare'; did you mean 'share'?"),
        (
            lambda c: c["store"].__setitem__("logits", "int8"),
            "got store.logits int8 and by_view false: leave",
        ),
        (
            lambda c: c["store"].__setitem__("by_view", True),
            "got store.logits float16 and by_view true: leave",
        ),
        (lambda c: c["data"].pop(0), "data.labels is of a source beside others"),
        (lambda c: c.__setitem__("data", []), "data lists no source"),
        (lambda c: c["attacks"].__setitem__("clean-from-1", c["attacks"]["pgd-cnn"]), "'clean-from-1' is taken"),
    ],
)
def test_what_a_config_may_not_say(changed, change, expected):
    with pytest.raises(ConfigError) as caught:
        plan_build(changed(change), device=CPU)
    assert expected.replace("spec.", "changed.yaml.") in str(caught.value)


def test_a_list_of_one_source_is_that_source(tiny_cache, tiny_cache_config, tmp_path):
    config = yaml.safe_load(tiny_cache_config.read_text())
    config["data"] = [config["data"]]
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(config))
    assert plan_build(tmp_path / "one.yaml", device=CPU).spec == read_spec(tiny_cache)
