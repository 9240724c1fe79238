"""Images that stay encoded: the bytes of their shards, what decodes, what may be kept, and which decoder it was."""

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from darht.cache.format.images import decode_image, decode_views, decoder_identity, encode_png, image_size, is_plain
from darht.cache.format.layout import ENCODED, ArrayLayout
from darht.cache.format.resample import centred, resample
from darht.cache.format.shards import encode_values
from darht.cache.format.store import Store
from darht.core.errors import CorruptError, DataError

GOLDEN = (
    "010000000200000061 62 e975c4e0  01000000 01000000 63 d1b15c05"  # one value of so many bytes, each with its crc32c
    "0000000000000000 0e00000000000000  0e00000000000000 0d00000000000000"  # offset and size
    "ffffffffffffffff ffffffffffffffff  ffffffffffffffff ffffffffffffffff 5bf6bfba"  # rows that are not there
)


def layout(rows: int = 6, shard: int = 4) -> ArrayLayout:
    return ArrayLayout("image", "image", (rows,), ENCODED, shard, 1, False, "f" * 64, {})


def objects(values: list[bytes]) -> np.ndarray:
    found = np.empty(len(values), dtype=object)
    found[:] = values
    return found


def pixels(height: int = 9, width: int = 7, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8)


def encoded(kind: str, mode: str = "RGB", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels().transpose(1, 2, 0)).convert(mode).save(file, kind, **options)
    return file.getvalue()


def test_golden_bytes_of_a_shard():
    assert encode_values(layout(2), [b"ab", b"c"]) == bytes.fromhex(GOLDEN)


@settings(max_examples=15)
@given(values=st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=11), data=st.data())
def test_zarr_reads_and_writes_the_same(values, data, tmp_path_factory):
    import zarr

    array, folder = layout(len(values)), tmp_path_factory.mktemp("zarr")
    store = Store(folder)
    store.create({array.name: array})
    for shard in range(array.shards):
        store.write(array, shard, objects(values[array.rows(shard)]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", zarr.errors.UnstableSpecificationWarning)
        theirs = zarr.open_array(folder / "data.zarr", path="image", mode="r+")
    assert theirs[:].tolist() == values
    first = data.draw(st.integers(0, len(values) - 1))
    assert store.read(array, slice(first, len(values))).tolist() == values[first:]
    ours = (folder / "data.zarr/image/c/0").read_bytes()
    theirs[: min(4, len(values))] = objects(values[:4])
    assert (folder / "data.zarr/image/c/0").read_bytes() == ours


def test_damage_in_a_shard_is_noticed(tmp_path: Path):
    array, store = layout(4), Store(tmp_path)
    store.create({array.name: array})
    store.write(array, 0, objects([b"one", b"two", b"three", b"four"]))
    path = tmp_path / "data.zarr/image/c/0"
    data = path.read_bytes()
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(CorruptError, match="do not decode"):
            store.read(array, slice(0, 4))


def test_pixels_come_back():
    image = pixels()
    np.testing.assert_array_equal(decode_image(encode_png(image)), image)
    assert image_size(encode_png(image)) == (9, 7)
    grey = decode_image(encoded("JPEG", "L"))
    assert grey.shape == (3, 9, 7) and (grey[0] == grey[2]).all()


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff\xd8\xff", encoded("GIF", "L"), encoded("PNG", "RGBA"), encoded("PNG", "P"), encoded("JPEG", "CMYK"),
     encoded("PNG")[:60], encoded("JPEG")[:-40]],
)  # fmt: skip
def test_what_is_no_plain_image_is_refused(data):
    with pytest.raises(DataError):
        decode_image(data)
    assert len(data) > 500 or not is_plain(data, "jpeg") or data == encoded("JPEG")[:-40]


def test_what_may_be_kept():
    assert is_plain(encoded("JPEG"), "jpeg") and is_plain(encoded("PNG", "L"), "png")
    for data, kind in [(encoded("PNG"), "jpeg"), (encoded("JPEG"), "png"), (encoded("JPEG", "CMYK"), "jpeg"),
                       (encoded("PNG", "RGBA"), "png"), (b"", "png")]:  # fmt: skip
        assert not is_plain(data, kind)


def test_views_of_encoded_images():
    images = [pixels(9, 7), pixels(12, 20, seed=1)]
    files, boxes = [encode_png(image) for image in images], np.array([[1, 2, 5, 4, 1], [0, 3, 12, 12, 0]])
    shown = decode_views(files, boxes, 6)
    np.testing.assert_array_equal(shown, [resample(*pair, 6) for pair in zip(images, boxes, strict=True)])
    np.testing.assert_array_equal(decode_views(files, None, 6)[1], centred(images[1][None], 6)[0])
    with pytest.raises(DataError, match="one size"):
        decode_views(files, None, 0)


def test_the_decoder_is_named_by_what_it_makes_of_a_small_image():
    """Bits of libjpeg-turbo, whose transform is exact on every processor; another decoder has another name."""
    assert decoder_identity() == "422f989a34b4d01499a120c9309f0b8a8baa6b80cb77c65e2d56ae33aaba0f95"
