"""A thread that writes a unit while the next one is computed: shard first, record last, as without it."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import numpy as np

from darht.cache.format.commit import Commit, write_commit
from darht.cache.format.layout import ArrayLayout
from darht.cache.format.store import Store

OnUnit = Callable[[ArrayLayout, int, float], None]


class UnitWriter:
    """Writes one unit at a time behind its caller's back; what went wrong is raised by the caller's next call.

    The end of the block waits for the last unit, also where computing the next has failed.
    """

    def __init__(self, store: Store, facts: Mapping[str, Any], on_unit: OnUnit) -> None:
        """`facts` go into the records; `on_unit` is told in the caller's thread, once a unit is written."""
        self._store, self._facts, self._on_unit = store, dict(facts), on_unit
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="darht-write")
        self._under_way: tuple[ArrayLayout, int, Future[float]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def put(self, array: ArrayLayout, shard: int, values: np.ndarray, seconds: float) -> None:
        """Write a unit that took so many seconds, once the one before it is written.

        Raises:
            CorruptError, OSError: the unit before this could not be written.
        """
        self.wait()
        self._under_way = array, shard, self._pool.submit(self._write, array, shard, values, seconds)

    def wait(self, name: str | None = None) -> None:
        """Until the unit under way is written; with a name only if it is of this array.

        Raises:
            CorruptError, OSError: it could not be written.
        """
        if self._under_way is None or name not in (None, self._under_way[0].name):
            return
        array, shard, written = self._under_way
        self._under_way = None
        self._on_unit(array, shard, written.result())

    def _write(self, array: ArrayLayout, shard: int, values: np.ndarray, seconds: float) -> float:
        start, rows = time.perf_counter(), array.rows(shard)
        size, sha256, parts = self._store.write(array, shard, values)
        seconds += time.perf_counter() - start
        about = (array.name, shard, (rows.start, rows.stop), array.fingerprint)
        commit = Commit(*about, size, sha256, seconds, self._facts, parts=parts)
        write_commit(self._store.storage, array, commit)
        return seconds
