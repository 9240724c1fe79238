"""Processes that end with the one that started them, however that ended, and leave Ctrl-C to it."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

_LOOK = 0.5  # seconds between two looks
_SENT_TO_ALL = [signal.SIGINT, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]  # a terminal, and SLURM


def end_with_parent() -> None:
    """From now on a thread looks whether the parent is still there, and kills this process when it is not.

    What is written is whole or absent, so that a kill at any moment leaves what can be gone on with.
    """
    threading.Thread(target=_watch, args=(os.getppid(),), name="end-with-parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK)
    os._exit(137)  # as after SIGKILL


def end_with_spawner() -> None:
    """The same for a process of `multiprocessing`, at once: a killed parent cannot end its children."""
    threading.Thread(target=_wait_for_spawner, name="end-with-parent", daemon=True).start()


def _wait_for_spawner() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


@contextmanager
def deaf_to_ctrl_c() -> Iterator[None]:
    """Processes started inside never see Ctrl-C, which a terminal sends to all: the parent hears it and ends them."""
    resource_tracker.ensure_running()  # its own start would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SENT_TO_ALL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_ctrl_c_to_parent() -> None:
    """The same for this process from now on: SIGTERM alone, which the parent sends, still stops it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SENT_TO_ALL)
