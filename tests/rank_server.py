"""Two processes that train one student: a server that imports once and forks both ranks for each run, and its client.

    with RankServer() as server:
        server.together(cache, out, config)            # how the two ranks end: [0, 0]
        server.together(cache, out, config, "1:2")     # rank 1 wishes to stop after step 2

The server is single-threaded, so that forking it is safe; the wish to stop comes by a callback.
"""

import json
import os
import socket
import sys
from pathlib import Path

from forking import ForkServer

from darht.core.config import parse, to_plain
from darht.trainer.config import TrainConfig

WORLD = 2


class RankServer(ForkServer):
    """The client's side."""

    def __init__(self) -> None:
        super().__init__(__file__)

    def together(self, cache: Path, out: Path, config: TrainConfig, stop: str = "") -> list[int]:
        """Two processes that train one student into `out`, one of which may wish to stop: `RANK:STEP`; how they end."""
        order = {"config": to_plain(config), "cache": str(cache), "out": str(out), "stop": stop}
        codes: list[int] = self.ask(order)
        return codes


def serve() -> None:
    """Fork the ranks for every line on stdin; answer each with a line."""
    import gc

    import torch

    torch.set_num_threads(1)
    gc.freeze()  # a collection in a child would copy all that it shares with this process
    answers = sys.stdout
    for line in sys.stdin:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        pids = [_fork(json.loads(line), rank, port) for rank in range(WORLD)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        answers.write(json.dumps(codes) + "\n")
        answers.flush()


def _fork(order: dict[str, object], rank: int, port: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.dup2(2, 1)  # the answers are the server's
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(WORLD)}
    os.environ.update(address | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    try:
        _train(order)
    finally:
        os._exit(1)


def _train(order: dict[str, object]) -> None:
    """Train as one rank, and leave the process."""
    import torch

    from darht.cache.read.reader import open_cache
    from darht.trainer.student import checkpoints
    from darht.trainer.student.distributed import leave, rank_and_world
    from darht.trainer.student.train import Callbacks, train

    def stop(step: int, *rest: object) -> None:
        if order["stop"] == f"{rank_and_world()[0]}:{step}":
            raise KeyboardInterrupt

    checkpoints.EVERY = 0.0  # after every epoch
    cache, out = open_cache(Path(str(order["cache"]))), Path(str(order["out"]))
    config = parse(TrainConfig, order["config"], "recipe")
    try:
        train(config, cache, out, device=torch.device("cpu"), resume=True, callbacks=Callbacks(on_step=stop))
    except KeyboardInterrupt:
        leave(130)
    leave(0)


if __name__ == "__main__":
    import darht.cache.read.reader
    import darht.trainer.student.train  # noqa: F401 - imported here, once, not in every child

    serve()
