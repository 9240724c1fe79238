"""When a cache pays: what its teachers and attacks cost, against teachers in the training loop.

The cache cost C seconds: the sum over its commit records. A loop with live teachers asks each of them once about every
image of every epoch. An epoch of that costs L seconds on the machine that built the cache, the sum over teachers of
(seconds of its clean logits) / (rows x views) x (rows trained on). So the cache costs as much as C / L epochs with live
teachers, and n students of E epochs are cheaper from the cache as soon as n E L > C. Methods that ask teachers in the
inner loop too (AdaAD) make L larger, by their number of steps and the backward passes.
"""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darht.cache.format.commit import read_commit
from darht.cache.read.reader import Cache
from darht.core.errors import CacheError, CorruptError
from darht.core.sealed import read_sealed

_LOOKUPS = 16  # questions to an object store at a time


@dataclass(frozen=True)
class Cost:
    """Seconds of work, from the commit records.

    Attributes:
        attacks: of crafting, by attack.
        teachers: of logits, clean and adversarial, by teacher.
        others: of everything else: images, labels, Jacobians.
        epoch: of one pass of every teacher over the rows trained on, as a live loop makes it in each epoch.
    """

    attacks: dict[str, float]
    teachers: dict[str, float]
    others: float
    epoch: float

    @property
    def total(self) -> float:
        """C, what the cache cost."""
        return sum(self.attacks.values()) + sum(self.teachers.values()) + self.others

    @property
    def epochs(self) -> float:
        """C / L: the epochs with live teachers that cost as much; infinite where teachers cost nothing measurable."""
        return self.total / self.epoch if self.epoch > 0 else math.inf


@dataclass(frozen=True)
class RunCost:
    """What a student of this cache cost.

    Attributes:
        epochs: E, as trained so far.
        seconds: of training, as its log has them.
        live: whether its teachers were in the loop, and so in `seconds`.
    """

    epochs: int
    seconds: float
    live: bool


def cost_of(cache: Cache) -> Cost:
    """The cost of a sealed cache.

    Raises:
        CorruptError: a commit record cannot be read.
    """
    seconds = {name: array_seconds(cache, name) for name in cache.arrays}
    attacks, spec = {name: seconds[f"delta/{name}"] for name in cache.spec.attacks}, cache.spec
    clean = {name: seconds[f"logits/{name}/clean"] for name in spec.teachers}
    logits = {
        name: clean[name] + sum(seconds[f"logits/{name}/{attack}"] for attack in spec.attacks) for name in spec.teachers
    }
    trained = spec.data.rows - len(cache.manifest.holdout)
    known = sum(attacks.values()) + sum(logits.values())
    epoch = sum(clean.values()) / (spec.data.rows * spec.views.count) * trained
    return Cost(attacks, logits, sum(seconds.values()) - known, epoch)


def array_seconds(cache: Cache, name: str) -> float:
    """What computing and writing an array took; records that are gone count nothing.

    Raises:
        CorruptError: a record cannot be read.
    """
    array = cache.arrays[name]
    with ThreadPoolExecutor(_LOOKUPS) as pool:  # behind a URL the times of so many small questions would add up
        commits = list(pool.map(lambda shard: read_commit(cache.folder, array, shard), range(array.shards)))
    return sum(commit.seconds for commit in commits if commit is not None)


def run_cost(run: Path, cache: Cache) -> RunCost:
    """What the log of a run's folder says.

    Raises:
        CacheError: it is no run, has no epoch yet, or was trained from another cache.
    """
    try:
        identity: dict[str, Any] = read_sealed(run / "run.json", "restore it").value["identity"]
        rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        spent, live = sum(float(row["seconds"]) for row in rows), identity["recipe"]["teachers"] == "live"
        root_hash = identity["cache_root_hash"]
    except (CorruptError, OSError, ValueError, KeyError, TypeError) as error:
        raise CacheError(
            f"{run} is not a run of darht-train ({error}); give the folder of one of this cache"
        ) from error
    if not rows:
        raise CacheError(f"{run} has no epoch in its log yet; go on with it first")
    if root_hash != cache.root_hash:
        raise CacheError(
            f"{run} was trained from the cache {root_hash[:12]}, this one is {cache.root_hash[:12]}; give a run of it"
        )
    return RunCost(len(rows), spent, live)


def cost_facts(cost: Cost, run: RunCost | None = None) -> list[tuple[str, str]]:
    """A cost for people, as pairs of name and value."""
    parts = [f"attack {name} {seconds:.1f} s" for name, seconds in cost.attacks.items()]
    parts += [f"teacher {name} {seconds:.1f} s" for name, seconds in cost.teachers.items()]
    rest = [f"the rest {cost.others:.1f} s"] if parts else []
    facts = [("cost", ": ".join(filter(None, (f"{cost.total:.1f} s", ", ".join(parts + rest)))))]
    if not cost.epoch:
        return facts
    pays = f"as much as {cost.epochs:.1f} epochs with these teachers in the loop, {cost.epoch:.2f} s an epoch"
    if run is not None:
        students = math.floor(cost.epochs / run.epochs) + 1
        spent = f"a student of {run.epochs} epochs took {run.seconds:.1f} s"
        spent += " with teachers in the loop" if run.live else f", with teachers in the loop {_live(cost, run):.1f} s"
        pays += f"; {spent}: the cache is the cheaper way from {students} student{'s' * (students > 1)} on"
    return [*facts, ("pays", pays)]


def _live(cost: Cost, run: RunCost) -> float:
    return run.seconds + run.epochs * cost.epoch
