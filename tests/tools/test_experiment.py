"""Whole experiments: the commands that are run, what is skipped, and the main job on a handful of digits."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from PIL import Image
from runs import write_student

from darht.cache.builder.config import load_config
from darht.core.errors import ConfigError
from darht.core.files import sha256_file
from darht.core.sealed import write_sealed
from darht.tools.experiment import plan_stages, run_experiment, write_inputs
from darht.tools.experiment_cli import call, experiment
from darht.tools.experiment_config import ExperimentConfig, TeacherPlan, load_experiment
from darht.tools.experiment_page import NUMBERS, PAGE, PICTURE, write_page
from darht.tools.experiment_results import Gain, collect, gains, measure_ways, seeds_done
from darht.trainer.config import load_recipe
from darht.trainer.evaluation.score import SCHEMA_VERSION

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
ON_A_GPU = ["cifar10-gpu.yaml", "cifar100-gpu.yaml", "tiny-imagenet-gpu.yaml"]
EXPERIMENTS = [
    "digits-demo.yaml",
    "cifar10-small.yaml",
    "cifar10-zoo.yaml",
    "cifar10-proof.yaml",
    "tiny-imagenet-small.yaml",
]
EXPERIMENTS += ON_A_GPU
TINY_NET = {"arch": "resnet18", "kwargs": {"width": 4, "blocks": [1, 1, 1, 1]}}
TRAINING = {
    "inner.eps": 32, "inner.step": 8, "inner.steps": 1, "views.padding": 1, "views.flip": False, "optim.epochs": 1,
    "optim.batch_size": 32,
}  # fmt: skip
TINY = {
    "data": {"source": "digits", "limit": 80, "test_limit": 40, "holdout": 0.1},
    "teachers": {
        "resnet": {**TINY_NET, "set": TRAINING, "allow": True},
        "vit": {
            "arch": "timm:vit_tiny_patch16_224",
            "kwargs": {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2},
            "algorithm": "standard",
            "set": TRAINING,
            "allow": True,
        },
    },
    "cache": {
        "views": {"padding": 1, "flip": False},
        "attacks": {"pgd": {"teacher": "resnet", "eps": 32, "step": 8, "steps": 1}},
    },
    "students": {
        "cached": {
            "student": TINY_NET,
            "inner": {"kind": "cached", "eps": 32, "step": 8, "steps": 1},
            "optim": {"epochs": 1, "batch_size": 32},
        }
    },
}


@pytest.fixture
def tiny_recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY, sort_keys=False))
    return path


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_files_that_an_experiment_writes_are_valid(name: str, tmp_path: Path) -> None:
    config = load_experiment(RECIPES / name)
    write_inputs(config, tmp_path, root=None)
    for cache, members in config.caches.items():
        assert tuple(load_config(tmp_path / f"{cache}.yaml").teachers) == members
    assert {member for members in config.caches.values() for member in members} == set(config.teachers)
    for student in config.students:
        recipe = load_recipe(tmp_path / "recipes" / f"{student}.yaml", ())
        if "attacks" in config.cache:
            assert recipe.inner.eps == config.cache["attacks"]["pgd-resnet"]["eps"]


def in_miniature(config: ExperimentConfig) -> ExperimentConfig:
    """The same stages on a handful of digits: tiny networks, one step, nothing compiled; a radius that breaks all."""
    resnet = {"width": 2, "blocks": [1, 1, 1, 1]}
    nets = {
        "resnet18": resnet,
        "timm:vit_tiny_patch16_224": {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2},
        "python:timm.models.resnetv2:ResNetV2": {
            "layers": [1, 1], "channels": [32, 64], "basic": True, "bottle_ratio": 1.0, "stem_chs": 32,
        },
    }  # fmt: skip
    few = {"eps": 64, "step": 32, "steps": 1}
    short = {
        **{f"inner.{key}": value for key, value in few.items()}, "views.padding": 1, "views.flip": False,
        "optim.epochs": 1, "optim.batch_size": 32,
    }  # fmt: skip
    teachers = {
        name: replace(plan, kwargs=nets[str(plan.arch)], set={**plan.set, **short}, allow=True)
        for name, plan in config.teachers.items()
    }
    students = {
        name: {
            **student,
            "student": {**student["student"], "kwargs": resnet},
            "inner": {"kind": student["inner"]["kind"], "eps": 64, "steps": 1},
            "optim": {**student["optim"], "epochs": 4, "batch_size": 32},
            "compute": {"precision": "bf16", "channels_last": True},
        }
        for name, student in config.students.items()
    }
    cache = {
        "views": {"padding": 1, "flip": False}, "precision": config.cache["precision"],
        "attacks": {name: {**attack, **few} for name, attack in config.cache["attacks"].items()},
        "store": {"rows_per_shard": 32, "rows_per_chunk": 16},
    }  # fmt: skip
    data = {"source": "digits", "limit": 64, "test_limit": 32, "holdout": 0.1}
    return replace(config, data=data, teachers=teachers, cache=cache, students=students, tier="quick")


def test_an_experiment_for_a_gpu_in_miniature(tmp_path: Path) -> None:
    config = in_miniature(load_experiment(RECIPES / ON_A_GPU[0]))
    config = replace(config, students={name: config.students[name] for name in ("homogeneous", "no-teachers")})
    seconds = run_experiment(config, tmp_path, root=None, call=call, tell=lambda line: None)
    result = collect(config, tmp_path, seconds)
    assert [way.name for way in result.ways] == list(config.students)
    assert [row[0] for row in result.teachers] == list(config.teachers)
    assert sum(" against no-teachers: " in fact for fact in result.facts) == 1
    assert sum(fact.startswith("cache-") for fact in result.facts) == 2
    report = json.loads((tmp_path / "run" / "homogeneous" / "eval.json").read_text())
    transferred = [score["name"] for score in report["scores"] if score["name"].startswith("transfer:")]
    assert transferred == [f"transfer:{name}" for name in config.sets["homogeneous"]]


def test_the_experiments_for_a_gpu_compare_the_same_on_other_images() -> None:
    first, *others = (load_experiment(RECIPES / name) for name in ON_A_GPU)
    assert (
        first.tier == "full" and first.baseline == "no-teachers" and set(first.sets) == {"heterogeneous", "homogeneous"}
    )
    for other in others:
        assert (other.sets, other.students, other.cache["attacks"]) == (
            first.sets,
            first.students,
            first.cache["attacks"],
        )
        for name, plan in first.teachers.items():
            assert (other.teachers[name].arch, other.teachers[name].algorithm) == (plan.arch, plan.algorithm)


def test_a_set_has_a_cache_of_its_own_with_its_attacks(tmp_path: Path) -> None:
    config = load_experiment(RECIPES / ON_A_GPU[0], ("data.limit=500", "students.homogeneous.optim.epochs=2"))
    assert config.data["limit"] == 500 and config.students["homogeneous"]["optim"]["epochs"] == 2
    write_inputs(config, tmp_path, root=None)
    spec = load_config(tmp_path / "cache-homogeneous.yaml")
    assert set(spec.attacks) == {f"pgd-{name}" for name in config.sets["homogeneous"]}
    stages = {stage.name: stage for stage in plan_stages(config, tmp_path, root=None)}
    assert stages["train homogeneous"].needs == ("cache-homogeneous",)
    assert stages["cache-homogeneous"].needs == ("teacher resnet", "teacher resnet-at", "teacher resnet-fat")
    assert stages["cache-homogeneous"].any_threads and not stages["train homogeneous"].any_threads
    assert str(tmp_path / "cache-homogeneous") in stages["train homogeneous"].words
    assert str(tmp_path / "cache-heterogeneous") in stages["train no-teachers"].words


def test_only_the_caches_of_first_order_students_have_jacobians(tmp_path: Path) -> None:
    config = load_experiment(RECIPES / ON_A_GPU[0])
    shared = set(config.sets["homogeneous"]) & set(config.sets["heterogeneous"])
    config.cache["jacobians"] = {name: {"classes": 3} for name in config.sets["homogeneous"]}
    config.students["homogeneous"]["targets"] = "first-order"
    write_inputs(config, tmp_path, root=None)
    assert set(load_config(tmp_path / "cache-homogeneous.yaml").jacobians) == set(config.sets["homogeneous"])
    assert shared and not load_config(tmp_path / "cache-heterogeneous.yaml").jacobians


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sets": {"a": ["resnet", "bit"]}}, r"set 'a' must name teachers of resnet, vit; got \('resnet', 'bit'\)"),
        ({"sets": {"a": ["vit"]}}, "attack 'pgd' names teacher 'resnet', who is in no set"),
        ({"students": {"s": {"set": "b"}}}, "student 's' trains from set 'b'; the sets are none"),
        ({"students": {"s": {"set": ["b", "c"]}}}, r"student 's' trains from set '\['b', 'c'\]'; the sets are none"),
        ({"cache": {"attacks": None}}, "cache.attacks must be a mapping, a name each; got None: write {} for none"),
        ({"cache": {"attacks": ["pgd"]}}, r"cache.attacks must be a mapping, a name each; got \['pgd'\]"),
        ({"cache": {"attacks": {"pgd": "resnet"}}}, "cache.attacks.pgd must be a mapping; got 'resnet'"),
        (
            {"cache": {"attacks": {"pgd": {"teacher": ["vit"]}}}},
            r"attack 'pgd' names teacher '\['vit'\]', who is in no",
        ),
        ({"cache": {"jacobians": None}}, "cache.jacobians must be a mapping, a name each; got None"),
    ],
)
def test_sets_that_do_not_fit_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    sets = {} if "the sets are none" in message else {"sets": {"a": ["resnet"]}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({**TINY, **sets, **change}))
    with pytest.raises(ConfigError, match=message):
        load_experiment(tmp_path / "own.yaml")


def test_a_student_typed_wrongly_is_refused_and_a_new_one_brings_its_recipe(tiny_recipe: Path) -> None:
    name = next(iter(TINY["students"]))
    with pytest.raises(ConfigError, match=f"has no student '{name}x': did you mean '{name}'"):
        load_experiment(tiny_recipe, (f"students.{name}x.optim.epochs=2",))
    with pytest.raises(ConfigError, match=f"has no student 'zz': they are {name}.* needs students.zz.recipe"):
        load_experiment(tiny_recipe, ("students.zz=null",))
    assert load_experiment(tiny_recipe, ("students.zz.recipe=kd",)).students["zz"] == {"recipe": "kd"}


@pytest.mark.parametrize(
    "path", sorted(p for p in RECIPES.glob("*.yaml") if p.name not in EXPERIMENTS), ids=lambda p: p.stem
)
def test_every_training_recipe_is_valid_and_begins_with_its_command(path: Path) -> None:
    recipe = load_recipe(path, ()).recipe
    assert recipe == ("at" if path.stem.startswith("zoo-") else path.stem.removesuffix("-warm"))
    assert "darht-train --shards CACHE --recipe recipes/" + path.name in path.read_text().split("recipe:")[0]


def test_the_commands_name_the_data_and_the_limits(tiny_recipe: Path, tmp_path: Path) -> None:
    stages = plan_stages(load_experiment(tiny_recipe), tmp_path, root=Path("somewhere"))
    assert [stage.name for stage in stages] == [
        "teacher resnet", "teacher vit", "cache", "info", "transfer", "neighbours", "train cached", "eval cached",
    ]  # fmt: skip
    assert "--root somewhere --limit 80 --test-limit 40" in stages[0].line
    assert stages[-1].line.endswith("--limit 40")


def test_a_teacher_that_is_there_is_measured_and_not_trained(tmp_path: Path) -> None:
    teachers = {**TINY["teachers"], "imported": {"path": "elsewhere/wrn", "role": "vanilla"}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({**TINY, "teachers": teachers}))
    config, folder = load_experiment(tmp_path / "own.yaml"), str((tmp_path / "elsewhere" / "wrn").resolve())
    stage = next(stage for stage in plan_stages(config, tmp_path, root=None) if stage.name == "teacher imported")
    assert stage.words == ("darht-teacher", "check", folder, "--data", "digits", "--limit", "40")
    write_inputs(config, tmp_path / "out", root=None)
    spec = load_config(tmp_path / "out" / "cache.yaml")
    assert (spec.teachers["imported"].path, spec.teachers["imported"].role) == (folder, "vanilla")
    assert (spec.teachers["vit"].path, spec.teachers["vit"].role) == ("teachers/vit", "robust")


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({}, "give one of them"),
        ({"path": "t", "arch": "resnet18"}, "give one of them"),
        ({"path": "t", "set": {"eps": 8}}, "trained already: leave kwargs, resize, algorithm and set out"),
    ],
)
def test_a_teacher_is_trained_or_there(plan: dict[str, object], message: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({**TINY, "teachers": {"t": plan}}))
    with pytest.raises(ConfigError, match=message):
        load_experiment(tmp_path / "own.yaml")


def evaluated(run: Path, right: dict[str, list[int]]) -> None:
    """A run of `at` that trained for two CPU seconds, and was right about these images."""
    run.mkdir(parents=True)
    np.savez(run / "eval.npz", attacks=np.array(list(right)), right=np.array(list(right.values()), dtype=np.int8))
    scores = [{"name": name, "accuracy": 100 * sum(values) / len(values)} for name, values in right.items()]
    report = {
        "schema_version": SCHEMA_VERSION, "per_image": "eval.npz", "threat": {}, "model": {"parameters": 9},
        "data": {"rows": len(right["clean"])}, "scores": scores,
        "recipe": {"recipe": "at", "inner": {"kind": "pgd"}},
    }  # fmt: skip
    write_sealed(run / "eval.json", report, {"eval.npz": sha256_file(run / "eval.npz")})
    (run / "log.jsonl").write_text(f"{json.dumps({'epoch': 1, 'cpu_seconds': 0.5})}\n" * 4)


@pytest.mark.parametrize(
    ("tier", "score", "where"),
    [("quick", "worst case", "in the worst case"), ("standard", "autoattack", "under AutoAttack")],
)
def test_every_seed_is_a_run_of_its_own_and_the_gain_is_over_the_baseline(
    tier: str, score: str, where: str, tmp_path: Path
) -> None:
    students = {"no-teachers": TINY["students"]["cached"], "taught": {**TINY["students"]["cached"], "seed": 4}}
    wanted = {**TINY, "students": students, "seeds": 2, "baseline": "no-teachers", "tier": tier}
    wanted["transfer"] = tier == "quick"
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(wanted))
    config = load_experiment(tmp_path / "own.yaml")
    lines = {stage.name: stage.line for stage in plan_stages(config, tmp_path, root=None)}
    assert ("--tier standard --no-transfer" in lines["eval taught-0"]) == (tier == "standard")
    assert ("--no-transfer" in lines["eval taught-0"]) == (tier == "standard")
    assert "--set seed=1 " in lines["train no-teachers-1"] and "--set seed=5 " in lines["train taught-1"]
    alive = {
        "no-teachers-0": [1, 0, 0, 0],
        "no-teachers-1": [1, 1, 0, 0],
        "taught-0": [1, 1, 1, 0],
        "taught-1": [1, 1, 0, 0],
    }
    for run, right in alive.items():
        evaluated(tmp_path / "run" / run, {"clean": [1] * 4, "pgd-20": right, score: right})
    runs = {name: [tmp_path / "run" / run for run in config.runs(name)] for name in config.students}
    gain = gains(config, runs, score)["taught"]
    assert gain.points == pytest.approx(25.0) and gain.images == 4
    assert gain.sentence("taught", config, 2).startswith(f"taught against no-teachers: +25.0 points {where}")
    way = measure_ways(config, runs, {})[1]
    assert (way.name, way.recipe, way.inner, way.teachers, way.cache_seconds) == ("taught", "at", "pgd", (), 0.0)
    assert (way.judged.mean, way.pgd.mean, way.gain, way.cpu_seconds) == (62.5, 62.5, gain, 2.0)
    assert way.judged.low < 62.5 < way.judged.high and way.clean_gain == Gain(0.0, (0.0, 0.0), 4)


def test_a_page_is_there_as_soon_as_every_way_has_one_seed(tmp_path: Path, tiny_cache: Path) -> None:
    students = dict.fromkeys(("plain", "taught"), TINY["students"]["cached"])
    wanted = {**TINY, "teachers": {}, "cache": {}, "students": students, "seeds": 3, "baseline": "plain"}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(wanted))
    out, config, told = tmp_path / "out", load_experiment(tmp_path / "own.yaml"), []

    def call(words: tuple[str, ...]) -> None:
        if words[0] == "darht-eval":
            evaluated(Path(words[1]), {"clean": [1, 1], "pgd-20": [1, 0], "worst case": [1, 0]})
        if words[:2] == ("darht-cache", "build"):
            (out / "cache").symlink_to(tiny_cache)

    def on_measured(seconds: dict[str, float]) -> None:
        done = seeds_done(config, out)
        if done:
            page = write_page(config, out, collect(config, out, seconds), "darht-experiment").read_text()
            told.append((done, "one seed of the 3 asked for, so far" in page, "means over 3 seeds, " in page))

    run_experiment(config, out, root=None, call=call, tell=lambda line: None, on_measured=on_measured)
    assert told == [(1, True, False), (1, True, False), (2, False, False), (2, False, False), (3, False, True)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"baseline": "other"}, "they are cached"),
        ({"students": {}}, "students must name one way of training or more"),
    ],
)
def test_seeds_and_baselines_that_are_not_there(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({**TINY, **change}))
    with pytest.raises(ConfigError, match=message):
        load_experiment(tmp_path / "own.yaml")


def test_an_experiment_of_ours_goes_by_its_name() -> None:
    assert load_experiment(Path("digits-demo")) == load_experiment(RECIPES / "digits-demo.yaml")


def test_a_teachers_setting_is_changed_alone(tiny_recipe: Path, tmp_path: Path) -> None:
    change = ("teachers.vit.set.optim.epochs=9", "teachers.resnet.set.optim.kind={}")
    before, config = load_experiment(tiny_recipe), load_experiment(tiny_recipe, change)
    assert before.teachers["vit"].set["optim.epochs"] != 9 and "optim.lr" not in before.teachers["resnet"].set
    assert config.teachers["vit"].set == before.teachers["vit"].set | {"optim.epochs": 9}
    line = {stage.name: stage.line for stage in plan_stages(config, tmp_path, root=None)}["teacher vit"]
    assert "--set optim.epochs=9" in line and "--set optim=" not in line


def test_a_finished_stage_is_not_run_again_but_a_changed_one_is(tiny_recipe: Path, tmp_path: Path) -> None:
    config, out, ran = load_experiment(tiny_recipe), tmp_path / "out", []

    def run(config: ExperimentConfig, root: Path | None = None, most: int = 8) -> tuple[list[str], list[str]]:
        """The programs that ran, and what was told; stopped after so many."""
        ran.clear()
        told: list[str] = []
        plan = {stage.words: stage for stage in plan_stages(config, out, root)}

        def call(words: tuple[str, ...]) -> None:
            if len(ran) == most:
                raise KeyboardInterrupt
            ran.append(words[0])
            for path in plan[words].makes:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()

        seconds = run_experiment(config, out, root=root, call=call, tell=told.append)
        assert list(seconds) == [stage.name for stage in plan.values()]
        return list(ran), told

    with pytest.raises(KeyboardInterrupt):
        run(config, most=3)
    assert len(ran) == 3
    looked, student = ["darht-cache", "darht-inspect", "darht-inspect"], ["darht-train", "darht-eval"]
    again, told = run(config)
    assert again == [*looked, *student]
    assert sum(line.startswith("# done before: ") for line in told) == 3
    assert run(config)[0] == []
    assert run(config, root=tmp_path)[0] == ["darht-teacher", "darht-teacher", "darht-cache", *looked, *student]

    run(config)
    changed = load_experiment(tiny_recipe, ("students.cached.optim.lr=0.3",))
    assert run(changed)[0] == student
    shutil.rmtree(out / "run" / "cached")
    assert run(changed)[0] == student
    (out / "run" / "cached" / "eval.json").unlink()
    assert run(changed)[0] == student[1:]
    renamed = replace(changed, students={"other": changed.students["cached"]})
    assert run(renamed)[0] == student
    assert run(load_experiment(tiny_recipe, ("cache.views.count=5",)))[0] == ["darht-cache", *looked, *student]


def test_the_main_job_on_a_handful_of_digits(tiny_recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(experiment, [str(tiny_recipe), "--out", str(out)])
    assert result.exit_code == 0, result.output
    for path in ("teachers/resnet/teacher.json", "cache/manifest.json", "run/cached/student/model.safetensors"):
        assert (out / path).is_file()
    report = json.loads((out / "run" / "cached" / "eval.json").read_text())
    names = [score["name"] for score in report["scores"] if score["family"] != "check"]
    assert names == ["clean", "fgsm", "pgd-20", "transfer:resnet", "transfer:vit", "worst case"]
    assert report["cache_root_hash"] == json.loads((out / "cache" / "manifest.json").read_text())["root_hash"]
    assert "$ darht-cache build" in result.output
    assert "root hash" in result.output
    numbers = json.loads((out / NUMBERS).read_text())["ways"][0]
    assert numbers["name"] == "cached" and numbers["cpu_seconds"] > 0 and numbers["gain"] is None
    assert numbers["judged"]["low"] <= numbers["judged"]["mean"] <= numbers["judged"]["high"]
    page = (out / PAGE).read_text()
    assert f"]({PICTURE})" in page and "| cached | " in page
    with Image.open(out / PICTURE) as picture:
        assert picture.size[0] > 1000

    for change, refused in (("students.cached.optim.lr=0.3", "another run"), ("cache.views.count=5", "another spec")):
        result = CliRunner().invoke(experiment, [str(tiny_recipe), "--out", str(out), "--set", change])
        assert result.exit_code == 2 and refused in result.stderr and result.stderr.count("\n") == 1
    assert (out / PAGE).read_text() == page
    shutil.rmtree(out / "run" / "cached")
    result = CliRunner().invoke(experiment, [str(tiny_recipe), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "$ darht-train" in result.output and "$ darht-eval" in result.output
    assert "# done before: darht-teacher train" in result.output


def test_a_mistake_in_the_recipe_is_one_line(tmp_path: Path) -> None:
    for change, said in (
        ({"data": {"source": "digits", "rows": 3}}, "data takes"),
        ({"student": {}}, "did you mean 'students'"),
        ({"cache": {**TINY["cache"], "seed": -4}}, "seed must be at least 0; got -4: write 4"),
    ):
        path = tmp_path / "wrong.yaml"
        path.write_text(yaml.safe_dump({**TINY, **change}))
        with pytest.raises(ConfigError, match=said):
            load_experiment(path)
        result = CliRunner().invoke(experiment, [str(path), "--out", str(tmp_path / "out")])
        assert result.exit_code == 2 and result.output.startswith("error: ") and len(result.output.splitlines()) == 1


@pytest.mark.parametrize(
    "stop", [SystemExit(130), click.Abort()]
)  # a stage that keeps something, and one that does not
def test_a_stage_that_is_stopped_stops_the_experiment_which_says_how_it_goes_on(
    stop: BaseException, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(words: tuple[str, ...]) -> None:
        raise stop

    monkeypatch.setattr("darht.tools.experiment_cli.call", call)
    words = [str(tiny_recipe), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(experiment, words, prog_name="darht-experiment")
    assert result.exit_code == 130 and "stopped: finished stages stay" in result.stderr
    assert result.stderr.endswith(f"go on with: darht-experiment {' '.join(words)}\n")


def test_what_a_later_stage_would_refuse_is_told_before_the_first(tmp_path: Path) -> None:
    def refuse(change: dict[str, Any]) -> str:
        path = tmp_path / "wrong.yaml"
        path.write_text(yaml.safe_dump({**TINY, **change}))
        with pytest.raises(ConfigError) as caught:
            run_experiment(
                load_experiment(path), tmp_path / "out", root=None, call=lambda words: pytest.fail(), tell=print
            )
        return str(caught.value)

    assert "cache.yaml: attack 'pgd' names teacher 'resnt'" in refuse(
        {"cache": {"attacks": {"pgd": {"teacher": "resnt"}}}}
    )
    assert "unknown key 'recpie'" in refuse({"students": {"one": {"recpie": "kd"}}})
    assert refuse({"row": 80}) == "row must lie in 0..79, the rows that data.limit takes; got 80"


def test_an_experiment_without_transfer_ends_with_its_table(
    tiny_recipe: Path, tmp_path: Path, tiny_cache: Path
) -> None:
    config = load_experiment(tiny_recipe)
    bare = replace(config, teachers={}, cache={"views": {"padding": 1}})
    assert [stage.name for stage in plan_stages(bare, tmp_path, None)] == [
        "cache",
        "info",
        "train cached",
        "eval cached",
    ]
    evaluated(tmp_path / "run" / "cached", {"clean": [1, 0], "pgd-20": [0, 0], "worst case": [0, 0]})
    (tmp_path / "run" / "cached" / "log.jsonl").write_text('{"epoch": 1, "seconds": 1.0}\n')
    shutil.copytree(tiny_cache, tmp_path / "cache")
    result = collect(bare, tmp_path, {"cache": 1.0, "train cached": 2.0})
    (way,) = result.ways
    assert (way.clean.mean, way.pgd.mean, way.gain, way.transfer, way.cpu_seconds) == (50.0, 0.0, None, None, None)
    assert not any("pictures" in fact for fact in result.facts)

    write_student(tmp_path / "before" / "student", 2)
    (tmp_path / "before" / "run.json").write_text("{}")  # a run that serves as a teacher keeps no measurement
    later = replace(bare, teachers={"before": TeacherPlan(path=str(tmp_path / "before"), role="robust")})
    result = collect(later, tmp_path, {"teacher before": 3.0, "cache": 1.0, "train cached": 2.0})
    assert result.teachers == [("before", "resnet18", "at", "-", "-", "")]
