"""The threat model: a norm ball around an image, cut by the pixel range, in pixel levels.

Perturbations are held in levels (8 means 8/255). Whole levels are exact in float32, so a sign attack with whole steps
and a whole start never leaves the grid of uint8 images, and storing its perturbation as int8 loses nothing.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from darht.core.errors import ConfigError
from darht.core.rng import RowRng

Norm = Literal["linf", "l2"]
LEVELS = 255
_SNAP = 1e-3  # a float32 k/255 comes back within 2e-5 of k; an image that is farther is not on the grid and stays as is


def check_levels(name: str, value: float, norm: Norm) -> None:
    """Epsilon and steps are in pixel levels, whole ones in L-inf.

    Raises:
        ConfigError: a value that reads like a fraction of 1 (0.03), is not positive, or is not whole in L-inf.
    """
    if value <= 0:
        raise ConfigError(f"{name} must be above 0 pixel levels; got {value:g}")
    if value < 1 and norm == "linf":
        raise ConfigError(
            f"{name} is in whole pixel levels of 255; got {value:g}, which is {value * LEVELS:.2f} levels: "
            f"write {name}: {max(1, round(value * LEVELS))}"
        )
    if value > LEVELS and norm == "linf":
        raise ConfigError(f"{name} is in pixel levels of 255; got {value:g}")
    if value != int(value) and norm == "linf":
        raise ConfigError(
            f"{name} must be a whole number of pixel levels in L-inf; got {value:g}: write {round(value)}"
        )


def to_levels(x: Tensor) -> Tensor:
    """Pixels in [0, 1] to levels in [0, 255], exactly whole for images that came from uint8."""
    levels = x * LEVELS
    whole = levels.round()
    return torch.where((levels - whole).abs() < _SNAP, whole, levels)


@dataclass(frozen=True, kw_only=True)
class Threat:
    """A norm and a radius in pixel levels.

    Attributes:
        eps: the radius; in L2 the Euclidean norm of the whole perturbation.
        norm: `linf` or `l2`.
    """

    eps: float
    norm: Norm = "linf"

    def __post_init__(self) -> None:
        check_levels("eps", self.eps, self.norm)

    def project(self, delta: Tensor) -> Tensor:
        """The nearest perturbation inside the ball, `[B, 3, H, W]` in levels."""
        if self.norm == "linf":
            return delta.clamp(-self.eps, self.eps)
        return delta * (self.eps / _norms(delta)).clamp(max=1.0)

    def direction(self, gradient: Tensor) -> Tensor:
        """The steepest ascent of unit norm: the sign in L-inf, the normalised gradient in L2."""
        return gradient.sign() if self.norm == "linf" else gradient / _norms(gradient)

    def random_start(self, shape: torch.Size, generator: RowRng) -> Tensor:
        """Whole levels, uniform on the cube of half-width `eps`; in L2 then projected and cut to whole levels."""
        half_width = min(int(self.eps), LEVELS)
        start = generator.integers(-half_width, half_width, tuple(shape[1:])).float()
        return start if self.norm == "linf" else self.project(start).trunc()

    def quantise(self, delta: Tensor) -> Tensor:
        """Whole levels inside the ball, as int8 `[B, 3, H, W]`: rounded in L-inf, cut towards zero in L2."""
        whole = self.project(delta).round() if self.norm == "linf" else self.project(delta).trunc()
        return whole.clamp(-127, 127).to(torch.int8)


def _norms(value: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(value.flatten(1), dim=1)
    return norms.clamp(min=1e-12)[:, None, None, None]
