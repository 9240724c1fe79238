"""How a build is shared: among jobs, each of which builds its row blocks, and inside a job among workers.

A row block is shard number k of all arrays. Perturbations come before the logits that need them and both lie in one
block, so nobody waits for anybody, and any block can be built by anyone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from darht.cache.builder.build import BuildReport, claim_folder
from darht.cache.builder.plan import Plan
from darht.cache.builder.pool import OnNotice, Pool, Task, UnitDone, share
from darht.cache.builder.writer import OnUnit
from darht.core.config import fingerprint
from darht.core.device import pick_device
from darht.core.errors import ConfigError
from darht.core.memory import give_back
from darht.core.storage import LocalStorage, Location, Storage, open_storage

_INDEXES = ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX", "RANK")


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """Who works on a build.

    Attributes:
        engine: `local` for processes of this machine, `ray` for actors of a Ray cluster.
        workers: how many; with Ray on GPUs there is one on each.
        device: auto, cpu, cuda or cuda:N; several processes go round the GPUs of this machine.
    """

    engine: Literal["local", "ray"] = "local"
    workers: int = 1
    device: str = "auto"

    @property
    def alone(self) -> bool:
        """Whether one worker does all of it, which needs no process of its own."""
        return self.engine == "local" and self.workers == 1

    def asking_device(self) -> torch.device:
        """Where this process asks the teachers some images before the work begins; Ray's machines may have others."""
        return pick_device(self.device if self.engine == "local" else "auto")


@dataclass(frozen=True)
class Part:
    """The row blocks of a job, and in words why it has these."""

    shards: tuple[int, ...]
    reason: str


def part_of(shards: int, index: int, jobs: int) -> tuple[int, ...]:
    """The row blocks of job `index` of `jobs`: every `jobs`-th, so that the parts differ by one block at most."""
    return tuple(range(index, shards, jobs))


def choose_part(choice: str, shards: int, environ: Mapping[str, str]) -> Part:
    """What `--shard` means.

    Args:
        choice: `I/N` (job I of N, from 0), `auto` or `auto/N` (I, and N unless it is given, from the scheduler's
            variables), or numbers of row blocks such as `3,7,9`.
        shards: how many row blocks there are.
        environ: the variables of a job.

    Raises:
        ConfigError: any other text, a number out of range, or variables that do not say enough.
    """
    head, slash, tail = choice.partition("/")
    if head == "auto":
        index, jobs, found = _from_environment(environ, _whole(tail, "--shard auto/N") if slash else None)
    elif slash:
        index, jobs, found = _whole(head, "--shard I/N"), _whole(tail, "--shard I/N"), ""
    else:
        return _listed(choice, shards)
    if not 0 <= index < jobs:
        raise ConfigError(f"--shard counts jobs from 0: I/N needs 0 <= I < N; got {index}/{jobs}{found}")
    chosen = part_of(shards, index, jobs)
    return Part(chosen, f"job {index}/{jobs}{found}: {len(chosen)} of {shards} row blocks")


def _listed(choice: str, shards: int) -> Part:
    rule = "--shard takes I/N, auto, auto/N or row blocks such as 3,7,9"
    chosen = tuple(sorted({_whole(text, rule) for text in choice.split(",")}))
    if not 0 <= chosen[0] <= chosen[-1] < shards:
        raise ConfigError(f"--shard: row blocks lie in 0..{shards - 1}; got {choice}; for job I of N write I/N")
    return Part(chosen, f"row blocks {','.join(map(str, chosen))}: {len(chosen)} of {shards}")


def _from_environment(environ: Mapping[str, str], jobs: int | None) -> tuple[int, int, str]:
    """I, N and which variables they come from. With N given, I is the variable itself: so a single job can be rerun."""
    present = [name for name in _INDEXES if name in environ]
    if len(present) != 1:
        found = f"found {' and '.join(present)}" if present else f"found none of {', '.join(_INDEXES)}"
        raise ConfigError(f"--shard auto needs the variable of one scheduler, {found}: write --shard I/N")
    name = present[0]
    index = _variable(environ, name)
    if jobs is not None:
        return index, jobs, f" ({name}={index})"
    if name == "JOB_COMPLETION_INDEX":
        raise ConfigError(f"{name}={index}, but Kubernetes does not tell how many jobs there are: --shard auto/N")
    if name == "RANK":
        size = _variable(environ, "WORLD_SIZE")
        return index, size, f" (RANK={index}, WORLD_SIZE={size})"
    first, count = _variable(environ, "SLURM_ARRAY_TASK_MIN"), _variable(environ, "SLURM_ARRAY_TASK_COUNT")
    step = _variable(environ, "SLURM_ARRAY_TASK_STEP", default=1)
    found = f" ({name}={index}, SLURM_ARRAY_TASK_MIN={first}, SLURM_ARRAY_TASK_COUNT={count})"
    if step < 1 or (index - first) % step or (index - first) // step >= count:
        raise ConfigError(f"the numbers of the job array are not evenly spaced{found}: write --shard auto/N or I/N")
    return (index - first) // step, count, found


def _variable(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    if name not in environ and default is not None:
        return default
    return _whole(environ.get(name, ""), f"--shard auto reads {name}")


def _whole(text: str, rule: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(f"{rule}, in whole numbers; got '{text}'")
    return int(text)


def build_shared(
    plan: Plan,
    load: Callable[..., Plan],
    out: Location,
    pool_config: PoolConfig,
    *,
    batch_size: int | None = None,
    shards: Sequence[int] | None = None,
    on_unit: OnUnit,
    on_notice: OnNotice,
) -> BuildReport:
    """`build` by several workers, each of which loads plan and teachers once; the bytes are those of one.

    Args:
        plan: of this process, on any device; the workers' plans must have its spec.
        load: makes the plan of a worker, `load(device=device)`; it travels to it.
        out: the cache's folder or URL, which every worker must reach.
        pool_config: how many, on what.
        batch_size: images in one forward pass; None for 256, or what fits on a GPU.
        shards: the row blocks to build; None for all of them.
        on_unit: called after every unit with its array, shard and seconds (0 when it was there already).
        on_notice: called with a line when a worker is lost.

    Raises:
        ConfigError: a cache in this process's memory, a device that is not there, Ray that is not installed.
        CacheError: a row block took three workers along, or the folder is not this cache's.
        DarhtError: whatever a worker raised.
    """
    folder, chosen = _reachable(open_storage(out)), range(plan.shards) if shards is None else shards
    claim_folder(folder, plan)
    give_back()  # what the first look at files left: from here on others compute
    report, seen = BuildReport(), set[tuple[str, int]]()

    def count(unit: UnitDone) -> None:
        if (unit.array, unit.shard) not in seen:  # those of a lost worker come again, as reused
            seen.add((unit.array, unit.shard))
            report.add(unit.array, unit.seconds)
            on_unit(plan.arrays[unit.array], unit.shard, unit.seconds)

    if chosen:
        task = Task(load=load, fingerprint=fingerprint(plan.spec), out=folder, batch_size=batch_size)
        pool, size = _pool(task, pool_config, min(pool_config.workers, len(chosen)))
        share(chosen, pool, size, on_unit=count, on_notice=on_notice)
    return report


def _reachable(folder: Storage) -> Storage:
    """The same storage, as another process can open it."""
    if isinstance(folder, LocalStorage):
        return LocalStorage(folder.folder.resolve())
    if str(folder).startswith("memory://"):
        raise ConfigError(
            f"{folder} lies in the memory of one process: leave out --workers and --engine, or give a folder"
        )
    return folder


def _pool(task: Task, pool_config: PoolConfig, workers: int) -> tuple[Pool, int]:
    if pool_config.engine == "ray":
        from darht.cache.builder.pool_ray import ray_pool

        return ray_pool(task, pool_config.device, workers)
    from darht.cache.builder.pool_processes import process_pool

    return process_pool(task, pool_config.device, workers), workers
