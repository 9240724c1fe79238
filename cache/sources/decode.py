"""From image files to pixels: 8-bit RGB of one size, with every file that cannot be read named at once."""

import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from darht.cache.format.spec import RULES
from darht.cache.sources.rows import one_line, rows_to_take, shown
from darht.core.errors import DataError
from darht.core.images import check_pixel_count

_MODES_OF_8_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
_BLOCK = 256  # images a thread decodes in one go: far fewer futures than files
_THREADS = 4  # Pillow decodes without the interpreter lock; more threads wait for the disk
_NAMED = 40  # broken files in a message: a screen of them
_ORIENTATION = 0x0112  # the EXIF tag, and what each of its values asks for
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TURNED, LAID = "were turned as their EXIF orientation says", "have transparent pixels and were laid on black"


@dataclass(frozen=True)
class Decoding:
    """How image files become pixels.

    Attributes:
        image_size: side in pixels of a square to resize and cut each image to; None takes them as they are.
        skip_broken: leave files out that cannot be decoded, instead of refusing all.
        rules: of the cache's spec (`DataSpec`): under 1 neither EXIF orientation nor transparency is looked at.
    """

    image_size: int | None = None
    skip_broken: bool = False
    rules: int = RULES


class Decoded(NamedTuple):
    """What was read.

    Attributes:
        images: uint8 `[N, 3, H, W]`.
        kept: int64 `[N]`, the number of each image among the paths.
        broken: paths that were left out.
        changes: how many images were turned, or laid on black.
    """

    images: NDArray[np.uint8]
    kept: NDArray[np.int64]
    broken: tuple[Path, ...]
    changes: Counter[str]


@dataclass
class _Found:
    """What threads note while they decode."""

    broken: dict[int, str] = field(default_factory=dict)
    odd: dict[int, tuple[int, int]] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)


def decode_images(paths: Sequence[Path], limit: int | None, where: str, how: Decoding) -> Decoded:
    """Decode files of one size, in the order given.

    Args:
        paths: the files.
        limit: the first so many readable files only; None for all.
        where: they lie, for messages.
        how: they become pixels.

    Raises:
        DataError: naming every file that cannot be decoded, or the first whose size differs from that of the first
            file and how many others do; there are fewer files than the limit.
    """
    wanted = rows_to_take(limit, len(paths), where)
    with warnings.catch_warnings():  # of every thread
        warnings.simplefilter("ignore", UserWarning)  # damaged EXIF, palettes: nothing that a pixel depends on
        images, kept, found = _decode_all(paths, wanted, how)
    rows_to_take(limit, len(kept), where)
    broken = tuple(paths[number] for number in sorted(found.broken))
    return Decoded(images, np.array(kept, dtype=np.int64), broken, Counter(found.changes))


def _decode_all(paths: Sequence[Path], wanted: int, how: Decoding) -> tuple[NDArray[np.uint8], list[int], _Found]:
    """The first `wanted` readable images `[N, 3, H, W]`, their numbers, and what was found on the way."""
    parts: list[NDArray[np.uint8]] = []
    kept: list[int] = []
    found, first, start = _Found(), _first(paths, how), 0
    while len(kept) < wanted and start < len(paths):  # once, unless files are skipped under a limit
        numbers = range(start, min(start + wanted - len(kept), len(paths)))
        start = numbers.stop
        images = _decode_part(paths, numbers, first, how, found)
        good = [number - numbers.start for number in numbers if number not in found.broken]
        parts.append(images if len(good) == len(numbers) else images[good])
        kept += [numbers.start + number for number in good]
        _refuse(paths, found, first, how)
    return parts[0] if len(parts) == 1 else np.concatenate(parts), kept, found


def _first(paths: Sequence[Path], how: Decoding) -> tuple[Path, tuple[int, ...]]:
    """The first file that can be decoded, and its shape `[H, W, 3]`; where none can, the first file and no pixels."""
    for path in paths:
        try:
            return path, _decode(path, how, []).shape
        except DataError:
            continue
    return paths[0], (1, 1, 3)


def _decode_part(
    paths: Sequence[Path], numbers: range, first: tuple[Path, tuple[int, ...]], how: Decoding, found: _Found
) -> NDArray[np.uint8]:
    """Images `[n, 3, H, W]` of some of the paths; those that are broken or of another size are noted in `found`."""
    images = np.empty((len(numbers), 3, *first[1][:2]), dtype=np.uint8)

    def fill(start: int) -> None:
        for number in range(start, min(start + _BLOCK, numbers.stop)):
            try:
                pixels = _decode(paths[number], how, found.changes)
            except DataError as error:
                found.broken[number] = str(error)
                continue
            if pixels.shape == first[1]:
                images[number - numbers.start] = pixels.transpose(2, 0, 1)
            else:
                found.odd[number] = pixels.shape[0], pixels.shape[1]

    with ThreadPoolExecutor(_THREADS) as threads:
        list(threads.map(fill, range(numbers.start, numbers.stop, _BLOCK)))
    return images


def _refuse(paths: Sequence[Path], found: _Found, first: tuple[Path, tuple[int, ...]], how: Decoding) -> None:
    """Raise DataError for what cannot become rows, all of it at once."""
    problems = []
    if found.broken and not how.skip_broken:
        listed = shown((f"{paths[n]} ({found.broken[n]})" for n in sorted(found.broken)), _NAMED)
        count = "" if len(found.broken) == 1 else f"{len(found.broken)} files: "
        problems.append(f"cannot decode {count}{listed}; replace or remove what is broken, or leave it out with "
                        "--skip-broken (skip_broken: true under data)")  # fmt: skip
    if found.odd:
        number = min(found.odd)
        (height, width), (other_height, other_width) = first[1][:2], found.odd[number]
        problems.append(
            f"all images must have one size; {paths[number]} is {other_width}x{other_height} pixels, {first[0]} is "
            f"{width}x{height}; files of another size: {len(found.odd)}; an imagefolder is brought to one size with "
            f"image_size, for example `image_size: {min(width, height)}`"
        )
    if problems:
        raise DataError("; ".join(problems))


def _decode(path: Path, how: Decoding, changes: list[str]) -> NDArray[np.uint8]:
    """One image, uint8 `[H, W, 3]`; what was done to it is added to `changes`. DataError says why there is none."""
    try:
        with Image.open(path) as image:
            check_pixel_count(*image.size, where="it")
            if image.mode not in _MODES_OF_8_BITS:
                raise DataError(f"must have 8 bits a channel; its Pillow mode is {image.mode}")
            rgb = _without_alpha(image) if how.rules == 1 else _upright(image, changes)
            return np.asarray(rgb if how.image_size is None else _square(rgb, how.image_size))
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files; all mean the same to a user
        raise DataError(one_line(error).replace(f" {str(path)!r}", "")) from error


def _without_alpha(image: Image.Image) -> Image.Image:
    return image.convert("RGBA").convert("RGB") if image.mode in ("P", "PA") else image.convert("RGB")


def _upright(image: Image.Image, changes: list[str]) -> Image.Image:
    """8-bit RGB as a viewer shows it: turned as EXIF says, and on black where it is transparent."""
    image.load()  # Pillow turns TIFF files itself here, and then forgets their orientation
    turn, rgb = _TURNS.get(_orientation(image)), _without_alpha(image)
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        if rgba.getchannel("A").getextrema() != (255, 255):
            rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert("RGB")
            changes.append(LAID)
    if turn is None:
        return rgb
    changes.append(TURNED)
    return rgb.transpose(turn)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF beside whole pixels: no orientation is known
        return 1


def _square(image: Image.Image, side: int) -> Image.Image:
    """Resize the shorter side to `side` and cut the centre, rounding as torchvision's Resize and CenterCrop do."""
    width, height = image.size
    short = min(width, height)
    width, height = int(side * width / short), int(side * height / short)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return resized.crop((left, top, left + side, top + side))
