"""A pool of processes on this machine.

Each worker has a pipe of its own: a queue that all share would stay locked when its holder is killed.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

import torch

from darht.cache.builder.pool import Event, Failed, Lost, Task, compute
from darht.core.device import pick_device
from darht.core.errors import DarhtError

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
        with _deaf_to_ctrl_c():
            process.start()
        theirs.close()  # so that our end reads the end of file when theirs dies
        self.processes.append(process)
        self.pipes[number] = ours
        return number

    def submit(self, worker: int, shard: int) -> None:
        """Send the number of a row block."""
        with contextlib.suppress(OSError):  # it is dead: `wait` reads the end of file
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
            return Lost(number, f"worker {number} (pid {process.pid}) {_how(process.exitcode)}")
        return event

    def stop(self, worker: int) -> None:
        """Tell a worker that it may go."""
        with contextlib.suppress(OSError):
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


def _how(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"ended with exit code {exitcode}"
    return f"was killed by {signal.Signals(-exitcode).name}"


@contextlib.contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Processes started inside never see Ctrl-C, which a terminal sends to all: the parent hears it and ends them."""
    resource_tracker.ensure_running()  # its own start would unblock the signal
    unheard = [signal.SIGINT, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]  # SLURM sends that to all
    before = signal.pthread_sigmask(signal.SIG_BLOCK, unheard)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def serve(pipe: Connection, task: Task, device: torch.device, threads: int, number: int) -> None:
    """The life of a worker: load, then compute each row block whose number comes, until None does."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        worker = task.worker(device, threads)
        while (shard := pipe.recv()) is not None:
            compute(worker, shard, number, "processes", pipe.send)
    except (EOFError, BrokenPipeError):
        return
    except DarhtError as error:
        pipe.send(Failed(error))
    except Exception:
        pipe.send(Failed(RuntimeError(f"worker {number} failed\n{traceback.format_exc()}")))


def _end_with_parent() -> None:
    """A killed parent cannot end its children: each of them watches it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
