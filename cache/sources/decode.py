"""From the bytes of an image file to pixels: 8-bit RGB, upright, on black where it is transparent."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from darht.cache.format.spec import PIXEL_RULES
from darht.cache.sources.rows import one_line
from darht.core.errors import DataError
from darht.core.images import check_pixel_count

_MODES_OF_8_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
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
TURNED, LAID, ANIMATED = 1, 2, 4  # bits
CHANGES = {
    LAID: "have transparent pixels and were laid on black",
    TURNED: "were turned as their EXIF orientation says",
    ANIMATED: "are animated, and their first frame was taken",
}
_ADDRESS = re.compile(r" <_io\.BytesIO object at 0x[0-9a-f]+>")


@dataclass(frozen=True)
class Decoding:
    """How image files become pixels.

    Attributes:
        image_size: side in pixels of a square to resize and cut each image to; None takes them as they are.
        skip_broken: leave files out that cannot be decoded, instead of refusing all.
        mixed: whether images may differ in size.
        rules: of the cache's spec (`DataSpec`): under 1 neither EXIF orientation nor transparency is looked at.
    """

    image_size: int | None = None
    skip_broken: bool = False
    rules: int = PIXEL_RULES
    mixed: bool = False


class Decoded(NamedTuple):
    """One image.

    Attributes:
        pixels: uint8 `[H, W, 3]`.
        size: height and width of the image as it stands upright, before it was brought to `image_size`.
        changes: what was done to it, bits of CHANGES.
    """

    pixels: NDArray[np.uint8]
    size: tuple[int, int]
    changes: int


@contextmanager
def quiet() -> Iterator[None]:
    """Without Pillow's warnings, in every thread: damaged EXIF, palettes; nothing that a pixel depends on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def decode(data: bytes, how: Decoding) -> Decoded:
    """Decode an image.

    Raises:
        DataError: saying why it cannot be.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            check_pixel_count(*image.size, where="it")
            if image.mode not in _MODES_OF_8_BITS:
                raise DataError(f"must have 8 bits a channel; its Pillow mode is {image.mode}")
            changes = ANIMATED if getattr(image, "is_animated", False) else 0
            rgb, more = (_without_alpha(image), 0) if how.rules == 1 else _upright(image)
            pixels = np.asarray(rgb if how.image_size is None else _square(rgb, how.image_size))
            return Decoded(pixels, (rgb.height, rgb.width), changes | more)
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files; all mean the same to a user
        raise DataError(_ADDRESS.sub("", one_line(error))) from error


def _without_alpha(image: Image.Image) -> Image.Image:
    return image.convert("RGBA").convert("RGB") if image.mode in ("P", "PA") else image.convert("RGB")


def _upright(image: Image.Image) -> tuple[Image.Image, int]:
    """8-bit RGB as a viewer shows it: turned as EXIF says, and on black where it is transparent."""
    image.load()  # Pillow turns TIFF files itself here, and then forgets their orientation
    turn, rgb, changes = _TURNS.get(_orientation(image)), _without_alpha(image), 0
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        if rgba.getchannel("A").getextrema() != (255, 255):
            rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert("RGB")
            changes = LAID
    return (rgb, changes) if turn is None else (rgb.transpose(turn), changes | TURNED)


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
