"""Try again what a network or a busy server spoilt, for as long as that is worth it."""

import atexit
import logging
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from darht.core.errors import UnreachableError

RETRY_FOR = 600.0  # seconds: a server is restarted, or an object store has its bad minutes, in less
_FIRST_WAIT, _LONGEST_WAIT = 0.2, 10.0  # seconds between tries: doubled each time, and a random share of that
_SILENT = 3  # failures before anything is said: single ones are ordinary
LOG = logging.getLogger("darht.storage")  # warnings of a logger that nobody set up are lines on stderr
_WAITED_FOR: set[str] = set()  # hosts of which it was said that they are waited for
_LOCK = threading.Lock()
_JITTER = random.Random()  # of our own: threads must draw nothing from the generator that a program has seeded
T = TypeVar("T")
_ENDING = threading.Event()
# Set before threads of pools are joined, which atexit is too late for: a process that ends would wait for files that
# nobody wants any more, and for minutes where their server is gone. concurrent.futures ends its own threads so.
getattr(threading, "_register_atexit", atexit.register)(_ENDING.set)


class TransientError(Exception):
    """What may be gone at the next try; its text says what it was."""


def patiently(action: Callable[[], T], what: str, host: str, retry_for: float) -> T:
    """What `action` gives, tried again after each TransientError with growing, random pauses.

    Args:
        action: one request.
        what: what it does, for the message: `read s3://bucket/key`.
        host: who is waited for.
        retry_for: seconds after which no further try is begun.

    Raises:
        UnreachableError: it went on failing, or the process ends.
    """
    end, tries = time.monotonic() + retry_for, 0
    while True:
        if _ENDING.is_set():
            raise UnreachableError(f"cannot {what}: the process ends")
        try:
            found = action()
        except TransientError as error:
            tries += 1
            pause = _JITTER.uniform(0.5, 1) * min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** min(tries - 1, 16))
            if time.monotonic() + pause > end:
                raise UnreachableError(
                    f"cannot {what}: {tries} tries within {duration(retry_for)} ({error}); see that {host} is up, "
                    "and run again",
                    waited=True,
                ) from error
            if tries == _SILENT:
                _say_once(host, f"waiting for {host} ({error}), up to {duration(retry_for)}")
            _ENDING.wait(pause)
        else:
            if host in _WAITED_FOR:
                _answers_again(host)
            return found


def _say_once(host: str, line: str) -> None:
    with _LOCK:
        known = host in _WAITED_FOR
        _WAITED_FOR.add(host)
    if not known:
        LOG.warning(line)


def _answers_again(host: str) -> None:
    with _LOCK:
        known = host in _WAITED_FOR
        _WAITED_FOR.discard(host)
    if known:
        LOG.warning(f"{host} answers again")


def duration(seconds: float) -> str:
    """Seconds in the largest unit that they fill: `10 min`, `90 s`."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:g} {unit}"
    return f"{seconds:g} s"
