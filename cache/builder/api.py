"""The public call that builds a cache; `import darht` has it by name."""

import functools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from darht.cache.builder.build import build, plan_build, spec_in
from darht.cache.builder.config import CacheConfig, check_config
from darht.cache.builder.jobs import PoolConfig, build_shared
from darht.cache.builder.seal import seal
from darht.cache.builder.sense import check_teachers
from darht.cache.read.reader import Cache
from darht.cache.read.webdataset import open_shards
from darht.core.device import pick_device
from darht.core.storage import Location
from darht.core.trust import is_trusting

OnUnit = Callable[[str, int, float], None]


def build_cache(
    config: str | Path | Mapping[str, Any] | CacheConfig,
    out: Location,
    *,
    device: str = "auto",
    workers: int = 1,
    batch_size: int | None = None,
    download: bool = False,
    allow: Collection[str] = (),
    on_unit: OnUnit = lambda array, shard, seconds: None,
) -> Cache:
    """Craft perturbations, ask every teacher, store both, seal, and open what came out, as `darht-cache build` does.

    A build that was stopped goes on; a cache that is whole is opened.

    Args:
        config: a YAML file, to which its paths are relative; or its contents as a mapping or a `CacheConfig`, whose
            paths are relative to the current folder.
        out: the cache's folder or URL.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        workers: processes that share the work; the bytes are those of one. They are spawned: call this under
            `if __name__ == "__main__":` in a script that has more than one.
        batch_size: images in one forward pass; None for 256, or what fits on a GPU.
        download: fetch CIFAR when its files are not there.
        allow: teachers to take though they make no sense: see `darht.cache.builder.sense.check_teachers`.
        on_unit: told array, shard and seconds (0 when it was there) after every unit.

    Raises:
        ConfigError, DataError, ModelError: whatever is wrong with the config, the images or the teachers; before any
            work, where a teacher makes no sense.
        SpecMismatchError: `out` holds another cache.
    """
    if isinstance(config, Mapping):
        config = check_config(config, "config")
    wanted = Path(config) if isinstance(config, str) else config
    pool = PoolConfig(engine="local", workers=workers, device=device)
    where = pick_device(device if pool.alone else "cpu")  # the others load the teachers where they compute
    known = spec_in(out)
    plan = plan_build(wanted, device=where, download=download, known=known, out=out)
    check_teachers(plan, out, device=pool.asking_device(), allow=allow)
    common: dict[str, Any] = {"batch_size": batch_size, "on_unit": lambda array, *rest: on_unit(array.name, *rest)}
    if pool.alone:
        build(plan, out, device=where, **common)
    else:
        there = wanted.resolve() if isinstance(wanted, Path) else wanted
        load = functools.partial(plan_build, there, known=known, out=out, trust_code=is_trusting())
        build_shared(plan, load, out, pool, on_notice=lambda text: None, **common)
    seal(out)
    return open_shards(out)
