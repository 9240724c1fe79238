"""Trainings that are killed: a server that imports once and forks a child for each run, and its client.

    with TrainServer(cache, config) as server:
        server.train(out, kill_after=0.3)      # SIGKILL after 0.3 s
        server.train(out, kill_at_rename=5)    # killed right before the fifth file gets its name
        server.train(out)                      # goes on to the end

The server is single-threaded, so that forking it is safe; the kills are in the child, production code has no hook.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

from forking import ForkServer

from darht.core.config import to_plain
from darht.trainer.config import TrainConfig


class Ended(NamedTuple):
    """How a training ended: by a signal, or after so many seconds, with an error unless it is empty."""

    signal: int
    seconds: float
    error: str


class TrainServer(ForkServer):
    """The client's side."""

    def __init__(self, cache: Path, config: TrainConfig) -> None:
        super().__init__(__file__, str(cache), json.dumps(to_plain(config)))

    def train(self, out: Path, *, kill_after: float | None = None, kill_at_rename: int | None = None) -> Ended:
        """Begin or go on with the run in `out`, in a child."""
        return Ended(*self.ask({"out": str(out), "kill_after": kill_after, "kill_at_rename": kill_at_rename}))


def serve(cache: Path, config: TrainConfig) -> None:
    """Fork a child for every line on stdin; answer each with a line."""
    import gc

    import torch

    torch.set_num_threads(1)
    gc.freeze()  # a collection in a child would copy all that it shares with this process
    answers = sys.stdout
    for line in sys.stdin:
        answers.write(json.dumps(_in_a_child(cache, config, json.loads(line))) + "\n")
        answers.flush()


def _in_a_child(cache: Path, config: TrainConfig, order: dict[str, object]) -> Ended:
    reading, writing = os.pipe()
    start = time.perf_counter()
    if child := os.fork():
        os.close(writing)
        return _wait(child, reading, order["kill_after"], start)
    try:
        os.write(writing, _train(cache, config, order).encode() or b"-")
        os._exit(0)
    finally:
        os._exit(70)


def _wait(child: int, reading: int, kill_after: object, start: float) -> Ended:
    import select

    if isinstance(kill_after, float) and not select.select([reading], [], [], kill_after)[0]:
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    status = os.waitpid(child, 0)[1]
    killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    error = "" if killed or said == "-" else said or "no answer: see stderr"
    return Ended(killed, time.perf_counter() - start, error)


def _train(cache: Path, config: TrainConfig, order: dict[str, object]) -> str:
    import torch

    from darht.cache.read.reader import open_cache
    from darht.core.errors import DarhtError
    from darht.trainer.student import checkpoints
    from darht.trainer.student.train import train

    checkpoints.EVERY = 0.0  # after every epoch
    if isinstance(order["kill_at_rename"], int):
        _die_at_rename(order["kill_at_rename"])
    try:
        train(config, open_cache(cache), Path(str(order["out"])), device=torch.device("cpu"), resume=True)
    except DarhtError as error:
        return str(error)
    return ""


def _die_at_rename(count: int) -> None:
    """Kill this process when a file, written and flushed, is about to get its name for the `count`-th time."""
    replace, seen = Path.replace, [0]

    def watched(path: Path, target: Path) -> Path:
        seen[0] += 1
        if seen[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(path, target)

    Path.replace = watched  # type: ignore[assignment,method-assign]


if __name__ == "__main__":
    from darht.core.config import parse

    serve(Path(sys.argv[1]), parse(TrainConfig, json.loads(sys.argv[2]), "recipe"))
