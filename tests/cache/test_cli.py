"""The command line of the cache, from the YAML to the printed table."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def shrink(config) -> None:
    config["data"]["limit"] = 40
    config["views"]["count"] = 2
    config["store"] = {"rows_per_shard": 40, "rows_per_chunk": 8}
    del config["attacks"]["pgd-vit"]


def test_build_seal_and_info(invoke, variant, tmp_path: Path):
    spec, out = variant(shrink), tmp_path / "out"
    first = invoke("build", spec, "--out", out, "--device", "cpu", "--batch-size", "64")
    assert first.exit_code == 0, first.output
    root = json.loads((out / "manifest.json").read_text())["root_hash"]
    lines = first.output.splitlines()
    assert lines[-2].startswith(f"{out}: 9 units computed in ") and lines[-2].endswith(" s, 0 reused; sealed")
    assert lines[-1] == f"root hash {root}"

    again = invoke("build", spec, "--out", out, "--device", "cpu")
    assert again.output.splitlines()[-2:] == [
        f"{out}: 0 units computed in 0.0 s, 9 reused; sealed",
        f"root hash {root}",
    ]

    (out / "manifest.json").unlink()
    assert invoke("seal", out).output == f"root hash {root}\n"

    info = invoke("info", out)
    assert info.exit_code == 0
    for text in ("digits train, 40 rows", "views  2 (crop-flip", "pgd on cnn, 1 views", f"root hash  {root}"):
        assert text in info.output
    for name in ("source_index", "delta/pgd-cnn", "logits/cnn/pgd-cnn", "logits/vit/clean"):
        assert f" {name} " in info.output  # whole, though a pipe has 80 columns


def test_a_build_that_fails_on_its_way_says_so_in_one_line(invoke, variant, copied: Path):
    (copied / "spec.json").write_text("{")
    result = invoke("build", variant(), "--out", copied, "--device", "cpu")
    assert result.exit_code != 0
    assert result.output.startswith(f"error: {copied}/spec.json is not a cache spec: ")
    assert result.output.count("\n") == 1


@pytest.mark.parametrize("command", ["info", "seal"])
def test_a_folder_that_is_no_cache(invoke, tmp_path: Path, command):
    result = invoke(command, tmp_path)
    assert result.exit_code == 2
    assert result.output == (
        f"error: {tmp_path} is not a cache: {tmp_path}/spec.json is missing; "
        "darht-cache build SPEC.yaml --out DIR makes one\n"
    )


@pytest.mark.parametrize(
    ("command", "damage", "text"),
    [
        ("info", lambda folder: (folder / "manifest.json").unlink(), "is not sealed"),
        ("info", lambda folder: shutil.rmtree(folder / "data.zarr/label/c"), "is missing: run darht-cache build again"),
        (
            "seal",
            lambda folder: shutil.rmtree(folder / "commits/image"),
            "4 of 45 units are missing, first: image shard 0",
        ),
        ("seal", lambda folder: (folder / "commits/image/00001.json").write_text(""), "is not a commit record"),
    ],
)
def test_a_cache_that_is_not_whole(invoke, copied: Path, command, damage, text):
    damage(copied)
    result = invoke(command, copied)
    assert result.exit_code != 0
    assert result.output.startswith("error: ") and text in result.output and result.output.count("\n") == 1


def test_the_options_are_checked(invoke, variant, tmp_path: Path):
    assert invoke("build", variant()).exit_code == 2
    assert invoke("build", variant(), "--out", tmp_path / "out", "--batch-size", "0").exit_code == 2
    assert not (tmp_path / "out").exists()


LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
from darht.cache.cli import cache
cache()
"""


@pytest.mark.parametrize("command", ["info", "status", "verify", "gc"])
@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('"rows":100,', f'"rows":{10**12},', "rows must lie in 1..100,000,000; got 1000000000000"),
        ('"rows":100,', '"rows":0,', "rows must lie in 1..100,000,000; got 0"),
        ('"padding":1}', '"padding":1000000}', "padding must lie in 0..127 pixels and count be at least 1"),
        ('"source"', '"source":' + "[" * 100_000, "is nested more than 50 levels deep"),
    ],
)  # fmt: skip
def test_a_spec_that_claims_too_much_is_one_line(copied: Path, command, old, new, expected):
    spec = (copied / "spec.json").read_text()
    assert old in spec
    (copied / "spec.json").write_text(spec.replace(old, new))
    words = [sys.executable, "-c", LIMITED, command, copied]
    done = subprocess.run(words, capture_output=True, check=False, text=True, timeout=120)
    assert done.returncode == 4 and expected in done.stderr
    assert len(done.stderr.splitlines()) == 1 and len(done.stderr) < 1000
