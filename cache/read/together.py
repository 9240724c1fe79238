"""Small reads, all at once where each of them waits for a server."""

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from darht.core.storage import Storage
from darht.core.storage_remote import IN_FLIGHT, RemoteStorage


@functools.lru_cache
def _pool(process: int) -> ThreadPoolExecutor:
    """The threads of this process that wait for reads; none of them waits for another."""
    return ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix=f"darht-reads-{process}")


def together(folder: Storage, action: Callable[..., object], units: Sequence[tuple[Any, ...]]) -> None:
    """An action on each of some units: behind a URL without a local copy many at a time, else one after the other.

    The action may not call this function.
    """
    if isinstance(folder, RemoteStorage) and len(units) > 1:
        list(_pool(os.getpid()).map(lambda unit: action(*unit), units))
        return
    for unit in units:
        action(*unit)
