"""Several processes that train one student (`torchrun`): each takes its part of every global batch.

Weights, gradients and the rows' memory are the same everywhere after each step or epoch. So a run does not depend on
how many processes there are, but for the order of float additions, for dropout, which every process draws for itself,
and for what is taken over a batch: the statistics of batch norm and weights by the batch (`darht` with `weights:
batch`, `mtard`) are those of a process's part.
"""

import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from darht.cache.read.sampler import share
from darht.core.errors import UnreachableError
from darht.core.parent import end_with_parent
from darht.trainer.student.memory import Memory
from darht.trainer.student.step import Learned


class Wish(NamedTuple):
    """How many processes want to stop, on its way.

    Attributes:
        wanting: how many, float `[]` on the CPU, once `work` is done.
        work: that sums it.
    """

    wanting: Tensor
    work: dist.Work

    def read(self) -> bool:
        """Whether any does."""
        self.work.wait()
        return bool(self.wanting)


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Attributes:
        rank: its number.
        world: how many there are.
        hosts: a group of the same processes that talk without their GPUs, which are not waited for so; None when alone.
    """

    rank: int = 0
    world: int = 1
    hosts: dist.ProcessGroup | None = None

    @property
    def own(self) -> tuple[int, ...]:
        """What keys the draws of this process alone; nothing for the first, which draws as one that is alone."""
        return () if self.first else (self.rank,)

    @property
    def first(self) -> bool:
        """Whether this is the process that scores and writes."""
        return self.rank == 0

    def part(self, at: Tensor) -> Tensor:
        """This process's rows of a global batch."""
        return share(at, self.rank, self.world)

    def averaged(self, loss: nn.Module) -> DistributedDataParallel | None:
        """A loss whose gradients are averaged over the processes while they are still computed; None when alone.

        Weights that one step's loss does not reach keep no gradient, as alone. Batch norm's statistics are each
        process's own until `share`.
        """
        if self.world == 1:
            return None
        return DistributedDataParallel(loss, broadcast_buffers=False, find_unused_parameters=True)

    def wish(self, stop: bool) -> "Wish | None":
        """Tell the others whether this process wants to stop, and wait for nobody; None when alone."""
        if self.world == 1:
            return None
        wanting = torch.tensor(float(stop))
        return Wish(wanting, dist.all_reduce(wanting, group=self.hosts, async_op=True))

    def stop(self, wanted: bool, wishes: "Wish | None") -> bool:
        """Whether to stop after this step: alone when it is `wanted`, together when somebody wanted it a step ago.

        What others want is read a step late, when it has long come, and by all in the same step.
        """
        return wanted if self.world == 1 else wishes is not None and wishes.read()

    def same(self, value: object) -> bool:
        """Whether every process has this value."""
        return all(other == value for other in self._everyones(value))

    def any(self, wanted: bool) -> bool:
        """Whether some process wants this; none goes on before all have said."""
        return any(self._everyones(wanted))

    def _everyones(self, value: object) -> list[object]:
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value, group=self.hosts)
        return values

    def share(self, networks: Iterable[nn.Module], memory: Memory | None, learned: Learned) -> None:
        """After an epoch: the first one's buffers (batch norm), the memory's parts, the mean of `learned`.

        Args:
            networks: the student, and its average where there is one.
            memory: of rows, where there is one.
            learned: what the recipe carries from step to step.
        """
        if self.world == 1:
            if memory is not None:
                memory.alone()
            return
        for network in networks:
            for buffer in network.buffers():
                dist.broadcast(buffer, src=0)
        if memory is not None:
            memory.join(self.total, self.claim)
        for name, value in learned.items():
            learned[name] = self.total(value.clone()) / self.world

    def total(self, value: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def claim(self, flags: Tensor) -> tuple[Tensor, Tensor]:
        """Of what processes flag, bool `[N]`: what this one speaks for, who is the only one to, and what any flags."""
        speaker = flags.int() * (self.rank + 1)
        if self.world > 1:
            dist.all_reduce(speaker, op=dist.ReduceOp.MAX)
        return speaker == self.rank + 1, speaker > 0

    def agree(self, value: object) -> object:
        """What the first process has."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.hosts)
        return box[0]


@contextmanager
def _with_others() -> Iterator[None]:
    """What all processes do together.

    Raises:
        UnreachableError: one of them has ended, or cannot be reached.
    """
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):  # gloo's errors have no class of their own
            raise
        raise UnreachableError(
            "another process of this training has ended or cannot be reached; what its last epoch kept is whole: "
            "start all of them again"
        ) from error


def leave(code: int) -> NoReturn:
    """End this process; one of several at once, because gloo's threads may abort it while Python ends."""
    if rank_and_world()[1] == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are, as `torchrun` says; 0 and 1 without it."""
    if "RANK" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """The processes that `torchrun` started, or this one alone; a group that was made here ends with the block."""
    rank, world = rank_and_world()
    own = world > 1 and not dist.is_initialized()
    if own:
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun, which ends its processes unless it is killed itself
            end_with_parent()
        with _with_others():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    hosts = dist.new_group(backend="gloo") if world > 1 else None
    try:
        with warnings.catch_warnings(), _with_others():
            # Kernels of one pixel have strides of two kinds, which mean the same.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
            yield Ranks(rank, world, hosts)
            if own:
                dist.barrier()  # nobody leaves while another still waits for what it sends
    finally:
        if own:
            dist.destroy_process_group()
