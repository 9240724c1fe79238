"""Files that carry their own sha256, which is checked before anything in them is believed.

A JSON file ends with two keys: `files`, the sha256 of each file that belongs to it and lies in the same folder, and
`sha256`, that of all its bytes before this key. Such a file is written after those that it names. A zip, as torch and
numpy write them, has as its comment the sha256 of all bytes before the comment. A file and its own sha256 get their
name together, so a kill leaves both or neither. Earlier files carry none: they are read, and a line
says so once for each folder.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from darht.core.bounded import read_json
from darht.core.errors import ConfigError, CorruptError
from darht.core.files import sha256_file, write_atomic

FILES, SHA256 = "files", "sha256"
_ZIP_END = 22  # bytes of a zip's last record; its first four are PK\5\6, its last two the length of the comment
_COMMENT = re.compile(rb"sha256 ([0-9a-f]{64})\n")
_COMMENT_BYTES = 72
_DIGITS = 64
_RESTORE = "restore it from a copy, or remove it and make it again"


class Sealed(NamedTuple):
    """What a JSON file holds.

    Attributes:
        value: the mapping, without `files` and `sha256`.
        files: sha256 by name of the files beside it.
        hashed: whether it carries its own sha256.
    """

    value: dict[str, Any]
    files: dict[str, str]
    hashed: bool


def seal_json(value: Mapping[str, Any], files: Mapping[str, str] | None = None) -> bytes:
    """The JSON of a mapping, indented for people, with its sha256 and those of the `files` that belong to it."""
    text = json.dumps({**value, FILES: dict(files or {}), SHA256: ""}, indent=2)
    body = text[: -len(_tail(""))].encode()
    return body + _tail(hashlib.sha256(body).hexdigest()).encode() + b"\n"


def _tail(digest: str) -> str:
    return f'"{SHA256}": "{digest}"\n}}'


def write_sealed(path: Path, value: Mapping[str, Any], files: Mapping[str, str] | None = None) -> None:
    """Write `seal_json` of these, atomically.

    Raises:
        DarhtError: the folder cannot be written or the disk is full; what was there before stays.
    """
    write_atomic(path, seal_json(value, files))


def unseal_json(data: bytes, where: str, fix: str) -> Sealed:
    """What `seal_json` was given.

    Args:
        data: of the file; one that has no key `sha256` is taken as it is.
        where: what messages call it.
        fix: what to do when it is damaged, the end of the message.

    Raises:
        CorruptError: it is no JSON mapping, or was changed after it was written.
    """
    try:
        value = read_json(data, where)
    except ConfigError as error:
        raise CorruptError(f"{error}: {fix}") from error
    if not isinstance(value, dict):
        raise CorruptError(f"{where} holds no JSON mapping: {fix}")
    if SHA256 not in value and not any(_like_a_sha256(key, item) for key, item in value.items()):
        return Sealed(value, {}, hashed=False)
    digest, files = value.pop(SHA256, None), value.pop(FILES, None)
    body, tail = data[: -len(_tail("")) - _DIGITS - 1], data[-len(_tail("")) - _DIGITS - 1 :]
    if tail != _tail(hashlib.sha256(body).hexdigest()).encode() + b"\n" or not _names_hashes(files):
        stated = f"its sha256 says {digest[:12]}" if isinstance(digest, str) else "it names no sha256"
        raise CorruptError(f"{where} was changed after it was written ({stated}): {fix}")
    return Sealed(value, files, hashed=True)


def _like_a_sha256(key: str, item: object) -> bool:
    """Whether this was the key `sha256` before a letter of it changed."""
    return len(key) == len(SHA256) and isinstance(item, str) and len(item) == _DIGITS


def _names_hashes(files: object) -> bool:
    return isinstance(files, dict) and all(
        isinstance(digest, str) and Path(name).name == name for name, digest in files.items()
    )


def read_sealed(path: Path, fix: str) -> Sealed:
    """What `write_sealed` wrote.

    Raises:
        CorruptError: it cannot be read, or was changed after it was written; the message ends with `fix`.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CorruptError(f"{path} cannot be read ({error.strerror}): {fix}") from error
    sealed = unseal_json(data, str(path), fix)
    if not sealed.hashed:
        tell_unhashed(path)
    return sealed


def check_named(card: Path, sealed: Sealed, name: str, fix: str) -> None:
    """Compare a file beside `card` with the sha256 that the card has of it; old cards have none.

    Raises:
        CorruptError: it is missing, or another file than the card names; the message ends with `fix`.
    """
    path, stated = card.parent / name, sealed.files.get(name)
    if stated is None:
        if sealed.hashed:
            raise CorruptError(f"{card} does not name {name}: {fix}")
        return
    if not path.is_file():
        raise CorruptError(f"{path} is missing, {card.name} names it: {fix}")
    found = sha256_file(path)
    if found != stated:
        raise CorruptError(f"{path} has sha256 {found[:12]}, {card.name} says {stated[:12]}: {fix}")


@cache
def _told(folder: Path) -> None:
    logging.getLogger(__name__).warning(
        "note: %s holds files of an earlier version, which carry no sha256: they are read unchecked", folder
    )


def tell_unhashed(path: Path) -> None:
    """Say that files like this one are not checked, once for each folder."""
    _told(path.parent.absolute())


class ZipSealer:
    """A file that takes a zip in pieces, for `torch.save`, and hashes it on its way; `close` gives it its comment."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self._held = file, hashlib.sha256(), b""

    def write(self, data: bytes) -> int:
        """Pass on all but the bytes that may be the zip's last record."""
        if len(data) < _ZIP_END:
            data, size = self._held + data, len(data)
        else:
            size = len(data)
            self._pass_on(self._held)
        self._pass_on(memoryview(data)[:-_ZIP_END] if len(data) > _ZIP_END else b"")
        self._held = bytes(data[-_ZIP_END:])
        return size

    def flush(self) -> None:
        """Nothing: the file is flushed when it is whole."""

    def close(self) -> None:
        """Write the zip's last record with room for a comment, and the comment."""
        self._pass_on(self._held[:-2] + _COMMENT_BYTES.to_bytes(2, "little"))
        self._file.write(b"sha256 " + self._digest.hexdigest().encode() + b"\n")

    def _pass_on(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self._file.write(data)


def seal_zip(data: bytes) -> bytes:
    """A zip with its sha256 as its comment."""
    buffer = BytesIO()
    sealer = ZipSealer(buffer)
    sealer.write(data)
    sealer.close()
    return buffer.getvalue()


def check_zip(file: BinaryIO, where: str, fix: str) -> bool:
    """Whether a zip carries its sha256, which was compared; the file is left at its beginning.

    Raises:
        CorruptError: it does not, and is no whole zip without a comment either; or its bytes have another sha256.
    """
    size = file.seek(0, 2)
    file.seek(max(0, size - _COMMENT_BYTES))
    end = file.read()
    file.seek(0)
    stated = _COMMENT.fullmatch(end)
    if stated is None:
        record = end[-_ZIP_END:]
        if record[:4] == b"PK\5\6" and record[-2:] == b"\0\0":
            return False
        raise CorruptError(f"{where} is damaged (it is cut, or its end was changed): {fix}")
    digest, left = hashlib.sha256(), size - _COMMENT_BYTES
    while piece := file.read(min(left, 1 << 20)):
        digest.update(piece)
        left -= len(piece)
    file.seek(0)
    if digest.hexdigest() != stated[1].decode():
        raise CorruptError(f"{where} is damaged (it has another sha256 than when it was written): {fix}")
    return True


@dataclass
class Checked:
    """What `check_folder` found.

    Attributes:
        whole: files that have the sha256 that they carry, or that a file beside them has of them.
        unhashed: files that commands read and nothing has a sha256 of.
        damaged: a line for each file that is not what was written.
    """

    whole: list[Path]
    unhashed: list[Path]
    damaged: list[str]

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Take an error of this block as a line of `damaged`."""
        try:
            yield
        except CorruptError as error:
            self.damaged.append(str(error))


def check_folder(folder: Path) -> Checked:
    """Read every file below a folder that carries a sha256 or is named with one: of a run, teacher, index or export."""
    found = Checked([], [], [])
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".tmp"))
    named = {path for card in paths if card.suffix == ".json" for path in _check_card(card, found)}
    for path in paths:
        if path in named or path.suffix == ".json":
            continue
        if path.suffix in (".pt", ".npz"):
            with found.noting(), path.open("rb") as file:
                (found.whole if check_zip(file, str(path), _RESTORE) else found.unhashed).append(path)
        elif path.suffix in (".safetensors", ".faiss", ".npy"):
            found.unhashed.append(path)
    return found


def _check_card(card: Path, found: Checked) -> list[Path]:
    """Check a JSON file and the files that it names, which are returned."""
    named: list[Path] = []
    with found.noting():
        sealed = unseal_json(card.read_bytes(), str(card), _RESTORE)
        (found.whole if sealed.hashed else found.unhashed).append(card)
        named += [card.parent / name for name in sealed.files]
        for path in named:
            with found.noting():
                check_named(card, sealed, path.name, _RESTORE)
                found.whole.append(path)
    return named
