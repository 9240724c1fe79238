"""Where the rows of a cache are while a student is trained on them: on its device, in memory, or streamed."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from darht.cache.format.layout import block_rows, row_blocks
from darht.cache.read.loader import GIB, reading_threads
from darht.cache.read.mixture import choose_room, feed_groups
from darht.cache.read.reader import Cache
from darht.cache.read.sizes import needed_bytes, row_bytes
from darht.core.errors import ConfigError

_SCRATCH = 8  # a share of the budget, 1/8, for blocks on their way from the file into a window
_COPIES = 3  # of a block, at worst: as in the file, out of its tar, decoded
Needed = Literal["none", "drawn", "all"]


@dataclass(frozen=True)
class FeedPlan:
    """Where the rows of a cache are while a student is trained on them.

    Attributes:
        kind: `device`: all on the device that trains; `memory`: all in the machine's memory, batches go to the device;
            `streamed`: windows of them in memory.
        device: which trains.
        adversarial: whether the stored perturbations and the teachers' answers to them are needed.
        jacobians: whether the teachers' Jacobians are needed.
        batch: rows of a step.
        needed: bytes of all rows.
        budget: bytes that may be held.
        per_window: blocks of rows that are read together.
        window_rows: the rows that these hold.
        threads: that read.
        logits: which of the teachers' logits are needed: none, clean ones on the drawn view alone, or all; where views
            lie apart no other view is streamed.
        room: of a window, when streamed: rows, and how many of them may have the views of each further band.
    """

    kind: Literal["device", "memory", "streamed"]
    device: torch.device
    adversarial: bool
    jacobians: bool
    batch: int
    needed: int
    budget: int
    per_window: int
    window_rows: int
    threads: int
    logits: Needed = "all"
    room: tuple[int, ...] = ()

    def __str__(self) -> str:
        needed, budget = f"{self.needed / GIB:.3g} GiB", f"{self.budget / GIB:.3g} GiB"
        if self.kind == "streamed":
            return f"cache: {needed} do not fit {budget}, streamed in windows of {self.window_rows:,} rows"
        where = f"on {self.device}" if self.kind == "device" and self.device.type != "cpu" else "in memory"
        return f"cache: {needed} of {budget}, resident {where}"


def plan_feed(
    cache: Cache,
    *,
    device: torch.device,
    adversarial: bool,
    batch: int,
    budget_gib: float,
    jacobians: bool = False,
    logits: Needed = "all",
    rows: np.ndarray | None = None,
) -> FeedPlan:
    """Decide where the rows will be.

    Args:
        cache: opened by `open_cache` or `open_shards`.
        device: which trains.
        adversarial: whether the stored perturbations and the teachers' answers to them are needed.
        batch: rows of a step.
        budget_gib: the most memory that the cache may take.
        jacobians: whether the teachers' Jacobians are needed.
        logits: which of the teachers' logits are needed; see `FeedPlan`.
        rows: as of `Feed`.

    Raises:
        ConfigError: the budget does not hold two windows of one block and a batch.
    """
    if not 0 < budget_gib < math.inf:
        raise ConfigError(
            f"the memory must be a number of GiB above 0; got {budget_gib:g}: raise --memory (memory_gib)"
        )
    threads = reading_threads(cache)
    wanted = {"adversarial": adversarial, "jacobians": jacobians, "logits": logits != "none"}
    budget, parts = int(budget_gib * GIB), (adversarial, jacobians)
    blocks, size, needed = row_blocks(cache.spec), block_rows(cache.spec.store), needed_bytes(cache, **wanted)
    if needed <= budget:
        kind: Literal["device", "memory"] = "device" if _fits(device, needed) else "memory"
        return FeedPlan(kind, device, *parts, batch, needed, budget, len(blocks), cache.rows, threads, logits)
    held = len(cache.manifest.holdout) * (int(np.prod(cache.spec.view_shape)) + 8)
    free = (budget - budget // _SCRATCH - held) // 2
    wanted["one_view"] = logits == "drawn" and cache.spec.store.by_view
    row = [row_bytes(cache, **wanted, band=band) for band in range(len(cache.spec.bands))]
    room = choose_room(cache, feed_groups(cache, batch, rows), row, free)
    if room.bytes > free:
        least = (2 * room.bytes + held) * _SCRATCH / (_SCRATCH - 1)
        raise ConfigError(
            f"{cache.folder} needs {needed / GIB:.3g} GiB in memory, or {least / GIB:.3g} GiB to be streamed in "
            f"batches of {batch}; the budget is {budget_gib:g} GiB: raise --memory (memory_gib)"
        )
    threads = max(1, min(threads, budget // _SCRATCH // (_COPIES * size * sum(row))))
    read = room.per_window, min(room.read, cache.rows)
    return FeedPlan("streamed", device, *parts, batch, needed, budget, *read, threads, logits, room.rows)


def _fits(device: torch.device, needed: int) -> bool:
    """Half of what a GPU has free is left to the network and its activations."""
    return device.type != "cuda" or needed <= torch.cuda.mem_get_info(device)[0] // 2
