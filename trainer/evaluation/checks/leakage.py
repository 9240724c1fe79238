"""Whether a model was trained on the images that it is tested on."""

import numpy as np

from darht.cache.read.reader import Cache
from darht.cache.sources.load import FileSource, Source

_MOST = 2 << 30  # bytes of images that are compared; beyond that only the content hash of the whole split is


def trained_on(cache: Cache, test: Source | FileSource) -> int:
    """How many test images lie in a cache, byte for byte."""
    if cache.spec.data.sha256 == test.sha256:
        return len(test.images)
    shape = cache.spec.view_shape
    if cache.rows * int(np.prod(shape)) > _MOST or shape != test.images.shape[1:]:
        return 0
    seen = {image.tobytes() for image in cache.clean()}
    return sum(test.images[k : k + 1].tobytes() in seen for k in range(len(test.images)))
