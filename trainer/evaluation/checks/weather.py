"""Snow, frost and fog, and the streaks, zooms and clouds that they are made of."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Pixels = NDArray[np.float64]
"""Images in [0, 1], `[B, H, W, 3]`."""


@dataclass(frozen=True)
class Draw:
    """One random generator for each image."""

    generators: list[np.random.Generator]

    def each(self, draw: Callable[[np.random.Generator], Any]) -> NDArray[Any]:
        """What `draw` gives for every image, stacked."""
        return np.stack([np.asarray(draw(generator)) for generator in self.generators])


def clipped_zoom(x: Pixels, factor: float) -> Pixels:
    """The middle of each image, enlarged to the image's size; `[B, H, W, C]`."""
    height, width = x.shape[1:3]
    inner = int(np.ceil(height / factor)), int(np.ceil(width / factor))
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    cut = x[:, top : top + inner[0], left : left + inner[1]]
    big = ndimage.zoom(cut, (1, factor, factor, 1), order=1)
    top, left = (big.shape[1] - height) // 2, (big.shape[2] - width) // 2
    made: Pixels = big[:, top : top + height, left : left + width]
    return made


def streak(x: Pixels, degrees: NDArray[np.float64], *, radius: float, sigma: float) -> Pixels:
    """Blur each image in one direction with half a Gaussian of `sigma` pixels; `[B, H, W, C]`.

    As ImageMagick does it, which made the published files: `2 ceil(radius) + 1` taps, each at the nearest whole pixel,
    and the edge goes on for ever.
    """
    taps = np.arange(2 * int(np.ceil(radius)) + 1)
    weights = np.exp(-(taps**2) / (2 * sigma**2))
    rows, columns = np.arange(x.shape[1]), np.arange(x.shape[2])
    out = np.zeros_like(x)
    for k, angle in enumerate(np.deg2rad(degrees)):
        down, across = (np.ceil(taps * part - 0.5).astype(int) for part in (np.sin(angle), np.cos(angle)))
        for weight, dy, dx in zip(weights / weights.sum(), down, across, strict=True):
            beside = (columns + dx).clip(0, len(columns) - 1)
            out[k] += weight * x[k, (rows + dy).clip(0, len(rows) - 1)[:, None], beside]
    return out


def clouds(draw: Draw, side: int, decay: float) -> NDArray[np.float64]:
    """A fractal in [0, 1] for each image, `[B, side, side]`, by midpoint displacement on a torus.

    The displacement shrinks by `decay` squared at each halving: the original applies its factor twice.
    """
    size = 1 << max(1, (side - 1).bit_length())
    height = np.zeros((len(draw.generators), size, size))
    step, amplitude = size, 1.0
    while step >= 2:
        half, across = step // 2, (3, size // step, size // step)
        push = amplitude * draw.each(partial(_pushes, shape=across))
        corners = height[:, ::step, ::step]
        beside = np.roll(corners, -1, 1)
        centre = (corners + beside + np.roll(corners + beside, -1, 2)) / 4 + push[:, 0]
        height[:, half::step, half::step] = centre
        right, below = np.roll(corners, -1, 2), np.roll(corners, -1, 1)
        height[:, ::step, half::step] = (corners + right + centre + np.roll(centre, 1, 1)) / 4 + push[:, 1]
        height[:, half::step, ::step] = (corners + below + centre + np.roll(centre, 1, 2)) / 4 + push[:, 2]
        step, amplitude = half, amplitude / decay**2
    height -= height.min(axis=(1, 2), keepdims=True)
    height /= np.maximum(height.max(axis=(1, 2), keepdims=True), 1e-12)
    return height[:, :side, :side]


def _pushes(generator: np.random.Generator, shape: tuple[int, ...]) -> Pixels:
    return generator.uniform(-1, 1, size=shape)


def _cut(square: NDArray[np.float64], x: Pixels) -> NDArray[np.float64]:
    return square[:, : x.shape[1], : x.shape[2], None]


def fog(x: Pixels, level: int, draw: Draw) -> Pixels:
    """A cloud over the image, scaled back to the image's own brightness."""
    thick, decay = ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))[level]
    brightest = x.max(axis=(1, 2, 3), keepdims=True)
    foggy = x + thick * _cut(clouds(draw, max(x.shape[1:3]), decay), x)
    made: Pixels = foggy * brightest / (brightest + thick)
    return made


def frost(x: Pixels, level: int, draw: Draw) -> Pixels:
    """A dimmed image under ice: bright needles in random directions on a cloud, slightly blue."""
    own, ice = ((1.0, 0.2), (1.0, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))[level]
    seeds = draw.each(lambda r: r.random(size=(x.shape[1], x.shape[2], 1)) > 0.9).astype(np.float64)
    reach = max(2.0, x.shape[1] / 4)
    needles = np.zeros_like(seeds)
    for _ in range(2):
        angles = draw.each(lambda r: r.uniform(-180, 180))
        needles = np.maximum(needles, streak(seeds, angles, radius=reach, sigma=reach / 2))
    needles /= np.maximum(needles.max(axis=(1, 2), keepdims=True), 1e-12)
    cloud = _cut(clouds(draw, max(x.shape[1:3]), 1.75), x)
    layer = np.clip(0.35 + 0.4 * cloud + 0.6 * needles, 0, 1) * np.array([0.85, 0.95, 1.0])
    made: Pixels = own * x + ice * layer
    return made


def snow(x: Pixels, level: int, draw: Draw) -> Pixels:
    """A whitened image under two layers of streaked flakes, one turned by half a circle."""
    mean, spread, zoom, least, radius, sigma, own = (
        (0.1, 0.2, 1.0, 0.6, 8, 3, 0.95), (0.1, 0.2, 1.0, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    )[level]  # fmt: skip
    scale = x.shape[1] / 32
    flakes = draw.each(lambda r: r.normal(mean, spread, size=(*x.shape[1:3], 1)))
    flakes = clipped_zoom(flakes, zoom)
    flakes = np.clip(np.where(flakes < least, 0.0, flakes), 0, 1)
    flakes = streak(flakes, draw.each(lambda r: r.uniform(-135, -45)), radius=radius * scale, sigma=sigma * scale)
    grey = x @ np.array([0.299, 0.587, 0.114])
    white = own * x + (1 - own) * np.maximum(x, grey[..., None] * 1.5 + 0.5)
    made: Pixels = white + flakes + np.rot90(flakes, k=2, axes=(1, 2))
    return made
