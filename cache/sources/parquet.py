"""Parquet files with a column `image` of encoded bytes and a column `label`, as ImageNet is published on data hubs.

A row group is read when a row of it is wanted; the last few are kept, since rows are read in order.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darht.cache.sources.rows import one_line
from darht.core.errors import DataError

_GROUPS = 6  # row groups in memory: one for each thread that decodes, and the next
SUFFIX = ".parquet"


def is_table(name: str) -> bool:
    """Whether a file's name is that of a Parquet file."""
    return name.endswith(SUFFIX)


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("Parquet is read by pyarrow, which is not installed: pip install 'darht[parquet]'") from error
    return pyarrow.parquet


class Tables:
    """Reads single rows of the `image` columns of Parquet files; threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._starts: dict[Path, NDArray[np.int64]] = {}
        self._groups: OrderedDict[tuple[Path, int], list[bytes | None]] = OrderedDict()

    def read(self, path: Path, row: int) -> bytes:
        """The encoded image in a row.

        Raises:
            OSError: the file cannot be read.
            DataError: the row holds no bytes.
        """
        with self._lock:
            if path not in self._starts:
                self._starts[path] = _group_starts(_parquet().ParquetFile(path))
            group = int(np.searchsorted(self._starts[path], row, side="right")) - 1
            found = self._group(path, group)[row - int(self._starts[path][group])]
        if found is None:
            raise DataError("it has no bytes in the column 'image'")
        return found

    def _group(self, path: Path, group: int) -> list[bytes | None]:
        key = path, group
        if key not in self._groups:
            file = _parquet().ParquetFile(path)
            column = file.read_row_group(group, columns=[_leaf(file, path)]).column("image").combine_chunks()
            values = column.field("bytes") if column.type.num_fields else column
            self._groups[key] = values.to_pylist()
            while len(self._groups) > _GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]


def _group_starts(file: Any) -> NDArray[np.int64]:
    counts = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)[:-1]


def _leaf(file: Any, path: Path) -> str:
    """The column of bytes: `image`, or `image.bytes` of a structure."""
    schema = file.schema_arrow
    if "image" not in schema.names:
        raise DataError(f"{path} must have a column 'image'; it has {', '.join(schema.names)}: rename it")
    kind = schema.field("image").type
    if kind.num_fields and any(kind.field(number).name == "bytes" for number in range(kind.num_fields)):
        return "image.bytes"
    if str(kind) in ("binary", "large_binary"):
        return "image"
    raise DataError(f"{path}: column 'image' must hold encoded bytes, or a structure with 'bytes'; it is {kind}")


def read_labels(paths: Sequence[Path]) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]], tuple[str, ...]]:
    """Of each file the places of its rows, int64 `[n, 2]` (row, -1), and its labels `[n]`; and the class names.

    Names are those of the metadata that the `datasets` library writes; none where there are none.

    Raises:
        DataError: pyarrow is not installed, a file is no Parquet, a column is missing, or the files disagree.
    """
    labels, named = [], dict[tuple[str, ...], Path]()
    for path in paths:
        try:
            file = _parquet().ParquetFile(path)
            _leaf(file, path)
            found, names = _labels(file, path), _class_names(file.schema_arrow.metadata or {})
        except DataError:
            raise
        except Exception as error:  # pyarrow raises many kinds; all mean that the file is wrong
            raise DataError(f"cannot read {path} as Parquet: {one_line(error)}; replace it") from error
        labels.append(found)
        named.setdefault(names, path)
    if len(named) > 1:
        (_, first), (_, other) = list(named.items())[:2]
        raise DataError(f"{first} and {other} name other classes in their metadata: take the files of one data set")
    names = next(iter(named), ())
    places = [np.stack([np.arange(len(found)), np.full(len(found), -1)], axis=1) for found in labels]
    return places, labels, names


def _labels(file: Any, path: Path) -> NDArray[np.int64]:
    if "label" not in file.schema_arrow.names:
        raise DataError(f"{path} must have a column 'label'; it has {', '.join(file.schema_arrow.names)}: rename it")
    column = file.read(columns=["label"]).column("label")
    if column.null_count or not str(column.type).startswith(("int", "uint")):
        raise DataError(f"{path}: column 'label' must hold a whole number in each row; it is {column.type} with "
                        f"{column.null_count} rows empty: mend the labels")  # fmt: skip
    found: NDArray[np.int64] = column.to_numpy().astype(np.int64)
    return found


def _class_names(metadata: dict[bytes, bytes]) -> tuple[str, ...]:
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return tuple(str(name) for name in features["label"]["names"])
    except (ValueError, KeyError, TypeError):
        return ()
