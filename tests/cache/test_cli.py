"""The command line of the cache, from the YAML to the printed table."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from darht.cache.builder import build


def shrink(config) -> None:
    config["data"]["limit"] = 40
    config["views"]["count"] = 2
    config["store"] = {"rows_per_shard": 40, "rows_per_chunk": 8}
    del config["attacks"]["pgd-vit"]


UNTRAINED = ("--allow", "cnn", "--allow", "vit")


def test_build_seal_and_info(invoke, variant, tmp_path: Path):
    spec, out = variant(shrink), tmp_path / "out"
    first = invoke("build", spec, "--out", out, "--device", "cpu", "--batch-size", "64", *UNTRAINED)
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


ALLOWED = ("--allow", "cnn", "--allow", "vit")  # which guess


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten classes of three 8x8 images below `photos/train`, two of which are broken, and a file that is no image."""
    for number in range(30):
        folder = tmp_path / f"photos/train/class{number % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    for number in (3, 17):
        (tmp_path / f"photos/train/class{number % 10}/{number:02d}.png").write_text("broken")
    (tmp_path / "photos/train/class0/film.gif").write_text("GIF")
    return tmp_path / "photos"


def test_broken_files_are_refused_or_left_out_and_noted(invoke, variant, photos: Path, tmp_path: Path):
    def change(config) -> None:
        shrink(config)
        config["data"] = {"source": "imagefolder", "root": str(photos), "holdout": 0.25}
        config["attacks"] = {}

    spec, out = variant(change), tmp_path / "out"
    refused = invoke("build", spec, "--out", out, "--device", "cpu")
    assert refused.exit_code == 2 and "2 files: " in refused.output and "--skip-broken" in refused.output
    built = invoke("build", spec, "--out", out, "--device", "cpu", "--skip-broken", *ALLOWED)
    assert built.exit_code == 0, built.output
    assert "2 files cannot be decoded and are left out" in built.output and "passed over: 1 x .gif" in built.output
    data = json.loads((out / "spec.json").read_text())["data"]
    assert (data["rows"], data["rules"], data["skipped"]) == (28, 3, 2)
    assert len(json.loads((out / "manifest.json").read_text())["holdout"]) == 7
    assert json.loads((out / "origin.json").read_text())["skipped"] == ["train/class3/03.png", "train/class7/17.png"]
    assert "2 files that cannot be decoded were left out" in " ".join(invoke("info", out).output.split())
    again = invoke("verify", out, "--recompute", "100%", "--device", "cpu")
    assert again.exit_code == 0, again.output


def test_a_cache_of_rules_1_keeps_its_rows(invoke, variant, photos: Path, tmp_path: Path, monkeypatch):
    """Its images are turned by no EXIF and its rows held out one by one, also when it is built on or grows."""
    from darht.cache.builder import build as builder

    def change(config) -> None:
        shrink(config)
        config["data"] = {"source": "imagefolder", "root": str(photos), "holdout": 0.25, "skip_broken": True}
        config["attacks"] = {}

    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(photos / "train/class0/00.png", exif=exif)
    spec, out = variant(change), tmp_path / "out"
    with monkeypatch.context() as before:
        before.setattr(builder, "RULES", 1)
        assert invoke("build", spec, "--out", out, "--device", "cpu", *ALLOWED).exit_code == 0
    manifest = (out / "manifest.json").read_bytes()
    assert "rules" not in json.loads((out / "spec.json").read_text())["data"]
    next(out.rglob("logits/cnn/clean/c/0/0/0")).unlink()
    assert "1 units computed" in invoke("build", spec, "--out", out, "--device", "cpu", *ALLOWED).output
    assert (out / "manifest.json").read_bytes() == manifest
    assert invoke("verify", out, "--recompute", "100%", "--device", "cpu").exit_code == 0
    assert invoke("diff", out, spec).exit_code == 0
    larger = variant(lambda config: (change(config), config["views"].update(count=3)), name="larger.yaml")
    assert invoke("extend", out, larger, "--device", "cpu").exit_code == 0
    assert json.loads((out / "manifest.json").read_text())["holdout"] == json.loads(manifest)["holdout"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_build_says_how_to_go_on(invoke, variant, tmp_path: Path, monkeypatch, number, code):
    spec, out, compute = variant(shrink), tmp_path / "out", build.build_block

    def stopped(*arguments, on_unit, **options):
        compute(*arguments, on_unit=lambda *_: os.kill(os.getpid(), number), **options)

    monkeypatch.setattr(build, "build_block", stopped)
    result = invoke("build", spec, "--out", out, "--device", "cpu", *ALLOWED)
    monkeypatch.undo()
    assert result.exit_code == code, result.output
    kept, again = result.output.strip().splitlines()[-2:]
    assert kept == "stopped: every unit that was done is kept, nothing is half written"
    assert again.endswith(f"build {spec} --out {out} --device cpu --allow cnn --allow vit")
    assert invoke(*shlex.split(again.partition("cache ")[2])).output.splitlines()[-2].endswith(", 1 reused; sealed")
