"""What each setting of a recipe gives and costs: on and off, for students without and with teachers, several seeds.

    python bench/recipes.py --data DIR --teacher resnet=zoo:cifar10-resnet --out docs/benchmarks-recipes.md

Trains every student of `variants` from one cache by one `warm` step (8 epochs of the first 5,000 images of CIFAR-10, a
ResNet of 78,000 parameters) and asks it 1,000 test images under two kinds of PGD-20. What is finished is not done
again, so that a stopped run goes on; every student renews the page. `--seeds`, `--epochs`, `--limit` and `--images`
make it shorter, `--only` takes some of the students.
"""

import argparse
import datetime
import io
import json
import os
import platform
import shlex
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from attack_models import load_images
from quality import PLAIN, STUDENT, build, call, darht, write

from darht.attacks import PGD, Engine
from darht.core.files import write_atomic
from darht.core.rng import RowRng
from darht.core.zoo import absolute, teacher_at
from darht.trainer.evaluation.report.compare import paired_bootstrap
from darht.trainer.state.checkpoint import load_student

WARM = {"kind": "warm", "eps": 8, "warm": {"start": "noise"}}
AT = {"recipe": "at", "loss": {"clean_share": 0.0}, "student": PLAIN, "inner": WARM}
DARHT = {"recipe": "darht", "loss": {"phases": [0.1, 0.8], "clean_share": 0.0}, "student": STUDENT, "inner": WARM}
RSLAD = {"recipe": "rslad", "student": PLAIN, "inner": WARM}
FIRST = {"student": PLAIN, "inner": WARM, "targets": "first-order"}
ADAAD = {"recipe": "adaad", **FIRST}
SHARE = 0.7  # of a batch of the mixed cache, without labels
OTHERS = 15_000  # rows without labels


class Variant(NamedTuple):
    """One student: its recipe, the student that it is held against, its cache, how many times the epochs it has."""

    recipe: dict[str, Any]
    against: str
    cache: str = "cache"
    longer: float = 1.0


def merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `change`, mapping by mapping."""
    inner = {key: merge(base[key], value) if isinstance(base.get(key), dict) and isinstance(value, dict) else value
             for key, value in change.items()}  # fmt: skip
    return base | inner


def variants() -> dict[str, Variant]:
    """Every student by name."""
    settings: dict[str, dict[str, Any]] = {
        "lr 0.3": {"optim": {"lr": 0.3}},
        "no averaging": {"average": {"kind": "none"}},
        "smoothing 0.1": {"loss": {"smoothing": 0.1}},
        "smoothing 0.4": {"loss": {"smoothing": 0.4}},
        "awp 0.005": {"loss": {"awp": 0.005}},
        "reset 3": {"inner": {"warm": {"reset": 3}}},
        "start: label": {"inner": {"warm": {"start": "label"}}},
        "from clean weights": {"student": {"init": "clean"}},
    }
    found = {}
    for name, base in (("at", AT), ("darht", DARHT)):
        found[name] = Variant(base, name)
        for what, change in settings.items():
            found[f"{name}, {what}"] = Variant(merge(base, change), name)
        found[f"{name}, n-fgsm"] = Variant(base | {"inner": {"kind": "n-fgsm", "eps": 8}}, name)
    found["adr"] = Variant({"recipe": "adr", "student": PLAIN, "inner": WARM}, "at")
    found["trades"] = Variant({"recipe": "trades", "student": PLAIN, "inner": WARM}, "at")
    faster = {"optim": {"lr": 0.3}}
    found["rslad"] = Variant(RSLAD, "at")
    found["rslad, lr 0.3"] = Variant(RSLAD | faster, "rslad")
    found["ard, tau 1, lr 0.3"] = Variant(RSLAD | {"recipe": "ard", "loss": {"tau": 1}} | faster, "at")
    found["saad"] = Variant({"recipe": "saad", "loss": {"scale": 5, "igdm": 1, "beta": 0}, **FIRST}, "at", "jacobians")
    found["adaad"] = Variant(ADAAD, "at", "jacobians")
    found["adaad, gradient 1"] = Variant(ADAAD | {"loss": {"gradient": 1.0}}, "adaad", "jacobians")
    for name, base, cache in (("darht", DARHT, "cache"), ("rslad", RSLAD, "cache"), ("adaad", ADAAD, "jacobians")):
        for correct in ("drop", "mix"):
            change = {"loss": {"correct": correct}}
            found[f"{name}, correct: {correct}"] = Variant(merge(base, change), name, cache)
    return found | mixed()


def mixed() -> dict[str, Variant]:
    """Students with rows that have no labels, and those that see the labelled rows alone for as many steps."""
    found = {"at, longer": Variant(AT, "at", longer=1 / (1 - SHARE))}
    for name, base in (("darht", DARHT), ("rslad", RSLAD)):
        recipe = base | {"optim": {"lr": 0.3}}
        found[f"{name}, lr 0.3, longer"] = Variant(recipe, "at, longer", longer=1 / (1 - SHARE))
        found[f"{name}, lr 0.3, unlabelled"] = Variant(recipe, f"{name}, lr 0.3, longer", "mixed")
    return found


def prepare(options: argparse.Namespace) -> None:
    """The caches: plain, with Jacobians and with rows without labels; and a student of clean images to begin from."""
    data = {"source": "cifar10", "root": str(options.data.resolve()), "limit": options.limit, "holdout": 0.1}
    given = (item.split("=", 1) for item in options.teacher)
    teachers = {name: {"path": absolute(teacher_at(path, Path.cwd()))} for name, path in given}
    spec = {"data": data, "teachers": teachers, "views": {"kind": "crop-flip", "padding": 4, "count": 16}}
    changes: dict[str, dict[str, Any]] = {"cache": {}}
    if teachers:
        changes["jacobians"] = {"jacobians": {teacher: {} for teacher in teachers}}
        changes["mixed"] = {"data": [data, others(options)]}
    for name, change in changes.items():
        if not (options.work / name / "manifest.json").is_file():
            build(spec | change, options.work / name)
    clean = options.work / "clean"
    if not (clean / "student" / "config.json").is_file():
        shutil.rmtree(clean, ignore_errors=True)
        recipe = AT | {"loss": {"clean_share": 1.0}, "average": {"kind": "none"}}
        train(recipe, clean, options, Variant(recipe, ""))


def others(options: argparse.Namespace) -> dict[str, Any]:
    """The training images after the first `limit`, as a file of images whose labels are left out."""
    path = options.work / "others.npz"
    if not path.is_file():
        files = [load_images(options.data, f"data_batch_{number}", 10_000) for number in range(1, 6)]
        x, y = (torch.cat(part)[options.limit : options.limit + OTHERS] for part in zip(*files, strict=True))
        held = io.BytesIO()
        np.savez(held, image=(x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy(), label=y.numpy())
        write_atomic(path, held.getvalue())
    return {"source": "npz", "path": str(path.resolve()), "labels": "none", "share": SHARE, "views": 1}


def train(recipe: dict[str, Any], folder: Path, options: argparse.Namespace, variant: Variant) -> float:
    """Train one student; CPU seconds."""
    epochs = round(options.epochs * variant.longer)
    optim = {"epochs": epochs, "batch_size": 128, "lr": 0.1, "schedule": "cosine", "warmup": 0.1}
    compute = {"precision": "bf16", "channels_last": True}
    file = folder.with_suffix(".yaml")
    if recipe["student"].get("init"):
        recipe = merge(recipe, {"student": {"init": str(options.work / "clean")}})
    write(file, merge({"optim": optim, "compute": compute}, recipe))
    words = ("--shards", str(options.work / variant.cache), "--recipe", str(file), "--out", str(folder))
    return darht("darht-train", *words)[1]


def measure(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train and judge one student, unless that was done before."""
    variant = variants()[name]
    folder = options.work / "runs" / slug(name, seed)
    result = folder.with_suffix(".json")
    if result.is_file() and (known := json.loads(result.read_text()))["images"] == options.images:
        return known
    shutil.rmtree(folder, ignore_errors=True)
    seconds = train(variant.recipe | {"seed": seed}, folder, options, variant)
    words = ("--judge", str(folder), "--data", str(options.data), "--images", str(options.images))
    judged = json.loads(call(sys.executable, __file__, *words)[0])
    found = {"name": name, "seed": seed, "images": options.images, "seconds": seconds, **judged}
    write_atomic(result, json.dumps(found).encode())
    robust = 100 * np.mean([int(one) for one in found["robust"]])
    print(f"{name}, seed {seed}: {robust:.1f} % robust, {seconds:.0f} CPU s", flush=True)
    return found


def slug(name: str, seed: int) -> str:
    """The name of a student's folder; without a dot, after which `with_suffix` would cut."""
    return "-".join([*"".join(c if c.isalnum() else " " for c in name).split(), str(seed)])


def judge(run: Path, data: Path, images: int) -> dict[str, str]:
    """Which test images the run's student gets right, and keeps under PGD-20 by cross-entropy and by the margin."""
    torch.set_num_threads(1)
    net = load_student(run / "student", torch.device("cpu"))[0].fold().eval()
    x, y = load_images(data, "test_batch", images)
    robust = torch.ones(len(y), dtype=torch.bool)
    for objective in ("ce", "dlr"):
        generator = RowRng.create(0, f"pgd-{objective}", rows=torch.arange(len(y)))
        attack = PGD(eps=8, step=2, steps=20, objective=objective)
        outcome = Engine(precision="bf16").run(attack, net, x, y, generator=generator)
        robust &= outcome.robust
    return {"clean": _bits(outcome.clean_correct), "robust": _bits(robust)}


def _bits(right: torch.Tensor) -> str:
    return "".join(str(int(one)) for one in right)


def page(results: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """The Markdown page: one row a student, its differences paired by image over the seeds that both have."""
    by_name: dict[str, dict[int, dict[str, Any]]] = {}
    for one in results:
        by_name.setdefault(one["name"], {})[one["seed"]] = one
    names = {str(options.data): "DIR", str(options.work.parent): "WORK", str(options.out): "PAGE"}
    head = HEAD.format(
        words=shlex.join(names.get(word, word) for word in sys.argv[1:]),
        date=datetime.date.today(), version=torch.__version__.split("+")[0],
        machine=f"{os.cpu_count()}-core {platform.machine()} CPU",
        epochs=options.epochs, images=options.images, limit=options.limit, share=SHARE, others=OTHERS,
    )  # fmt: skip
    rows = [_row(name, by_name, variant) for name, variant in variants().items() if name in by_name]
    return head + "\n".join(rows) + "\n"


def _row(name: str, by_name: dict[str, dict[int, dict[str, Any]]], variant: Variant) -> str:
    own, base = by_name[name], by_name.get(variant.against, {})
    cells = [name, *(_over_seeds([_right(one, what).mean() for one in own.values()]) for what in RIGHT)]
    both = sorted(set(own) & set(base))
    for what in RIGHT:
        if variant.against == name or not both:
            cells.append("")
            continue
        first, second = (np.stack([_right(runs[seed], what) for seed in both]) for runs in (own, base))
        points, (low, high), _ = paired_bootstrap(first, second)
        cells.append(f"{points:+.1f} [{low:+.1f}, {high:+.1f}]")
    seconds = fmean(one["seconds"] for one in own.values())
    against = "" if variant.against == name else variant.against
    return "| " + " | ".join([*cells, against, f"{seconds:.0f}", str(len(own))]) + " |"


def _over_seeds(shares: list[float]) -> str:
    """The mean in per cent, with the standard deviation of one seed where there are several."""
    spread = f" ± {100 * np.std(shares, ddof=1):.1f}" if len(shares) > 1 else ""
    return f"{100 * np.mean(shares):.1f}{spread}"


RIGHT = ("clean", "robust")


def _right(one: dict[str, Any], what: str) -> np.ndarray:
    return np.array([int(bit) for bit in one[what]])


HEAD = """# Settings of recipes, on and off

`python bench/recipes.py {words}`, {date}, {machine}, torch {version}, no GPU.

CIFAR-10, the first {limit:,} training images (10 % held out for selection), {epochs} epochs in batches of 128, learning
rate 0.1 where nothing else is said, cosine schedule, one `warm` step from noise in every batch, no clean batches; the
student is a ResNet of 78,000 parameters in bfloat16. L-inf, epsilon 8/255. "Robust" is what withstands PGD-20 on the
cross-entropy and on the margin (DLR), of the first {images:,} test images. Differences are points, paired by image,
means over the seeds that both students have, with 95 % bootstrap intervals over images; what another seed would give is
not in them, "±" is its standard deviation. CPU seconds are those of the whole `darht-train` on one thread.

"Unlabelled": of every batch {share:.0%} are rows whose labels are left out, of the {others:,} training images that
follow; they stand for generated ones, whose distribution is this one at best, and the teacher was trained on them. An
epoch has as many batches as the labelled rows give: "longer" takes as many steps, on the labelled rows alone.

| student | clean | robust | clean, difference | robust, difference | less that of | CPU s | seeds |
|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="holds cifar-10-batches-py/")
    parser.add_argument("--work", type=Path, default=Path("build/bench/recipes"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--teacher", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--limit", type=int, default=5000, help="training images")
    parser.add_argument("--images", type=int, default=1000, help="test images")
    parser.add_argument("--jobs", type=int, default=2, help="students trained at once, one thread each")
    parser.add_argument("--only", action="append", choices=list(variants()))
    parser.add_argument("--judge", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.judge is not None:
        print(json.dumps(judge(options.judge, options.data, options.images)))
        return
    options.work /= f"{options.limit}-images-{options.epochs}-epochs"
    (options.work / "runs").mkdir(parents=True, exist_ok=True)
    prepare(options)
    results: list[dict[str, Any]] = []

    def work(job: tuple[str, int]) -> None:
        results.append(measure(*job, options))
        if options.out is not None:
            write_atomic(options.out, page(results, options).encode())

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(work, [(name, seed) for seed in range(options.seeds) for name in options.only or variants()]))


if __name__ == "__main__":
    main()
