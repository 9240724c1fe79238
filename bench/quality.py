"""What each way of training gives and costs: students of one size from the same images and teachers, several seeds.

    python bench/quality.py --data DIR --out docs/benchmarks-quality.md

Makes the three teachers of recipes/cifar10-small.yaml and two more ResNets for a set of one family, a cache for each
set, and Jacobians; then it trains and judges every student. What is finished is not done again: a stopped run goes on,
`--seeds 3` adds to what `--seeds 1` measured, and every student renews the page.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from quality_page import page

from darht.core.files import write_atomic

HERE = Path(__file__).resolve().parent
STUDENT = {"arch": "resnet18", "kwargs": {"width": 8, "blocks": [1, 1, 1, 1]}}
PLAIN = STUDENT | {"feature_map": False}
PHASES = {"phases": [0.1, 0.8]}
DARHT = {"recipe": "darht", "loss": PHASES, "student": STUDENT}
EVERY = PHASES | {"clean_share": 0.0}  # every batch adversarial
PGD = {"kind": "pgd", "eps": 8, "step": 2, "steps": 10}
SAME = 2  # epochs of the two further ResNets, so that both sets of teachers are about as robust by themselves


class Variant(NamedTuple):
    """One way of training a student.

    Attributes:
        recipe: its file.
        cache: which teachers it has.
        seeds: at most; what costs ten times as much is run once.
        core: whether all its seeds come before the rest.
    """

    recipe: dict[str, Any]
    cache: str = "mixed"
    seeds: int = 99
    core: bool = False


def warm(start: str = "cached") -> dict[str, Any]:
    return {"kind": "warm", "eps": 8, "warm": {"start": start}}


VARIANTS = {
    "at": Variant({"recipe": "at", "loss": {"clean_share": 0.5}, "student": PLAIN, "inner": PGD}, core=True),
    "darht, live": Variant(DARHT | {"inner": PGD, "teachers": "live"}, core=True),
    "darht, warm": Variant(DARHT | {"inner": warm()}, core=True),
    "darht, pgd:10": Variant(DARHT | {"inner": PGD}, core=True),
    "darht, cached": Variant(DARHT | {"inner": {"kind": "cached", "eps": 8}}, core=True),
    "darht, warm, every batch": Variant(DARHT | {"inner": warm(), "loss": EVERY}, core=True),
    "at, every batch": Variant(
        {"recipe": "at", "loss": {"clean_share": 0.0}, "student": PLAIN, "inner": PGD}, core=True
    ),
    "darht, warm, targets: first-order": Variant(DARHT | {"inner": warm(), "targets": "first-order"}),
    "darht, warm, targets: nearest": Variant(DARHT | {"inner": warm(), "targets": "nearest"}),
    "darht, warm, start: zero": Variant(DARHT | {"inner": warm("zero")}),
    "darht, warm, start: noise": Variant(DARHT | {"inner": warm("noise")}),
    "darht, pgd:10, three ResNets": Variant(DARHT | {"inner": PGD}, "same"),
    "rslad, live": Variant({"recipe": "rslad", "student": PLAIN, "inner": PGD, "teachers": "live"}),
    "trades": Variant({"recipe": "trades", "student": PLAIN, "inner": PGD}),
    "adaad, warm, targets: first-order": Variant(
        {"recipe": "adaad", "student": PLAIN, "inner": warm(), "targets": "first-order"}
    ),
    "adaad + igdm, warm, targets: first-order": Variant(
        {"recipe": "adaad", "loss": {"igdm": 20}, "student": PLAIN, "inner": warm(), "targets": "first-order"}
    ),
    "adaad, pgd:10, targets: first-order": Variant(
        {"recipe": "adaad", "student": PLAIN, "inner": PGD, "targets": "first-order"}
    ),
    "adaad, live": Variant({"recipe": "adaad", "student": PLAIN, "inner": PGD, "teachers": "live"}, seeds=1),
}


def call(*words: str) -> tuple[str, float]:
    """Run a command on one thread; what it printed, and the CPU seconds that it took."""
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as process:
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode}")
    return printed, usage.ru_utime + usage.ru_stime


def darht(command: str, *words: str) -> tuple[str, float]:
    return call(str(Path(sys.executable).parent / command), *words)


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Two caches, `mixed` with Jacobians and `same`; what the Jacobians cost and how good the teachers are."""
    known = options.work / "facts.json"
    if known.is_file():
        return json.loads(known.read_text())
    plan = yaml.safe_load((HERE.parent / "recipes" / "cifar10-small.yaml").read_text())
    teachers = plan["teachers"]
    twin = teachers["resnet"]
    for seed in (1, 2):
        settings = twin["set"] | {"optim.epochs": SAME, "seed": seed}
        teachers[f"resnet-{seed}"] = twin | {"set": settings}
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda name: teach(name, teachers[name], plan["data"], options), teachers))
    data = {key: value for key, value in plan["data"].items() if key != "test_limit"}
    spec = {"data": data | {"root": str(options.data.resolve())}, **plan["cache"]}
    mixed = spec | {"teachers": {name: {"path": f"teachers/{name}"} for name in ("resnet", "vit", "bit")}}
    same = spec | {"teachers": {name: {"path": f"teachers/{name}"} for name in ("resnet", "resnet-1", "resnet-2")}}
    del same["attacks"]  # nothing of it is trained on
    facts = jacobians(mixed, options.work)
    build(same, options.work / "same")
    cards = {name: json.loads((options.work / "teachers" / name / "teacher.json").read_text()) for name in teachers}
    facts["teachers"] = {name: next(iter(card["accuracy"].values())) for name, card in cards.items()}
    write_atomic(known, json.dumps(facts).encode())
    return facts


def teach(name: str, plan: dict[str, Any], data: dict[str, Any], options: argparse.Namespace) -> None:
    """Train a teacher, unless that was done before."""
    folder = options.work / "teachers" / name
    if (folder / "teacher.json").is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    words = ["--data", "cifar10", "--root", str(options.data), "--limit", str(data["limit"]), "--test-limit", "1000"]
    words += ["--arch", plan["arch"], "--kwargs", json.dumps(plan["kwargs"]), "--algorithm", plan["algorithm"]]
    words += [word for key, value in plan["set"].items() for word in ("--set", f"{key}={value}")]
    _, seconds = darht("darht-teacher", "train", *words, "--out", str(folder))
    print(f"teacher {name}: {seconds:.0f} CPU s", flush=True)


def build(spec: dict[str, Any], folder: Path) -> float:
    """Build a cache beside its spec; CPU seconds."""
    write(folder.with_suffix(".yaml"), spec)
    return darht("darht-cache", "build", str(folder.with_suffix(".yaml")), "--out", str(folder))[1]


def jacobians(spec: dict[str, Any], work: Path) -> dict[str, Any]:
    """The cache of the mixed set, and what it costs to extend it by Jacobians."""
    folder = work / "mixed"
    built = build(spec, folder)
    before = size(folder)
    write(work / "mixed.yaml", spec | {"jacobians": {name: {} for name in spec["teachers"]}})
    _, seconds = darht("darht-cache", "extend", str(folder), str(work / "mixed.yaml"))
    rows = json.loads((folder / "manifest.json").read_text())["rows"]
    cost = {"bytes_before": before, "bytes": size(folder) - before, "build_seconds": built, "seconds": seconds}
    print(f"cache: {built:.0f} CPU s, Jacobians: {seconds:.0f} CPU s", flush=True)
    return {"rows": rows, **cost}


def size(folder: Path) -> int:
    manifest = json.loads((folder / "manifest.json").read_text())
    return sum(shard["size"] for shard in manifest["shards"])


def write(path: Path, value: dict[str, Any]) -> None:
    write_atomic(path, yaml.safe_dump(value, sort_keys=False).encode())


def run_folder(name: str, seed: int, options: argparse.Namespace) -> Path:
    words = name.replace(",", "").replace(":", "").replace(" +", "").split()
    return options.work / "runs" / "-".join([*words, str(seed)])


def measure(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one student and judge it; what was done before with as many epochs is not done again."""
    result = run_folder(name, seed, options) / "result.json"
    known = json.loads(result.read_text()) if result.is_file() else {}
    if known.get("epochs") != options.epochs:
        known = train(name, seed, options)
    wanted = options.core_images if VARIANTS[name].core else options.images
    have = len(known.get("autoattack", ""))
    if have < wanted:
        words = (str(result.parent / "run"), "--data", str(options.data), "--first", str(have), "--images", str(wanted))
        more = json.loads(call(sys.executable, str(HERE / "quality_judge.py"), "attack", *words)[0])
        for key in ("autoattack", "warnings", "judge_seconds"):
            more[key] = known.get(key, type(more[key])()) + more[key]
        known |= more
        write_atomic(result, json.dumps(known).encode())
        print(f"{name}, seed {seed}: {wanted} images judged in {known['judge_seconds']:.0f} CPU s", flush=True)
    return known


def train(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one student; what it cost."""
    folder = run_folder(name, seed, options)
    optim = {"epochs": options.epochs, "batch_size": 128, "lr": 0.1, "schedule": "cosine", "warmup": 0.1}
    compute = {"precision": "bf16", "channels_last": True}
    shutil.rmtree(folder, ignore_errors=True)
    plain = {"optim": optim, "average": {"kind": "none"}, "compute": compute, "seed": seed}  # as the page was measured
    write(folder / "recipe.yaml", plain | VARIANTS[name].recipe)
    cache = options.work / VARIANTS[name].cache
    words = ("--shards", str(cache), "--recipe", str(folder / "recipe.yaml"), "--out", str(folder / "run"))
    _, seconds = darht("darht-train", *words)
    found = {"name": name, "seed": seed, "epochs": options.epochs, "seconds": seconds}
    write_atomic(folder / "result.json", json.dumps(found).encode())
    print(f"{name}, seed {seed}: {seconds:.0f} CPU s", flush=True)
    return found


def closeness(options: argparse.Namespace) -> dict[str, Any]:
    """Stand-ins for the teachers' answers against the teachers, on the examples of the student of `darht, pgd:10`."""
    path, run = options.work / "targets.json", run_folder("darht, pgd:10", 0, options) / "run"
    if not path.is_file() and run.is_dir():
        words = ("targets", str(run), "--cache", str(options.work / "mixed"))
        write_atomic(path, call(sys.executable, str(HERE / "quality_judge.py"), *words)[0].encode())
    return json.loads(path.read_text()) if path.is_file() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="holds cifar-10-batches-py/")
    parser.add_argument("--work", type=Path, default=Path("build/bench/quality"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--images", type=int, default=200, help="test images for AutoAttack")
    parser.add_argument("--core-images", type=int, default=500, help="the same for the ways that are compared first")
    parser.add_argument("--jobs", type=int, default=2, help="students trained at once, one thread each")
    parser.add_argument("--only", action="append", choices=list(VARIANTS))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    facts, results = prepare(options), []
    names = options.only or list(VARIANTS)
    jobs = [(name, seed) for seed in range(options.seeds) for name in names if seed < VARIANTS[name].seeds]
    jobs.sort(key=lambda job: (VARIANTS[job[0]].seeds == 1, not VARIANTS[job[0]].core))

    def work(job: tuple[str, int]) -> None:
        results.append(measure(*job, options))
        if options.out is not None:
            settings = vars(options) | {"same": SAME}
            write_atomic(options.out, page(results, facts, closeness(options), settings, list(VARIANTS)).encode())

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(work, jobs))


if __name__ == "__main__":
    main()
