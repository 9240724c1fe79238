"""What an epoch's batches gave so far: mean loss and training accuracy, from forward passes that happen anyway."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from darht.core.fused import fused
from darht.trainer.student.model import StudentOutput

_STEPS, _LOSS, _CLEAN, _CLEAN_RIGHT, _ADVERSARIAL, _ADVERSARIAL_RIGHT = range(6)


class Batch(Protocol):
    """The part of a training step that metrics look at.

    Attributes:
        x: what the student trains on, pixels `[B, 3, H, W]`; rows that differ from `clean` count as adversarial.
        clean: the views that `x` was made from.
        y: labels `[B]`.
    """

    @property
    def x(self) -> Tensor: ...  # noqa: D102
    @property
    def clean(self) -> Tensor: ...  # noqa: D102
    @property
    def y(self) -> Tensor: ...  # noqa: D102


class Reading(NamedTuple):
    """Figures of the epoch so far.

    Attributes:
        loss: mean over its steps.
        clean: training accuracy on clean rows in per cent; None while there were none.
        adversarial: the same on adversarial rows.
    """

    loss: float
    clean: float | None
    adversarial: float | None


class LateCopy:
    """A small tensor of a GPU as it was a few steps ago at the latest, read without waiting."""

    def __init__(self) -> None:
        self._copy: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def of(self, value: Tensor) -> Tensor | None:
        """What was copied before, once it is there, and None until then; the next copy is of `value`."""
        seen = None
        if self._copied is not None and self._copied.query():
            assert self._copy is not None
            seen = self._copy
        if self._copied is None or seen is not None:
            self._copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._copy.copy_(value, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        return seen


class Metrics:
    """Sums of one epoch on the training device.

    Attributes:
        counts: float64 `[6]`: steps, sum of losses, clean rows, right ones, adversarial rows, right ones. Processes
            that train together may add theirs up before `row`.
    """

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(6, dtype=torch.float64, device=device)
        self._late = LateCopy()

    @torch.no_grad()
    def count(self, out: StudentOutput, batch: Batch, known: Tensor | None = None) -> None:
        """Count what the student said about `batch.x`, of rows with labels; nothing waits for the device.

        Args:
            out: what it said.
            batch: images and labels.
            known: bool `[B]`, which rows have labels; None where all have.
        """
        if batch.x is batch.clean:  # nothing to compare
            self.counts[_CLEAN].add_(len(batch.y) if known is None else known.sum())
            self.counts[_CLEAN_RIGHT].add_(_right(out.logits, batch.y, known))
            return
        self.counts[_CLEAN:].add_(_right_of_both(out.logits, batch.y, batch.x, batch.clean, known))

    def add(self, loss: Tensor, share: float = 1.0) -> None:
        """Count one step with its loss, a scalar on the device; or a share of a step, with the mean loss of that."""
        self.counts[_STEPS].add_(share)
        self.counts[_LOSS].add_(loss.detach() if share == 1 else share * loss.detach())

    def reading(self) -> Reading:
        """The figures as they stand; waits for a GPU."""
        return _reading(self.counts)

    def glance(self) -> Reading | None:
        """The figures a few steps ago at the latest, without waiting for a GPU; None while there are none."""
        if self.counts.device.type != "cuda":
            return self.reading() if self.counts[_STEPS] else None
        seen = self._late.of(self.counts)
        return None if seen is None else _reading(seen)

    def row(self) -> dict[str, float | None]:
        """The part of the log's row that the batches tell; accuracies of rows that were not seen are None."""
        loss, clean, adversarial = self.reading()
        return {"loss": round(loss, 6), "train_clean": _rounded(clean), "train_adversarial": _rounded(adversarial)}


@fused
def _right(logits: Tensor, y: Tensor, known: Tensor | None) -> Tensor:
    """How many rows are right, int64 `[]`."""
    right = logits.argmax(-1) == y
    return (right if known is None else right & known).sum()


@fused
def _right_of_both(logits: Tensor, y: Tensor, x: Tensor, clean: Tensor, known: Tensor | None) -> Tensor:
    """Clean rows, right ones, adversarial rows, right ones, int64 `[4]`."""
    right = logits.argmax(-1) == y
    moved = (x != clean).flatten(1)
    # The largest byte of a row is found eighty times faster than `any` on a CPU.
    adversarial = moved.view(torch.uint8).amax(1).bool()
    found = torch.stack([~adversarial, right & ~adversarial, adversarial, right & adversarial])
    return (found if known is None else found & known).sum(1)


def _reading(counts: Tensor) -> Reading:
    steps, loss, clean, clean_right, adversarial, adversarial_right = counts.tolist()
    return Reading(
        loss / max(1.0, steps),
        100 * clean_right / clean if clean else None,
        100 * adversarial_right / adversarial if adversarial else None,
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
