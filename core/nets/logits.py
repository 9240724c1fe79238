"""Logits out of the answers that foreign networks give: a tensor, or a tuple, list, mapping or object with one."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from darht.core.errors import ModelError


class LogitsOf(nn.Module):
    """A network whose answer holds its logits under `key`: a place in a tuple or list, a mapping's key or a field."""

    def __init__(self, net: nn.Module, key: int | str) -> None:
        super().__init__()
        self.net, self.key = net, key

    def forward(self, x: Tensor) -> Tensor:
        """Raw logits `[B, C]`."""
        answer: Any = self.net(x)
        is_field = not isinstance(answer, tuple | list | Mapping)
        logits: Tensor = getattr(answer, str(self.key)) if is_field else answer[self.key]
        return logits


def wrap_logits(net: nn.Module, key: int | str | None) -> nn.Module:
    """The network that answers with logits alone; itself where `key` is None."""
    return net if key is None else LogitsOf(net, key)


def find_logits(answer: Any, batch: int, num_classes: int, name: str) -> int | str | None:
    """Where the logits `[B, C]` lie in what a network answers; None for an answer that is the logits.

    A field `logits` is taken before others; elsewhere the one tensor of that shape is.

    Raises:
        ModelError: no tensor has the shape, or several have and none is called logits.
    """
    parts = _parts(answer)
    fitting = [key for key, value in parts.items() if tuple(value.shape) == (batch, num_classes)]
    if "logits" in fitting:
        return "logits"
    if len(fitting) == 1:
        return fitting[0]
    shapes = ", ".join(f"{'' if key is None else f'{key!r}: '}{tuple(value.shape)}" for key, value in parts.items())
    found = f"{type(answer).__name__} ({shapes or 'no tensors'})"
    rule = f"must give logits of shape {(batch, num_classes)} for {batch} images and {num_classes} classes"
    fix = "wrap it in a python:module:callable that returns the logits" if fitting else "check --classes and --arch"
    several = f"{len(fitting)} tensors have that shape; " if fitting else ""
    raise ModelError(f"{name} {rule}; it answers with {found}: {several}{fix}")


def _parts(answer: Any) -> dict[int | str | None, Tensor]:
    if isinstance(answer, Tensor):
        return {None: answer}
    if isinstance(answer, Mapping):
        items: list[tuple[Any, Any]] = [(key, value) for key, value in answer.items() if isinstance(key, str)]
    elif isinstance(answer, tuple | list):
        items = list(enumerate(answer))
    else:
        items = [("logits", getattr(answer, "logits", None))]
    return {key: value for key, value in items if isinstance(value, Tensor)}
