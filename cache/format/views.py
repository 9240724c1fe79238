"""Views: exact geometric versions of an image, crop offset and flip on whole pixels."""

import numpy as np

from darht.cache.format.spec import RESIZED_CROP
from darht.core.errors import ConfigError
from darht.core.keys import derive_seed


def crop_flip_offsets(padding: int, *, flip: bool = True, count: int | None = None, seed: int = 0) -> np.ndarray:
    """The table of views, int8 `[V, 3]` of (dy, dx, flip); view 0 is the identity.

    Args:
        padding: crops lie up to this many pixels off the image, whose outside is black.
        flip: whether mirror images are views too; digits and text must not be mirrored.
        count: None for all, `(2 * padding + 1)**2` and twice as many with `flip`; otherwise the identity and a
            seeded subset without repetition.
        seed: of the subset.

    Raises:
        ConfigError: more views than there are.
    """
    shifts, mirrors = range(-padding, padding + 1), (0, 1) if flip else (0,)
    table = [(dy, dx, mirror) for dy in shifts for dx in shifts for mirror in mirrors]
    table.remove((0, 0, 0))
    if count is not None:
        if not 1 <= count <= len(table) + 1:
            raise ConfigError(f"views.count must lie in 1..{len(table) + 1} for padding {padding}; got {count}")
        order = np.random.Generator(np.random.Philox(derive_seed(seed, "views"))).permutation(len(table))
        table = [table[i] for i in order[: count - 1]]
    return np.array([(0, 0, 0), *table], dtype=np.int8)


def check_padding(padding: int, image_shape: tuple[int, ...]) -> None:
    """Raise ConfigError where a crop may lie outside of the image `[3, H, W]` and so be black."""
    side = min(image_shape[-2:])
    if padding >= side:
        raise ConfigError(
            f"padding must be smaller than the image side; got {padding} for images of {image_shape[-2]} x "
            f"{image_shape[-1]} pixels, of which some views would be black: write at most {side - 1}"
        )


def check_size(size: int, image_shape: tuple[int, ...]) -> None:
    """Raise ConfigError where crops would be larger than the image `[3, H, W]`."""
    height, width = image_shape[-2:]
    if size > min(height, width):
        raise ConfigError(
            f"views.size must be at most the image side; got {size} for images of {height} x {width} pixels: "
            f"write at most {min(height, width)}"
        )


def view_table(
    kind: str,
    *,
    padding: int,
    flip: bool,
    count: int | None,
    seed: int,
    size: int | None = 0,
    scale: tuple[float, ...] | None = (),
    ratio: tuple[float, ...] | None = (),
) -> np.ndarray:
    """The table of views of a spec: only the identity, or crops and flips, int8 `[V, 3]`.

    Boxes of resized crops differ from row to row. What is the same for a view of all rows stands in their table,
    float64 `[V, 7]`: its number, size, scale, ratio, and whether it may be mirrored.
    """
    if kind == RESIZED_CROP:
        return np.array([(view, size, *(scale or ()), *(ratio or ()), flip) for view in range(count or 1)], np.float64)
    if kind == "identity":
        return np.zeros((1, 3), dtype=np.int8)
    return crop_flip_offsets(padding, flip=flip, count=count, seed=seed)


def crop_flip(images: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """One view of all images `[B, 3, H, W]`: pixel (i, j) is pixel (i + dy, j' + dx), or 0 outside of the image.

    Args:
        images: of any dtype.
        offset: (dy, dx, flip) of the view; with flip, j' = W - 1 - j. It is what `apply_views` does to tensors.
    """
    H, W = images.shape[-2:]
    dy, dx, flip = (int(value) for value in offset)
    rows, columns = np.arange(H) + dy, (np.arange(W)[::-1] if flip else np.arange(W)) + dx
    inside = ((rows >= 0) & (rows < H))[:, None] & ((columns >= 0) & (columns < W))
    moved: np.ndarray = images[..., rows.clip(0, H - 1)[:, None], columns.clip(0, W - 1)] * inside
    return moved.astype(images.dtype)
