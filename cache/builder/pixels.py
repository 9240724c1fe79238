"""The pixels of a source's rows, whether they are in memory or in files, of one size or of several."""

import numpy as np
from numpy.typing import NDArray

from darht.cache.format.images import encode_png
from darht.cache.format.resample import centre_boxes, resample_all
from darht.cache.format.spec import StoreSpec
from darht.cache.sources.encoded import EncodedImages
from darht.cache.sources.load import FileSource, Source
from darht.cache.sources.rows import LazyImages

Images = NDArray[np.uint8] | LazyImages
Pixels = NDArray[np.uint8] | list[NDArray[np.uint8]]


def pixels_of(images: Images, rows: slice) -> Pixels:
    """Each of some rows, uint8 `[3, H, W]`; one array where all images have one size.

    Raises:
        DataError: a file is not what it was.
    """
    if isinstance(images, EncodedImages) and len(images.shape) == 2:
        return images.pixels(rows)
    return images[rows]


def sizes_of(images: Images, rows: slice) -> NDArray[np.int32]:
    """Height and width of some rows, int32 `[n, 2]`."""
    if isinstance(images, EncodedImages):
        return images.sizes(rows)
    return np.tile(np.array(images.shape[2:], dtype=np.int32), (len(range(len(images))[rows]), 1))


def first_views(source: Source | FileSource, rows: NDArray[np.int64], size: int) -> NDArray[np.uint8]:
    """View 0 of some rows: with `size` the centred square at so many pixels, with 0 the image as it is."""
    images = source.images
    if not size:
        return images[rows]
    spans = [slice(int(row), int(row) + 1) for row in rows]
    views = [resample_all(pixels_of(images, at), centre_boxes(sizes_of(images, at)), size) for at in spans]
    return np.concatenate(views)


def stored_images(images: Images, rows: slice, store: StoreSpec) -> NDArray[np.object_]:
    """What a cache of encoded images keeps of some rows, the bytes of each, `[n]`."""
    assert store.images != "raw"
    kept = (
        images.stored(rows, store.images)
        if isinstance(images, EncodedImages)
        else [encode_png(pixels) for pixels in images[rows]]
    )
    found = np.empty(len(kept), dtype=object)
    found[:] = kept
    return found
