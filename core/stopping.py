"""SIGTERM and SIGUSR1, which schedulers and spot machines send before they end a process, are taken like Ctrl-C."""

import signal
import threading
from types import FrameType
from typing import Any

BY_HAND, BY_SCHEDULER = 130, 143  # exit codes of a stopped command, as shells have them
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
_heard: list[int] = []
_before: list[dict[int, Any]] = []  # what signals did before each `listen` that lasts: a command may run others


def listen() -> None:
    """From now on these signals do what Ctrl-C does at that moment; only a process's main thread can."""
    _heard.clear()
    if threading.current_thread() is threading.main_thread():
        _before.append({number: signal.signal(number, _pass_on) for number in _SIGNALS})


def stop_listening() -> None:
    """Let them do what they did before."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in _before.pop().items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def exit_code() -> int:
    """Of a command that was stopped: 143 by one of these signals, 130 by hand."""
    return BY_SCHEDULER if _heard else BY_HAND


def _pass_on(number: int, frame: FrameType | None) -> None:
    _heard.append(number)
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):  # a shell has what it starts in the background ignore Ctrl-C, and that alone
        handler = signal.default_int_handler
    handler(signal.SIGINT, frame)
