"""Workers that build row blocks, whatever they run on: what they load, what they tell, and who gets which block.

The main path is `share`: every worker of a pool computes one row block at a time; the block of a worker that is lost
goes back into the queue.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from darht.cache.builder.build import build_block
from darht.cache.builder.compute import Worker
from darht.cache.builder.plan import Plan
from darht.cache.format.store import Store
from darht.core.config import fingerprint
from darht.core.errors import CacheError, SpecMismatchError
from darht.core.storage import Storage

MAX_ATTEMPTS = 3  # twice may be bad luck or a tight machine; a block that takes three workers along takes all of them
OnNotice = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a worker needs to begin; it travels to other processes and machines.

    Attributes:
        load: plans the build on a device, for example `functools.partial(plan_build, path)`.
        fingerprint: of the spec that the plan must come to.
        out: the cache, claimed already.
        batch_size: images in one forward pass; None for what a worker takes by itself.
    """

    load: Callable[..., Plan]
    fingerprint: str
    out: Storage
    batch_size: int | None

    def worker(self, device: torch.device, threads: int) -> Worker:
        """Load plan and teachers in a process that may use so many threads.

        Raises:
            SpecMismatchError: the config, the data or a teacher changed since the build began.
        """
        torch.set_num_threads(threads)
        plan = self.load(device=device)
        if fingerprint(plan.spec) != self.fingerprint:
            raise SpecMismatchError(
                f"the spec, the data or a teacher changed while {self.out} was being built: undo it, or build anew"
            )
        return Worker(plan, Store(self.out), device, self.batch_size)


@dataclass(frozen=True)
class UnitDone:
    """A unit is done; `seconds` is 0 when it was before."""

    array: str
    shard: int
    seconds: float


@dataclass(frozen=True)
class BlockDone:
    """A worker has nothing to do."""

    worker: int


@dataclass(frozen=True)
class Lost:
    """A worker is gone without a word; `how` names it and says what is known."""

    worker: int
    how: str


@dataclass(frozen=True)
class Failed:
    """A worker met an error that another one would meet as well."""

    error: Exception


Event = UnitDone | BlockDone | Lost | Failed


class Pool(Protocol):
    """Workers by number: processes, or Ray's actors."""

    def start(self) -> int:
        """Start a worker; it loads while it waits for its first block."""
        ...

    def submit(self, worker: int, shard: int) -> None:
        """Have a worker compute a row block; a worker that is lost by then shows in `wait`."""
        ...

    def wait(self) -> list[Event]:
        """What happened since; waits until something has."""
        ...

    def stop(self, worker: int) -> None:
        """There is nothing more to do for a worker."""
        ...

    def end(self) -> None:
        """End all that are left, whatever they do."""
        ...


def compute(worker: Worker, shard: int, number: int, engine: str, tell: Callable[[Event], None]) -> None:
    """What a worker of any pool does with a row block."""
    build_block(
        worker,
        shard,
        on_unit=lambda array, shard, seconds: tell(UnitDone(array.name, shard, seconds)),
        engine=engine,
        number=number,
    )
    tell(BlockDone(number))


def share(
    shards: Sequence[int], pool: Pool, size: int, *, on_unit: Callable[[UnitDone], None], on_notice: OnNotice
) -> None:
    """Have a pool of up to `size` workers compute row blocks, each as soon as somebody is free.

    Raises:
        CacheError: one row block took three workers along.
        DarhtError: whatever a worker raised.
    """
    waiting, busy, losses = deque(shards), dict[int, int](), Counter[int]()

    def next_block(worker: int) -> None:
        busy[worker] = waiting.popleft()
        pool.submit(worker, busy[worker])

    try:
        for _ in range(min(size, len(waiting))):
            next_block(pool.start())
        while busy:
            for event in pool.wait():
                match event:
                    case UnitDone():
                        on_unit(event)
                    case BlockDone(worker):
                        del busy[worker]
                        next_block(worker) if waiting else pool.stop(worker)
                    case Lost(worker, how):
                        shard = busy.pop(worker)
                        losses[shard] += 1
                        _check_losses(shard, losses[shard], how)
                        on_notice(f"{how} in row block {shard}: another worker takes it")
                        waiting.append(shard)
                        next_block(pool.start())
                    case Failed(error):
                        raise error
    finally:
        pool.end()


def _check_losses(shard: int, losses: int, how: str) -> None:
    if losses >= MAX_ATTEMPTS:
        raise CacheError(
            f"row block {shard} took {losses} workers along, the last: {how}; most often memory runs out: lower "
            "--batch-size or --workers"
        )
