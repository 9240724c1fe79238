"""Atomic writes."""

import errno
import hashlib
import os
from pathlib import Path

import pytest

from darht.core.errors import DarhtError
from darht.core.files import sha256_file, write_atomic


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_with_its_folders(tmp_path: Path):
    path = tmp_path / "a" / "b" / "file.bin"
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new" and names(path.parent) == ["file.bin"]
    assert path.stat().st_mode & 0o777 == 0o644
    write_atomic(path, b"newer")
    assert path.read_bytes() == b"newer" and names(path.parent) == ["file.bin"]


@pytest.mark.parametrize("step", ["fsync", "fdopen"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch, step, error):
    path = tmp_path / "file.bin"
    write_atomic(path, b"old")

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(DarhtError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file.bin"]
    if isinstance(error, OSError):
        assert str(caught.value) == (
            f"cannot write {path}: No space left on device; what was there before is whole: "
            "run again once it can be written"
        )


def test_a_failed_rename_leaves_no_temporary_file(tmp_path: Path):
    (tmp_path / "file.bin" / "child").mkdir(parents=True)
    with pytest.raises(DarhtError, match=r"cannot write .*file\.bin: .*directory"):
        write_atomic(tmp_path / "file.bin", b"new")
    assert names(tmp_path) == ["file.bin"]


def test_bytes_reach_the_disk_before_the_name_does(tmp_path: Path, monkeypatch):
    events = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(Path, "replace", lambda self, target: (events.append("replace"), replace(self, target)))
    write_atomic(tmp_path / "file.bin", b"new")
    assert events == ["fsync", "replace", "fsync"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path: Path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(DarhtError, match=r"cannot write .*: Permission denied"):
            write_atomic(tmp_path / "file.bin", b"new")
    finally:
        tmp_path.chmod(0o755)


def test_a_folder_that_is_a_file(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DarhtError, match=r"cannot write .*file/x\.bin: (File exists|Not a directory)"):
        write_atomic(tmp_path / "file" / "x.bin", b"new")


def test_sha256_of_a_file(tmp_path: Path):
    data = bytes(range(256)) * 5000
    (tmp_path / "x").write_bytes(data)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()
