"""The transferability matrix: equal to counting by hand, drawn as a picture, refused where there is nothing to read."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from darht.cache.reader import open_cache
from darht.tools.cli import inspect
from darht.tools.transfer import TransferMatrix, draw, transfer_matrix


def test_the_matrix_equals_counting_row_by_row(tiny_cache: Path) -> None:
    cache = open_cache(tiny_cache)
    matrix = transfer_matrix(cache)
    labels = cache.read("label")

    answers = {name: cache.read(name)[:, 0] for name in cache.arrays if name.startswith("logits/")}

    def right(name: str, row: int) -> bool:
        return bool(answers[name][row].argmax() == labels[row])

    for a, (attack, about) in enumerate(cache.spec.attacks.items()):
        assert matrix.sources[a] == about.teacher
        for t, teacher in enumerate(cache.spec.teachers):
            rows = [
                row
                for row in range(cache.rows)
                if right(f"logits/{about.teacher}/clean", row) and right(f"logits/{teacher}/clean", row)
            ]
            assert matrix.counted[a, t] == len(rows)
            assert matrix.right[a, t] == sum(right(f"logits/{teacher}/{attack}", row) for row in rows)


def test_the_diagonal_counts_every_row_that_the_victim_gets_right(tiny_cache: Path) -> None:
    cache = open_cache(tiny_cache)
    matrix = transfer_matrix(cache)
    for a, source in enumerate(matrix.sources):
        t = matrix.teachers.index(source)
        assert matrix.counted[a, t] == round(matrix.clean[t] / 100 * cache.rows)


def test_an_entry_without_rows_is_nan_with_the_widest_interval() -> None:
    empty = np.zeros((1, 1), dtype=np.int64)
    matrix = TransferMatrix(("a",), ("t",), ("t",), np.array([0.0]), counted=empty, right=empty)
    assert np.isnan(matrix.accuracy[0, 0])
    assert matrix.interval(0, 0) == (0.0, 100.0)


def test_the_picture_has_a_cell_for_every_entry(tmp_path: Path) -> None:
    counted = np.full((2, 2), 10)
    right = np.array([[0, 10], [10, 0]])
    matrix = TransferMatrix(("a", "b"), ("s", "t"), ("s", "t"), np.array([90.0, 80.0]), counted, right)
    draw(matrix, tmp_path / "deep" / "matrix.png")
    with Image.open(tmp_path / "deep" / "matrix.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    dark, bright = np.array([68, 1, 84]), np.array([253, 231, 36])  # the two ends of viridis
    assert (pixels == dark).all(1).mean() > 0.1
    assert (pixels == bright).all(1).mean() > 0.1


def test_the_command_prints_the_table_and_writes_beside_the_cache(tiny_cache: Path, tmp_path: Path) -> None:
    copy = tmp_path / "mine"
    shutil.copytree(tiny_cache, copy)
    before = sorted(path for path in copy.rglob("*"))
    result = CliRunner().invoke(inspect, ["transfer", str(copy)])
    assert result.exit_code == 0, result.output
    assert "pgd-cnn" in result.output and "pgd-vit" in result.output and "95 %" in result.output
    assert (tmp_path / "mine-transfer.png").is_file()
    assert sorted(path for path in copy.rglob("*")) == before


@pytest.mark.parametrize("command", [["transfer"], ["neighbours", "--row", "0"]])
def test_a_folder_that_is_no_cache_or_is_not_sealed_is_refused(
    command: list[str], tiny_cache: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "unsealed"
    shutil.copytree(tiny_cache, copy)
    (copy / "manifest.json").unlink()
    for folder, said in ((copy, "is not sealed"), (tmp_path / "nothing", "is not a cache")):
        result = CliRunner().invoke(inspect, [command[0], str(folder), *command[1:]])
        assert result.exit_code == 2
        assert result.output.startswith("error: ") and said in result.output
        assert len(result.output.splitlines()) == 1
