"""A pool of Ray's actors: on each GPU of a cluster one, or on CPUs. Ray is imported here alone, and only when used."""

import os
from typing import Any

from darht.cache.builder.compute import Worker
from darht.cache.builder.pool import Event, Failed, Lost, Task, compute
from darht.core.device import pick_device
from darht.core.errors import ConfigError, DarhtError

_PATIENCE = 5.0  # seconds for actors that were let go to clean up before their Ray ends


def ray_pool(task: Task, device: str, workers: int) -> tuple["RayPool", int]:
    """A pool on the cluster that RAY_ADDRESS or this machine names, else on a Ray of this machine's own, and its size.

    Each GPU of the cluster has one actor; without GPUs, or with `cpu`, `workers` actors share the CPUs.

    Raises:
        ConfigError: Ray is not installed, or GPUs are asked for where there are none, or one by its number.
    """
    if device.startswith("cuda:"):
        raise ConfigError(f"--engine ray gives every actor its own GPU; got --device {device}: use auto, cuda or cpu")
    try:
        import ray
    except ImportError as error:
        raise ConfigError("--engine ray needs a package that is not installed: pip install 'darht[ray]'") from error
    own = not ray.is_initialized()
    if own:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a build reports to nobody
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    has = ray.cluster_resources()
    cpus, gpus = max(1, int(has.get("CPU", 1))), 0 if device == "cpu" else int(has.get("GPU", 0))
    size = gpus or min(workers, cpus)
    pool = RayPool(task, gpu=gpus > 0, threads=cpus // size, own=own)
    if device == "cuda" and gpus == 0:
        pool.end()
        raise ConfigError("--device cuda, but Ray's cluster has no GPU: use --device cpu or auto")
    return pool, size


class BlockActor:
    """Keeps plan and teachers loaded; Ray makes an actor of it."""

    def __init__(self, task: Task, device: str, threads: int, number: int) -> None:
        self.task, self.device, self.threads, self.number = task, device, threads, number
        self.worker: Worker | None = None

    def compute(self, shard: int) -> list[Event]:
        """Compute a row block; the first one loads, so that its errors come back as those of any other."""
        if self.worker is None:
            self.worker = self.task.worker(pick_device(self.device), self.threads)
        events: list[Event] = []
        compute(self.worker, shard, self.number, "ray", events.append)
        return events


class RayPool:
    """Actors with a GPU each, or with `threads` CPUs."""

    def __init__(self, task: Task, *, gpu: bool, threads: int, own: bool) -> None:
        import ray

        self.ray, self.own = ray, own
        self.arguments = (task, "cuda" if gpu else "cpu", threads)
        needs = {"num_gpus": 1, "num_cpus": 1} if gpu else {"num_gpus": 0, "num_cpus": threads}
        self.actor = ray.remote(**needs)(BlockActor)
        self.actors: dict[int, Any] = {}
        self.running: dict[Any, int] = {}
        self.leaving: list[Any] = []
        self.started = 0

    def start(self) -> int:
        """Ask Ray for an actor; it starts where its CPUs or its GPU are free."""
        number, self.started = self.started, self.started + 1
        self.actors[number] = self.actor.remote(*self.arguments, number)
        return number

    def submit(self, worker: int, shard: int) -> None:
        """Call the actor."""
        self.running[self.actors[worker].compute.remote(shard)] = worker

    def wait(self) -> list[Event]:
        """What the first call that ends has done."""
        (answer,), _ = self.ray.wait(list(self.running), num_returns=1)
        number = self.running.pop(answer)
        try:
            events: list[Event] = self.ray.get(answer)
        except self.ray.exceptions.RayTaskError as error:
            return [Failed(error.cause if isinstance(error.cause, DarhtError) else error)]
        except self.ray.exceptions.RayError as error:
            del self.actors[number]
            return [Lost(number, f"Ray's actor {number} was lost ({type(error).__name__})")]
        return events

    def stop(self, worker: int) -> None:
        """Let an actor go, so that its CPUs are there for one that still waits for its place."""
        self.leaving.append(self.actors.pop(worker).__ray_terminate__.remote())

    def end(self) -> None:
        """Kill the actors that are left, and end Ray itself when it was started here."""
        for actor in self.actors.values():
            self.ray.kill(actor)
        if self.leaving:
            self.ray.wait(self.leaving, num_returns=len(self.leaving), timeout=_PATIENCE)
        if self.own:
            self.ray.shutdown()
