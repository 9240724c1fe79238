"""Run the whole job from one file: teachers, cache, inspection, students, evaluation.

`darht-experiment RECIPE.yaml --out DIR` runs the commands that a person would type, prints each before
it runs, and ends with a table. A finished stage is not run again, so a stopped experiment goes on where it was.
"""

import difflib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from darht.cache.builder.config import load_config
from darht.core.config import load_mapping, override, parse
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
        students: a training recipe by name; `set` in it names the teachers' set whose cache it trains from.
        sets: of teachers, by name, each with a cache of its own; left out, all teachers share one cache. A student that
            names none trains from the first.
        row: of `darht-inspect neighbours`.
        seeds: how many students are trained by each recipe; they differ by their seed alone.
        baseline: the student that the others are compared with, image by image.
        tier: of `darht-eval`; with `standard` and `full` students are compared under AutoAttack.
        transfer: attack students with the examples of their teachers too; large teachers make that the dearest part.
    """

    data: dict[str, Any]
    teachers: dict[str, TeacherPlan]
    cache: dict[str, Any]
    students: dict[str, dict[str, Any]]
    sets: dict[str, tuple[str, ...]] = field(default_factory=dict)
    row: int = 7
    seeds: int = 1
    baseline: str | None = None
    tier: Literal["quick", "standard", "full"] = "quick"
    transfer: bool = True

    def __post_init__(self) -> None:
        if not self.students:
            raise ConfigError("students must name one way of training or more; got none")
        if self.seeds < 1:
            raise ConfigError(f"seeds must be at least 1; got {self.seeds}")
        if self.baseline is not None and self.baseline not in self.students:
            raise ConfigError(f"baseline names no student: '{self.baseline}'; they are {', '.join(self.students)}")
        for name, members in self.sets.items():
            if not members or not set(members) <= set(self.teachers):
                raise ConfigError(f"set '{name}' must name teachers of {', '.join(self.teachers)}; got {members}")
        used = {member for members in self.sets.values() for member in members}
        for name, attack in self.cache.get("attacks", {}).items():
            if self.sets and attack.get("teacher") not in used:
                raise ConfigError(f"attack '{name}' names teacher '{attack.get('teacher')}', who is in no set")
        for name, student in self.students.items():
            if "set" in student and student["set"] not in self.sets:
                known = ", ".join(self.sets) or "none"
                raise ConfigError(f"student '{name}' trains from set '{student['set']}'; the sets are {known}")

    @property
    def score(self) -> str:
        """The score of an evaluation by which students are compared."""
        return "worst case" if self.tier == "quick" else "autoattack"

    @property
    def caches(self) -> dict[str, tuple[str, ...]]:
        """The teachers of each cache, by the name of its folder."""
        if not self.sets:
            return {"cache": tuple(self.teachers)}
        return {f"cache-{name}": tuple(members) for name, members in self.sets.items()}

    def cache_of(self, student: str) -> str:
        """The cache that a student trains from."""
        chosen = self.students[student].get("set")
        return next(iter(self.caches)) if chosen is None else f"cache-{chosen}"

    def runs(self, name: str) -> list[str]:
        """The names of a student's runs: its own, or one for each seed."""
        return [name] if self.seeds == 1 else [f"{name}-{k}" for k in range(self.seeds)]


def load_experiment(path: Path, assignments: tuple[str, ...] = ()) -> ExperimentConfig:
    """Read an experiment: a file, or the name of one that comes with darht; `assignments` change it (`data.limit=500`).

    Raises:
        ConfigError: no such experiment, unknown keys, wrong values.
    """
    path = find_recipe(path)
    written = load_mapping(path)
    data = override(written, assignments, ExperimentConfig)
    _check_new_students(written, data, path.name)
    config = parse(ExperimentConfig, data, path.name)
    known = {"source", "limit", "test_limit", "holdout", "image_size"}
    unknown = sorted(set(config.data) - known)
    if unknown or "source" not in config.data:
        raise ConfigError(f"{path.name}: data takes {', '.join(sorted(known))}, and source is required; got {unknown}")
    settings = (config.cache, *config.students.values(), *(teacher.set for teacher in config.teachers.values()))
    for seed in (one.get("seed") for one in settings):
        if isinstance(seed, int):
            check_seed(seed)
    teachers = {
        name: _found(replace(plan, set=_dotted(plan.set)), path.parent) for name, plan in config.teachers.items()
    }
    return replace(config, teachers=teachers)


def _check_new_students(written: dict[str, Any], data: dict[str, Any], file: str) -> None:
    """A student that only `--set` names is one more with a recipe of its own, or a name typed wrongly."""
    before, after = (part.get("students") for part in (written, data))
    if not isinstance(before, dict) or not isinstance(after, dict):
        return  # `parse` says so
    for name, student in after.items():
        if name not in before and "recipe" not in (student or {}):
            close = difflib.get_close_matches(name, before, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"they are {', '.join(before)}"
            raise ConfigError(f"{file} has no student '{name}': {hint} (a new one needs students.{name}.recipe)")


def _dotted(settings: dict[str, Any], start: str = "") -> dict[str, Any]:
    """Settings by their dotted keys: `optim: {epochs: 9}` is `optim.epochs: 9`, and the later of two wins."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        nested = isinstance(value, dict) and value
        flat |= _dotted(value, f"{start}{key}.") if nested else {f"{start}{key}": value}
    return flat


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
    for name, members in config.caches.items():
        stages += _cache_stages(name, members, config, out)
    limit = config.data.get("test_limit")
    cut = () if limit is None else ("--limit", str(limit))
    cut = cut if config.tier == "quick" else (*cut, "--tier", config.tier)
    cut = cut if config.transfer else (*cut, "--no-transfer")
    for k in range(config.seeds):  # every way once before any twice: what is stopped has something to compare
        for name, recipe in config.students.items():
            run, cache = config.runs(name)[k], config.cache_of(name)
            file, folder = str(out / "recipes" / f"{name}.yaml"), str(out / "run" / run)
            seed = () if config.seeds == 1 else ("--set", f"seed={recipe.get('seed', 0) + k}")
            words = ("darht-train", "--shards", str(out / cache), "--recipe", file, *seed, "--out", folder, "--resume")
            stages.append(Stage(f"train {run}", words, (cache,)))
            stages.append(Stage(f"eval {run}", ("darht-eval", folder, *cut), (f"train {run}",)))
    return stages


def _cache_stages(name: str, members: tuple[str, ...], config: ExperimentConfig, out: Path) -> list[Stage]:
    """Build a cache and look at it."""
    folder, label = str(out / name), name.removeprefix("cache").replace("-", " ", 1)
    allowed = [word for member in members if config.teachers[member].allow for word in ("--allow", member)]
    words = ("darht-cache", "build", str(out / f"{name}.yaml"), "--out", folder, *allowed)
    stages = [Stage(name, words, tuple(f"teacher {member}" for member in members))]
    stages.append(Stage(f"info{label}", ("darht-cache", "info", folder), (name,)))
    if _of_members(config.cache.get("attacks", {}), members):  # both look at perturbations
        stages.append(Stage(f"transfer{label}", ("darht-inspect", "transfer", folder), (name,)))
        neighbours = ("darht-inspect", "neighbours", folder, "--row", str(config.row))
        stages.append(Stage(f"neighbours{label}", neighbours, (name,)))
    return stages


def _of_members(attacks: dict[str, Any], members: tuple[str, ...]) -> dict[str, Any]:
    """The attacks against teachers of a set."""
    return {name: attack for name, attack in attacks.items() if attack.get("teacher") in members}


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
    """Write the caches' specs and the students' recipes, the files that the commands read."""
    data = {key: value for key, value in config.data.items() if key != "test_limit"}
    if root is not None:
        data["root"] = str(root.resolve())
    for cache, members in config.caches.items():
        write_atomic(out / f"{cache}.yaml", yaml.safe_dump(_spec(config, members, data), sort_keys=False).encode())
    for name, recipe in config.students.items():
        plain = {key: value for key, value in recipe.items() if key != "set"}
        write_atomic(out / "recipes" / f"{name}.yaml", yaml.safe_dump(plain, sort_keys=False).encode())


def _spec(config: ExperimentConfig, members: tuple[str, ...], data: dict[str, Any]) -> dict[str, Any]:
    """The YAML of a cache with these teachers."""
    plans, spec = {name: config.teachers[name] for name in members}, dict(config.cache)
    teachers = {name: {"path": plan.path or f"teachers/{name}", "role": plan.role} for name, plan in plans.items()}
    if config.sets:
        spec["attacks"] = _of_members(spec.get("attacks", {}), members)
        if "jacobians" in spec:
            spec["jacobians"] = {name: one for name, one in spec["jacobians"].items() if name in members}
    return {"data": data, "teachers": teachers, **spec}


def run_experiment(
    config: ExperimentConfig,
    out: Path,
    *,
    root: Path | None,
    call: Call,
    tell: Callable[[str], None],
    jobs: int = 1,
    on_measured: Callable[[dict[str, float]], None] = lambda seconds: None,
) -> dict[str, float]:
    """Run every stage that has not been finished with the same words before.

    Args:
        config: the experiment.
        out: where everything goes: `teachers/`, `cache.yaml` and `cache/` (of each set), `recipes/`, `run/`.
        root: of the data set.
        call: runs one command.
        tell: is told each command before it runs.
        jobs: stages at a time; with more than one, each is a process that writes to `logs/`.
        on_measured: told the seconds so far by stage whenever a student was evaluated.

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
        if stage.name.startswith("eval "):
            on_measured(_seconds(done))

    if jobs > 1:
        run_side_by_side(left, call, jobs=jobs, logs=out / "logs", on_start=on_start, on_end=on_end)
    else:
        for stage in left:
            on_start(stage)
            call(stage.words)
            on_end(stage)
    return _seconds(done)


def _seconds(done: dict[str, Any]) -> dict[str, float]:
    return {name: stage["seconds"] for name, stage in done.items()}


def check_inputs(config: ExperimentConfig, out: Path, root: Path | None) -> None:
    """Write the files that stages read, and refuse those that a later stage would refuse."""
    write_inputs(config, out, root)
    for cache in config.caches:
        load_config(out / f"{cache}.yaml")
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
