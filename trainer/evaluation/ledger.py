"""What has been measured so far, on disk: one file for each attack and batch, so that a stopped evaluation goes on.

A file is named by the hash of everything that its content depends on (the model, the images, the attack, the rows, the
seed). Another option gives another name; nothing is ever taken for what it is not.

Several processes may keep one ledger together: each makes what no other is making, under a lock that goes with its
process, so that a killed one leaves its piece to the others.
"""

import contextlib
import fcntl
import io
import logging
import re
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from darht.core.config import fingerprint
from darht.core.errors import CorruptError
from darht.core.files import write_atomic
from darht.core.sealed import check_zip, seal_zip

Arrays = dict[str, np.ndarray]
_LOOK = 0.05  # seconds between two looks at what the others make


@dataclass(frozen=True)
class Entry:
    """One piece of an evaluation: what its arrays depend on, and how they are made.

    Attributes:
        name: of the attack; readable part of the file's name.
        facts: everything else that the arrays depend on, as plain data.
        make: computes them.
    """

    name: str
    facts: Mapping[str, Any]
    make: Callable[[], Arrays]


@dataclass(frozen=True)
class Ledger:
    """Results by what they depend on.

    Attributes:
        folder: where the files lie; None keeps nothing.
        identity: of the model and the images, as plain data; part of every name.
        shared: other processes write here too.
    """

    folder: Path | None
    identity: Mapping[str, Any]
    shared: bool = False

    def get(self, name: str, facts: Mapping[str, Any], make: Callable[[], Arrays]) -> Arrays:
        """The arrays that `make` returned for these facts, made now unless they are here already.

        What another process is making is waited for.
        """
        if self.folder is None:
            return make()
        path = self._path(name, facts)
        held = _read(path)
        if held is not None:
            return held
        with _locked(path, wait=True) if self.shared else contextlib.nullcontext():
            return (_read(path) if self.shared else None) or _write(path, make())

    def share_out(self, entries: Sequence[Entry], on_done: Callable[[int], None]) -> None:
        """With other processes: make what nobody is making until all of it is here; alone nothing is done.

        Args:
            entries: in the order in which they are made.
            on_done: told how many are here, whoever made them.
        """
        waiting = [(self._path(one.name, one.facts), one) for one in entries] if self.shared else []
        while waiting:
            left = [(path, one) for path, one in waiting if not _offered(path, one)]
            if len(left) < len(waiting):
                on_done(len(entries) - len(left))
            elif left:
                time.sleep(_LOOK)
            waiting = left

    def _path(self, name: str, facts: Mapping[str, Any]) -> Path:
        assert self.folder is not None
        key = fingerprint({"identity": self.identity, "name": name, "facts": facts})
        return self.folder / f"{re.sub('[^A-Za-z0-9.]+', '-', name)}-{key[:24]}.npz"


def _offered(path: Path, entry: Entry) -> bool:
    """Whether an entry is here, made now if nobody is making it."""
    if path.is_file():
        return True
    with _locked(path, wait=False) as mine:
        if mine and not path.is_file():
            _write(path, entry.make())
        return mine


def _write(path: Path, arrays: Arrays) -> Arrays:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # numpy types one keyword among them
    write_atomic(path, seal_zip(buffer.getvalue()))
    return arrays


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Whether nobody else is at work on a file; its lock goes with the process that has it.

    Who has got the lock looks whether the file is there by now. The lock's own file is removed before it is free, so
    that two may have locks of two files of one name: then the file is made twice, with the same content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_suffix(".lock")
    with lock.open("ab") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            lock.unlink(missing_ok=True)


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
