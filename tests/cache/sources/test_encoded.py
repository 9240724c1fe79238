"""Sources that are read: their pixels and hash, what is not read twice, and what changes under a build."""

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from darht.cache.sources import scan as scanning
from darht.cache.sources.encoded import EncodedImages, read_index, write_index
from darht.cache.sources.load import FileSource, load_source
from darht.cache.sources.open import open_source
from darht.core.errors import DataError

NAMES = [f"train/{label}/{number}.png" for label in ("cat", "dog") for number in range(3)]


def encoded(seed: int, side: int = 6, kind: str = "PNG", **options) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(NAMES):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(number))
    return tmp_path


def opened(root: Path, name: str = "imagefolder", rules: int = 3, **options) -> FileSource:
    source = open_source(name, root, "train", rules=rules, **options)
    assert isinstance(source, FileSource)
    return source


def tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_a_source_that_is_read_has_the_pixels_of_one_that_is_loaded(folder):
    loaded, source = load_source("imagefolder", folder, "train"), opened(folder)
    assert source.images.shape == loaded.images.shape and len(source.images) == 6
    np.testing.assert_array_equal(source.images[:], loaded.images)
    np.testing.assert_array_equal(source.images[np.array([4, 0])], loaded.images[[4, 0]])
    assert opened(folder, rules=2).sha256 == loaded.sha256 != source.sha256


def test_the_content_hash_is_what_the_format_says(folder):
    digest = hashlib.sha256(b'{"classes":["cat","dog"],"images":"encoded","rows":6}\n')
    for name in NAMES:
        digest.update(hashlib.sha256((folder / name).read_bytes()).digest())
    digest.update(np.array([0, 0, 0, 1, 1, 1], dtype="<i8").tobytes())
    assert opened(folder).sha256 == digest.hexdigest()


def test_an_index_spares_reading_what_did_not_change(folder, monkeypatch):
    source, read = opened(folder), list[int]()
    index = read_index(write_index(source.images), folder)
    look = scanning._look_at
    monkeypatch.setattr(scanning, "_look_at", lambda located, n, *more: read.append(n) or look(located, n, *more))
    assert opened(folder, index=index).sha256 == source.sha256 and read == []
    (folder / NAMES[4]).write_bytes(encoded(99))
    assert opened(folder, index=index).sha256 == opened(folder).sha256 != source.sha256
    assert read[0] == 4 and len(read) == 7
    assert opened(folder, index=index, rules=2).sha256 != source.sha256 and len(read) == 13


@pytest.mark.parametrize("data", [None, b"", b"PK", b"\x93NUMPY\x01"])
def test_an_index_that_cannot_be_read_is_none(folder, data):
    assert read_index(data, folder) is None


def test_a_file_that_changes_after_it_was_indexed_is_noticed(folder):
    images: EncodedImages = opened(folder).images
    stat = (folder / NAMES[1]).stat()
    (folder / NAMES[1]).write_bytes(encoded(98))
    os.utime(folder / NAMES[1], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(DataError, match=r"cat/1.png cannot be read: its contents changed since it was indexed"):
        images[:]
    (folder / NAMES[1]).unlink()
    with pytest.raises(DataError, match="No such file"):
        images[1:2]


def test_an_animated_file_is_its_first_frame_and_is_told(folder):
    frames = [Image.new("RGB", (6, 6), (shade, 0, 0)) for shade in (10, 200)]
    frames[0].save(folder / "train/cat/9.webp", save_all=True, append_images=frames[1:], lossless=True)
    source = opened(folder)
    assert source.images[3:4].max() == 10
    assert any("1 images are animated, and their first frame was taken" in note for note in source.notes)


def test_tars(tmp_path):
    tar(tmp_path / "imagenet-train-0001.tar", {"b.cls": b"1", "b.png": encoded(2), "._b.png": b"", "b.json": b"{}"})
    tar(tmp_path / "imagenet-train-0000.tar", {"x/a.jpg": encoded(1, kind="JPEG"), "x/a.cls": b"0\n"})
    source = opened(tmp_path, "webdataset")
    assert source.labels.tolist() == [0, 1] and source.classes == ("0", "1")
    expected = np.asarray(Image.open(io.BytesIO(encoded(2)))).transpose(2, 0, 1)
    np.testing.assert_array_equal(source.images[1:], expected[None])
    np.testing.assert_array_equal(load_source("webdataset", tmp_path, "train").images, source.images[:])
    assert any("1 x .json" in note and "1 x hidden file" in note for note in source.notes)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    assert opened(tmp_path, "webdataset").classes == ("cat", "dog")


def test_tars_that_do_not_fit(tmp_path):
    with pytest.raises(DataError, match=r"needs files \*.tar in .*train, or with 'train' in their names"):
        opened(tmp_path, "webdataset")
    path = tar(tmp_path / "train/0.tar", {"a.png": encoded(0), "b.cls": b"1", "c.png": b"torn", "c.cls": b"x"})
    with pytest.raises(DataError, match=r"4 do not: .*a has no .cls, .*b has no image, .*c.cls is no whole number"):
        opened(tmp_path, "webdataset")
    tar(path, {"a.png": encoded(0), "a.cls": b"0", "sub/c.png": b"torn", "sub/c.cls": b"0"})
    with pytest.raises(DataError, match=r"train/0.tar:sub/c.png \(cannot identify image file\)"):
        opened(tmp_path, "webdataset")
    assert opened(tmp_path, "webdataset", skip_broken=True).skipped == ("train/0.tar:sub/c.png",)
    path.write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(DataError, match=r"cannot read .*0.tar as a plain tar: .*unpack it if it is compressed"):
        opened(tmp_path, "webdataset")


@pytest.mark.parametrize("label", ["7000000000", "99999999999999999999"])
def test_a_label_that_implies_billions_of_classes(tmp_path, label):
    tar(tmp_path / "train/0.tar", {"a.png": encoded(0), "a.cls": label.encode()})
    with pytest.raises(
        DataError, match=r"1 rows cannot fill the 7000000001 classes|a.cls is no whole number of at most"
    ):
        opened(tmp_path, "webdataset")


def test_parquet(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "data").mkdir()

    def save(images, labels, names=("cat", "dog"), file="train-00000-of-00001"):
        features = {"label": {"_type": "ClassLabel", "names": names}}
        about = {"huggingface": json.dumps({"info": {"features": features}})}
        table = arrow.table({"image": images, "label": labels}).replace_schema_metadata(about)
        parquet.write_table(table, tmp_path / f"data/{file}.parquet", row_group_size=2)

    save([{"bytes": encoded(n), "path": f"{n}.png"} for n in range(5)], [0, 1, 1, 0, 1])
    source = opened(tmp_path, "parquet")
    assert source.classes == ("cat", "dog") and source.labels.tolist() == [0, 1, 1, 0, 1]
    expected = np.asarray(Image.open(io.BytesIO(encoded(3)))).transpose(2, 0, 1)
    np.testing.assert_array_equal(source.images[np.array([3, 0])][0], expected)
    save([encoded(0), None, b"torn"], [0, 1, 0])
    with pytest.raises(DataError, match=r"2 files: .*parquet:row 1 \(it has no bytes.*parquet:row 2 \(cannot identify"):
        opened(tmp_path, "parquet")
    save(["path"], [0])
    with pytest.raises(DataError, match=r"column 'image' must hold encoded bytes, .*; it is string"):
        opened(tmp_path, "parquet")
    save([encoded(0)], [7_000_000_000], names=())
    with pytest.raises(DataError, match="1 rows cannot fill the 7000000001 classes"):
        opened(tmp_path, "parquet")
    save([encoded(0)], ["cat"])
    with pytest.raises(DataError, match="column 'label' must hold a whole number in each row; it is string"):
        opened(tmp_path, "parquet")
    (tmp_path / "data/train-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="as Parquet"):
        opened(tmp_path, "parquet")


def test_without_pyarrow_parquet_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    (tmp_path / "train").mkdir()
    (tmp_path / "train/a.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"pip install 'darht\[parquet\]'"):
        opened(tmp_path, "parquet")
