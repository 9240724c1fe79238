"""The transferability matrix: equal to counting by hand, drawn as a picture, refused where there is nothing to read."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from built import sealed_cache
from click.testing import CliRunner
from PIL import Image
from torch import Tensor, nn

from darht.attacks import FGSM
from darht.attacks.transfer import TransferMatrix, transfer_matrix
from darht.cache.builder.teachers import Card, save_teacher
from darht.cache.read.reader import open_cache
from darht.cache.sources.load import load_source
from darht.core.preprocessing import Preprocessing
from darht.tools.cli import inspect
from darht.tools.transfer import draw, stored_transfer


def test_the_matrix_equals_counting_row_by_row(tiny_cache: Path) -> None:
    cache = open_cache(tiny_cache)
    matrix = stored_transfer(cache)
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
    matrix = stored_transfer(cache)
    for a, source in enumerate(matrix.sources):
        t = matrix.teachers.index(source)
        assert matrix.counted[a, t] == round(matrix.clean[t] / 100 * cache.rows)


def test_classes_add_up_to_the_whole(tiny_cache: Path) -> None:
    matrix = stored_transfer(open_cache(tiny_cache))
    assert np.array_equal(matrix.counted_by_class.sum(2), matrix.counted)
    assert np.array_equal(matrix.right_by_class.sum(2), matrix.right)
    label = int(matrix.counted_by_class[0, 0].argmax())
    low, high = matrix.interval(0, 0, label)
    assert low <= matrix.accuracy_by_class[0, 0, label] <= high


def test_it_agrees_with_attacking_the_teachers_again(tmp_path: Path) -> None:
    """FGSM draws nothing, so the live matrix must count the very same rows and the very same answers."""
    digits = load_source("digits", None, "train", limit=100)
    x, y = torch.from_numpy(digits.images).float() / 255, torch.from_numpy(digits.labels)
    nets = {"cnn": cnn(), "mlp": mlp()}
    for seed, net in enumerate(nets.values()):
        learn(net, x, y, seed)
    attack, config = FGSM(eps=32), {"source": "digits", "limit": 100, "holdout": 0}
    for name, net in nets.items():
        arch = f"python:{__name__}:{name}"
        card = Card(arch=arch, num_classes=10, preprocessing=Preprocessing(), weights_sha256="")
        save_teacher(tmp_path / name, net, card)
    spec = {
        "data": config,
        "teachers": {name: {"path": name} for name in nets},
        "attacks": {f"fgsm-{name}": {"kind": "fgsm", "teacher": name, "eps": 32} for name in nets},
        "views": {"kind": "identity"},
        "store": {"logits": "float32"},
    }
    sealed_cache(spec, tmp_path)
    live = transfer_matrix(nets, x, y, attacks=[attack], count=len(y))
    read = stored_transfer(open_cache(tmp_path / "cache"), balanced=True)
    assert np.array_equal(live.counted_by_class, read.counted_by_class)
    assert np.array_equal(live.right_by_class, read.right_by_class)
    assert np.array_equal(live.clean, read.clean)
    assert read.counted.min() > 30 and read.right.min() < read.counted.min()


def cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 10))


def learn(net: nn.Module, x: Tensor, y: Tensor, seed: int) -> None:
    """A few steps, so that both are right on most rows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in net.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.reset_parameters()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    net.eval().requires_grad_(False)


def made(names: tuple[str, ...], clean: np.ndarray, counted: np.ndarray, right: np.ndarray) -> TransferMatrix:
    return TransferMatrix(
        attacks=names, sources=names, teachers=names, clean=clean, counted_by_class=counted, right_by_class=right
    )


def test_an_entry_without_rows_is_nan_with_the_widest_interval() -> None:
    empty = np.zeros((1, 1, 3), dtype=np.int64)
    matrix = made(("t",), np.array([0.0]), empty, empty)
    assert np.isnan(matrix.accuracy_by_class).all() and matrix.interval(0, 0, 2) == (0.0, 100.0)
    assert np.isnan(matrix.accuracy[0, 0])
    assert matrix.interval(0, 0) == (0.0, 100.0)


def test_the_picture_has_a_cell_for_every_entry(tmp_path: Path) -> None:
    counted = np.full((2, 2, 1), 10)
    right = np.array([[[0], [10]], [[10], [0]]])
    matrix = made(("s", "t"), np.array([90.0, 80.0]), counted, right)
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
