"""What rows of a cache take in memory."""

from darht.cache.format.layout import ArrayLayout
from darht.cache.read.reader import Cache

_BYTES_OBJECT = 40  # of Python, around the bytes of an image


def row_bytes(
    cache: Cache, *, adversarial: bool, jacobians: bool = False, logits: bool = True, one_view: bool = False
) -> int:
    """What a row takes in memory, on average: its arrays, an int64 label and an int64 source index.

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
        if array.encoded:
            return array.row_bytes + cache.size(array.name) // cache.rows + _BYTES_OBJECT
        return array.row_bytes // (array.shape[1] if one_view and array.is_answer and array.attack is None else 1)

    return 16 + 8 * one_view + sum(map(size, held))


def needed_bytes(cache: Cache, *, adversarial: bool, jacobians: bool = False, logits: bool = True) -> int:
    """What `load_training_set` will hold in memory."""
    return cache.rows * row_bytes(cache, adversarial=adversarial, jacobians=jacobians, logits=logits)
