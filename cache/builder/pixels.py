"""The pixels of a source's rows, whether they are in memory or in files, of one size or of several."""

import numpy as np
from numpy.typing import NDArray

from darht.cache.format.boxes import draw_boxes
from darht.cache.format.images import encode_png
from darht.cache.format.resample import centre_boxes, resample_all
from darht.cache.format.spec import CacheSpec, StoreSpec
from darht.cache.sources.encoded import EncodedImages
from darht.cache.sources.load import FileSource, Source
from darht.cache.sources.rows import LazyImages

Images = NDArray[np.uint8] | LazyImages
Pixels = NDArray[np.uint8] | list[NDArray[np.uint8]]
_TOGETHER = 32  # images decoded at once, to be cut


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


class ShardImages:
    """The images of the shard that is worked on, decoded once, and what resized crops show of them.

    Images that differ in size are decoded some at a time and cut at once into all their views, where these take less
    memory than the images; else they are kept until another shard is wanted.

    Attributes:
        differ: whether images differ in size.
    """

    def __init__(self, images: Images, spec: CacheSpec) -> None:
        self.differ = isinstance(images, EncodedImages) and len(images.shape) == 2
        self._images, self._spec = images, spec
        self._decoded: tuple[slice, Pixels] = slice(0, 0), []
        self._drawn: tuple[slice, NDArray[np.int32]] = slice(0, 0), np.empty(0, dtype=np.int32)
        self._cut: tuple[slice, NDArray[np.uint8] | None] = slice(0, 0), None

    def boxes(self, rows: slice) -> NDArray[np.int32]:
        """Where the resized crops of some rows lie, int32 `[n, V, 5]`."""
        if self._drawn[0] != rows:
            self._drawn = rows, self._draw(rows)
        return self._drawn[1]

    def pixels(self, rows: slice) -> Pixels:
        """Images of some rows of a shard, uint8 `[3, H, W]` each.

        Raises:
            DataError: a file is not what it was.
        """
        if isinstance(self._images, np.ndarray):
            return self._images[rows]
        shard = self._shard(rows)
        if self._decoded[0] != shard:
            self._decoded = shard, pixels_of(self._images, shard)
        return self._decoded[1][rows.start - shard.start : rows.stop - shard.start]

    def crops(self, rows: slice, at: slice, view: int) -> NDArray[np.uint8]:
        """Some of these rows, counted from the first of them, in a view, uint8 `[n, 3, S, S]`.

        Raises:
            DataError: a file is not what it was.
        """
        shard = self._shard(rows)
        if self._cut[0] != shard:
            self._cut = shard, self._cut_all(shard) if self._views_are_smaller(shard) else None
        if self._cut[1] is None:
            return resample_all(self.pixels(rows)[at], self.boxes(rows)[at, view], self._spec.views.size)
        first = rows.start - shard.start
        return self._cut[1][first + at.start : first + at.stop, view]

    def _shard(self, rows: slice) -> slice:
        """The rows of the shard that holds these, or more where they go beyond it."""
        size = self._spec.store.rows_per_shard
        start = rows.start // size * size
        return slice(start, min(max(start + size, rows.stop), len(self._images)))

    def _draw(self, rows: slice) -> NDArray[np.int32]:
        numbers = np.arange(rows.start, rows.stop, dtype=np.int64)
        return draw_boxes(sizes_of(self._images, rows), numbers, self._spec.views, self._spec.seed)

    def _views_are_smaller(self, shard: slice) -> bool:
        views = self._spec.views
        pixels = sizes_of(self._images, shard).astype(np.int64).prod(1)
        return bool(views.count * views.size**2 < pixels.mean())

    def _cut_all(self, shard: slice) -> NDArray[np.uint8]:
        boxes, size = self._draw(shard), self._spec.views.size
        found = np.empty((*boxes.shape[:2], 3, size, size), dtype=np.uint8)
        for start in range(shard.start, shard.stop, _TOGETHER):
            part = slice(start, min(start + _TOGETHER, shard.stop))
            pixels, here = pixels_of(self._images, part), slice(part.start - shard.start, part.stop - shard.start)
            for view in range(boxes.shape[1]):
                found[here, view] = resample_all(pixels, boxes[here, view], size)
        return found


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
