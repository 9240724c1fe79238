"""The model as an attack sees it: logits and input gradients, counted and checked."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

from darht.attacks.objectives import Model
from darht.core.errors import ModelError

Precision = Literal["float32", "bf16"]


class NoGradientError(ModelError):
    """No gradient reaches the pixels."""


class Oracle:
    """Answers for whole batches, in one precision.

    Attributes:
        forwards: forward passes so far (each of a whole batch).
        backwards: backward passes so far.
        patient: whether what is not finite is told by `settle` and not at once, which would wait for the device;
            batches are then all of one size.
    """

    def __init__(self, model: Model, precision: Precision = "float32") -> None:
        self.model = model
        self.precision = precision
        self.forwards = 0
        self.backwards = 0
        self.patient = False
        self._largest: Tensor | None = None  # logit of each row since it was settled, NaN where one was

    def logits(self, z: Tensor) -> Tensor:
        """Logits `[B, C]` without a graph."""
        with torch.no_grad():
            return self._forward(z)

    def gradient(
        self, z: Tensor, loss_of: Callable[[Tensor], Tensor], passes: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits `[B, C]`, loss `[B]` and the gradient of the summed loss with respect to the pixels alone.

        Over several passes (for a model that draws random numbers) the gradient is their mean; logits and loss are
        the last pass's, as in Croce & Hein's code.

        Raises:
            NoGradientError: the logits do not depend on the pixels through anything differentiable.
        """
        total: Tensor | None = None
        for _ in range(passes):
            with torch.enable_grad():
                pixels = z.detach().requires_grad_()
                logits = self._forward(pixels)
                loss = loss_of(logits)
                gradient = self._backward(loss, pixels)
            total = gradient if total is None else total + gradient
        assert total is not None
        return logits.detach(), loss.detach(), total if passes == 1 else total / passes

    def _backward(self, loss: Tensor, pixels: Tensor) -> Tensor:
        self.backwards += 1
        found = torch.autograd.grad(loss.sum(), pixels, allow_unused=True)[0] if loss.requires_grad else None
        if found is None:
            raise NoGradientError(
                "no gradient reaches the pixels (the model detaches, rounds through numpy or runs under no_grad): "
                "attack it with Square, which needs none"
            )
        return found.contiguous()

    def _forward(self, z: Tensor) -> Tensor:
        self.forwards += 1
        with self._autocast(z.device.type):
            logits = self.model(z.clone())  # a model may normalise in place, and the iterate is ours
        if logits.dtype != z.dtype:
            logits = logits.to(z.dtype)
        if self.patient:
            largest = logits.detach().abs().amax(1)
            self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)
        elif not bool(torch.isfinite(logits).all()):
            raise _not_finite((~torch.isfinite(logits)).any(1))
        return logits

    def settle(self) -> None:
        """Raise what a patient oracle has noticed since; one question to the device.

        Raises:
            ModelError: the model's output was NaN or infinite.
        """
        largest, self._largest = self._largest, None
        if largest is not None and not bool(largest.isfinite().all()):
            raise _not_finite(~largest.isfinite())

    def _autocast(self, device: str) -> AbstractContextManager[object]:
        return nullcontext() if self.precision == "float32" else torch.autocast(device, torch.bfloat16)


def _not_finite(bad: Tensor) -> ModelError:
    count = int(bad.sum())
    return ModelError(f"the model's output is NaN or infinite for {count} of {len(bad)} rows: check its weights")
