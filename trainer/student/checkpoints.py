"""What a run keeps of itself between two epochs: a copy to go back to, and files to go on from.

The files are written once in a minute, and after the last epoch, by a thread, from a copy in the machine's memory: an
epoch may take three seconds, and the memory of `inner: warm` half a gigabyte. A kill costs what came after the last
checkpoint; what comes then is computed again to the same bits.
"""

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any, Self, cast

from torch import Tensor

from darht.core.tensors import save_tensors
from darht.trainer.export.model_card import write_model_card
from darht.trainer.state.checkpoint import (
    BEST,
    CHECKPOINT,
    LAST,
    MEMORY,
    Progress,
    StudentCard,
    save_weights,
    write_log,
)
from darht.trainer.student.run import TrainState, remove_pauses

EVERY = 60.0  # seconds from one checkpoint to the next, at least


class Checkpoints:
    """The files of a run, and the end of its last epoch; a context manager, which writes what it still owes.

    Args:
        out: the run's folder.
        writes: whether this process does; every one of several can go back.
        goes_back: whether `back` will be asked for, so that every epoch's end is copied.
    """

    def __init__(self, out: Path, *, writes: bool, goes_back: bool) -> None:
        self._out, self._writes, self._goes_back = out, writes, goes_back
        self._written, self._epoch = time.monotonic(), 0
        self._copy: dict[str, Any] = {}
        self._owed: StudentCard | None = None
        self._best: tuple[StudentCard, dict[str, Tensor]] | None = None
        self._writing: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.settle()

    def add(self, state: TrainState, card: StudentCard, *, best: bool, now: bool) -> None:
        """Note the end of an epoch, and begin to write it when that is due or is to be `now`.

        Raises:
            DarhtError: what was begun before could not be written.
        """
        due = self._writes and (now or time.monotonic() - self._written >= EVERY)
        if due or self._goes_back:
            self.wait()  # for who reads the copy that is overwritten here
            self._epoch = -1  # until it is whole: an interrupt leaves a mixture, which must not be written
            self._copy = copied(state.contents(), self._copy)
            self._epoch = state.progress.epoch
        if not self._writes:
            return
        best_yet = (card, copied(state.result.state_dict())) if best else self._best
        self._owed, self._best = card, best_yet  # both or none, after an interrupt as well
        write_log(self._out, state.progress.history)
        if due:
            remove_pauses(self._out)  # first: where they lie, they are further than the checkpoint
            self._begin()

    def finish(self, state: TrainState, card: StudentCard) -> None:
        """Write the epoch that ended last, unless it is written already: nothing has changed since.

        Raises:
            DarhtError: it could not be written.
        """
        if self._owed is not None:
            self.add(state, card, best=False, now=True)
        self.wait()

    def settle(self) -> None:
        """Write what would be lost when the run ends between two steps: the best student, and what it may go back to.

        Raises:
            DarhtError: it could not be written.
        """
        self.wait()
        if self._owed is not None and self._copy and self._epoch == self._owed.epoch:
            self._begin()
            self.wait()
        elif self._best is not None:
            self._save_best(*self._best)
            self._best = None

    def back(self, state: TrainState) -> None:
        """Bring a run to the end of its last good epoch: the one before, or where it was taken up."""
        remove_pauses(self._out)
        if not self._copy:
            state.load(self._out / CHECKPOINT)
            return
        memory = {"memory": self._copy["memory"]}  # which is copied from; others may become a part of the run
        state.restore(copied({name: value for name, value in self._copy.items() if name not in memory}) | memory)

    def wait(self) -> None:
        """Let what was begun be written.

        Raises:
            DarhtError: it could not be.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _begin(self) -> None:
        """Let a thread write the copy, which ends with it: one that stays slows torch's own threads down."""
        assert self._owed is not None
        pool, run = ThreadPoolExecutor(1), copy_context().run
        self._writing = pool.submit(run, self._write, self._copy, self._owed, self._best)
        pool.shutdown(wait=False)
        self._written, self._owed, self._best = time.monotonic(), None, None

    def _write(
        self, copy: dict[str, Any], card: StudentCard, best: tuple[StudentCard, dict[str, Tensor]] | None
    ) -> None:
        """Best and last and then the checkpoint, so that whatever a kill leaves is consistent or made again."""
        if best is not None:
            self._save_best(*best)
        save_weights(self._out / LAST, _result(copy), card)
        write_model_card(self._out, LAST)
        memory = None if copy["memory"] is None else MEMORY.format(copy["progress"]["epoch"])
        if memory is not None:
            save_tensors(self._out / memory, copy["memory"])
        save_tensors(self._out / CHECKPOINT, copy | {"memory": memory})
        for old in self._out.glob(MEMORY.format("*")):
            if old.name != memory:
                old.unlink(missing_ok=True)

    def _save_best(self, card: StudentCard, weights: dict[str, Tensor]) -> None:
        save_weights(self._out / BEST, weights, card)
        write_model_card(self._out, BEST)


def _result(contents: dict[str, Any]) -> dict[str, Tensor]:
    """The weights to keep: the mean's, where it has taken any in."""
    mean = contents["average"]
    if mean is None or not int(mean["n_averaged"]):
        return cast(dict[str, Tensor], contents["student"])
    return {name.removeprefix("module."): value for name, value in mean.items() if name.startswith("module.")}


def copied(value: Any, into: Any = None) -> Any:
    """Nested plain values with their tensors on the CPU, which nobody else has; tensors of `into` are written over."""
    if isinstance(value, Tensor):
        if isinstance(into, Tensor) and (into.shape, into.dtype) == (value.shape, value.dtype):
            return into.copy_(value)
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        known = into if isinstance(into, Mapping) else {}
        return {key: copied(item, known.get(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(item) for item in value)
    return value


def advance(progress: Progress, row: dict[str, Any]) -> bool:
    """Note a finished epoch; True when none before scored better. With nothing held out the last is the best."""
    score = row.get("holdout_pgd", float(row["epoch"]))
    best = bool(score >= progress.best)
    progress.epoch, progress.best = row["epoch"], max(score, progress.best)
    progress.history.append(row)
    return best
