"""Counter-based random numbers, keyed by seed, purpose and row.

The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), written in int64
tensor arithmetic so that CPU and GPU give the same bits. The key is a hash of (seed, purpose); the counter is
(position, draw, row, view). So what a row draws depends on nothing but its own index: not on the batch it sits in, nor
on its order, nor on which worker computes it, nor on what was drawn before.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from darht.core.device import constant
from darht.core.fused import fused, is_fusing
from darht.core.keys import derive_key, derive_seed

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
Key = tuple[int, int] | tuple[Tensor, ...]
W = TypeVar("W", int, Tensor)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: Key) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32.

    Args:
        counter: four broadcastable int64 tensors with values below 2**32.
        key: two words below 2**32, numbers or tensors.

    Returns:
        Four int64 tensors of the broadcast shape, uniform on [0, 2**32).
    """
    return _rounds(torch.broadcast_tensors(*counter), key)


def _rounds(counter: Sequence[W], key: Sequence[W]) -> tuple[W, W, W, W]:
    """The rounds on tensors, or on Python's own whole numbers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2**64, so both halves are exact after masking the arithmetic shift.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = (p0 >> 32) & _MASK, (p1 >> 32) & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & _MASK, high0 ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def word(row: int, seed: int, *purpose: object) -> int:
    """The first 32-bit word of one row, as `RowRng.create(seed, *purpose, rows=[row])` draws it, without a tensor."""
    return int(_rounds((0, 0, row, 0), derive_key(seed, *purpose))[0])


@dataclass(frozen=True, kw_only=True)
class RowRng:
    """Random numbers for a batch of rows.

    Attributes:
        key: two 32-bit words; see `derive_key`.
        rows: int64 `[B]`, the source index of each row in the batch.
        views: int64 `[B]`, the view of each row.
    """

    key: tuple[int, int]
    rows: Tensor
    views: Tensor

    @classmethod
    def create(cls, seed: int, *purpose: object, rows: Tensor, views: Tensor | None = None) -> "RowRng":
        """A generator for these rows; `purpose` names what the numbers are for (an attack's name, say)."""
        return cls(key=derive_key(seed, *purpose), rows=rows, views=torch.zeros_like(rows) if views is None else views)

    def __getitem__(self, index: Tensor) -> "RowRng":
        """The generator of a subset of the batch, by mask or position."""
        return replace(self, rows=self.rows[index], views=self.views[index])

    def fold(self, *parts: object) -> "RowRng":
        """An independent stream for the same rows (a restart, an iteration)."""
        return replace(self, key=derive_key(*self.key, *parts))

    def words(self, shape: tuple[int, ...], draw: int = 0) -> Tensor:
        """Uniform 32-bit words as int64 `[B, *shape]`; another `draw` gives independent numbers."""
        return _words(self.rows, self.views, self._key(), shape, draw)

    def integers(self, low: int, high: int, shape: tuple[int, ...], draw: int = 0) -> Tensor:
        """Integers in [low, high] as int64 `[B, *shape]`; the bias is below (high - low + 1) / 2**32."""
        return _integers(self.rows, self.views, self._key(), shape, draw, ends=(low, high))

    def uniform(self, shape: tuple[int, ...], draw: int = 0) -> Tensor:
        """Float32 on [0, 1) with 24 bits, `[B, *shape]`."""
        return _uniform(self.rows, self.views, self._key(), shape, draw)

    def normal(self, shape: tuple[int, ...], draw: int = 0) -> Tensor:
        """Standard normal float32 `[B, *shape]` by Box and Muller, computed in float64."""
        pair = self.words((2, *shape), draw).double()
        radius = torch.sqrt(-2.0 * torch.log((pair[:, 0] + 1.0) * 2.0**-32))
        return (radius * torch.cos(pair[:, 1] * (2.0 * math.pi * 2.0**-32))).float()

    def _key(self) -> Key:
        """Numbers, or tensors where numbers would be compiled in and every other key would be compiled again."""
        return constant(self.key, self.rows.device).unbind() if is_fusing(self.rows.device) else self.key


@fused
def _words(rows: Tensor, views: Tensor, key: Key, shape: tuple[int, ...], draw: int) -> Tensor:
    count = math.prod(shape)
    position = torch.arange(-(-count // 4), device=rows.device)
    draws = torch.full_like(position, draw)
    block = torch.stack(philox4x32((position, draws, rows[:, None], views[:, None]), key), dim=-1)
    return block.flatten(1)[:, :count].reshape(-1, *shape)


@fused
def _integers(
    rows: Tensor, views: Tensor, key: Key, shape: tuple[int, ...], draw: int, *, ends: tuple[int, int]
) -> Tensor:
    low, high = ends
    return low + ((_words(rows, views, key, shape, draw) * (high - low + 1)) >> 32)


@fused
def _uniform(rows: Tensor, views: Tensor, key: Key, shape: tuple[int, ...], draw: int) -> Tensor:
    return (_words(rows, views, key, shape, draw) >> 8).float() * 2.0**-24


@contextlib.contextmanager
def borrowed_generator(seed: int, *purpose: object) -> Iterator[None]:
    """Seed torch's global generators for the block, for what draws from them (fresh weights, dropout).

    They are given back in the state in which the caller had them.
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(derive_seed(seed, *purpose))
        yield
