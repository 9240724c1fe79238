"""Processes of bench/clusters.py: darht's commands in sessions of their own, waited for and killed."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ENTRIES = {
    "darht-cache": "from darht.cache.cli import cache; cache(prog_name='darht-cache')",
    "darht-teacher": "from darht.trainer.cli import teacher; teacher(prog_name='darht-teacher')",
    "darht-train": "from darht.trainer.cli import train; train(prog_name='darht-train')",
}
PATIENCE = 900.0  # seconds for anything that is waited for, on a machine that may be busy


def program(name: str, *words: object) -> list[str]:
    """The command line of one of darht's commands, of the darht that this process has imported."""
    return [sys.executable, "-W", "ignore", "-c", ENTRIES[name], *map(str, words)]


@contextlib.contextmanager
def started(words: list[str], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process with a session of its own, which is killed at the latest with the block."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            words, stdout=file, stderr=file, start_new_session=True, env={**os.environ, **environment}
        )
        try:
            yield process
        finally:
            kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a process and those that it started, as when a machine goes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def finish(process: subprocess.Popen[bytes], log: Path, wanted: int = 0) -> str:
    """What a process printed, after it ended as it should."""
    code = process.wait(PATIENCE)
    if code != wanted:
        sys.exit(f"exit code {code}, not {wanted}: {log}\n{log.read_text()[-3000:]}")
    return log.read_text()


def wait_for(what: str, condition: Callable[[], Any]) -> Any:
    """What `condition` gives once that is true."""
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        if time.monotonic() > end:
            sys.exit(f"waited in vain for {what}")
        time.sleep(0.1)
    return found


def answers(url: str) -> bool:
    """Whether a server is there."""
    try:
        return bool(urllib.request.urlopen(url, timeout=5).status == 200)
    except OSError:
        return False


def free_port() -> int:
    """A port of loopback that nobody has now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
