"""Run the whole job from one file: teachers, cache, inspection, students, evaluation.

`darht-experiment RECIPE.yaml --out DIR` runs the commands that a person would type, prints each before
it runs, and ends with a table. A finished stage is not run again, so a stopped experiment goes on where it was;
`stage_ledger.py` says when a stage is finished.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from darht.cache.builder.config import load_config
from darht.cache.builder.teachers import CARD
from darht.cache.format.manifest import MANIFEST
from darht.core.errors import ConfigError
from darht.core.files import write_atomic
from darht.tools.experiment_config import ExperimentConfig, TeacherPlan
from darht.tools.stage_ledger import read_ledger
from darht.tools.stage_pool import Call, Stage, run_side_by_side
from darht.trainer.config import load_recipe
from darht.trainer.state.checkpoint import BEST, CONFIG, RUN


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
            seed = () if config.seeds == 1 else ("--set", f"seed={recipe.get('seed', 0) + k}")
            stages += _student_stages(run, out / "recipes" / f"{name}.yaml", out, cache, seed=seed, cut=cut)
    return stages


def _student_stages(
    run: str, recipe: Path, out: Path, cache: str, *, seed: tuple[str, ...], cut: tuple[str, ...]
) -> list[Stage]:
    """Train a student and measure it."""
    folder = out / "run" / run
    words = ("--shards", str(out / cache), "--recipe", str(recipe), *seed, "--out", str(folder), "--resume")
    made = (folder / RUN, folder / BEST / CONFIG)
    train = Stage(f"train {run}", ("darht-train", *words), (cache,), reads=(recipe,), makes=made)
    measure = ("darht-eval", str(folder), *cut)
    return [train, Stage(f"eval {run}", measure, (train.name,), makes=(folder / "eval.json",))]


def _cache_stages(name: str, members: tuple[str, ...], config: ExperimentConfig, out: Path) -> list[Stage]:
    """Build a cache and look at it."""
    folder, label = str(out / name), name.removeprefix("cache").replace("-", " ", 1)
    allowed = [word for member in members if config.teachers[member].allow for word in ("--allow", member)]
    spec, taught = out / f"{name}.yaml", tuple(f"teacher {member}" for member in members)
    words = ("darht-cache", "build", str(spec), "--out", folder, *allowed)
    stages = [Stage(name, words, taught, any_threads=True, reads=(spec,), makes=(out / name / MANIFEST,))]
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
    folder = out / "teachers" / name
    return Stage(f"teacher {name}", (*words, "--out", str(folder), "--resume"), makes=(folder / CARD,))


def _options(data: dict[str, Any], *names: str) -> list[str]:
    return [word for name in names if data.get(name) for word in (f"--{name.replace('_', '-')}", str(data[name]))]


def write_inputs(config: ExperimentConfig, out: Path, root: Path | None) -> None:
    """Write the caches' specs and the students' recipes, the files that the commands read."""
    data = {key: value for key, value in config.data.items() if key != "test_limit"}
    if root is not None:
        data["root"] = str(root.resolve())
    for cache in config.caches:
        write_atomic(out / f"{cache}.yaml", yaml.safe_dump(_spec(config, cache, data), sort_keys=False).encode())
    for name, recipe in config.students.items():
        plain = {key: value for key, value in recipe.items() if key != "set"}
        write_atomic(out / "recipes" / f"{name}.yaml", yaml.safe_dump(plain, sort_keys=False).encode())


def _spec(config: ExperimentConfig, cache: str, data: dict[str, Any]) -> dict[str, Any]:
    """The YAML of a cache; of several, those have Jacobians that a student needs for `targets: first-order`."""
    plans, spec = {name: config.teachers[name] for name in config.caches[cache]}, dict(config.cache)
    teachers = {name: {"path": plan.path or f"teachers/{name}", "role": plan.role} for name, plan in plans.items()}
    if config.sets:
        spec["attacks"] = _of_members(spec.get("attacks", {}), tuple(plans))
        rows = {name: one for name, one in spec.pop("jacobians", {}).items() if name in plans}
        targets = [one.get("targets") for name, one in config.students.items() if config.cache_of(name) == cache]
        spec |= {"jacobians": rows} if rows and "first-order" in targets else {}
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
    """Run every stage that is not done, or needs one that was not.

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
        CorruptError: what was noted of the stages was changed since.
        StageError: a stage failed beside others.
    """
    check_inputs(config, out, root)
    plan, ledger, started = plan_stages(config, out, root), read_ledger(out), {}
    left = ledger.take_undone(plan)
    for stage in plan:
        if stage not in left:
            tell(f"# done before: {stage.line}")

    def on_start(stage: Stage) -> None:
        tell(f"$ {stage.line}")
        started[stage.name] = time.perf_counter()

    def on_end(stage: Stage) -> None:
        seconds = time.perf_counter() - started[stage.name]
        ledger.note(stage, seconds)
        if jobs > 1:
            tell(f"# {stage.name}: {seconds:.0f} s")
        if stage.name.startswith("eval "):
            on_measured(ledger.seconds(plan))

    if jobs > 1:
        run_side_by_side(left, call, jobs=jobs, logs=out / "logs", on_start=on_start, on_end=on_end)
    else:
        for stage in left:
            on_start(stage)
            call(stage.words)
            on_end(stage)
    return ledger.seconds(plan)


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
