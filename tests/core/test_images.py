"""A small file that describes a huge image is refused before it is decoded."""

import pytest
from PIL import Image

from darht.cache.sources.decode import Decoding
from darht.cache.sources.located import locate_files
from darht.cache.sources.scan import scan
from darht.core.errors import DataError
from darht.core.images import MAX_PIXELS, check_pixel_count
from darht.tools.neighbours import read_image


def test_the_bound():
    check_pixel_count(MAX_PIXELS, 1, "it")
    with pytest.raises(DataError, match=r"it is 50000001x1 pixels, more than 50,000,000: make it smaller"):
        check_pixel_count(MAX_PIXELS + 1, 1, "it")


def test_a_bomb_is_one_line(tmp_path):
    path = tmp_path / "bomb.png"
    Image.new("1", (10_000, 6000)).save(path)
    assert path.stat().st_size < 20_000
    located = locate_files(tmp_path, [path])
    for read in (
        lambda: scan(located, None, "here", Decoding(32), keep=True),
        lambda: read_image(path, (3, 8, 8)),
    ):
        with pytest.raises(DataError, match=r"10000x6000 pixels, more than 50,000,000") as caught:
            read()
        assert "\n" not in str(caught.value)
