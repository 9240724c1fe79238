"""The file of an experiment: data, teachers, caches, students, and how they are compared."""

import difflib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from darht.core.bounded import show
from darht.core.config import load_mapping, override, parse
from darht.core.errors import ConfigError
from darht.core.keys import check_seed
from darht.core.recipes import find_recipe
from darht.core.zoo import absolute, teacher_at


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
        cache: its `views`, `attacks`, `store`, `seed`, and `jacobians` for students that are `first-order`.
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
        for key in ("attacks", "jacobians"):
            _check_mappings(f"cache.{key}", self.cache.get(key, {}))
        used = [member for members in self.sets.values() for member in members]  # a list: anything may be asked for
        for name, attack in self.cache.get("attacks", {}).items():
            if self.sets and attack.get("teacher") not in used:
                raise ConfigError(f"attack '{name}' names teacher '{attack.get('teacher')}', who is in no set")
        for name, student in self.students.items():
            if "set" in student and student["set"] not in list(self.sets):
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


def _check_mappings(where: str, value: Any) -> None:
    """What is sorted by sets before the cache's own rules are asked."""
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must be a mapping, a name each; got {show(value)}: write {{}} for none")
    for name, one in value.items():
        if not isinstance(one, dict):
            raise ConfigError(f"{where}.{name} must be a mapping; got {show(one)}")


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
