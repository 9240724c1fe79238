"""Ctrl-C that waits for a safe point."""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Self

STOPPING = "stopping at the end of this step; Ctrl-C again stops at once and loses what is not in a checkpoint"


class InterruptHandler:
    """From `arm` on, the first Ctrl-C is noted, and `check` raises KeyboardInterrupt; another Ctrl-C does not wait.

    As a context it is released at the end.

    Args:
        tell: is told that the first one was heard.
    """

    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell, self._handler = tell, signal.getsignal(signal.SIGINT)
        self._armed = self._asked = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def arm(self) -> None:
        """Take Ctrl-C over, once; only a process's main thread can."""
        if not self._armed and threading.current_thread() is threading.main_thread():
            self._handler, self._armed = signal.signal(signal.SIGINT, self._ask), True

    def check(self) -> None:
        """Raise KeyboardInterrupt when it was asked for: here nothing is half done."""
        if self._asked:
            self._asked = False
            raise KeyboardInterrupt

    def release(self) -> None:
        """Let Ctrl-C do what it did before."""
        if signal.getsignal(signal.SIGINT) == self._ask and self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        self.release()
        self._tell()
