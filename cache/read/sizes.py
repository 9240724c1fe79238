"""What rows of a cache take in memory."""

from darht.cache.format.layout import ArrayLayout
from darht.cache.read.reader import Cache

_BYTES_OBJECT = 40  # of Python, around the bytes of an image


def held_arrays(cache: Cache, *, adversarial: bool, jacobians: bool = False, logits: bool = True) -> list[ArrayLayout]:
    """The arrays of which a trainer holds rows, but for labels."""
    return [
        array
        for array in cache.arrays.values()
        if (array.kind == "image" or array.has_views or (array.is_jacobian and jacobians))
        and (array.attack is None or adversarial)
        and (not array.is_answer or logits)
    ]


def row_bytes(
    cache: Cache,
    *,
    adversarial: bool,
    jacobians: bool = False,
    logits: bool = True,
    one_view: bool = False,
    band: int = 0,
) -> int:
    """What a row takes in memory, on average: its arrays, an int64 label and an int64 source index.

    With `one_view` its clean answers in one view alone, and an int64 for which. Of several sources only the views that
    all rows have; of the views of a `band` (see `CacheSpec.bands`) after those, what a row that has them takes more.
    """
    bands, every = cache.spec.bands, held_arrays(cache, adversarial=adversarial, jacobians=jacobians, logits=logits)
    held = [array for array in every if array.first_view == bands[band].first]

    def size(array: ArrayLayout) -> int:
        if array.encoded:
            return array.row_bytes + cache.size(array.name) // cache.rows + _BYTES_OBJECT
        return array.row_bytes // (array.shape[1] if one_view and array.is_clean_answer else 1)

    slots = 8 * (len(bands) - 1)
    return sum(map(size, held)) + (0 if band else 16 + 8 * one_view + slots)


def needed_bytes(cache: Cache, *, adversarial: bool, jacobians: bool = False, logits: bool = True) -> int:
    """What `load_training_set` will hold in memory."""
    wanted = {"adversarial": adversarial, "jacobians": jacobians, "logits": logits}
    return sum(band.rows * row_bytes(cache, **wanted, band=number) for number, band in enumerate(cache.spec.bands))
