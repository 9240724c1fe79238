"""Read everything that a run, teacher, evaluation, index or export left, and compare it with its sha256."""

import json
from pathlib import Path

from darht.core.errors import CacheError, DarhtError
from darht.core.sealed import Checked, check_folder
from darht.core.tensors import load_tensors
from darht.trainer.state.checkpoint import BEST, CHECKPOINT, CONFIG, LAST, RUN, check_of_run, read_student_card


def verify_folder(folder: Path) -> Checked:
    """What is whole, what nothing has a sha256 of, and what is damaged.

    Of a run its students are compared with `run.json`, and its log with its checkpoint.

    Raises:
        CacheError: there is no such folder, or no command of darht reads anything in it.
    """
    if not folder.is_dir():
        raise CacheError(f"there is no folder {folder}: give a run, a teacher, an evaluation, an index or an export")
    found = check_folder(folder)
    if not (found.whole or found.unhashed or found.damaged):
        raise CacheError(
            f"{folder} holds nothing of darht: give a run, a teacher, an evaluation, an index or an export"
        )
    if (folder / RUN).is_file() and not found.damaged:
        for which in (BEST, LAST):
            if (folder / which / CONFIG).is_file():
                try:
                    check_of_run(read_student_card(folder / which), folder, which)
                except DarhtError as error:
                    found.damaged.append(str(error))
        _check_log(folder, found)
    return found


def _check_log(run: Path, found: Checked) -> None:
    """The log begins with the rows that the checkpoint has, which is up to a minute older."""
    checkpoint, log = run / CHECKPOINT, run / "log.jsonl"
    if not checkpoint.is_file() or not log.is_file():
        return
    rows = load_tensors(checkpoint, lazily=True)["progress"]["history"]
    kept = "".join(json.dumps(row) + "\n" for row in rows).encode()
    written = log.read_bytes()
    if written[: len(kept)] == kept and written[-1:] in (b"", b"\n"):
        found.whole.append(log)
    else:
        found.damaged.append(f"{log} differs from {checkpoint.name}: go on with darht-train --resume, or remove it")
