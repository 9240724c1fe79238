"""A run: everything that changes while a student is trained, and how it is kept and taken up again."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from darht.core.config import canonical_json
from darht.core.tensors import load_tensors
from darht.trainer.state.checkpoint import CHECKPOINT, PAUSED, Progress, load_checkpoint, restore
from darht.trainer.state.pause import Pause
from darht.trainer.student.distributed import Ranks
from darht.trainer.student.memory import Memory
from darht.trainer.student.model import Student
from darht.trainer.student.step import Learned


@dataclass(eq=False)
class TrainState:
    """Everything that changes while a student is trained: but for the last two, what its checkpoint holds.

    Attributes:
        student: trained.
        forward: the same, compiled when the recipe says so.
        optimizer: of its parameters.
        memory: of `inner: warm`.
        average: of the student's weights, when they are averaged.
        learned: what the recipe carries from step to step.
        progress: finished epochs and their log.
        pause: how far the epoch after them is; None at its beginning.
        identity: of the run, as `run.json` has it; a checkpoint of another one is refused.
        stopping: whether this process was asked to stop and the others, who train with it, do not know yet.
        shared: what a step costs, with the gradient that all processes have of it; None when alone.
    """

    student: Student
    forward: nn.Module
    optimizer: torch.optim.Optimizer
    memory: Memory | None
    average: AveragedModel | None = None
    learned: Learned = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)
    pause: Pause | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    stopping: bool = False
    shared: DistributedDataParallel | None = None

    @property
    def result(self) -> Student:
        """The student to score and to keep."""
        if self.average is None or not int(self.average.n_averaged):
            return self.student
        return cast(Student, self.average.module)

    @property
    def networks(self) -> list[nn.Module]:
        """The student, and its average where there is one."""
        return [self.student] if self.average is None else [self.student, self.average.module]

    def contents(self) -> dict[str, Any]:
        """Everything that the next step depends on: plain values, and tensors that are not copied."""
        return {
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": vars(self.progress),
            "identity": json.loads(canonical_json(self.identity)),
            "memory": None if self.memory is None else self.memory.state(),
            "average": None if self.average is None else self.average.state_dict(),
            "learned": self.learned,
            "pause": None if self.pause is None else vars(self.pause),
        }

    def load(self, path: Path) -> None:
        """Go on where the checkpoint stands, if there is one.

        Raises:
            CacheError: it is damaged.
            SpecMismatchError: it belongs to another run.
        """
        self._take_over(*load_checkpoint(path, self.student, self.optimizer, self.identity))

    def restore(self, contents: dict[str, Any]) -> None:
        """Go on where `contents` stand, whose tensors may become this run's, but for the memory's."""
        self._take_over(*restore(contents, self.student, self.optimizer))

    def _take_over(self, progress: Progress, more: dict[str, Any]) -> None:
        self.progress, device = progress, next(self.student.parameters()).device
        self.learned.clear()
        self.learned |= {name: value.to(device) for name, value in more.get("learned", {}).items()}
        self.pause = Pause.read(more["pause"]) if more.get("pause") else None
        if self.memory is not None and more:
            self.memory.load(more["memory"])
        if self.average is not None and more:
            self.average.load_state_dict(more["average"])


def pause_file(out: Path, ranks: Ranks) -> Path:
    """Where this process keeps a run that is paused: until the epoch ends, each holds a part of what it depends on."""
    return out / (PAUSED if ranks.first else PAUSED.replace(".", f"-{ranks.rank}."))


def load_furthest(state: TrainState, ranks: Ranks, out: Path) -> str | None:
    """Go on from a pause where every process has its part of the same one, and from the last epoch otherwise.

    Returns:
        A sentence about a pause that is not taken up; None when there is nothing to say.
    """
    path, mark, world = pause_file(out, ranks), None, 0
    if path.is_file():
        kept = load_tensors(path, lazily=True)
        pause = Pause.read(kept["pause"])
        mark, world = (kept["progress"]["epoch"], pause.steps, pause.world), pause.world
    together = ranks.same(mark) and world == ranks.world
    state.load(path if together else out / CHECKPOINT)
    if mark is None or together:
        return None
    return (
        f"the pause was kept by {world} processes, these are {ranks.world}: on from epoch {state.progress.epoch}'s end"
    )


def kept_epochs(out: Path) -> int:
    """How many epochs are done where a run on the disk would be gone on with; 0 for the beginning.

    Raises:
        CacheError: the pause or the checkpoint is damaged.
    """
    for path in (out / PAUSED, out / CHECKPOINT):  # where a pause lies, it is further
        if path.is_file():
            return int(load_tensors(path, lazily=True)["progress"]["epoch"])
    return 0


def remove_pauses(out: Path) -> None:
    """Forget what every process kept in the middle of an epoch."""
    for path in out.glob(PAUSED.replace(".", "*.")):
        path.unlink(missing_ok=True)
