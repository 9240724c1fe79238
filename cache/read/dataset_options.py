"""What a `CacheDataset` may be asked for: the rules of its arguments, and what its batches depend on."""

import sys
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, get_args

import numpy as np

from darht.cache.format.spec import AttackSpec
from darht.cache.read.draw import choose_attack
from darht.cache.read.loader import training_rows
from darht.cache.read.reader import Cache
from darht.core.config import fingerprint
from darht.core.errors import ConfigError

Rows = Literal["training", "holdout", "all"]
Pixels = Literal["uint8", "float"]
ALL_ATTACKS = "all"


@dataclass(eq=False, repr=False)
class Options:
    """The arguments of a `CacheDataset`, which says what they mean."""

    cache: Cache
    _: KW_ONLY
    batch_size: int = 256
    seed: int = 0
    epoch: int = 0
    rows: Rows = "training"
    views: bool = True
    pixels: Pixels = "uint8"
    logits: bool = True
    adversarial: str | None = None
    rank: int = 0
    world: int = 1
    memory_gib: float = 8.0
    drop_last: bool = True

    def _check(self, cache: object) -> None:
        """Raise ConfigError with every rule that an argument breaks."""
        if not isinstance(cache, Cache):
            raise ConfigError(f"a dataset takes an opened cache: open_cache({str(cache)!r})")
        numbers = {"batch_size": (self.batch_size, 1), "world": (self.world, 1), "rank": (self.rank, 0)}
        numbers |= {"epoch": (self.epoch, 0), "seed": (self.seed, -sys.maxsize)}
        problems = [problem for name, (value, least) in numbers.items() for problem in whole_number(name, value, least)]
        if not problems and self.rank >= self.world:
            problems.append(f"rank must lie in 0..{self.world - 1}, for world is {self.world}; got {self.rank}")
        if not problems and self.batch_size < self.world:
            problems.append(f"batch_size is that of all {self.world} processes together; got {self.batch_size}")
        if self.rows not in get_args(Rows):
            problems.append(f"rows must be one of {', '.join(get_args(Rows))}; got {self.rows!r}")
        if self.pixels not in get_args(Pixels):
            problems.append(f"pixels must be one of {', '.join(get_args(Pixels))}; got {self.pixels!r}")
        problems += self._attack_problems(cache.spec.attacks)
        if problems:
            raise ConfigError("; ".join(problems))

    def _attack_problems(self, attacks: Mapping[str, AttackSpec]) -> list[str]:
        if self.adversarial is None:
            return []
        wanted = tuple(attacks) if self.adversarial == ALL_ATTACKS else (self.adversarial,)
        if not attacks or not set(wanted) <= set(attacks):
            known = f"{ALL_ATTACKS}, or one of {', '.join(attacks)}" if attacks else "None, for the cache has no attack"
            return [f"adversarial must be {known}; got {self.adversarial!r}"]
        finer = [name for name in wanted if attacks[name].scale != 1]
        if finer and self.pixels == "uint8":
            return [f"{', '.join(finer)} moves pixels by parts of a level: ask for pixels='float'"]
        return []

    def _source_rows(self) -> np.ndarray:
        """The rows that are asked for, int64, in order.

        Raises:
            ConfigError: there are none.
        """
        training, holdout = training_rows(self.cache), np.array(self.cache.manifest.holdout, dtype=np.int64)
        rows = {"training": training, "holdout": holdout, "all": np.union1d(training, holdout)}[self.rows]
        if not len(rows):
            raise ConfigError(
                f"{self.cache.folder} has no {self.rows} rows: choose others of {', '.join(get_args(Rows))}"
            )
        return rows

    def _attack(self, attacks: tuple[str, ...], number: int) -> int | None:
        """Which attack batch `number` of the whole run shows, as a position in `attacks`."""
        if self.adversarial is None:
            return None
        if self.adversarial == ALL_ATTACKS:
            return choose_attack(len(attacks), seed=self.seed, number=number)
        return attacks.index(self.adversarial)

    def _depends_on(self) -> dict[str, Any]:
        """What rows, views and attacks of all batches depend on, beside the memory; not ranks, which share them."""
        names = ("seed", "batch_size", "rows", "views", "adversarial", "drop_last")
        found = {"cache_root_hash": self.cache.root_hash, "excluded_rows": fingerprint(self.cache.excluded)}
        return found | {name: getattr(self, name) for name in names}


def whole_number(name: str, value: object, least: int) -> list[str]:
    """What is wrong with a whole number."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= least:
        return []
    return [f"{name} must be a whole number{f' of at least {least}' if least >= 0 else ''}; got {value!r}"]
