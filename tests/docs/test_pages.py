"""What the pages show is run: every Python block, in order, in one folder on digits, with tiny networks."""

import functools
import shutil
from pathlib import Path

import pytest
from blocks import ROOT, blocks

from darht.cache.builder.api import build_cache

SPEC = """
data: {source: digits, limit: 200, holdout: 0.1}
views: {padding: 1, flip: false, count: 2}
teachers: {cnn: {path: teachers/cnn}}
attacks: {pgd: {kind: pgd, teacher: cnn, eps: 8, step: 4, steps: 1}}
"""
RECIPE = """
student: {kwargs: {width: 4, blocks: [1, 1, 1, 1]}}
inner: {kind: pgd, eps: 8, steps: 1}
loss: {phases: [0.3, 0.6]}
optim: {epochs: 3, batch_size: 64}
"""


def run(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    names: dict[str, object] = {}
    for number, text in enumerate(blocks(page, "python"), 1):
        exec(compile(text, f"{page}, block {number}", "exec"), names)


def test_the_blocks_of_the_page_about_python_run(tmp_path, monkeypatch):
    run("docs/python.md", tmp_path, monkeypatch)
    assert (tmp_path / "run" / "student").is_dir() and (tmp_path / "eval-student" / "report.html").is_file()


def test_the_blocks_of_the_readme_run(tmp_path, monkeypatch, tiny_teachers):
    shutil.copytree(tiny_teachers["cnn"], tmp_path / "teachers" / "cnn")
    (tmp_path / "cache.yaml").write_text(SPEC)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.setattr("darht.build_cache", functools.partial(build_cache, allow=["cnn"]), raising=False)  # untrained
    run("README.md", tmp_path, monkeypatch)
    assert (tmp_path / "run" / "student").is_dir()


def test_the_table_of_public_names_is_the_package():
    import darht

    table = (ROOT / "docs" / "python.md").read_text().split("## What is public")[1]
    names = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")]
    assert sorted(names) == sorted(darht.__all__)
