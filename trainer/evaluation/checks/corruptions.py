"""The 15 common corruptions at 5 severities (Hendrycks & Dietterich 2019, arXiv 1903.12261), made on the fly.

The constants are those of CIFAR-10-C, for images of 32 pixels; lengths in pixels grow with the side elsewhere. Every
image draws from its own generator, so that nothing depends on batches. What differs from the published files: the
random numbers, frost, which is drawn (pieces of photographs there), and rounding (fixed-point interpolation and 8-bit
images between steps there).
"""

import io
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image
from scipy import ndimage

from darht.core.errors import ConfigError
from darht.core.keys import derive_seed
from darht.trainer.evaluation.checks import weather
from darht.trainer.evaluation.checks.weather import Draw, Pixels, clipped_zoom, streak

SEVERITIES = (1, 2, 3, 4, 5)
FORM = 2  # of the corruptions; a change that moves pixels raises it, so that no older result is taken for a new one


def corrupt(images: np.ndarray, name: str, severity: int, *, rows: Sequence[int], seed: int) -> np.ndarray:
    """Corrupted images, uint8 `[B, 3, H, W]`.

    Args:
        images: uint8 `[B, 3, H, W]`.
        name: one of `CORRUPTIONS`.
        severity: 1 to 5.
        rows: the images' numbers in their source; with seed, name and severity they key the random numbers.
        seed: of the evaluation.

    Raises:
        ConfigError: an unknown corruption or severity.
    """
    if name not in CORRUPTIONS or severity not in SEVERITIES:
        known = f"{', '.join(CORRUPTIONS)} at severity 1 to 5"
        raise ConfigError(f"the corruptions are {known}; got {name} at severity {severity}")
    draws = [np.random.Generator(np.random.Philox(derive_seed(seed, name, severity, row))) for row in rows]
    x = images.transpose(0, 2, 3, 1).astype(np.float64) / 255
    made = CORRUPTIONS[name](x, severity - 1, Draw(draws))
    return np.clip(made * 255 + 1e-6, 0, 255).astype(np.uint8).transpose(0, 3, 1, 2)


def _scale(x: Pixels) -> float:
    """Lengths in pixels are for a side of 32."""
    return float(x.shape[1]) / 32


def _gaussian_noise(x: Pixels, level: int, draw: Draw) -> Pixels:
    noise: Pixels = (0.04, 0.06, 0.08, 0.09, 0.10)[level] * draw.each(lambda r: r.normal(size=x.shape[1:]))
    return x + noise


def _shot_noise(x: Pixels, level: int, draw: Draw) -> Pixels:
    photons = (500, 250, 100, 75, 50)[level]
    return np.stack([r.poisson(one * photons) for r, one in zip(draw.generators, x, strict=True)]) / photons


def _impulse_noise(x: Pixels, level: int, draw: Draw) -> Pixels:
    share = (0.01, 0.02, 0.03, 0.05, 0.07)[level]
    u = draw.each(lambda r: r.random(size=x.shape[1:]))
    return np.where(u < share / 2, 0.0, np.where(u > 1 - share / 2, 1.0, x))


def _defocus_blur(x: Pixels, level: int, draw: Draw) -> Pixels:
    radius, soft = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))[level]
    radius *= max(1.0, _scale(x))
    reach = int(np.ceil(radius)) + 1
    ticks = np.arange(-reach, reach + 1)
    disk = (ticks[:, None] ** 2 + ticks[None] ** 2 <= radius**2).astype(np.float64)
    kernel = ndimage.gaussian_filter(disk / disk.sum(), soft, truncate=1 / soft)
    made: Pixels = ndimage.convolve(x, (kernel / kernel.sum())[None, :, :, None], mode="mirror")
    return made


def _glass_blur(x: Pixels, level: int, draw: Draw) -> Pixels:
    """Blur, let every pixel take the value of a near one, blur again.

    The paper swaps neighbours; the code that made the published files copies them, as here.
    """
    sigma, rounds = ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))[level]
    sigma, reach = sigma * _scale(x), max(1, round(_scale(x)))
    x = ndimage.gaussian_filter(x, (0, sigma, sigma, 0), mode="nearest")
    height, width = x.shape[1:3]
    rows, columns = np.arange(height)[:, None], np.arange(width)
    for _ in range(rounds):
        steps = draw.each(lambda r: r.integers(-reach, reach, size=(2, height, width)))
        to = (rows + steps[:, 0]).clip(0, height - 1), (columns + steps[:, 1]).clip(0, width - 1)
        x = x[np.arange(len(x))[:, None, None], to[0], to[1]]
    made: Pixels = ndimage.gaussian_filter(x, (0, sigma, sigma, 0), mode="nearest")
    return made


def _motion_blur(x: Pixels, level: int, draw: Draw) -> Pixels:
    radius, sigma = ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5))[level]
    angles = draw.each(lambda r: r.uniform(-45, 45))
    return streak(x, angles, radius=radius * _scale(x), sigma=sigma * _scale(x))


def _zoom_blur(x: Pixels, level: int, draw: Draw) -> Pixels:
    factors = 1 + 0.01 * np.arange((6, 11, 16, 21, 26)[level])
    return (x + sum(clipped_zoom(x, factor) for factor in factors)) / (len(factors) + 1)


def _brightness(x: Pixels, level: int, draw: Draw) -> Pixels:
    """More of the value in hue, saturation and value; the ratios to the largest channel stay."""
    value = x.max(axis=3, keepdims=True)
    brighter = np.clip(value + (0.05, 0.1, 0.15, 0.2, 0.3)[level], 0, 1)
    made: Pixels = np.where(value > 0, x * brighter / np.maximum(value, 1e-12), brighter)
    return made


def _contrast(x: Pixels, level: int, draw: Draw) -> Pixels:
    mean = x.mean(axis=(1, 2), keepdims=True)
    made: Pixels = (x - mean) * (0.75, 0.5, 0.4, 0.3, 0.15)[level] + mean
    return made


def _elastic(x: Pixels, level: int, draw: Draw) -> Pixels:
    """A random affine map of three points, and then a smooth random displacement of what it gave."""
    strengths = ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))
    alpha, sigma, shake = (x.shape[1] * value for value in strengths[level])
    side, grid = x.shape[1:3], np.stack(np.meshgrid(*map(np.arange, x.shape[1:3]), indexing="ij"))
    centre, third = np.array(side) // 2, min(side) // 3
    points = np.stack([centre + third, centre + np.array([third, -third]), centre - third]).astype(np.float64)
    out = np.empty_like(x)
    for k, r in enumerate(draw.generators):
        moved = points + r.uniform(-shake, shake, size=points.shape)
        back = np.linalg.solve(np.c_[moved, np.ones(3)], points)  # [3, 2]: from the result's places to the image's
        places = np.tensordot(back[:2].T, grid, 1) + back[2][:, None, None]
        out[k] = _looked_up(x[k], places, "mirror")
        if alpha:
            noise = r.uniform(-1, 1, size=(2, *side))
            push = alpha * ndimage.gaussian_filter(noise, (0, sigma, sigma), mode="reflect", truncate=3)
            out[k] = _looked_up(out[k], grid + push, "reflect")
    return out


def _looked_up(image: Pixels, places: Pixels, mode: str) -> Pixels:
    """An image `[H, W, 3]` at fractional places `[2, H, W]`, bilinear."""
    channels = [ndimage.map_coordinates(image[..., c], places, order=1, mode=mode) for c in range(image.shape[2])]
    return np.stack(channels, axis=-1)


def _by_pillow(x: Pixels, change: Callable[[Image.Image], Image.Image]) -> Pixels:
    pictures = (Image.fromarray((one * 255).round().astype(np.uint8)) for one in x)
    return np.stack([np.asarray(change(picture).convert("RGB")) for picture in pictures]) / 255.0


def _pixelate(x: Pixels, level: int, draw: Draw) -> Pixels:
    size = (x.shape[2], x.shape[1])
    small = tuple(max(1, int(side * (0.95, 0.9, 0.85, 0.75, 0.65)[level])) for side in size)
    box = Image.Resampling.BOX
    return _by_pillow(x, lambda picture: picture.resize((small[0], small[1]), box).resize(size, box))


def _jpeg(x: Pixels, level: int, draw: Draw) -> Pixels:
    def change(picture: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=(80, 65, 58, 50, 40)[level])
        return Image.open(buffer)

    return _by_pillow(x, change)


CORRUPTIONS: dict[str, Callable[[Pixels, int, Draw], Pixels]] = {
    "gaussian noise": _gaussian_noise,
    "shot noise": _shot_noise,
    "impulse noise": _impulse_noise,
    "defocus blur": _defocus_blur,
    "glass blur": _glass_blur,
    "motion blur": _motion_blur,
    "zoom blur": _zoom_blur,
    "snow": weather.snow,
    "frost": weather.frost,
    "fog": weather.fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic": _elastic,
    "pixelate": _pixelate,
    "jpeg": _jpeg,
}
