"""Fixtures of the cache's tests: variants of the tiny config, copies of the tiny cache, its command line."""

import copy
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from crash_server import CrashServer

from darht.cache.builder.build import build, plan_build
from darht.cache.builder.plan import Plan
from darht.cache.builder.writer import OnUnit
from darht.cache.cli import cache

sys.path.insert(0, str(Path(__file__).parent))  # damage.py, which the tests share

CPU = torch.device("cpu")


@pytest.fixture
def variant(tiny_cache_config: Path, tmp_path: Path) -> Callable[..., Path]:
    """`variant(change)` writes the tiny config, changed in place by `change`, and gives the YAML's path."""
    original = yaml.safe_load(tiny_cache_config.read_text())

    def write(change: Callable[[dict[str, Any]], object] = lambda config: None, name: str = "spec.yaml") -> Path:
        config = copy.deepcopy(original)
        change(config)
        path = tmp_path / name
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        return path

    return write


@pytest.fixture
def small(variant: Callable[..., Path]) -> Callable[..., Plan]:
    """`small(change)` plans a build of 40 rows in shards of 16, with three views and one attack on the ResNet."""

    def plan(change: Callable[[dict[str, Any]], object] = lambda config: None) -> Plan:
        def shrink(config: dict[str, Any]) -> None:
            config["data"]["limit"] = 40
            config["views"]["count"] = 3
            config["store"] = {"rows_per_shard": 16, "rows_per_chunk": 4}
            del config["attacks"]["pgd-vit"]
            change(config)

        return plan_build(variant(shrink), device=CPU)

    return plan


@pytest.fixture
def build_into() -> Callable[..., Path]:
    """`build_into(plan, folder)` computes all units, without a seal."""

    def run(plan: Plan, folder: Path, on_unit: OnUnit = lambda array, shard, seconds: None, **options: Any) -> Path:
        build(plan, folder, device=CPU, on_unit=on_unit, **options)
        return folder

    return run


@pytest.fixture
def copied(tiny_cache: Path, tmp_path: Path) -> Path:
    """A copy of the tiny cache, to be damaged."""
    return Path(shutil.copytree(tiny_cache, tmp_path / "copy"))


@pytest.fixture
def invoke() -> Callable[..., Result]:
    """`invoke("info", folder)` runs `darht-cache info folder`; an exception that is no exit is a failure."""

    def run(*arguments: object) -> Result:
        result = CliRunner().invoke(cache, [str(argument) for argument in arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
        return result

    return run


@pytest.fixture
def refusal(invoke: Callable[..., Result], variant: Callable[..., Path], tmp_path: Path) -> Callable[..., str]:
    """`refusal(change)` builds from a changed config: that must fail with 2 and one line, which it gives."""

    def run(change: Callable[[dict[str, Any]], object] = lambda config: None, out: Path | None = None) -> str:
        result = invoke("build", variant(change), "--out", out or tmp_path / "out", "--device", "cpu")
        assert result.exit_code == 2, result.output
        assert result.output.startswith("error: ") and result.output.count("\n") == 1, result.output
        return result.output.removeprefix("error: ").rstrip("\n")

    return run


@pytest.fixture(scope="session")
def quick_config(tiny_cache_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The YAML of a cache that is built again and again: 36 rows in shards of 12, one teacher, 19 units."""
    config = yaml.safe_load(tiny_cache_config.read_text())
    config["data"]["limit"] = 36
    config["views"]["count"] = 2
    config["store"] = {"rows_per_shard": 12, "rows_per_chunk": 12}
    del config["attacks"]["pgd-vit"], config["teachers"]["vit"]
    config["attacks"]["pgd-cnn"]["steps"] = 1
    path = tmp_path_factory.mktemp("quick") / "quick.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


@pytest.fixture(scope="session")
def crash_server(quick_config: Path) -> Iterator[CrashServer]:
    """Builds of `quick_config` in children that can be killed."""
    with CrashServer(quick_config) as server:
        yield server


@pytest.fixture(scope="session")
def reference(crash_server: CrashServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of `quick_config`, built without interruption."""
    folder = tmp_path_factory.mktemp("reference") / "cache"
    ended = crash_server.build(folder)
    assert (ended.computed, ended.error, ended.signal) == (19, "", 0)
    return folder
