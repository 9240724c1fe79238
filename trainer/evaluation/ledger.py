"""What has been measured so far, on disk: one file for each attack and batch, so that a stopped evaluation goes on.

A file is named by the hash of everything that its content depends on (the model, the images, the attack, the rows, the
seed). Another option gives another name; nothing is ever taken for what it is not.
"""

import io
import logging
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from darht.core.config import fingerprint
from darht.core.errors import CorruptError
from darht.core.files import write_atomic
from darht.core.sealed import check_zip, seal_zip

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Ledger:
    """Results by what they depend on.

    Attributes:
        folder: where the files lie; None keeps nothing.
        identity: of the model and the images, as plain data; part of every name.
    """

    folder: Path | None
    identity: Mapping[str, Any]

    def get(self, name: str, facts: Mapping[str, Any], make: Callable[[], Arrays]) -> Arrays:
        """The arrays that `make` returned for these facts, made now unless they are here already.

        Args:
            name: of the attack; readable part of the file's name.
            facts: everything else that the arrays depend on, as plain data.
            make: computes them.
        """
        if self.folder is None:
            return make()
        key = fingerprint({"identity": self.identity, "name": name, "facts": facts})
        path = self.folder / f"{re.sub('[^A-Za-z0-9.]+', '-', name)}-{key[:24]}.npz"
        held = _read(path)
        if held is not None:
            return held
        arrays = make()
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # numpy types one keyword among them
        write_atomic(path, seal_zip(buffer.getvalue()))
        return arrays


def _read(path: Path) -> Arrays | None:
    """None for a file that is not there, or is not what was written: then it is made again."""
    if not path.is_file():
        return None
    try:
        data = io.BytesIO(path.read_bytes())
        check_zip(data, str(path), "it is measured again")
        with np.load(data, allow_pickle=False) as held:
            return {name: held[name] for name in held.files}
    except (
        CorruptError,
        OSError,
        EOFError,
        ValueError,
        KeyError,
        RuntimeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        reason = error if isinstance(error, CorruptError) else f"{path} is damaged ({error}): it is measured again"
        logging.getLogger(__name__).warning("note: %s", reason)
        return None
