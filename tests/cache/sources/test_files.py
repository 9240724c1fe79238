"""Which files of a class's folder are rows, and that nothing else is passed over without a word."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from darht.cache.sources.files import SUFFIXES
from darht.cache.sources.load import Source, load_source
from darht.core.errors import DataError


def write(path: Path, value: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((2, 2, 3), value, np.uint8)).save(
        path, **({"quality": 100} if path.suffix == ".jpg" else {})
    )
    return path


def load(root: Path, split: str = "train", **options) -> Source:
    return load_source("imagefolder", root, split, **options)


def values(source: Source) -> list[int]:
    return source.images[:, 0, 0, 0].tolist()


def test_every_suffix_of_torchvision_is_read(tmp_path: Path):
    from darht.core.vision import torchvision

    assert set(SUFFIXES) == set(torchvision().datasets.folder.IMG_EXTENSIONS)
    for number, suffix in enumerate(SUFFIXES):
        if suffix != ".pgm":
            write(tmp_path / f"train/cat/{number}{suffix.upper()}", 10)
    Image.new("L", (2, 2), 10).save(tmp_path / "train/cat/grey.pgm")
    source = load(tmp_path)
    assert len(source.images) == len(SUFFIXES) and source.notes == ()


def test_rows_are_those_of_torchvision_in_its_order(tmp_path: Path):
    from darht.core.vision import torchvision

    files = ["a/9.png", "a/x/1.png", "a/x/y/2.ppm", "a/x-/3.png", "a/10.tif", "b/only/deep/4.bmp", "b/0.png"]
    for number, file in enumerate(files):
        write(tmp_path / "train" / file, 10 * number)
    expected = torchvision().datasets.ImageFolder(tmp_path / "train")
    source = load(tmp_path)
    assert values(source) == [np.asarray(image)[0, 0, 0] for image, _ in expected]
    assert source.labels.tolist() == [label for _, label in expected] and source.notes == ()


def test_what_is_passed_over_is_counted(tmp_path: Path):
    write(tmp_path / "train/cat/1.png", 1)
    for file in ("train/cat/b.gif", "train/cat/deep/c.GIF", "train/cat/._1.png", "train/notes.txt", "train/loose.png"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("x")
    (tmp_path / "train/.ipynb_checkpoints").mkdir()
    (tmp_path / "train/cat/LICENSE").write_text("x")
    (tmp_path / "train/cat/gone").symlink_to("nowhere")
    os.mkfifo(tmp_path / "train/cat/pipe.png")
    (note,) = load(tmp_path).notes
    listed = {"2 x .gif", "1 x .txt", "1 x .png", "1 x hidden file", "1 x hidden folder", "1 x file without a suffix",
              "1 x link to nothing", "1 x neither file nor folder"}  # fmt: skip
    assert set(note.removeprefix(f"{tmp_path}/train; passed over: ").split(", ")) == listed


def test_links_that_go_round_are_entered_once(tmp_path: Path):
    write(tmp_path / "train/cat/1.png", 1)
    write(tmp_path / "elsewhere/2.png", 2)
    (tmp_path / "train/cat/round").symlink_to(".")
    (tmp_path / "train/cat/more").symlink_to(tmp_path / "elsewhere")
    source = load(tmp_path)
    assert values(source) == [1, 2]
    assert "1 x link to a folder that is read already" in source.notes[0]


def test_a_class_that_is_a_link_to_nothing(tmp_path: Path):
    write(tmp_path / "train/cat/1.png", 1)
    (tmp_path / "train/dog").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"train/dog is a link to nothing \(such links: 1\); mend or remove it"):
        load(tmp_path)


def test_rules_1_read_what_they_read(tmp_path: Path):
    for number, file in enumerate(("cat/1.png", "cat/2.tif", "cat/deep/3.png", "dog/4.png")):
        write(tmp_path / "train" / file, number)
    (tmp_path / "train/cat/5.png").symlink_to("nowhere")
    (tmp_path / "train/owl").symlink_to("nowhere")
    source = load(tmp_path, rules=1)
    assert values(source) == [0, 3] and source.classes == ("cat", "dog")


def test_an_empty_class_says_what_lies_there(tmp_path: Path):
    write(tmp_path / "train/cat/1.png", 1)
    (tmp_path / "train/dog").mkdir()
    (tmp_path / "train/dog/a.gif").write_text("x")
    with pytest.raises(DataError, match=r"none in .*dog; .*; passed over: 1 x \.gif"):
        load(tmp_path)


@pytest.mark.parametrize("form", ["flat", "one folder", "empty"])
def test_a_test_folder_without_labels_is_not_the_test_split(tmp_path: Path, form: str):
    for split, value in (("train", 1), ("val", 2)):
        for name in ("cat", "dog"):
            write(tmp_path / split / name / "1.png", value)
    (tmp_path / "test").mkdir()
    if form != "empty":
        write(tmp_path / ("test" if form == "flat" else "test/images") / "1.png", 3)
    source = load(tmp_path, "test")
    assert values(source) == [2, 2]
    assert f"{tmp_path}/val is the test split" in source.notes[0]
    (tmp_path / "val").rename(tmp_path / "valid")
    assert values(load(tmp_path, "test")) == [2, 2]
