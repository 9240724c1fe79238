"""How large an image may be before its pixels are decoded: a small file can describe more than memory holds."""

from darht.core.errors import DataError

MAX_PIXELS = 50_000_000  # of one image: 150 MB as RGB, and some copies of it while it is resized


def check_pixel_count(width: int, height: int, where: str) -> None:
    """Raise DataError for an image of more than MAX_PIXELS; its header says how many it has."""
    if width * height > MAX_PIXELS:
        raise DataError(f"{where} is {width}x{height} pixels, more than {MAX_PIXELS:,}: make it smaller")
