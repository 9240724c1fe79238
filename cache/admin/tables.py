"""Tables for people: how the command line shows what the library tells."""

from typing import TYPE_CHECKING

from rich.table import Table

from darht.cache.admin.compare import ValueDiff
from darht.cache.admin.diff import CacheDiff
from darht.cache.admin.info import Summary
from darht.cache.admin.status import Status

if TYPE_CHECKING:
    from darht.cache.admin.recompute import Recomputed  # which needs torch


def status_table(status: Status) -> Table:
    """A line for every array: done, missing, corrupt, size and time."""
    table = _table("array", "done", "missing", "corrupt", "MB", "seconds", "seconds left")
    for array in status.arrays:
        left = "?" if array.seconds_left is None else f"{array.seconds_left:.0f}"
        counts = (f"{array.done}/{array.units}", str(len(array.missing)), str(len(array.corrupt)))
        table.add_row(array.name, *counts, f"{array.size / 1e6:.2f}", f"{array.seconds:.1f}", left)
    return table


def status_line(status: Status) -> str:
    """What a person asks first: what is to do, and how long it will take."""
    sealed = "sealed" if status.sealed else "not sealed"
    if not status.recorded:
        return _copy_line(status.shards)
    if not status.shards:
        return f"all units done; {sealed}"
    left = "time left unknown before every array has a unit"
    if status.seconds_left is not None:
        workers = f"{status.workers:.1f}".removesuffix(".0")
        left = f"{status.seconds_left:.0f} s left with {workers} worker{'' if workers == '1' else 's'}, as so far"
    return f"shards of rows that need work: {','.join(map(str, status.shards))}; {left}; {sealed}"


def _copy_line(shards: tuple[int, ...]) -> str:
    copy = "a sealed copy, which has no commit records"
    if not shards:
        return f"{copy}: every shard is there in its size"
    numbers = ",".join(map(str, shards))
    return f"{copy}; shards of rows that are not all there in their sizes: {numbers}: pull or push them again"


def info_table(summary: Summary) -> Table:
    """A line for every array of a sealed cache."""
    table = Table(header_style="bold")
    for title in ("array", "type", "shape"):
        table.add_column(title, no_wrap=title == "array")  # a name is for copying; a shape may take two lines
    for title in ("MB", "bytes/row", "of raw", "seconds"):
        table.add_column(title, justify="right")
    for row in summary.arrays:
        table.add_row(*row)
    return table


def diff_table(diff: CacheDiff) -> Table:
    """A line for every array of either cache."""
    table = _table("array", "bytes", "shards that differ", *_VALUES)
    for array in diff.arrays:
        bytes_ = {"both": "equal" if array.equal else "differ"}.get(array.found, f"{array.found} only")
        table.add_row(array.name, bytes_, str(len(array.shards)) if array.shards else "", *_values(array.values))
    return table


def recompute_table(found: "Recomputed") -> Table:
    """A line for every array that was computed again."""
    table = _table("array", "compared", *_VALUES)
    for name, diff in found.arrays.items():
        table.add_row(name, str(diff.compared), *_values(diff))
    return table


_VALUES = ("largest difference", "rows that differ", "argmax flips")


def _values(diff: ValueDiff | None) -> tuple[str, ...]:
    if diff is None:
        return ("", "", "")
    flips = "" if diff.argmax_flips is None else f"{100 * diff.argmax_flips:.3g} %"
    return (f"{diff.largest:.6g}", f"{100 * diff.rows:.3g} %", flips)


def _table(first: str, *rest: str) -> Table:
    table = Table(header_style="bold")
    table.add_column(first, no_wrap=True)
    for title in rest:
        table.add_column(title, justify="right")
    return table
