"""Torch's global generator, borrowed for what draws from it (fresh weights, dropout) and given back as it was."""

import contextlib
from collections.abc import Iterator

import torch

from darht.core.rng import derive_seed


@contextlib.contextmanager
def borrowed_generator(seed: int, *purpose: object) -> Iterator[None]:
    """Seed the global generators from (seed, purpose) for the block; the caller's state returns after it."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(derive_seed(seed, *purpose))
        yield
