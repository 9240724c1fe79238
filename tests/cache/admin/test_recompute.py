"""A sample computed again: exactly what is stored on the same engine, and an exit code where it is not."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from built import sealed_cache
from reseal import reseal, rewrite

from darht.cache.admin.compare import ValueDiff
from darht.cache.admin.recompute import LOGITS, VALUES, Recomputed, recompute, sample_batches, sample_size
from darht.cache.builder.build import plan_build
from darht.cache.read.reader import open_cache
from darht.core.errors import ConfigError, DataError, ModelError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def odd_cache(tiny_cache_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 rows in shards of 16, built in batches of 5, which leave a rest in every shard; logits show every bit."""
    config = yaml.safe_load(tiny_cache_config.read_text())
    config["data"]["limit"], config["views"]["count"] = 40, 3
    config["store"] = {"rows_per_shard": 16, "rows_per_chunk": 4, "logits": "float32"}
    folder = tmp_path_factory.mktemp("odd")
    return sealed_cache(config, folder, batch_size=5)


@pytest.fixture
def copied(odd_cache: Path, tmp_path: Path) -> Path:
    shutil.copytree(odd_cache, tmp_path / "copy")
    origin = json.loads((odd_cache / "origin.json").read_text())
    teachers = {name: str((odd_cache / path).resolve()) for name, path in origin["teachers"].items()}
    rewrite(tmp_path / "copy" / "origin.json", teachers=teachers)
    return tmp_path / "copy"


@pytest.mark.parametrize(("count", "seed", "rows"), [(1, 0, 5), (7, 1, 10), (40, 0, 40)])
def test_on_the_same_engine_nothing_differs(odd_cache, count, seed, rows):
    cache = open_cache(odd_cache)
    found = recompute(cache, count, device=CPU, seed=seed)
    assert count <= found.rows <= rows
    assert list(found.arrays) == list(cache.arrays)
    assert all(diff.largest == diff.values == 0 for diff in found.arrays.values()), found.arrays
    assert found.arrays["logits/vit/clean"].compared == found.rows * 3
    assert found.beyond(0.0, 0.0) == []


def test_the_sample_is_seeded_and_cut_as_the_build_was(odd_cache, tiny_cache_config):
    cache = open_cache(odd_cache)
    plan = plan_build(odd_cache.parent / "cache.yaml", device=CPU)
    every = sample_batches(plan, cache.rows, 5, seed=0)
    assert [(s.start, s.stop) for s in every[:5]] == [(0, 5), (5, 10), (10, 15), (15, 16), (16, 21)]
    assert sum(s.stop - s.start for s in every) == 40
    chosen = [sample_batches(plan, 8, 5, seed=seed) for seed in range(6)]
    assert chosen[0] == sample_batches(plan, 8, 5, seed=0) and len({str(c) for c in chosen}) > 1


def test_wrong_numbers_are_found_although_every_hash_fits(copied, invoke):
    def swap_classes(values: np.ndarray) -> None:
        values[:] = values[..., ::-1].copy()

    reseal(copied, "logits/vit/clean", swap_classes)
    reseal(copied, "delta/pgd-cnn", lambda values: values.fill(0))
    reseal(copied, "label", lambda values: values.__setitem__(0, (values[0] + 1) % 10))
    assert invoke("verify", copied).exit_code == 0  # nothing that it checks without teachers
    found = invoke("verify", copied, "--recompute", "100%", "--device", "cpu")
    assert found.exit_code == 4, found.output
    said = [line for line in found.output.splitlines() if line.startswith("differs: ")]
    assert {line.split(": ")[1] for line in said} >= {"label", "delta/pgd-cnn", "logits/vit/clean"}
    assert "logits/cnn/clean" not in found.output.split("differs: ", 1)[1]


def test_the_command(copied, tmp_path, invoke, tiny_teachers):
    found = invoke("verify", copied, "--recompute", "10%", "--seed", "3", "--device", "cpu", "--tolerance", "0")
    assert found.exit_code == 0, found.output
    assert "rows computed again on cpu" in found.output and "logits/vit/clean" in found.output
    assert f"torch {torch.__version__}" in found.output and "unknown" not in found.output
    origin = (copied / "origin.json").read_text()
    (copied / "origin.json").unlink()
    missing = invoke("verify", copied, "--recompute", "5", "--device", "cpu")
    assert missing.exit_code == 2 and "give --teacher NAME=FOLDER" in missing.output
    given = [word for name, path in tiny_teachers.items() for word in ("--teacher", f"{name}={path}")]
    assert invoke("verify", copied, "--recompute", "5", "--device", "cpu", *given).exit_code == 0
    swapped = [word.replace("cnn=", "vit=") if word.startswith("cnn=") else word for word in given]
    assert invoke("verify", copied, "--recompute", "5", *swapped).exit_code == 2
    for words in (["--teacher", "cnn"], ["--recompute", "0"], ["--recompute", "200%"], ["--recompute", "x"]):
        assert invoke("verify", copied, *words).exit_code == 2
    (copied / "origin.json").write_text(origin)
    assert invoke("verify", copied, "--recompute", "5", "--teacher", "typo=x").exit_code == 2
    assert "reads no folder" in invoke("verify", copied, "--recompute", "5", "--data-root", tmp_path).output


def test_other_teachers_and_images_are_refused(odd_cache, tiny_teachers, monkeypatch):
    cache = open_cache(odd_cache)
    with pytest.raises(ModelError, match=r"is not teacher 'cnn' of .*arch: \"resnet18\" -> \"timm:vit"):
        recompute(cache, 5, device=CPU, teachers={"cnn": tiny_teachers["vit"]})
    with pytest.raises(ConfigError, match="has no teacher 'typo'; it has cnn, vit"):
        recompute(cache, 5, device=CPU, teachers={"typo": tiny_teachers["vit"]})
    from darht.cache.admin import recompute as module

    load = module.open_source

    def other(*args, **kwargs):
        source = load(*args, **kwargs)
        return type(source)(**{**vars(source), "sha256": "0" * 64})

    monkeypatch.setattr(module, "open_source", other)
    with pytest.raises(DataError, match="holds other images than those of"):
        recompute(cache, 5, device=CPU)


@pytest.mark.parametrize(("text", "count"), [("2%", 4), ("100%", 200), ("0.1%", 1), ("7", 7), ("200", 200)])
def test_a_share_or_a_count(text, count):
    assert sample_size(text, 200) == count


@pytest.mark.parametrize("text", ["0", "-1", "0%", "101%", "201", "2.5", "%", "", "many", "nan%", "inf%"])
def test_what_is_neither(text):
    with pytest.raises(ConfigError, match=r"reads a share such as 2% or a count in 1\.\.200"):
        sample_size(text, 200)


def test_what_is_beyond_the_tolerances():
    def found(name: str, largest: float, values: float) -> list[str]:
        kinds = {"logits/a/clean": "logits", "delta/a": "delta", "image": "image"}
        return Recomputed(1, {name: ValueDiff(1, largest, 1.0, values, None)}, (), kinds).beyond()

    assert found("logits/a/clean", LOGITS, 1.0) == [] and found("delta/a", 64, VALUES) == []
    assert found("logits/a/clean", LOGITS * 1.01, 1.0) == [
        "logits/a/clean: logits differ by up to 0.0505, tolerance 0.05"
    ]
    assert found("delta/a", 1, VALUES * 1.01) == ["delta/a: 10.1 % of the values differ, tolerance 10 %"]
    assert found("image", 1, 0.0) == ["image: 100 % of the rows are not those of the data set"]
