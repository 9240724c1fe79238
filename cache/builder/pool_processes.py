"""A pool of processes on this machine.

Each worker has a pipe of its own: a queue that all share would stay locked when its holder is killed.
"""

import multiprocessing
import multiprocessing.connection
import signal
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

import torch

from darht.cache.builder.pool import Event, Failed, Lost, Task, compute
from darht.core.device import pick_device
from darht.core.errors import DarhtError
from darht.core.parent import deaf_to_ctrl_c, end_with_spawner

_PATIENCE = 5.0  # seconds that an ended process gets before it is killed


def process_pool(task: Task, device: str, workers: int) -> "ProcessPool":
    """A pool for this machine: workers go round its GPUs, and share the threads that one worker would have.

    Raises:
        ConfigError: a device that is not there.
    """
    where = pick_device(device)
    several = where.type == "cuda" and where.index is None
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if several else [where]
    return ProcessPool(task, devices, max(1, torch.get_num_threads() // workers))


class ProcessPool:
    """Workers that are spawned: threads and CUDA do not survive a fork."""

    def __init__(self, task: Task, devices: Sequence[torch.device], threads: int) -> None:
        self.task, self.devices, self.threads = task, devices, threads
        self.processes: list[SpawnProcess] = []
        self.pipes: dict[int, Connection] = {}

    def start(self) -> int:
        """Start a process; numbers count up, also over those that are lost."""
        number = len(self.processes)
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        arguments = (theirs, self.task, self.devices[number % len(self.devices)], self.threads, number)
        process = context.Process(target=serve, args=arguments, name=f"darht-worker-{number}", daemon=True)
        with deaf_to_ctrl_c():
            process.start()
        theirs.close()  # so that our end reads the end of file when theirs dies
        self.processes.append(process)
        self.pipes[number] = ours
        return number

    def submit(self, worker: int, shard: int) -> None:
        """Send the number of a row block."""
        with suppress(OSError):  # it is dead: `wait` reads the end of file
            self.pipes[worker].send(shard)

    def wait(self) -> list[Event]:
        """One message of each worker that has sent any, or the news of its death."""
        ready = multiprocessing.connection.wait(list(self.pipes.values()))
        return [self._receive(number) for number, pipe in list(self.pipes.items()) if pipe in ready]

    def _receive(self, number: int) -> Event:
        try:
            event: Event = self.pipes[number].recv()
        except (EOFError, OSError):
            self.pipes.pop(number).close()
            process = self.processes[number]
            process.join(_PATIENCE)
            return Lost(number, f"worker {number} (pid {process.pid}) {how_it_ended(process.exitcode)}")
        return event

    def stop(self, worker: int) -> None:
        """Tell a worker that it may go."""
        with suppress(OSError):
            self.pipes[worker].send(None)
        self.pipes.pop(worker).close()

    def end(self) -> None:
        """Let those that were stopped clean up; terminate the others: what is lost of a unit is computed again."""
        for number, process in enumerate(self.processes):
            if number in self.pipes:
                process.terminate()
        for process in self.processes:
            process.join(_PATIENCE)
            if process.is_alive():
                process.kill()
                process.join()


def how_it_ended(exitcode: int | None) -> str:
    """What an exit code says, as the end of a sentence about a process."""
    if exitcode is None or exitcode >= 0:
        return f"ended with exit code {exitcode}"
    return f"was killed by {signal.Signals(-exitcode).name}"


def serve(pipe: Connection, task: Task, device: torch.device, threads: int, number: int) -> None:
    """The life of a worker: load, then compute each row block whose number comes, until None does."""
    end_with_spawner()

    def tell(event: Event) -> None:
        with _ending_with(pipe):
            pipe.send(event)

    try:
        worker = task.worker(device, threads)
        while True:
            with _ending_with(pipe):
                shard = pipe.recv()
            if shard is None:
                return
            compute(worker, shard, number, "processes", tell)
    except DarhtError as error:
        tell(Failed(error))
    except Exception:
        tell(Failed(RuntimeError(f"worker {number} failed\n{traceback.format_exc()}")))


@contextmanager
def _ending_with(pipe: Connection) -> Iterator[None]:
    """End the process, without a word, where the pipe has lost its other end: the builder is gone."""
    try:
        yield
    except (EOFError, ConnectionError):
        pipe.close()
        raise SystemExit from None
