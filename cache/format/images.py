"""Images in a cache that keeps them encoded: for each row the bytes of a JPEG or PNG file, of 8-bit grey or RGB.

They are decoded when somebody wants their pixels, by threads: Pillow's libjpeg-turbo and zlib let go of the
interpreter's lock. PNG gives the same pixels everywhere. JPEG does up to its decoder, so a cache names the one whose
pixels its teachers saw, by what it makes of one small image.
"""

import base64
import functools
import hashlib
import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from darht.cache.format.resample import centred, resample
from darht.core.errors import DataError
from darht.core.images import check_pixel_count

_FORMATS = ("JPEG", "PNG")
_MODES = ("RGB", "L")
_THREADS = min(8, os.cpu_count() or 1)
_PART = 8  # images that a thread decodes in one go
_PROBE = base64.b64decode(  # 21 x 19 pixels in colour, chroma at half the resolution: all that a decoder has to choose
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAgGBgcGBQgHBwcJCQgKDBQNDAsLDBkSEw8UHRofHh0aHBwgJC4nICIsIxwcKDcpLDAxNDQ0Hyc5PTgy"
    "PC4zNDL/2wBDAQkJCQwLDBgNDRgyIRwhMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjL/wAARCAATABUDASIA"
    "AhEBAxEB/8QAFwABAQEBAAAAAAAAAAAAAAAAAAYFB//EACMQAAEDBAICAwEAAAAAAAAAAAEAAgQDESIxBSESoQYTQXH/xAAZAQABBQAAAAAAAAAAAAAA"
    "AAAGAgMEBQf/xAAlEQABAwIGAQUAAAAAAAAAAAABAAIDBCEFBhESMUFRYXGBscH/2gAMAwEAAhEDEQA/AOcQuI1iqOFxGsVtwuH1iqOFxGsVLhzF6pzC"
    "a7i6k5EGBGZTM3Euv4nxcb23r+otz5DA+yayiO20mC4tpx7PrxRXDJaGdolmYC496D9CXXZ4q6aodBBtLW2vr88O86rchUqfWIVHCpU+sQiLG4XHyh3C"
    "SbKfnAVeSlOeASKrm6/AbD0EREZxOOweyD53EyvJPZ+1/9k="
)
T = TypeVar("T")
Values = Sequence[bytes] | NDArray[np.object_]


def decode_image(data: bytes) -> np.ndarray:
    """The pixels of an image of a cache, uint8 `[3, H, W]`; grey is replicated.

    Raises:
        DataError: it is no JPEG or PNG of 8-bit grey or RGB, or is damaged.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            _check(image)
            return np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files; all mean the same to a user
        raise DataError(f"an image does not decode: {type(error).__name__}") from error


def image_size(data: bytes) -> tuple[int, int]:
    """Height and width of an image of a cache, from its header.

    Raises:
        DataError: as `decode_image`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            _check(image)
            return image.height, image.width
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"an image's header does not decode: {type(error).__name__}") from error


def _check(image: Image.Image) -> None:
    check_pixel_count(*image.size, where="it")
    if image.mode not in _MODES or "transparency" in image.info:
        raise DataError(f"an image must be 8-bit grey or RGB without transparency; its Pillow mode is {image.mode}")


def is_plain(data: bytes, kind: str) -> bool:
    """Whether the bytes of an image file may be kept as they are, among images stored as `kind`, `jpeg` or `png`.

    Others are turned, laid on black, of other modes, or of several frames; their pixels are kept as PNG.
    """
    try:
        with Image.open(io.BytesIO(data), formats=(kind.upper(),)) as image:
            _check(image)
            return image.format == kind.upper() and getattr(image, "n_frames", 1) == 1
    except (OSError, ValueError, SyntaxError, DataError):
        return False


def encode_png(pixels: np.ndarray) -> bytes:
    """Pixels uint8 `[3, H, W]` as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(file, "PNG")
    return file.getvalue()


def suffix_of(data: bytes) -> str:
    """`png` or `jpg`, by the first bytes of an image."""
    return "png" if data[:4] == b"\x89PNG" else "jpg"


def decode_views(values: Values, boxes: np.ndarray | None, size: int) -> np.ndarray:
    """Encoded images in a view each, uint8 `[n, 3, H, W]`, decoded and resized by threads.

    Args:
        values: the bytes of n images, of one size unless they are resized.
        boxes: integers `[n, 5]`, what resized crops show; None for the centred square.
        size: side of resized crops; 0 for images as they are.

    Raises:
        DataError: one does not decode, or is of another size than the first.
    """

    def show(number: int, pixels: np.ndarray) -> np.ndarray:
        if not size:
            return pixels
        return centred(pixels[None], size)[0] if boxes is None else resample(pixels, boxes[number], size)

    if not len(values):
        return np.empty((0, 3, size, size), dtype=np.uint8)
    found = each(values, show)
    if len({pixels.shape for pixels in found}) > 1:
        raise DataError("images must have one size")
    return np.stack(found)


def each(values: Values, action: Callable[[int, np.ndarray], T]) -> list[T]:
    """What an action gives for the number and the pixels of every image, in order, computed by threads.

    Raises:
        DataError: one does not decode.
    """

    def some(start: int) -> list[T]:
        stop = min(start + _PART, len(values))
        return [action(number, decode_image(values[number])) for number in range(start, stop)]

    with ThreadPoolExecutor(_THREADS) as threads:
        return [one for part in threads.map(some, range(0, len(values), _PART)) for one in part]


@functools.cache
def decoder_identity() -> str:
    """The sha256, in hexadecimal, of the pixels `[H, W, 3]` that this machine's JPEG decoder makes of a small image."""
    return hashlib.sha256(np.ascontiguousarray(decode_image(_PROBE).transpose(1, 2, 0)).tobytes()).hexdigest()
