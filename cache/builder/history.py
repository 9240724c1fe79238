"""What a cache was before it grew: which specs may follow which, and what units of former specs still hold.

`history/<fingerprint>.json` keeps every spec that a larger one replaced. A unit of clean logits that was made for it
can so be decoded, and its answers kept, until it is written again with the new views.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from darht.cache.format.commit import Former, read_commit
from darht.cache.format.layout import ArrayLayout, layouts, shard_key
from darht.cache.format.spec import CacheSpec
from darht.cache.format.store import Store
from darht.cache.format.views import view_table
from darht.core.config import canonical_json, fingerprint, parse_canonical, spec_diff, to_plain
from darht.core.errors import ConfigError, CorruptError
from darht.core.files import sha256_bytes
from darht.core.storage import Storage

HISTORY = "history"


def growth_problems(old: CacheSpec, new: CacheSpec) -> list[str]:
    """What keeps a cache of `old` from becoming one of `new` by adding teachers, attacks, Jacobians and views."""
    was, becomes = _without_source_views(old), _without_source_views(new)
    fixed = ("data", "store", "precision", "seed", "format_version")
    problems = [line for key in fixed for line in spec_diff(was[key], becomes[key], key)]
    for group in ("teachers", "attacks", "jacobians"):
        kept = {name: value for name, value in becomes[group].items() if name in was[group]}
        problems += spec_diff(was[group], kept, group)
    return problems + _view_problems(old, new)


def _without_source_views(spec: CacheSpec) -> dict[str, Any]:
    """A spec as plain values; how many views each source has is compared like other views."""
    plain: dict[str, Any] = to_plain(spec)
    for source in plain["data"].get("sources", ()):
        del source["views"]
    return plain


def _view_problems(old: CacheSpec, new: CacheSpec) -> list[str]:
    before, after = _views(old), _views(new)
    change = ", ".join(spec_diff(vars(old.views), vars(new.views), "views"))
    lost = [view for view in before if view not in set(after)]
    if lost:
        return [f"{change}: {len(lost)} of the {len(before)} views would be lost{_such_as(old, lost[0])}"]
    for source, grown in zip(old.data.sources, new.data.sources, strict=False):
        if set(before[: source.views]) - set(after[: grown.views]):
            return [f"{source.source} has {source.views} views, of which {grown.views} would leave some out"]
    return [
        f"{change}: attack '{name}' runs on the first {attack.views} views, and these would be others"
        for name, attack in old.attacks.items()
        if before[: attack.views] != after[: attack.views]
    ]


def _such_as(spec: CacheSpec, view: tuple[int, ...]) -> str:
    return "" if spec.views.resized else f", such as (dy, dx, flip) = {view}"


def _views(spec: CacheSpec) -> list[tuple[int, ...]]:
    return [tuple(row) for row in view_table(**vars(spec.views), seed=spec.seed).tolist()]


def history_key(spec: CacheSpec) -> str:
    """Where a former spec is kept in a cache."""
    return f"{HISTORY}/{fingerprint(spec)}.json"


def remember(folder: Storage, spec: CacheSpec) -> None:
    """Keep a spec that is about to be replaced."""
    folder.write(history_key(spec), canonical_json(spec).encode())


def is_history(key: str) -> bool:
    """Whether a file of a cache is a kept spec, and not the remains of writing one."""
    return key.startswith(f"{HISTORY}/") and key.endswith(".json")


@dataclass(frozen=True)
class History:
    """The former specs of a cache.

    Attributes:
        views: by array name and fingerprint, how a former spec laid the array out, and its views.
    """

    views: dict[tuple[str, str], tuple[ArrayLayout, list[tuple[int, ...]]]]

    def fingerprints(self, name: str) -> set[str]:
        """Those that an array had under former specs."""
        return {found for array, found in self.views if array == name}

    def answers(self, store: Store, array: ArrayLayout, shard: int, offsets: np.ndarray) -> dict[int, np.ndarray]:
        """The clean answers of a unit that a former spec's shard holds: `[rows, ...]` by the view's number.

        Empty where there are none that can be trusted: the record must be that of a former spec and its sha256 that of
        the shard, which a build that was killed may have replaced already.
        """
        if not self.fingerprints(array.name) or not array.is_answer or array.attack is not None:
            return {}
        try:
            commit = read_commit(store.storage, array, shard)
        except CorruptError:
            return {}
        if commit is None or (commit.array, commit.shard) != (array.name, shard):
            return {}
        if commit.fingerprint == array.fingerprint:  # of this spec, and being computed again: so it is damaged
            return {}
        old, views = self.views.get((array.name, commit.fingerprint), (array, []))
        data = store.storage.read(shard_key(old, shard)) if views else None
        if data is None or sha256_bytes(data) != commit.sha256:
            return {}
        if old.rows(shard) != array.rows(shard):
            return {}
        values, column = store.decode(old, shard, data), {view: number for number, view in enumerate(_own(old, views))}
        wanted = [tuple(row) for row in offsets.tolist()]
        span = range(array.first_view, array.first_view + array.shape[1])
        return {number: values[:, column[wanted[number]]] for number in span if wanted[number] in column}


def _own(array: ArrayLayout, views: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Of all views those that an array has."""
    return views[array.first_view : array.first_view + array.shape[1]]


def read_history(folder: Storage) -> History:
    """The former specs of a cache.

    Raises:
        CorruptError: one of them is not what was kept.
    """
    views: dict[tuple[str, str], tuple[ArrayLayout, list[tuple[int, ...]]]] = {}
    for key in filter(is_history, folder.keys(HISTORY)):
        data = folder.read(key) or b""
        try:
            spec = parse_canonical(CacheSpec, data, key)
        except ConfigError as error:
            raise _damaged(folder, key) from error
        if history_key(spec) != key:
            raise _damaged(folder, key)
        table = _views(spec)
        views |= {(array.name, array.fingerprint): (array, table) for array in layouts(spec).values()}
    return History(views)


def former_of(folder: Storage) -> Former:
    """The former fingerprints of a cache's arrays, for `unit_state`; read when they are first asked for."""

    @functools.cache
    def history() -> History:
        return read_history(folder)

    return lambda name: history().fingerprints(name)


def _damaged(folder: Storage, key: str) -> CorruptError:
    return CorruptError(
        f"{folder.name(key)} is not the former spec that was kept: remove it, and darht-cache build asks teachers again"
    )
