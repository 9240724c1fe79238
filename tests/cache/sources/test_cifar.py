"""CIFAR-10 and CIFAR-100: small pickles in the official layout, and the real files where they are at hand."""

import functools
import hashlib
import http.server
import os
import pickle
import shutil
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest

from darht.cache.sources import cifar as source_cifar
from darht.cache.sources.cifar import OFFICIAL_FILES, load_plain_pickle
from darht.cache.sources.load import load_source
from darht.core.errors import DataError

CIFAR10, CIFAR100 = "cifar-10-batches-py", "cifar-100-python"
NAMES = [f"name{i}" for i in range(3)]


def dump(value) -> bytes:
    # Protocol 3: with 2, Python 3 writes bytes as a call of _codecs.encode, which the official files do not hold.
    return pickle.dumps(value, protocol=3)


def batch(seed: int, rows: int, key: str = "labels") -> dict:
    pixels = np.random.default_rng(seed).integers(0, 256, (rows, 3072), dtype=np.uint8)
    return {"data": pixels, key: [(seed + i) % 3 for i in range(rows)], "filenames": [f"{i}.png" for i in range(rows)]}


@pytest.fixture
def put(tmp_path, monkeypatch):
    """Write one file of a data set and make it the official one."""

    def write(file: str, value, official: bool = True) -> Path:
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        content = value if isinstance(value, bytes) else dump(value)
        path.write_bytes(content)
        if official:
            monkeypatch.setitem(OFFICIAL_FILES, file, (len(content), hashlib.md5(content).hexdigest()))
        return path

    return write


@pytest.fixture
def cifar10(put, tmp_path) -> Path:
    for i in range(1, 6):
        put(f"{CIFAR10}/data_batch_{i}", batch(i, 4))
    put(f"{CIFAR10}/test_batch", batch(9, 6))
    put(f"{CIFAR10}/batches.meta", {"label_names": NAMES, "num_vis": 3072})
    return tmp_path


@pytest.fixture
def cifar100(put, tmp_path) -> Path:
    for seed, file in enumerate(("train", "test")):
        put(f"{CIFAR100}/{file}", {**batch(seed, 7, "fine_labels"), "coarse_labels": [9] * 7})
    put(f"{CIFAR100}/meta", {"fine_label_names": NAMES, "coarse_label_names": ["wrong"]})
    return tmp_path


def failure(name, root, split, **options) -> str:
    with pytest.raises(DataError) as caught:
        load_source(name, root, split, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_cifar10_train_is_the_five_batches_in_order(cifar10):
    source = load_source("cifar10", cifar10, "train")
    expected = np.concatenate([batch(i, 4)["data"] for i in range(1, 6)]).reshape(-1, 3, 32, 32)
    np.testing.assert_array_equal(source.images, expected)
    assert source.labels.tolist() == [(seed + i) % 3 for seed in range(1, 6) for i in range(4)]
    assert source.labels.dtype == np.int64 and source.classes == tuple(NAMES)
    assert (source.name, source.split) == ("cifar10", "train")


def test_cifar10_test_and_the_folder_itself_as_root(cifar10):
    source = load_source("cifar10", cifar10, "test")
    assert source.images.shape == (6, 3, 32, 32)
    assert load_source("cifar10", cifar10 / CIFAR10, "test").sha256 == source.sha256
    (cifar10 / CIFAR10).rename(cifar10 / "renamed")
    assert load_source("cifar10", cifar10 / "renamed", "test").sha256 == source.sha256


def test_cifar100_takes_the_fine_labels(cifar100):
    source = load_source("cifar100", cifar100, "test")
    assert source.labels.tolist() == [1, 2, 0, 1, 2, 0, 1] and source.classes == tuple(NAMES)
    np.testing.assert_array_equal(source.images.reshape(7, -1), batch(1, 7)["data"])


def test_a_limit_reads_only_the_batches_it_needs(cifar10):
    whole = load_source("cifar10", cifar10, "train")
    for i in (3, 4, 5):
        (cifar10 / CIFAR10 / f"data_batch_{i}").unlink()
    (cifar10 / CIFAR10 / "test_batch").unlink()
    part = load_source("cifar10", cifar10, "train", limit=8)
    np.testing.assert_array_equal(part.images, whole.images[:8])
    assert len(load_source("cifar10", cifar10, "train", limit=5).labels) == 5
    assert "data_batch_3" in failure("cifar10", cifar10, "train", limit=9)


def test_a_limit_above_the_rows(cifar10):
    assert "21 > 20 rows" in failure("cifar10", cifar10, "train", limit=21)


def test_a_missing_folder_says_how_to_get_it(tmp_path):
    message = failure("cifar10", tmp_path, "train")
    assert str(tmp_path / CIFAR10) in message and "--download" in message and "cifar-10-python.tar.gz" in message
    assert str(tmp_path / CIFAR100) in failure("cifar100", tmp_path / CIFAR100, "train")


def test_a_missing_file_is_named(cifar10):
    (cifar10 / CIFAR10 / "test_batch").unlink()
    message = failure("cifar10", cifar10, "test")
    assert "test_batch" in message and "No such file" in message and "--download" in message


@pytest.mark.parametrize("file", ["test_batch", "batches.meta"])
def test_a_changed_file_gives_both_sums_and_sizes_and_is_not_read(cifar10, monkeypatch, file):
    path = cifar10 / CIFAR10 / file
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    if file == "test_batch":  # the names are read first and are in order
        monkeypatch.setattr(source_cifar, "load_plain_pickle", lambda content, path: {"label_names": NAMES})
    message = failure("cifar10", cifar10, "test")
    for part in (str(path), *(hashlib.md5(c).hexdigest() for c in (content, content[:-1]))):
        assert part in message
    assert f"({len(content)} bytes)" in message and f"({len(content) - 1} bytes)" in message
    assert "remove it" in message and "--download" in message


class Exploit:
    def __init__(self, call, *arguments):
        self.reduced = (call, arguments)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_malicious_pickle_is_refused_by_name_and_never_run(put, cifar10, tmp_path, protocol):
    trace = tmp_path / "executed"
    exploit = pickle.dumps({"data": Exploit(os.system, f"touch {trace}")}, protocol=protocol)
    pickle.loads(exploit)
    assert trace.is_file(), "the exploit must work, or its refusal shows nothing"
    trace.unlink()
    path = put(f"{CIFAR10}/test_batch", exploit)
    message = failure("cifar10", cifar10, "test")
    assert f"'{os.system.__module__}.system'" in message and str(path) in message
    assert not trace.exists()


@pytest.mark.parametrize("call", [eval, getattr, __import__, np.load, np.frombuffer, pickle.loads, os.remove])
def test_only_the_globals_of_an_array_are_allowed(call):
    with pytest.raises(DataError, match="which was not called"):
        load_plain_pickle(dump({"data": Exploit(call, "x")}), Path("file"))


def test_a_global_inside_an_object_array_is_refused():
    array = np.array([Exploit(os.system, "true")], dtype=object)
    with pytest.raises(DataError, match="system"):
        load_plain_pickle(dump({"data": array}), Path("file"))


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_both_spellings_of_numpys_reconstruction(module):
    content = dump({"data": np.arange(6, dtype=np.uint8)})
    spelt = content.replace(b"numpy._core.multiarray", module).replace(b"numpy.core.multiarray", module)
    assert module in spelt
    np.testing.assert_array_equal(load_plain_pickle(spelt, Path("file"))["data"], np.arange(6))


@pytest.mark.parametrize("cut", [0, 1, 20, 3000])
def test_a_cut_pickle(cut):
    with pytest.raises(DataError, match="file is not a whole pickle"):
        load_plain_pickle(dump(batch(0, 2))[:cut], Path("file"))


def test_a_pickle_of_something_else():
    with pytest.raises(DataError, match="must hold a dictionary; it holds list"):
        load_plain_pickle(dump([1]), Path("file"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"data": np.zeros((6, 3072), np.float32)}, "found float32 [6, 3072]"),
        ({"data": np.zeros((6, 100), np.uint8)}, "found uint8 [6, 100]"),
        ({"data": "text"}, "found str"),
        ({"labels": None}, "'labels' must be a list"),
        ({"labels": ["a"] * 6}, "'labels' must be a list"),
        ({"labels": [0, 1, 2]}, "6 images but 3 labels"),
        ({"labels": [0, 1, 2, 3, 0, 0]}, "row 3 has 3"),
        ({"labels": [0, 0, 0, 1, 1, 1]}, "class 2 (name2) has no images"),
    ],
)
def test_a_batch_with_other_contents(put, cifar10, change, expected):
    put(f"{CIFAR10}/test_batch", {**batch(9, 6), **change})
    assert expected in failure("cifar10", cifar10, "test")


@pytest.mark.parametrize("meta", [{}, {"label_names": "text"}, {"label_names": [1, 2]}])
def test_a_meta_file_without_names(put, cifar10, meta):
    put(f"{CIFAR10}/batches.meta", meta)
    assert "'label_names', a list of texts" in failure("cifar10", cifar10, "test")


def test_a_batch_without_rows(put, cifar10):
    put(f"{CIFAR10}/test_batch", batch(0, 0))
    assert "holds no rows" in failure("cifar10", cifar10, "test")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def served_folder(tmp_path, monkeypatch):
    """A folder behind a web server of this machine alone; the server's address is in the environment as SERVED."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setenv("SERVED", f"http://127.0.0.1:{server.server_port}")
        yield folder
        server.shutdown()
        thread.join()


@pytest.fixture
def served(cifar10, served_folder, monkeypatch):
    """torchvision's own downloader, pointed at an archive of the small data set; returns that archive."""
    from darht.core.vision import torchvision

    archive = served_folder / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(cifar10 / CIFAR10, CIFAR10)
    shutil.rmtree(cifar10 / CIFAR10)
    dataset = torchvision().datasets.CIFAR10
    monkeypatch.setattr(dataset, "url", f"{os.environ['SERVED']}/{archive.name}")
    monkeypatch.setattr(dataset, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    return archive


def test_download_fetches_once_and_only_when_asked(served, tmp_path):
    root = tmp_path / "new" / "folder"
    assert "--download" in failure("cifar10", root, "train")
    assert not root.exists()
    source = load_source("cifar10", root, "train", download=True)
    assert len(source.labels) == 20
    served.unlink()
    assert load_source("cifar10", root / CIFAR10, "train", download=True).sha256 == source.sha256


def test_download_into_the_named_folder_itself(served, tmp_path):
    assert len(load_source("cifar10", tmp_path / "to" / CIFAR10, "test", download=True).labels) == 6


def test_a_failed_download_is_one_line(served, tmp_path):
    served.unlink()
    message = failure("cifar10", tmp_path / "to", "test", download=True)
    assert "cannot download cifar-10-python.tar.gz" in message and "official archive there" in message


def test_a_cut_download(served, tmp_path):
    served.write_bytes(served.read_bytes()[:-9])
    assert "corrupted" in failure("cifar10", tmp_path / "to", "test", download=True)


def test_torchvision_knows_both_archives():
    from darht.core.vision import torchvision

    for layout in source_cifar._LAYOUTS.values():
        dataset = getattr(torchvision().datasets, layout.dataset)
        assert dataset.filename == layout.archive and len(dataset.tgz_md5) == 32
        sums = dict(map(tuple, [*dataset.train_list, *dataset.test_list]))
        sums[dataset.meta["filename"]] = dataset.meta["md5"]
        ours = {file: md5 for file, (_, md5) in OFFICIAL_FILES.items() if file.startswith(f"{layout.folder}/")}
        assert ours == {f"{dataset.base_folder}/{file}": md5 for file, md5 in sums.items()}


@pytest.mark.real_data
def test_the_real_cifar10(cifar_root):
    train, test = load_source("cifar10", cifar_root, "train"), load_source("cifar10", cifar_root, "test")
    assert train.images.shape == (50000, 3, 32, 32) and test.images.shape == (10000, 3, 32, 32)
    assert train.labels[:8].tolist() == [6, 9, 9, 4, 1, 1, 2, 7]
    assert test.labels[:8].tolist() == [3, 8, 8, 0, 6, 6, 1, 6]
    assert np.bincount(train.labels).tolist() == [5000] * 10 and np.bincount(test.labels).tolist() == [1000] * 10
    assert train.classes[3] == "cat" and len(train.classes) == 10
    assert train.images[0, :, 0, 0].tolist() == [59, 62, 63]
    assert (
        load_source("cifar10", cifar_root, "train", limit=500).sha256
        == "090b67408cbcd2627f8a020f2cd455951dd3930aed192096f778ee56909d85bf"
    )


@pytest.mark.real_data
def test_the_real_cifar100(cifar_root):
    test = load_source("cifar100", cifar_root, "test")
    assert test.images.shape == (10000, 3, 32, 32) and len(test.classes) == 100
    assert np.bincount(test.labels).tolist() == [100] * 100
    assert (test.labels[0], test.classes[49]) == (49, "mountain")


@pytest.mark.real_data
def test_one_flipped_bit_in_a_real_file(cifar_root, tmp_path):
    folder = tmp_path / CIFAR10
    folder.mkdir()
    shutil.copyfile(cifar_root / CIFAR10 / "batches.meta", folder / "batches.meta")
    content = bytearray((cifar_root / CIFAR10 / "test_batch").read_bytes())
    content[20_000_000] ^= 1
    (folder / "test_batch").write_bytes(content)
    message = failure("cifar10", tmp_path, "test")
    assert "40351d587109b95175f43aff81a1287e (31035526 bytes)" in message and str(folder / "test_batch") in message


@pytest.mark.real_data
def test_the_recorded_sizes_are_those_of_the_real_files(cifar_root):
    for file, (size, _) in OFFICIAL_FILES.items():
        if (cifar_root / file).is_file():
            assert (cifar_root / file).stat().st_size == size
