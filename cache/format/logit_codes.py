"""Logits in fewer bytes: the k largest and the mass of the rest, or eight bits with a scale for each answer.

Either code is two arrays, a main one and its companion, and decodes to logits of all classes, so that a recipe sees
what it would see of a dense cache, up to the error that `docs/benchmarks-cache.md` measures.

- `top-k`: the k largest logits as float16, largest first, then `log sum exp` of all others; and whose they are. The
  others share their mass evenly when they are decoded, at temperature 1 as it was.
- `int8`: integers in -127..127; and for each answer a step and the logit that 0 stands for, float32.
"""

import math

import numpy as np

from darht.cache.format.spec import StoreSpec

_MOST = 127
_COMPANIONS = {"top-k": "-class", "int8": "-scale"}


def companion_suffix(store: StoreSpec) -> str:
    """What follows the name of a main array in that of its companion; empty where logits are not coded."""
    return _COMPANIONS.get(store.logits, "")


def encode_top(logits: np.ndarray, k: int, class_dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The k largest of each answer.

    Args:
        logits: `[..., C]`, finite, k < C.
        k: at least 1; of equal logits those of lower classes come first.
        class_dtype: int16 or int32.

    Returns:
        float16 `[..., k + 1]`, and the classes `[..., k]`. Logits beyond the range of float16 become infinite.
    """
    exact = logits.astype(np.float32)
    bound = np.partition(exact, -k, axis=-1)[..., -k, None]
    above, at = exact > bound, exact == bound
    room = k - above.sum(-1, keepdims=True)
    kept = above | (at & (np.cumsum(at, axis=-1) <= room))
    classes = np.nonzero(kept)[-1].reshape(*exact.shape[:-1], k)  # rising
    values = np.take_along_axis(exact, classes, -1)
    order = np.argsort(-values, axis=-1, kind="stable")
    rest = np.where(kept, -np.inf, exact)
    most = rest.max(-1, keepdims=True)
    mass = most + np.log(np.exp(rest - most).sum(-1, keepdims=True))
    with np.errstate(over="ignore"):  # the builder says it better
        main = np.concatenate([np.take_along_axis(values, order, -1), mass], axis=-1).astype(np.float16)
    return main, np.take_along_axis(classes, order, -1).astype(class_dtype)


def encode_int8(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits `[..., C]` as int8 `[..., C]`, and step and middle of each answer, float32 `[..., 2]`."""
    exact = logits.astype(np.float32)
    low, high = exact.min(-1, keepdims=True), exact.max(-1, keepdims=True)
    middle = (low + high) / 2
    step = (high - low) / (2 * _MOST)
    codes = np.rint((exact - middle) / np.maximum(step, np.finfo(np.float32).tiny))
    return codes.clip(-_MOST, _MOST).astype(np.int8), np.concatenate([step, middle], axis=-1)


def spread(classes: int, k: int) -> float:
    """How far below the logit of all the rest that of one of them lies."""
    return math.log(classes - k)


def decode(main: np.ndarray, companion: np.ndarray, classes: int) -> np.ndarray:
    """Logits of all classes, float32 `[..., C]`, from the two arrays of either code.

    `decode_tensors` of `cache.read.draw` does the same to tensors.
    """
    if main.dtype == np.int8:
        found: np.ndarray = main * companion[..., :1] + companion[..., 1:]
        return found
    k = companion.shape[-1]
    dense = np.empty((*main.shape[:-1], classes), dtype=np.float32)
    dense[...] = main[..., k:].astype(np.float32) - np.float32(spread(classes, k))
    np.put_along_axis(dense, companion.astype(np.int64), main[..., :k].astype(np.float32), axis=-1)
    return dense
