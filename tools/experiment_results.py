"""What a finished experiment measured: its tables, and what was gained over the student that is its baseline."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darht.cache.builder.teachers import read_card
from darht.cache.read.reader import open_cache
from darht.core.sealed import read_sealed
from darht.tools.experiment import ExperimentConfig
from darht.trainer.evaluation.report.compare import compare_seeds


@dataclass(frozen=True)
class Result:
    """What an experiment measured, ready to print.

    Attributes:
        teachers: name, architecture, algorithm, clean and PGD-20 accuracy, seconds.
        students: name, recipe, inner mode, clean, FGSM, PGD-20, worst transfer and worst case or AutoAttack, its gain
            over the baseline, seconds; means where there are several seeds.
        facts: what was gained, and other lines: the cache's bytes, where things lie.
    """

    teachers: Sequence[tuple[str, ...]]
    students: Sequence[tuple[str, ...]]
    facts: Sequence[str]


def collect(config: ExperimentConfig, out: Path, seconds: dict[str, float]) -> Result:
    """Read the cards, the evaluations and the manifest of a finished experiment."""
    teachers = []
    for name, plan in config.teachers.items():
        card = read_card(Path(plan.path) if plan.path else out / "teachers" / name)
        measured = card.accuracy.get(f"{config.data['source']} test", {})  # a run's files are left as they are
        figures = (f"{measured[key]:.1f}" if key in measured else "-" for key in ("clean", "pgd-20"))
        teachers.append((name, card.arch, card.training["algorithm"], *figures, f"{seconds[f'teacher {name}']:.0f}"))
    gained = gains(config, out)
    students = [student_row(name, config, out, seconds, gained) for name in config.students]
    facts = [
        *(gain.sentence(name, config) for name, gain in gained.items()),
        *(_cache_fact(name, out, seconds) for name in config.caches),
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
    return Result(teachers, students, facts)


def _cache_fact(name: str, out: Path, seconds: dict[str, float]) -> str:
    cache = open_cache(out / name)
    size = sum(shard.size for shard in cache.manifest.shards)
    return (
        f"{name}: {size / 1e6:.2f} MB, {size / cache.rows:.0f} bytes a row, built in {seconds[name]:.0f} s, "
        f"root hash {cache.root_hash[:16]}"
    )


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

    def sentence(self, name: str, config: ExperimentConfig) -> str:
        """What was gained, in words."""
        low, high = self.interval
        chance = "more than chance" if low > 0 else "less than without, beyond chance" if high < 0 else "within chance"
        where = "in the worst case" if config.tier == "quick" else "under AutoAttack"
        seeds = f", {config.seeds} seeds each" if config.seeds > 1 else ""
        return (
            f"{name} against {config.baseline}: {self.points:+.1f} points {where}, 95 % interval {low:+.1f} "
            f"to {high:+.1f} ({self.images} images, paired{seeds}): {chance}"
        )


def gains(config: ExperimentConfig, out: Path, score: str | None = None) -> dict[str, Gain]:
    """The gain of every student but the baseline, by name, in `score` or what they are judged by; none without one."""
    if config.baseline is None:
        return {}
    score = score or config.score
    folders = {name: [out / "run" / run for run in config.runs(name)] for name in config.students}
    found = {}
    for name in config.students:
        if name != config.baseline:
            points, interval, _ = compare_seeds(folders[name], folders[config.baseline], score)
            found[name] = Gain(points, interval, int(evaluation(folders[name][0])["data"]["rows"]))
    return found


def evaluation(run: Path) -> dict[str, Any]:
    """What `darht-eval` wrote into a run."""
    report: dict[str, Any] = read_sealed(run / "eval.json", "run darht-eval again").value
    return report


def student_row(
    name: str, config: ExperimentConfig, out: Path, seconds: dict[str, float], gained: dict[str, Gain]
) -> tuple[str, ...]:
    """A row of `Result.students`."""
    runs = config.runs(name)
    reports = [evaluation(out / "run" / run) for run in runs]
    figures = [_figures(report, config.score) for report in reports]
    columns = zip(*figures, strict=True)  # what was left out of one was left out of all, and stays empty
    texts = [
        "-" if None in column else f"{statistics.fmean(value or 0.0 for value in column):.1f}" for column in columns
    ]
    recipe, taken = reports[0]["recipe"], statistics.fmean(seconds[f"train {run}"] for run in runs)
    gain = gained[name].cell if name in gained else ""
    return (name, recipe["recipe"], recipe["inner"]["kind"], *texts, gain, f"{taken:.0f}")


def _figures(report: dict[str, Any], last: str) -> list[float | None]:
    """Clean, FGSM, PGD-20, worst transfer and the score named last, in per cent."""
    scores = {score["name"]: score["accuracy"] for score in report["scores"]}
    transfer = min((value for key, value in scores.items() if key.startswith("transfer:")), default=None)
    return [*(scores.get(key) for key in ("clean", "fgsm", "pgd-20")), transfer, scores.get(last)]
