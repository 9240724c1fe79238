"""What a GPU makes of darht, in about ten minutes: speed of each mode, launches, waits, memory, a build's precision.

    python bench/gpu.py                 measure the card; writes build/gpu/gpu.md and build/gpu/gpu.json
    python bench/gpu.py --smoke         the same with tiny networks, on whatever there is

Each measurement is kept as soon as it is made; a stopped run goes on, and one that failed is tried again. Without a GPU
it says so, and prints what can be counted instead. The targets are arithmetic for one H100, not measurements.
"""

import argparse
import datetime
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import yaml
from torch.profiler import ProfilerActivity, profile

from darht.cache.builder.build import build, plan_build
from darht.cache.builder.seal import seal
from darht.cache.builder.teachers import Card, save_teacher
from darht.cache.read.reader import Cache, open_cache
from darht.core.config import parse
from darht.core.errors import DarhtError
from darht.core.files import write_atomic
from darht.core.nets import build as build_net
from darht.core.preprocessing import Preprocessing
from darht.core.sealed import read_sealed, write_sealed
from darht.core.version import VERSION
from darht.trainer.config import TrainConfig
from darht.trainer.student.train import Callbacks, train

TARGETS = {"cached": 40_000, "warm": 17_000, "pgd:10": 5_500}  # images/s of one H100
EPOCH, AROUND = 3.0, 0.5  # seconds: of 50,000 images with `warm`, and around such an epoch
MODES = {"cached": {"kind": "cached"}, "warm": {"kind": "warm"}, "pgd:10": {"kind": "pgd", "steps": 10}}
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
CLASSES, GIB = 10, 2**30
STOPPED = 130  # as a command exits that Ctrl-C has stopped
TINY = {"width": 4, "blocks": [1, 1, 1, 1]}
Measurement = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Sizes:
    """How much is measured; `watched` steps are looked at for waits, and as many for launches."""

    rows: int = 13_000
    epoch_rows: int = 51_020  # 50,000 and the 2 % that are held out
    batch: int = 256
    watched: int = 10
    student: dict[str, Any] = field(default_factory=dict)
    teacher: tuple[str, dict[str, Any]] = ("wrn-28-10", {})
    shard: int = 1024
    compiled: tuple[bool, ...] = (False, True)


SMOKE = Sizes(rows=80, epoch_rows=80, batch=16, watched=1, student=TINY, teacher=("resnet18", TINY), shard=32,
              compiled=(False,))  # fmt: skip


def card(device: torch.device) -> dict[str, Any]:
    """What the figures belong to."""
    facts = {"darht": VERSION, "torch": torch.__version__.split("+")[0], "device": f"{platform.machine()} CPU, no GPU"}
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        facts |= {"device": found.name, "gib": round(found.total_memory / GIB), "cuda": str(torch.version.cuda)}
    return facts | {"cores": os.cpu_count()}


def make_cache(folder: Path, rows: int, sizes: Sizes, device: torch.device, *, teachers: int, **more: Any) -> Cache:
    """A sealed cache of random images; figures depend on the shape of what is read and asked, not on what it shows."""
    if not (folder / "cache" / "manifest.json").is_file():
        random = np.random.default_rng(0)
        images, labels = random.integers(0, 256, (rows, 3, 32, 32), dtype=np.uint8), np.arange(rows) % CLASSES
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / "train.npz", images=images, labels=labels)
        spec = {
            "data": {"source": "npz", "root": str(folder.resolve() / "train.npz")},
            "teachers": {f"t{k}": {"path": f"teacher{k}"} for k in range(teachers)},
            "attacks": {"pgd": {"kind": "pgd", "teacher": "t0", "eps": 8, "step": 2, "steps": 1}},
            "views": {"count": 4}, "store": {"rows_per_shard": sizes.shard, "rows_per_chunk": sizes.shard // 8},
        } | more  # fmt: skip
        arch, kwargs = sizes.teacher if more else ("resnet18", TINY)
        for k in range(teachers):
            torch.manual_seed(k)
            plain = Card(
                arch=arch, kwargs=kwargs, num_classes=CLASSES, preprocessing=Preprocessing(), weights_sha256=""
            )
            save_teacher(folder / f"teacher{k}", build_net(arch, CLASSES, kwargs), plain)
        (folder / "cache.yaml").write_text(yaml.safe_dump(spec))
        plan = plan_build(folder / "cache.yaml", device=device)
        build(plan, folder / "cache", device=device, on_unit=lambda *_: None)
        seal(folder / "cache")
    return open_cache(folder / "cache")


class Watch:
    """Looks at some steps of the last epoch, and at the time between the two before it."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes, self.on_gpu = sizes, device.type == "cuda"
        self.rows: list[dict[str, Any]] = []
        self.ended, self.around = 0.0, 0.0
        self.launches: float | None = None
        self.profiler: profile | None = None

    def epoch(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def step(self, number: int, total: int, images: int, metrics: Any) -> None:
        steps, now = total // 3, time.perf_counter()
        at = number - 2 * steps  # of the last epoch, from 1
        if at == 1:
            self.around = now - self.ended - self.rows[1]["seconds"] / steps
        if at in (2, 2 + self.sizes.watched) and self.on_gpu:
            torch.cuda.set_sync_debug_mode("warn" if at == 2 else "default")
        if at == 2 + self.sizes.watched and self.on_gpu:
            self.profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
            self.profiler.start()
        if at == 2 + 2 * self.sizes.watched and self.profiler is not None:
            self.profiler.stop()
            counts = [event.count for event in self.profiler.key_averages() if event.key in LAUNCHES]
            self.launches = sum(counts) / self.sizes.watched
        self.ended = now


def training(mode: str, compiled: bool, rows: int, sizes: Sizes, work: Path, device: torch.device) -> dict[str, Any]:
    """Three epochs of adversarial batches: one to warm up, one for speed, one that is looked at."""
    cache = make_cache(work / f"cache-{rows}", rows, sizes, device, teachers=3)
    plain = {
        "recipe": "darht", "loss": {"clean_share": 0.0, "phases": [0.0, 1.0]}, "inner": {"eps": 8, **MODES[mode]},
        "student": {"kwargs": sizes.student}, "optim": {"epochs": 3, "batch_size": sizes.batch, "lr": 0.01},
        "compute": {"precision": "bf16", "channels_last": True, "compile": compiled},
    }  # fmt: skip
    watch = Watch(sizes, device)
    told = Callbacks(on_step=watch.step, on_epoch=watch.epoch)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with warnings.catch_warnings(record=True) as said, TemporaryDirectory(dir=work) as out:
        warnings.simplefilter("always")
        try:
            train(parse(TrainConfig, plain, "bench"), cache, Path(out) / "run", device=device, callbacks=told)
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchronizing CUDA" in str(one.message) for one in said)
    return {
        "images_per_second": watch.rows[1]["images_per_second"], "seconds": watch.rows[1]["seconds"],
        "around": round(watch.around, 3), "launches": watch.launches,
        "waits": waits / sizes.watched if device.type == "cuda" else None, "peak_gib": _peak(device),
    }  # fmt: skip


def _peak(device: torch.device) -> float | None:
    return round(torch.cuda.max_memory_allocated(device) / GIB, 2) if device.type == "cuda" else None


def unit(precision: str, sizes: Sizes, work: Path, device: torch.device) -> dict[str, Any]:
    """A shard's perturbations by PGD-10 and answers to 4 views; the second of two, with the kernels of the first."""
    folder, seconds = work / f"unit-{precision}", dict[str, float]()
    attack = {"pgd": {"kind": "pgd", "teacher": "t0", "eps": 8, "step": 2, "steps": 10}}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    cache = make_cache(folder, 2 * sizes.shard, sizes, device, teachers=1, attacks=attack, precision=precision)
    environment: dict[str, Any] = {}
    for name in ("delta/pgd", "logits/t0/clean"):
        record = yaml.safe_load((folder / "cache" / "commits" / name / "00001.json").read_text())
        seconds[name], environment = record["seconds"], record["environment"]
    exact = work / "unit-fp32" / "cache"
    apart = {}
    if exact.is_dir():
        deltas = [open_cache(path).read("delta/pgd") for path in (exact, folder / "cache")]
        logits = [open_cache(path).read("logits/t0/clean").astype(np.float32) for path in (exact, folder / "cache")]
        apart = {"same": float((deltas[0] == deltas[1]).mean()), "logit": float(np.abs(logits[0] - logits[1]).max())}
    return {"batch": environment["batch_size"], "pgd_seconds": round(seconds["delta/pgd"], 3),
            "ask_seconds": round(seconds["logits/t0/clean"], 3), "peak_gib": _peak(device), "rows": cache.rows // 2,
            **apart}  # fmt: skip


def measurements(sizes: Sizes, work: Path, device: torch.device) -> dict[str, Measurement]:
    """All of them, by name, in order."""
    found: dict[str, Measurement] = {}
    for mode in MODES:
        for compiled in sizes.compiled:
            name = f"{mode} {'compiled' if compiled else 'eager'}"
            found[name] = partial(training, mode, compiled, sizes.rows, sizes, work, device)
    found["epoch"] = partial(training, "warm", sizes.compiled[-1], sizes.epoch_rows, sizes, work, device)
    for precision in ("fp32", "tf32", "bf16"):
        found[f"unit {precision}"] = partial(unit, precision, sizes, work, device)
    return found


def measure(todo: dict[str, Measurement], facts: dict[str, Any], file: Path) -> dict[str, dict[str, Any]]:
    """Make what is not there yet for this card and these versions; a failure is kept as its first line."""
    done: dict[str, dict[str, Any]] = {}
    if file.is_file():
        kept = read_sealed(file, "remove it, and all is measured anew").value
        done = {name: one for name, one in kept["measured"].items() if kept["card"] == facts and "error" not in one}
    for name, run in todo.items():
        if name in done:
            print(f"# measured before: {name}", flush=True)
            continue
        try:
            done[name] = run()
        except (DarhtError, RuntimeError) as error:  # RuntimeError: what CUDA and torch.compile raise
            done[name] = {"error": str(error).strip().split("\n", 1)[0][:200]}
        print(f"{name}: {done[name]}", flush=True)
        write_sealed(file, {"card": facts, "measured": done})
    return done


# The page ----------------------------------------------------------------------------------------------------------


ABOUT = """Random images of 32x32, ResNet-18 with three teachers, batches of 256, bf16 on channels-last images, every
batch adversarial. The unit is that of a WRN-28-10. Targets: one H100, by arithmetic."""
SAYS_NOTHING = "Tiny networks, whose figures say nothing."
STEPS = (
    "| mode | images/s | target | of it | launches a step | waits a step | peak GiB |\n|---|---|---|---|---|---|---|"
)
UNITS = """| a unit of the build in | rows | batch | PGD-10 s | 4 views s | peak GiB | as fp32 | logits within |
|---|---|---|---|---|---|---|---|"""


def page(done: dict[str, dict[str, Any]], facts: dict[str, Any], command: str) -> str:
    """The figures as Markdown; what a CPU cannot tell is a dash."""
    versions = ", ".join(f"{key} {value}" for key, value in facts.items() if key != "device")
    made = f"`{command}`, {datetime.date.today()}, {facts['device']}, {versions}."
    lines = [f"# {facts['device']}", "", made, SAYS_NOTHING if "--smoke" in command else ABOUT, "", STEPS]
    good = {name: one for name, one in done.items() if "error" not in one}
    for name, one in good.items():
        if name.split()[0] in TARGETS:
            speed, target = one["images_per_second"], TARGETS[name.split()[0]]
            figures = f"{_cell(one['launches'], 0)} | {_cell(one['waits'], 1)} | {_cell(one['peak_gib'], 2)}"
            lines.append(f"| {name} | {speed:,.0f} | {target:,} | {100 * speed / target:.0f} % | {figures} |")
    if epoch := good.get("epoch"):
        took = (
            f"{epoch['seconds']:.1f} s (target {EPOCH:g} s) and {epoch['around']:.2f} s around it (target {AROUND:g} s)"
        )
        lines += ["", f"An epoch of `warm` on 50,000 images: {took}."]
    lines += ["", UNITS]
    for name, one in good.items():
        if name.startswith("unit "):
            took = f"{one['pgd_seconds']:.2f} | {one['ask_seconds']:.2f} | {_cell(one['peak_gib'], 2)}"
            apart = f"{100 * one['same']:.2f} % | {one['logit']:.3f}" if "same" in one else "- | -"
            lines.append(f"| {name.split()[1]} | {one['rows']} | {one['batch']} | {took} | {apart} |")
    failed = [f"- {name} failed: {one['error']}" for name, one in done.items() if "error" in one]
    return "\n".join([*lines, *(["", *failed] if failed else []), ""])


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def counts() -> str:
    """What can be said without a GPU."""
    import launches
    import launches_engine

    steps = {mode: launches.count(mode) for mode in launches.MODES}
    return "\n\n".join([launches.page(steps), launches_engine.page(launches_engine.count())])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--work", type=Path, help="default: build/gpu, or build/gpu-smoke")
    parser.add_argument("--smoke", action="store_true", help="tiny networks, on the CPU where there is no GPU")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not given.smoke:
        print("torch sees no GPU: nothing can be measured. What a step launches and where it waits, counted:\n")
        print(counts())
        return 0
    work = given.work or Path("build/gpu-smoke" if given.smoke else "build/gpu")
    facts, file = card(device), work / "gpu.json"
    try:
        done = measure(measurements(SMOKE if given.smoke else Sizes(), work, device), facts, file)
    except DarhtError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return DarhtError.exit_code
    except KeyboardInterrupt:
        print(f"stopped; what is measured lies in {file}, and the same command goes on", file=sys.stderr)
        return STOPPED
    text = page(done, facts, "python bench/gpu.py" + (" --smoke" if given.smoke else ""))
    write_atomic(work / "gpu.md", text.encode())
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
