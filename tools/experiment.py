"""Run the whole job from one file: teachers, cache, inspection, students, evaluation.

`darht-experiment RECIPE.yaml --out DIR` runs the commands that a person would type, prints each before
it runs, and ends with a table. A finished stage is not run again, so a stopped experiment goes on where it was.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from darht.cache.builder.config import load_config
from darht.core.config import load_mapping, parse
from darht.core.errors import ConfigError
from darht.core.files import write_atomic
from darht.core.keys import check_seed
from darht.core.recipes import find_recipe
from darht.core.sealed import read_sealed, write_sealed
from darht.core.zoo import absolute, teacher_at
from darht.tools.stage_pool import Call, Stage, run_side_by_side
from darht.trainer.config import load_recipe

STAGES = "stages.json"


@dataclass(frozen=True)
class TeacherPlan:
    """How one teacher of the experiment is made: options of `darht-teacher train`, or the folder of one that is there.

    Attributes:
        arch: of a teacher that is trained.
        kwargs, resize, algorithm, set: the other options of its training.
        path: of a trained or imported teacher's folder, relative to the experiment's file; it is only measured.
        role: in the cache, robust or vanilla.
        allow: take it though it makes no sense (`--allow` of `darht-cache build`).
    """

    arch: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    resize: int | None = None
    algorithm: str = "pgd-at"
    set: dict[str, Any] = field(default_factory=dict)
    path: str | None = None
    role: Literal["robust", "vanilla"] = "robust"
    allow: bool = False

    def __post_init__(self) -> None:
        if (self.arch is None) == (self.path is None):
            raise ConfigError("a teacher has an arch to train, or the path of a teacher's folder: give one of them")
        if self.path is not None and (self.kwargs, self.resize, self.algorithm, self.set) != ({}, None, "pgd-at", {}):
            raise ConfigError(
                f"the teacher in {self.path} is trained already: leave kwargs, resize, algorithm and set out"
            )


@dataclass(frozen=True)
class ExperimentConfig:
    """An experiment.

    Attributes:
        data: a source, with `limit` (training rows), `test_limit` (test rows) and `holdout`.
        teachers: by name.
        cache: `views`, `attacks`, `store` and `seed` of the cache.
        students: a training recipe by name.
        row: of `darht-inspect neighbours`.
        seeds: how many students are trained by each recipe; they differ by their seed alone.
        baseline: the student that the others are compared with, image by image.
        tier: of `darht-eval`; with `standard` and `full` students are compared under AutoAttack.
    """

    data: dict[str, Any]
    teachers: dict[str, TeacherPlan]
    cache: dict[str, Any]
    students: dict[str, dict[str, Any]]
    row: int = 7
    seeds: int = 1
    baseline: str | None = None
    tier: Literal["quick", "standard", "full"] = "quick"

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ConfigError(f"seeds must be at least 1; got {self.seeds}")
        if self.baseline is not None and self.baseline not in self.students:
            raise ConfigError(f"baseline names no student: '{self.baseline}'; they are {', '.join(self.students)}")

    @property
    def score(self) -> str:
        """The score of an evaluation by which students are compared."""
        return "worst case" if self.tier == "quick" else "autoattack"

    def runs(self, name: str) -> list[str]:
        """The names of a student's runs: its own, or one for each seed."""
        return [name] if self.seeds == 1 else [f"{name}-{k}" for k in range(self.seeds)]


def load_experiment(path: Path) -> ExperimentConfig:
    """Read an experiment: a file, or the name of one that comes with darht.

    Raises:
        ConfigError: no such experiment, unknown keys, wrong values.
    """
    path = find_recipe(path)
    config = parse(ExperimentConfig, load_mapping(path), path.name)
    known = {"source", "limit", "test_limit", "holdout", "image_size"}
    unknown = sorted(set(config.data) - known)
    if unknown or "source" not in config.data:
        raise ConfigError(f"{path.name}: data takes {', '.join(sorted(known))}, and source is required; got {unknown}")
    settings = (config.cache, *config.students.values(), *(teacher.set for teacher in config.teachers.values()))
    for seed in (one.get("seed") for one in settings):
        if isinstance(seed, int):
            check_seed(seed)
    teachers = {name: _found(plan, path.parent) for name, plan in config.teachers.items()}
    return replace(config, teachers=teachers)


def _found(plan: TeacherPlan, base: Path) -> TeacherPlan:
    """A plan whose folder is a path from anywhere; `base` is where the experiment's file lies."""
    if plan.path is None:
        return plan
    return replace(plan, path=absolute(teacher_at(plan.path, base)))


def plan_stages(config: ExperimentConfig, out: Path, root: Path | None) -> list[Stage]:
    """The commands of an experiment, in order."""
    data = ["--data", config.data["source"], *(["--root", str(root)] if root else [])]
    data += _options(config.data, "image_size")
    stages = [_teach(name, plan, config, out, data) for name, plan in config.teachers.items()]
    cache, limit = str(out / "cache"), config.data.get("test_limit")
    allowed = [word for name, plan in config.teachers.items() if plan.allow for word in ("--allow", name)]
    words = ("darht-cache", "build", str(out / "cache.yaml"), "--out", cache, *allowed)
    stages.append(Stage("cache", words, tuple(stage.name for stage in stages)))
    stages.append(Stage("info", ("darht-cache", "info", cache), ("cache",)))
    if config.cache.get("attacks"):  # both look at perturbations
        stages.append(Stage("transfer", ("darht-inspect", "transfer", cache), ("cache",)))
        neighbours = ("darht-inspect", "neighbours", cache, "--row", str(config.row))
        stages.append(Stage("neighbours", neighbours, ("cache",)))
    cut = () if limit is None else ("--limit", str(limit))
    cut = cut if config.tier == "quick" else (*cut, "--tier", config.tier)
    for name, recipe in config.students.items():
        for k, run in enumerate(config.runs(name)):
            file, folder = str(out / "recipes" / f"{name}.yaml"), str(out / "run" / run)
            seed = () if config.seeds == 1 else ("--set", f"seed={recipe.get('seed', 0) + k}")
            words = ("darht-train", "--shards", cache, "--recipe", file, *seed, "--out", folder, "--resume")
            stages.append(Stage(f"train {run}", words, ("cache",)))
            stages.append(Stage(f"eval {run}", ("darht-eval", folder, *cut), (f"train {run}",)))
    return stages


def _teach(name: str, plan: TeacherPlan, config: ExperimentConfig, out: Path, data: list[str]) -> Stage:
    if plan.arch is None:
        limit = _options({"limit": config.data.get("test_limit")}, "limit")
        allow = ("--allow", Path(str(plan.path)).name) if plan.allow else ()
        return Stage(f"teacher {name}", ("darht-teacher", "check", str(plan.path), *data, *limit, *allow))
    words = ["darht-teacher", "train", *data, *_options(config.data, "limit", "test_limit")]
    words += ["--arch", plan.arch, "--kwargs", json.dumps(plan.kwargs)]
    words += ["--resize", str(plan.resize)] if plan.resize else []
    words += ["--algorithm", plan.algorithm]
    for key, value in plan.set.items():
        words += ["--set", f"{key}={json.dumps(value) if not isinstance(value, str) else value}"]
    return Stage(f"teacher {name}", (*words, "--out", str(out / "teachers" / name), "--resume"))


def _options(data: dict[str, Any], *names: str) -> list[str]:
    return [word for name in names if data.get(name) for word in (f"--{name.replace('_', '-')}", str(data[name]))]


def write_inputs(config: ExperimentConfig, out: Path, root: Path | None) -> None:
    """Write the cache's spec and the students' recipes, the files that the commands read."""
    data = {key: value for key, value in config.data.items() if key != "test_limit"}
    if root is not None:
        data["root"] = str(root.resolve())
    teachers = {
        name: {"path": plan.path or f"teachers/{name}", "role": plan.role} for name, plan in config.teachers.items()
    }
    spec = {"data": data, "teachers": teachers, **config.cache}
    write_atomic(out / "cache.yaml", yaml.safe_dump(spec, sort_keys=False).encode())
    for name, recipe in config.students.items():
        write_atomic(out / "recipes" / f"{name}.yaml", yaml.safe_dump(recipe, sort_keys=False).encode())


def run_experiment(
    config: ExperimentConfig, out: Path, *, root: Path | None, call: Call, tell: Callable[[str], None], jobs: int = 1
) -> dict[str, float]:
    """Run every stage that has not been finished with the same words before.

    Args:
        config: the experiment.
        out: where everything goes: `teachers/`, `cache.yaml`, `cache/`, `recipes/`, `run/`.
        root: of the data set.
        call: runs one command.
        tell: is told each command before it runs.
        jobs: stages at a time; with more than one, each is a process that writes to `logs/`.

    Returns:
        Seconds by stage.

    Raises:
        ConfigError: a file that a later stage would refuse; before any stage has run.
        StageError: a stage failed beside others.
    """
    check_inputs(config, out, root)
    done, started = read_stages(out), {}
    left = []
    for stage in plan_stages(config, out, root):
        if done.get(stage.name, {}).get("line") == stage.line:
            tell(f"# done before: {stage.line}")
        else:
            left.append(stage)

    def on_start(stage: Stage) -> None:
        tell(f"$ {stage.line}")
        started[stage.name] = time.perf_counter()

    def on_end(stage: Stage) -> None:
        seconds = round(time.perf_counter() - started[stage.name], 2)
        done[stage.name] = {"line": stage.line, "seconds": seconds}
        write_sealed(out / STAGES, done)
        if jobs > 1:
            tell(f"# {stage.name}: {seconds:.0f} s")

    if jobs > 1:
        run_side_by_side(left, call, jobs=jobs, logs=out / "logs", on_start=on_start, on_end=on_end)
    else:
        for stage in left:
            on_start(stage)
            call(stage.words)
            on_end(stage)
    return {name: stage["seconds"] for name, stage in done.items()}


def check_inputs(config: ExperimentConfig, out: Path, root: Path | None) -> None:
    """Write the files that stages read, and refuse those that a later stage would refuse."""
    write_inputs(config, out, root)
    load_config(out / "cache.yaml")
    for name in config.students:
        load_recipe(out / "recipes" / f"{name}.yaml", ())
    rows = config.data.get("limit")
    if rows is not None and not 0 <= config.row < rows:
        raise ConfigError(f"row must lie in 0..{rows - 1}, the rows that data.limit takes; got {config.row}")


def read_stages(out: Path) -> dict[str, dict[str, Any]]:
    """The stages that were noted in `out`, by name; none where nothing has run.

    Raises:
        CorruptError: the note was changed after it was written.
    """
    path = out / STAGES
    return read_sealed(path, "remove it, and every stage asks its command again").value if path.is_file() else {}
