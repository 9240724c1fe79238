"""Rows that are left out: not trained on, part of the run's identity, and refused when they are another cache's."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from darht.cache.read.loader import load_training_set
from darht.cache.read.reader import Cache, open_cache
from darht.core.errors import ConfigError
from darht.trainer import cli
from darht.trainer.config import TrainConfig
from darht.trainer.student.exclude import exclude_rows
from darht.trainer.student.setup import feed_plan, run_identity


def write(path: Path, cache: Cache, rows: object, **other: object) -> Path:
    path.write_text(json.dumps({"cache_root_hash": cache.root_hash, "rows": rows, **other}))
    return path


def test_excluded_rows_are_neither_trained_on_nor_selected_with(tiny_cache: Path, tmp_path: Path) -> None:
    cache = open_cache(tiny_cache)
    held = cache.manifest.holdout
    rows = [row for row in range(100) if row not in held][:7]
    assert exclude_rows(cache, write(tmp_path / "rows.json", cache, [*rows, held[0]])) == 7
    data = load_training_set(cache, device=torch.device("cpu"), adversarial=False, budget_gib=1)
    assert data.holdout.tolist() == list(held)
    assert sorted([*data.training.tolist(), *held, *rows]) == list(range(100))


def test_a_run_without_some_rows_is_another_run(tiny_cache: Path, tmp_path: Path) -> None:
    config, whole, part = TrainConfig(), open_cache(tiny_cache), open_cache(tiny_cache)
    rows = [row for row in range(100) if row not in whole.manifest.holdout]
    exclude_rows(part, write(tmp_path / "rows.json", part, rows[:2]))
    plan = feed_plan(config, whole, torch.device("cpu"), 1.0)
    assert run_identity(config, whole, plan) != run_identity(config, part, plan)
    exclude_rows(part, write(tmp_path / "none.json", part, []))
    assert run_identity(config, whole, plan) == run_identity(config, part, plan)


@pytest.mark.parametrize("rows", [None, "3", [100], [-1], [1.5], {"3": 1}])
def test_what_is_no_list_of_rows_is_refused(tiny_cache: Path, tmp_path: Path, rows: object) -> None:
    cache = open_cache(tiny_cache)
    with pytest.raises(ConfigError, match=r"must hold under 'rows' a list of whole numbers in 0\.\.99"):
        exclude_rows(cache, write(tmp_path / "rows.json", cache, rows))
    assert cache.excluded == ()


def test_lists_of_other_caches_files_that_are_not_json_and_all_rows_are_refused(
    tiny_cache: Path, tmp_path: Path
) -> None:
    cache, path = open_cache(tiny_cache), tmp_path / "rows.json"
    with pytest.raises(ConfigError, match="lists rows of another cache"):
        exclude_rows(cache, write(path, cache, [1], cache_root_hash="0" * 64))
    with pytest.raises(ConfigError, match="leaves no row of"):
        exclude_rows(cache, write(path, cache, np.arange(100).tolist()))
    path.write_text("{")
    for wrong in (path, tmp_path / "missing.json"):
        with pytest.raises(ConfigError, match="does not read as JSON"):
            exclude_rows(cache, wrong)


def test_the_command_takes_the_list(tiny_cache: Path, tmp_path: Path) -> None:
    cache = open_cache(tiny_cache)
    rows = [row for row in range(100) if row not in cache.manifest.holdout][:3]
    listed = write(tmp_path / "rows.json", cache, rows)
    words = ["--shards", str(tiny_cache), "--out", str(tmp_path / "run"), "--exclude", str(listed), "--device", "cpu"]
    for setting in ("optim.epochs=1", "optim.batch_size=32", "inner.eps=32", "inner.step=8", "inner.steps=1",
                    'student.kwargs={"width": 4, "blocks": [1, 1, 1, 1]}'):  # fmt: skip
        words += ["--set", setting]
    result = CliRunner().invoke(cli.train, words)
    assert result.exit_code == 0, result.output
    assert "3 rows are left out of training" in result.output
    assert "excluded_rows" in (tmp_path / "run" / "run.json").read_text()
