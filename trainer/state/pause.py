"""A run stopped between two steps: what the next one depends on beside weights and progress."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from darht.trainer.progress.metrics import Metrics


@dataclass(frozen=True)
class Pause:
    """Where an epoch was left; the default is its beginning.

    Attributes:
        steps: of the epoch that are done; which rows they saw follows from seed and epoch.
        images: that these saw.
        seconds: that they took.
        cpu_seconds: of this process, in all its threads, that they took.
        counts: of the metrics, float64 `[6]`; None at the beginning.
        generators: states of torch's global generators, the CPU's and then each GPU's; they draw dropout.
        world: how many processes trained together; each has a pause of its own.
    """

    steps: int = 0
    images: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    counts: Tensor | None = None
    generators: tuple[Tensor, ...] = ()
    world: int = 1

    @classmethod
    def here(
        cls,
        steps: int,
        images: int = 0,
        taken: tuple[float, float] = (0.0, 0.0),
        metrics: Metrics | None = None,
        world: int = 1,
    ) -> Self:
        """The moment between two steps; `taken` are seconds and CPU seconds."""
        gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        counts = None if metrics is None else metrics.counts.clone()
        return cls(steps, images, *taken, counts, (torch.get_rng_state(), *gpus), world)

    @classmethod
    def read(cls, state: dict[str, Any]) -> Self:
        """What `vars` of a pause gave, from a file."""
        return cls(**state | {"generators": tuple(state["generators"])})

    def metrics(self, device: torch.device) -> Metrics:
        """The metrics of the steps that are done."""
        metrics = Metrics(device)
        if self.counts is not None:
            metrics.counts.copy_(self.counts)
        return metrics

    def set_generators(self) -> None:
        """Let torch's global generators draw what they would have drawn next; at the beginning they stay as seeded.

        On a machine with fewer GPUs only those that are there are set.
        """
        if self.generators:
            torch.set_rng_state(self.generators[0])
            for gpu, state in list(enumerate(self.generators[1:]))[: torch.cuda.device_count()]:
                torch.cuda.set_rng_state(state, gpu)
