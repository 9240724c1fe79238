"""CIFAR-10 and CIFAR-100, from the official "python version" folders.

The files are Python 2 pickles. Each is compared with its official MD5 before a byte of it is interpreted, and is then
read by an unpickler that knows how to rebuild a numpy array and nothing else.
"""

import hashlib
import http.client
import io
import pickle
import tarfile
import urllib.error
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from darht.cache.sources.rows import Rows, one_line, rows_to_take, shown
from darht.core.errors import DataError
from darht.core.vision import torchvision

_ROW_BYTES = 3 * 32 * 32


class _Layout(NamedTuple):
    folder: str
    splits: dict[str, tuple[str, ...]]
    meta: str
    labels_key: str
    names_key: str
    dataset: str  # the class of torchvision.datasets that knows where the archive is
    archive: str


_LAYOUTS = {
    "cifar10": _Layout(
        "cifar-10-batches-py",
        {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
        "batches.meta",
        "labels",
        "label_names",
        "CIFAR10",
        "cifar-10-python.tar.gz",
    ),
    "cifar100": _Layout(
        "cifar-100-python",
        {"train": ("train",), "test": ("test",)},
        "meta",
        "fine_labels",
        "fine_label_names",
        "CIFAR100",
        "cifar-100-python.tar.gz",
    ),
}

# (bytes, MD5) of every official file.
OFFICIAL_FILES = {
    "cifar-10-batches-py/data_batch_1": (31035704, "c99cafc152244af753f735de768cd75f"),
    "cifar-10-batches-py/data_batch_2": (31035320, "d4bba439e000b95fd0a9bffe97cbabec"),
    "cifar-10-batches-py/data_batch_3": (31035999, "54ebc095f3ab1f0389bbae665268c751"),
    "cifar-10-batches-py/data_batch_4": (31035696, "634d18415352ddfa80567beed471001a"),
    "cifar-10-batches-py/data_batch_5": (31035623, "482c414d41f54cd18b22e5b47cb7c3cb"),
    "cifar-10-batches-py/test_batch": (31035526, "40351d587109b95175f43aff81a1287e"),
    "cifar-10-batches-py/batches.meta": (158, "5ff9c542aee3614f3951f8cda6e48888"),
    "cifar-100-python/train": (155249918, "16019d7e3df5f24257cddd939b257f8d"),
    "cifar-100-python/test": (31049707, "f0ef6b0ae62326f3e7ffdfab6717acfc"),
    "cifar-100-python/meta": (1473, "7973b15100ade9c7d40fb424638fde48"),
}

# All that the pickle of a numpy array may name. numpy's reconstruction function moved between modules; asking an array
# for it gives the right one without importing either.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


def read_cifar(name: str, root: Path, split: str, limit: int | None, download: bool) -> Rows:
    """Read `cifar10` or `cifar100` (fine labels): uint8 `[N, 3, 32, 32]`, in the order of the official files.

    Only the files that the split and the limit need are opened. `root` is the official folder or the one around it.

    Raises:
        DataError: a file is missing, differs from its official MD5 or cannot be read; the download failed.
    """
    layout = _LAYOUTS[name]
    folder = _locate(root, layout)
    needed = (*layout.splits[split], layout.meta)
    if download and not all((folder / file).is_file() for file in needed):
        _download(layout, root.parent if root.name == layout.folder else root)
        folder = _locate(root, layout)
    if not folder.is_dir():
        raise DataError(f"{name} needs the folder {folder}, which is not there; {_remedy(layout)}")
    classes = _class_names(folder, layout)
    images, labels = _read_batches(folder, layout, split, limit)
    return Rows(images.reshape(-1, 3, 32, 32), labels, classes)


def _locate(root: Path, layout: _Layout) -> Path:
    if (root / layout.folder).is_dir():
        return root / layout.folder
    is_the_folder = root.name == layout.folder or (root / layout.meta).is_file()
    return root if is_the_folder else root / layout.folder


def _remedy(layout: _Layout) -> str:
    return f"pass --download, or put the folder {layout.folder} of the official archive {layout.archive} there"


def _class_names(folder: Path, layout: _Layout) -> tuple[str, ...]:
    names = _read_pickle(folder / layout.meta, layout).get(layout.names_key)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{folder / layout.meta} must hold '{layout.names_key}', a list of texts; {_remedy(layout)}")
    return tuple(names)


def _read_batches(
    folder: Path, layout: _Layout, split: str, limit: int | None
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    images: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    for file in layout.splits[split]:
        if limit is not None and len(labels) >= limit:
            break
        batch_images, batch_labels = _read_batch(folder / file, layout)
        images.append(batch_images)
        labels += batch_labels
    take = rows_to_take(limit, len(labels), str(folder))
    return np.concatenate(images)[:take], np.array(labels[:take], dtype=np.int64)


def _read_batch(path: Path, layout: _Layout) -> tuple[NDArray[np.uint8], list[int]]:
    batch = _read_pickle(path, layout)
    images, labels = batch.get("data"), batch.get(layout.labels_key)
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (_ROW_BYTES,):
        found = f"{images.dtype} {list(images.shape)}" if isinstance(images, np.ndarray) else type(images).__name__
        raise DataError(f"{path}: 'data' must be uint8 [N, {_ROW_BYTES}]; found {found}; {_remedy(layout)}")
    if not isinstance(labels, list) or not all(isinstance(label, int) for label in labels):
        raise DataError(f"{path}: '{layout.labels_key}' must be a list of whole numbers; {_remedy(layout)}")
    if len(labels) != len(images):
        raise DataError(f"{path} holds {len(images)} images but {len(labels)} labels; {_remedy(layout)}")
    return images, labels


def _read_pickle(path: Path, layout: _Layout) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {one_line(error)}; {_remedy(layout)}") from error
    size, md5 = OFFICIAL_FILES[f"{layout.folder}/{path.name}"]
    actual = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if actual != md5:
        raise DataError(
            f"{path} is not the official file: expected MD5 {md5} ({size} bytes), "
            f"found {actual} ({len(content)} bytes); remove it, then {_remedy(layout)}"
        )
    return load_plain_pickle(content, path)


def load_plain_pickle(content: bytes, path: Path) -> dict[str, Any]:
    """Unpickle a dictionary of plain values and numpy arrays; `path` names the file in messages.

    Text of Python 2 is decoded as latin-1, which also carries the bytes of its arrays.

    Raises:
        DataError: the pickle names any global but those of a numpy array (nothing of it has then been called), is cut,
            or does not hold a dictionary.
    """
    try:
        value = _ArrayUnpickler(content, path).load()
    except DataError:
        raise
    except Exception as error:  # a damaged pickle may raise almost anything, as the module's documentation warns
        raise DataError(f"{path} is not a whole pickle: {one_line(error)}; get the file again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} must hold a dictionary; it holds {type(value).__name__}; get the file again")
    return value


class _ArrayUnpickler(pickle.Unpickler):
    """Rebuilds numpy arrays, and refuses every other global by name."""

    def __init__(self, content: bytes, path: Path) -> None:
        super().__init__(io.BytesIO(content), encoding="latin1")
        self._path = path

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """Return one of the allowed globals; nothing is imported."""
        try:
            return _ALLOWED[module_name, global_name]
        except KeyError:
            allowed = shown(f"{module}.{name}" for module, name in _ALLOWED)
            raise DataError(
                f"{self._path} is not a plain data file: its pickle asks for '{module_name}.{global_name}', "
                f"which was not called (allowed: {allowed}); do not trust this file, get the official one"
            ) from None


def _download(layout: _Layout, parent: Path) -> None:
    """Fetch and unpack the official archive; torchvision knows its address and its MD5."""
    try:
        datasets = torchvision().datasets
        dataset = getattr(datasets, layout.dataset)
        parent.mkdir(parents=True, exist_ok=True)
        datasets.utils.download_url(dataset.url, str(parent), dataset.filename, dataset.tgz_md5)
        with tarfile.open(parent / dataset.filename) as archive:
            archive.extractall(parent, filter="data")
    except (OSError, RuntimeError, ImportError, http.client.HTTPException, tarfile.TarError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it is a response too, and holds its connection
        raise DataError(
            f"cannot download {layout.archive} into {parent}: {one_line(error)}; try again, or put the folder "
            f"{layout.folder} of the official archive there"
        ) from error
