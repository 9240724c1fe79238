"""What a finished experiment measured: its tables, and what was gained over the student that is its baseline."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darht.cache.admin.cost import cost_of
from darht.cache.builder.teachers import read_card
from darht.cache.read.reader import Cache, open_cache
from darht.core.sealed import read_sealed
from darht.tools.experiment_config import ExperimentConfig
from darht.trainer.evaluation.report.compare import compare_seeds, mean_of_seeds
from darht.trainer.student.losses import RECIPES


@dataclass(frozen=True)
class Gain:
    """By how much a student's score lies above the baseline's: points, 95 % interval, and on how many images."""

    points: float
    interval: tuple[float, float]
    images: int

    @property
    def cell(self) -> str:
        """For the table."""
        return f"{self.points:+.1f} [{self.interval[0]:+.1f}, {self.interval[1]:+.1f}]"

    def sentence(self, name: str, config: ExperimentConfig, seeds: int) -> str:
        """What was gained over so many seeds, in words."""
        low, high = self.interval
        chance = "more than chance" if low > 0 else "less than without, beyond chance" if high < 0 else "within chance"
        where = "in the worst case" if config.tier == "quick" else "under AutoAttack"
        each = f", {seeds} seeds each" if seeds > 1 else ""
        return (
            f"{name} against {config.baseline}: {self.points:+.1f} points {where}, 95 % interval {low:+.1f} "
            f"to {high:+.1f} ({self.images} images, paired{each}): {chance}"
        )


@dataclass(frozen=True)
class Share:
    """A share of test images in per cent, the mean over seeds, and its 95 % interval over images."""

    mean: float
    low: float
    high: float

    @property
    def cell(self) -> str:
        """For the table."""
        return f"{self.mean:.1f} ± {(self.high - self.low) / 2:.1f}"


@dataclass(frozen=True)
class Way:
    """One way of training, over its seeds.

    Attributes:
        name: of the student in the experiment.
        recipe, inner: how it was trained.
        teachers: whose answers it was trained with.
        parameters: of the student.
        clean, pgd, judged: accuracies; `judged` under the attacks that ways are compared by.
        gain, clean_gain: over the baseline, paired by image; None for the baseline itself, and without one.
        transfer: accuracy under the examples of the teacher whose examples do most; None where they were left out.
        cpu_seconds: of training one student; scoring held-out rows is left out. None where the log has none.
        cache_seconds: of work in the cache, by its own records; all its students share it, and stops do not count.
    """

    name: str
    recipe: str
    inner: str
    teachers: tuple[str, ...]
    parameters: int
    clean: Share
    pgd: Share
    judged: Share
    gain: Gain | None
    clean_gain: Gain | None
    transfer: float | None
    cpu_seconds: float | None
    cache_seconds: float


@dataclass(frozen=True)
class Result:
    """What an experiment measured, ready to print.

    Attributes:
        teachers: name, architecture, algorithm, clean and PGD-20 accuracy, seconds of training, if it was trained here.
        ways: of training.
        facts: what was gained, and other lines: the cache's bytes, where things lie.
        seeds: of which every way was trained and measured; an experiment that runs still has fewer than it asks for.
    """

    teachers: Sequence[tuple[str, ...]]
    ways: Sequence[Way]
    facts: Sequence[str]
    seeds: int


def seeds_done(config: ExperimentConfig, out: Path) -> int:
    """Of how many seeds every way has been measured."""
    ways = zip(*(config.runs(name) for name in config.students), strict=True)
    whole = (all((out / "run" / run / "eval.json").is_file() for run in runs) for runs in ways)
    return sum(1 for _ in itertools.takewhile(bool, whole))


def collect(config: ExperimentConfig, out: Path, seconds: dict[str, float]) -> Result:
    """Read the cards, the evaluations and the manifest of an experiment that is finished for one seed or more."""
    teachers = []
    for name, plan in config.teachers.items():
        card = read_card(Path(plan.path) if plan.path else out / "teachers" / name)
        measured = card.accuracy.get(f"{config.data['source']} test", {})  # a run's files are left as they are
        figures = (f"{measured[key]:.1f}" if key in measured else "-" for key in ("clean", "pgd-20"))
        taught = "" if plan.path else f"{seconds[f'teacher {name}']:.0f}"
        teachers.append((name, card.arch, card.training["algorithm"], *figures, taught))
    seeds = seeds_done(config, out)
    runs = {name: [out / "run" / run for run in config.runs(name)[:seeds]] for name in config.students}
    caches = {name: open_cache(out / name) for name in config.caches}
    ways = measure_ways(config, runs, caches)
    facts = [
        *(way.gain.sentence(way.name, config, seeds) for way in ways if way.gain),
        *(_cache_fact(name, cache) for name, cache in caches.items()),
        f"seconds: {', '.join(f'{name} {value:.0f}' for name, value in seconds.items())}; "
        f"stages together {sum(seconds.values()):.0f}",
        f"teachers: {out / 'teachers'}   "
        f"{'   '.join(f'spec: {out / name}.yaml   cache: {out / name}' for name in config.caches)}   "
        f"runs: {out / 'run'}",
    ]
    if any(name.startswith("transfer") for name in seconds):
        pictures = [
            out / f"{name}-{what}.png" for name in config.caches for what in ("transfer", f"neighbours-{config.row}")
        ]
        facts.append(f"pictures: {', '.join(map(str, pictures))}")
    return Result(teachers, ways, facts, seeds)


def _cache_fact(name: str, cache: Cache) -> str:
    size = sum(shard.size for shard in cache.manifest.shards)
    return (
        f"{name}: {size / 1e6:.2f} MB, {size / cache.rows:.0f} bytes a row, {cost_of(cache).total:.0f} s of work, "
        f"root hash {cache.root_hash[:16]}"
    )


def gains(config: ExperimentConfig, runs: dict[str, list[Path]], score: str) -> dict[str, Gain]:
    """The gain in `score` of every student but the baseline, by name, over all its runs; none without a baseline."""
    if config.baseline is None:
        return {}
    found = {}
    for name, folders in runs.items():
        if name != config.baseline:
            points, interval, _ = compare_seeds(folders, runs[config.baseline], score)
            found[name] = Gain(points, interval, int(evaluation(folders[0])["data"]["rows"]))
    return found


def evaluation(run: Path) -> dict[str, Any]:
    """What `darht-eval` wrote into a run."""
    report: dict[str, Any] = read_sealed(run / "eval.json", "run darht-eval again").value
    return report


def measure_ways(config: ExperimentConfig, runs: dict[str, list[Path]], caches: dict[str, Cache]) -> list[Way]:
    """Read the evaluations and logs of the runs of every student, by its name, and what its cache cost."""
    judged, clean = gains(config, runs, config.score), gains(config, runs, "clean")
    ways = []
    for name, folders in runs.items():
        cache, report = config.cache_of(name), evaluation(folders[0])
        recipe, inner = report["recipe"]["recipe"], report["recipe"]["inner"]["kind"]
        taught = RECIPES[recipe].teachers_needed != "none"
        ways.append(
            Way(
                name,
                recipe,
                inner,
                config.caches[cache] if taught else (),
                report["model"]["parameters"],
                clean=_share(folders, "clean"),
                pgd=_share(folders, "pgd-20"),
                judged=_share(folders, config.score),
                gain=judged.get(name),
                clean_gain=clean.get(name),
                transfer=_mean([_transfer(evaluation(run)) for run in folders]),
                cpu_seconds=_mean([_cpu_seconds(run) for run in folders]),
                cache_seconds=cost_of(caches[cache]).total if taught else 0.0,
            )
        )
    return ways


def _share(runs: Sequence[Path], score: str) -> Share:
    mean, (low, high) = mean_of_seeds(runs, score)
    return Share(mean, low, high)


def _cpu_seconds(run: Path) -> float | None:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return _sum([row.get("cpu_seconds") for row in rows])  # runs of earlier versions did not count them


def _transfer(report: dict[str, Any]) -> float | None:
    found = (score["accuracy"] for score in report["scores"] if score["name"].startswith("transfer:"))
    return min(found, default=None)


def _mean(values: Sequence[float | None]) -> float | None:
    total = _sum(values)
    return None if total is None else total / len(values)


def _sum(values: Sequence[float | None]) -> float | None:
    return None if None in values else float(sum(value or 0.0 for value in values))
