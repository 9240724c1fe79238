"""The threat model: a norm ball around an image, cut by the pixel range, in pixel levels.

Perturbations are held in levels (8 means 8/255). Whole levels are exact in float32, so a sign attack with whole steps
and a whole start never leaves the grid of uint8 images, and storing its perturbation as int8 loses nothing.
"""

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from darht.core.bounded import show
from darht.core.errors import ConfigError
from darht.core.fused import fused
from darht.core.rng import RowRng

Norm = Literal["linf", "l2"]
LEVELS = 255
_SNAP = 1e-3  # a float32 k/255 comes back within 2e-5 of k; an image that is farther is not on the grid and stays as is
_EPS = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)(?:/(255))?", re.ASCII)
_SMALL_L2 = 16  # levels; the radii of papers, as shares of 1, are 0.25 to 3, and as levels 32 and more
_MAX_EPS = 1e6  # levels, beyond the distance of any two small images


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


def parse_eps(text: str, norm: Norm = "linf") -> float:
    """Read an epsilon from a command line: `8` and `8/255` are 8 pixel levels; the result is in levels.

    Other papers write the same radius as 0.031 in L-inf, and L2 radii as 0.5 or 1.0, all in shares of 1. Nothing is
    guessed: what could be meant so is refused with both readings.

    Args:
        text: as a person writes it.
        norm: `l2` takes any number of levels from 16 on, and smaller ones as `N/255`.

    Raises:
        ConfigError: not a number, not positive, more than 255 levels in L-inf, or one with two readings.
    """
    found = _EPS.fullmatch(text.strip())
    value = float(found[1]) if found else 0.0
    if found is None or not 0 < value <= _MAX_EPS:
        raise ConfigError(f"epsilon reads 8 or 8/255, in pixel levels above 0; got {show(text)}")
    if norm == "l2" and found[2] is None and value < _SMALL_L2:
        share = value * LEVELS
        raise ConfigError(
            f"an L2 epsilon below {_SMALL_L2} has two readings; got '{text}': {value:g} pixel levels are "
            f"{value / LEVELS:.4f}, and {value:g} as a share of 1 is {share:g} levels: write {value:g}/255 or "
            f"{share:g}/255"
        )
    if norm == "linf" and value != int(value):
        meant = max(1, round(value * LEVELS if value < 1 and found[2] is None else value))
        raise ConfigError(
            f"epsilon must be a whole number of pixel levels; got '{text}': {value:g} levels are not whole, and "
            f"{value:g} is {value * LEVELS:.1f} levels as a share of 1: write {meant} or {meant}/255"
        )
    if norm == "linf":
        check_levels("epsilon", value, norm)
    return value


def describe_eps(eps: float) -> str:
    """An epsilon in both units: `eps 8 levels = 0.0314`."""
    return f"eps {eps:g} levels = {eps / LEVELS:.4f}"


def to_levels(x: Tensor) -> Tensor:
    """Pixels in [0, 1] to levels in [0, 255], exactly whole for images that came from uint8."""
    levels = x * LEVELS
    whole = levels.round()
    return torch.where((levels - whole).abs() < _SNAP, whole, levels)


@fused
def to_pixels(levels: Tensor) -> Tensor:
    """Levels in [0, 255] to pixels in [0, 1], float32."""
    return levels.float() / LEVELS


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

    @property
    def radius(self) -> float:
        """The radius in pixels of [0, 1]."""
        return self.eps / LEVELS

    def project(self, delta: Tensor) -> Tensor:
        """The nearest perturbation inside the ball, `[B, 3, H, W]` in levels."""
        if self.norm == "linf":
            return delta.clamp(-self.eps, self.eps)
        return delta * (self.eps / row_norms(delta)).clamp(max=1.0)

    def clip(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The point of the ball around `x` and of [0, 1] next to `x_adv`; all in pixels."""
        if self.norm == "linf":
            return torch.minimum(torch.maximum(x_adv, x - self.radius), x + self.radius).clamp(0.0, 1.0)
        delta = x_adv - x
        return (x + delta * (self.radius / row_norms(delta)).clamp(max=1.0)).clamp(0.0, 1.0)

    def distance(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """How far the points are from the images, `[B]` in pixels of [0, 1]."""
        delta = x_adv - x
        return delta.abs().amax((1, 2, 3)) if self.norm == "linf" else row_norms(delta).flatten()

    def direction(self, gradient: Tensor) -> Tensor:
        """The steepest ascent of unit norm: the sign in L-inf, the normalised gradient in L2."""
        return gradient.sign() if self.norm == "linf" else gradient / row_norms(gradient)

    def random_start(self, shape: torch.Size, generator: RowRng) -> Tensor:
        """Whole levels, uniform on the cube of half-width `eps`; in L2 then projected, and so no whole levels."""
        half_width = min(max(1, int(self.eps)), LEVELS)
        start = generator.integers(-half_width, half_width, tuple(shape[1:])).float()
        return start if self.norm == "linf" else self.project(start)


def row_norms(value: Tensor) -> Tensor:
    """The Euclidean norm of each row, never 0, as `[B, 1, 1, 1]`."""
    norms: Tensor = torch.linalg.vector_norm(value.flatten(1), dim=1)
    return norms.clamp(min=1e-12)[:, None, None, None]
