"""What rows of a cache take in memory."""

import numpy as np

from darht.cache.format.layout import ArrayLayout
from darht.cache.read.reader import Cache


def row_bytes(
    cache: Cache, *, adversarial: bool, jacobians: bool = False, logits: bool = True, one_view: bool = False
) -> int:
    """What a row takes in memory: its arrays, an int64 label and an int64 source index.

    With `one_view` its clean answers in one view alone, and an int64 for which.
    """
    held = [
        array
        for array in cache.arrays.values()
        if (array.kind == "image" or array.has_views or (array.is_jacobian and jacobians))
        and (array.attack is None or adversarial)
        and (not array.is_answer or logits)
    ]

    def size(array: ArrayLayout) -> int:
        views = array.shape[1] if one_view and array.is_answer and array.attack is None else 1
        return int(np.prod(array.shape[1:])) * np.dtype(array.dtype).itemsize // views

    return 16 + 8 * one_view + sum(map(size, held))


def needed_bytes(cache: Cache, *, adversarial: bool, jacobians: bool = False, logits: bool = True) -> int:
    """What `load_training_set` will hold in memory."""
    return cache.rows * row_bytes(cache, adversarial=adversarial, jacobians=jacobians, logits=logits)
