"""The forms in which Tiny ImageNet lies on disks give the same rows."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from darht.cache.sources.load import load_source
from darht.core.errors import DataError

WNIDS = ["n03", "n01", "n02"]
LABELS = [2, 0, 1, 1, 2, 0, 0, 1, 2, 1, 0]  # of val_0 ... val_10


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The archive's form, with two training images of each class and eleven validation images."""
    for label, wnid in enumerate(WNIDS):
        (tmp_path / "train" / wnid / "images").mkdir(parents=True)
        (tmp_path / "train" / wnid / f"{wnid}_boxes.txt").write_text("boxes")
        for number in range(2):
            draw(tmp_path / "train" / wnid / "images" / f"{wnid}_{number}.JPEG", 10 * label + number)
    (tmp_path / "val/images").mkdir(parents=True)
    for number in range(len(LABELS)):
        draw(tmp_path / f"val/images/val_{number}.JPEG", 100 + number)
    lines = [f"val_{number}.JPEG\t{WNIDS[label]}\t0\t0\t63\t63\n" for number, label in enumerate(LABELS)]
    (tmp_path / "val/val_annotations.txt").write_text("".join(lines))
    (tmp_path / "wnids.txt").write_text("\n".join(WNIDS))
    return tmp_path


def draw(path: Path, seed: int) -> None:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)


def sha256(root: Path, split: str) -> str:
    source = load_source("tiny-imagenet", root, split)
    assert source.notes == ()
    return source.sha256


@pytest.mark.parametrize("inner", ["", "images"])
@pytest.mark.parametrize("leftovers", [True, False])
def test_validation_images_in_class_folders_are_the_same_rows(tiny: Path, inner: str, leftovers: bool):
    before = sha256(tiny, "test")
    for number, label in enumerate(LABELS):
        folder = tiny / "val" / WNIDS[label] / inner
        folder.mkdir(parents=True, exist_ok=True)
        (tiny / f"val/images/val_{number}.JPEG").rename(folder / f"val_{number}.JPEG")
    if not leftovers:
        shutil.rmtree(tiny / "val/images")
        (tiny / "val/val_annotations.txt").unlink()
    assert sha256(tiny, "test") == before
    assert load_source("tiny-imagenet", tiny, "test").labels.tolist() == LABELS


def test_training_images_without_the_inner_folder_are_the_same_rows(tiny: Path):
    before = sha256(tiny, "train")
    for wnid in WNIDS:
        for path in (tiny / "train" / wnid / "images").iterdir():
            path.rename(tiny / "train" / wnid / path.name)
        (tiny / "train" / wnid / "images").rmdir()
    assert sha256(tiny, "train") == before


def test_images_that_were_moved_halfway(tiny: Path):
    (tiny / "val/n03").mkdir()
    (tiny / "val/images/val_1.JPEG").rename(tiny / "val/n03/val_1.JPEG")
    with pytest.raises(DataError, match=r"val has class folders, and 10 images are still in .*images: move them too"):
        load_source("tiny-imagenet", tiny, "test")
    shutil.rmtree(tiny / "val/images")
    with pytest.raises(DataError, match="they differ in n01, n02"):
        load_source("tiny-imagenet", tiny, "test")


def test_broken_files_are_left_out_on_demand(tiny: Path):
    (tiny / "val/images/val_4.JPEG").write_bytes(b"")
    source = load_source("tiny-imagenet", tiny, "test", skip_broken=True)
    assert source.labels.tolist() == [label for number, label in enumerate(LABELS) if number != 4]
    assert source.skipped == ("val/images/val_4.JPEG",)
