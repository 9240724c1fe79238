"""Several processes that train one student (`torchrun`): each takes its part of every global batch.

Weights, gradients and the rows' memory are the same everywhere after each step or epoch. So a run does not depend on
how many processes there are, but for the order of float additions, for dropout, which every process draws for itself,
and for what is taken over a batch: the statistics of batch norm and weights by the batch (`darht` with `weights:
batch`, `mtard`) are those of a process's part.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from darht.cache.read.sampler import share
from darht.core.errors import UnreachableError
from darht.core.parent import end_with_parent
from darht.trainer.student.memory import Memory
from darht.trainer.student.step import Learned


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Attributes:
        rank: its number.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

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

    def add_gradients(self, model: nn.Module, *, stop: bool) -> Tensor | None:
        """Sum gradients over the processes; also how many of these want to `stop`, float `[]`, or None when alone."""
        if self.world == 1:
            return None
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        wish = gradients[0].new_full((1,), float(stop))
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), wish])
        self.total(flat)
        for gradient, part in zip(gradients, flat[:-1].split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
        return flat[-1]

    def stop(self, wanted: bool, wishes: Tensor | None) -> bool:
        """Whether to stop after this step: alone when it is `wanted`, together when somebody wanted it a step ago.

        What others want is read a step late so that a GPU is not waited for, and by all in the same step.
        """
        return wanted if self.world == 1 else wishes is not None and bool(wishes)

    def same(self, value: object) -> bool:
        """Whether every process has this value."""
        return all(other == value for other in self._everyones(value))

    def any(self, wanted: bool) -> bool:
        """Whether some process wants this; none goes on before all have said."""
        return any(self._everyones(wanted))

    def _everyones(self, value: object) -> list[object]:
        values = [value] * self.world
        if self.world > 1:
            with _with_others():
                dist.all_gather_object(values, value)
        return values

    def share(self, model: nn.Module, memory: Memory | None, learned: Learned) -> None:
        """After an epoch: the first one's buffers (batch norm), the memory's parts, the mean of `learned`."""
        if self.world == 1:
            if memory is not None:
                memory.alone()
            return
        with _with_others():
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)
        if memory is not None:
            memory.join(self.total)
        for name, value in learned.items():
            learned[name] = self.total(value.clone()) / self.world

    def total(self, value: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        if self.world > 1:
            with _with_others():
                dist.all_reduce(value)
        return value

    def agree(self, value: object) -> object:
        """What the first process has."""
        if self.world == 1:
            return value
        box = [value]
        with _with_others():
            dist.broadcast_object_list(box, src=0)
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
    try:
        yield Ranks(rank, world)
        if own:
            with _with_others():
                dist.barrier()  # nobody leaves while another still waits for what it sends
    finally:
        if own:
            dist.destroy_process_group()
