"""Run the stages of an experiment side by side, each in a process of its own that writes to a log of its own.

A server process imports torch once and forks one process for each stage, so that a stage begins at once.
"""

import multiprocessing
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from darht.core.errors import DarhtError
from darht.core.parent import end_with_parent, leave_ctrl_c_to_parent
from darht.core.trust import is_trusting, trusting

_PRELOADED = ["torch", "darht.cache.builder.build", "darht.trainer.student.train", "darht.trainer.evaluation.run"]
Call = Callable[[tuple[str, ...]], None]


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: of the stage.
        words: of the command, without the program's path.
        needs: the stages that must be done before, by name.
        any_threads: its results are the same with any number of threads, so that it takes every core where no other
            stage can run beside it.
    """

    name: str
    words: tuple[str, ...]
    needs: tuple[str, ...] = ()
    any_threads: bool = False
    reads: tuple[Path, ...] = ()
    makes: tuple[Path, ...] = ()

    @property
    def line(self) -> str:
        """As a person would type it."""
        return shlex.join(self.words)


class StageError(DarhtError):
    """A stage failed; its log says why."""


def run_side_by_side(
    stages: Sequence[Stage],
    call: Call,
    *,
    jobs: int,
    logs: Path,
    on_start: Callable[[Stage], None],
    on_end: Callable[[Stage], None],
) -> None:
    """Run every stage as soon as those that it needs are done.

    Args:
        stages: in an order in which they could run one after the other; what they need beside these is done.
        call: runs one command; a function of a module, because other processes look it up.
        jobs: how many at a time; each has its share of the machine's cores.
        logs: folder of `STAGE.log`, to which a stage's output is appended.
        on_start: told a stage that begins.
        on_end: told a stage that is done.

    Raises:
        StageError: a stage failed. Those beside it were waited for, and none was begun after it.
        KeyboardInterrupt: it was asked to stop, and every stage has stopped as its command does.
    """
    logs.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else jobs
    left = list(stages)
    running: dict[Stage, BaseProcess] = {}
    failed: list[tuple[Stage, int | None]] = []
    with _stopped_together(running):
        while running or (left and not failed):
            ready = [stage for stage in left if not _unmet(stage, left, running)]
            while ready and len(running) < jobs and not failed:
                stage = ready.pop(0)
                left.remove(stage)
                log = str(logs / f"{stage.name.replace(' ', '-')}.log")
                alone = not running and not ready
                threads = cores if alone and stage.any_threads else max(1, cores // jobs)
                process: BaseProcess = context.Process(
                    target=_run, args=(call, stage.words, log, threads, is_trusting())
                )
                process.start()
                running[stage] = process
                on_start(stage)
            wait([process.sentinel for process in running.values()])
            for stage in [stage for stage, process in running.items() if not process.is_alive()]:
                process = running.pop(stage)
                if process.exitcode == 0:
                    on_end(stage)
                else:
                    failed.append((stage, process.exitcode))
    if failed:
        raise StageError("; ".join(_told(stage, code, logs) for stage, code in failed))


def _unmet(stage: Stage, left: Sequence[Stage], running: dict[Stage, BaseProcess]) -> bool:
    return any(other.name in stage.needs for other in (*left, *running))


def _told(stage: Stage, code: int | None, logs: Path) -> str:
    log = logs / f"{stage.name.replace(' ', '-')}.log"
    lines = log.read_text().splitlines() or [""]
    return f"stage '{stage.name}' ended with exit code {code}: {lines[-1].removeprefix('error: ')} (all of it: {log})"


@contextmanager
def _stopped_together(running: dict[Stage, BaseProcess]) -> Iterator[None]:
    """Stop the stages, who leave Ctrl-C to this process, and wait for them before the wish goes further up."""
    try:
        yield
    except KeyboardInterrupt:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join()
        raise


def _run(call: Call, words: tuple[str, ...], log: str, threads: int, trust_code: bool) -> None:
    """In the stage's process: output goes to the log, and the exit code is the command's."""
    import torch

    leave_ctrl_c_to_parent()
    end_with_parent()
    torch.set_num_threads(threads)
    with Path(log).open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        with trusting(trust_code):
            call(words)
    except DarhtError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
