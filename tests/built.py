"""A sealed cache made from a config: the whole offline stage in one call."""

from pathlib import Path
from typing import Any

import yaml


def sealed_cache(config: dict[str, Any], folder: Path, *, batch_size: int = 256) -> Path:
    """Write `folder/cache.yaml`, build `folder/cache` on the CPU and seal it; gives the cache's folder."""
    import torch

    from darht.cache.builder.build import build, plan_build
    from darht.cache.builder.seal import seal

    (folder / "cache.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    out, cpu = folder / "cache", torch.device("cpu")
    plan = plan_build(folder / "cache.yaml", device=cpu)
    build(plan, out, device=cpu, batch_size=batch_size, on_unit=lambda array, shard, seconds: None)
    seal(out)
    return out
