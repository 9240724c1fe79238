"""Attacks side by side: ours beside the libraries people use, on the same models, epsilon, steps, batch and threads.

    python bench/attacks.py --out docs/benchmarks.md

measures everything and writes the page. What the log (`--work`) holds is not measured again, so that an interrupted
run goes on where it stopped; `--fresh` forgets it. `--smoke` does the same with a handful of images. `--parity` runs
AutoAttack alone, ours and the authors', on every model (1,000 images: half an hour for the robust ResNet and the ViT
each), and writes a section of its own. A library that is not installed is left out.

Every library has a process of its own for each model and attack, so that peak memory is its own. Rounds are
interleaved (all libraries once, then all of them again) and compared within a round, so that what else the machine does
disturbs all alike.
"""

import argparse
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from attack_libraries import ATTACKS, OURS, RUN, is_installed, load
from attack_models import MODELS, load_images, load_model, load_vit, robust_rows
from attack_page import PAGE, PARITY, page, parity_page, write_section

from darht.core.vision import torchvision

# (images, rounds). Nothing withstands on undefended models, and their passes are slow: fewer images do. The longest
# come first, so that two jobs end together.
PLAN = {
    ("resnet4b_adv", "autoattack"): (128, 3),
    ("vit", "autoattack"): (64, 1),
    ("vit", "apgd-ce-100"): (64, 1),
    ("vit", "pgd-20"): (64, 3),
    ("resnet20", "autoattack"): (64, 1),
    ("resnet20", "apgd-ce-100"): (64, 1),
    ("resnet20", "pgd-20"): (64, 3),
    ("resnet4b_adv", "apgd-ce-100"): (256, 3),
    ("resnet4b_adv", "pgd-20"): (512, 5),
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What one process measures, as often as it is told to."""

    library: str
    attack: str
    model: str
    images: int
    eps: int
    batch: int
    threads: int


def work_off(cell: Cell, folders: dict[str, Path]) -> None:
    """The life of a process: get ready, say so, then measure once for each line that comes in."""
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    warnings.simplefilter("ignore")
    torch.set_num_threads(cell.threads)
    torchvision()
    model = load_model(cell.model, folders["zoo"], folders["data"], folders["work"])
    x, y = load_images(folders["data"], "test_batch", cell.images)
    rows = x[: cell.batch].clone().requires_grad_()
    for _ in range(2):  # compile kernels, fault pages in
        torch.autograd.grad(model(rows).sum(), rows)
    load(cell.library)
    print("ready", file=reply, flush=True)
    for _ in sys.stdin:
        print(json.dumps(measure(cell, model, x, y)), file=reply, flush=True)


def measure(cell: Cell, model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
    """One round in this process."""
    gc.collect()
    before = memory(reset=True)
    start = time.process_time()
    x_adv, forwards, backwards = RUN[cell.library](cell.attack, model, x, y, cell.eps, cell.batch)
    seconds = time.process_time() - start
    peak = memory()
    robust = robust_rows(model, x, x_adv, y, cell.eps)
    return {
        "cpu": seconds, "forwards": forwards / len(y), "backwards": backwards / len(y),
        "memory": peak - before, "robust": "".join("01"[flag] for flag in robust.tolist()),
    }  # fmt: skip


def memory(*, reset: bool = False) -> float:
    """The process's peak in MiB; since now, after a reset, which Linux alone knows."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return float(status.read_text().split("VmHWM:")[1].split()[0]) / 1024


class Worker:
    """A process that measures a cell."""

    def __init__(self, cell: Cell, arguments: argparse.Namespace) -> None:
        self.cell = cell
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed by end()
        command = [sys.executable, "-W", "ignore", __file__, "--worker", json.dumps(asdict(cell))]
        command += ["--data", str(arguments.data), "--zoo", str(arguments.zoo), "--work", str(arguments.work)]
        variables = {**os.environ, "OMP_NUM_THREADS": str(cell.threads), "MKL_NUM_THREADS": str(cell.threads)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen(command, text=True, env=variables, **pipes)

    def ready(self) -> bool:
        """Wait until it has loaded everything."""
        return self._answer() == "ready"

    def go(self) -> dict[str, Any] | None:
        """Measure once; None, with a line that says why, where that fails."""
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        text = self._answer()
        return json.loads(text) if text else None

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.errors.close()

    def _answer(self) -> str:
        line = self.process.stdout.readline().strip()
        if not line:
            self.errors.seek(0)
            last = (self.errors.read().strip().splitlines() or ["no message"])[-1]
            print(f"{self.cell.library} on {self.cell.model}, {self.cell.attack}: failed: {last[:200]}", flush=True)
        return line


class Log:
    """Measurements, one JSON line each; a line that was cut off counts as not there."""

    def __init__(self, path: Path, *, fresh: bool) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            path.unlink(missing_ok=True)
        self.lock = threading.Lock()
        self.held: dict[tuple[Cell, int], dict[str, Any]] = {}
        for line in path.read_text().splitlines() if path.is_file() else []:
            try:
                one = json.loads(line)
                self.held[Cell(**one["cell"]), one["round"]] = one["found"]
            except (json.JSONDecodeError, KeyError, TypeError):
                continue

    def add(self, cell: Cell, number: int, found: dict[str, Any]) -> None:
        self.held[cell, number] = found
        with self.lock, self.path.open("a") as file:
            file.write(json.dumps({"cell": asdict(cell), "round": number, "found": found}) + "\n")


def collect(cells: list[Cell], rounds: int, log: Log, arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """All rounds of one model and attack, by library; libraries that fail or are not there are left out."""
    there = [cell for cell in cells if is_installed(cell.library)]
    for cell in set(cells) - set(there):
        print(f"{cell.library} is not installed", flush=True)
    open_cells = [cell for cell in there if any((cell, k) not in log.held for k in range(rounds))]
    workers = [Worker(cell, arguments) for cell in open_cells]
    workers = [worker for worker in workers if worker.ready()]
    for number in range(rounds):
        for worker in workers if number % 2 == 0 else workers[::-1]:
            if (worker.cell, number) in log.held:
                continue
            found = worker.go()
            if found is not None:
                log.add(worker.cell, number, found)
                tell(worker.cell, number, found)
    for worker in workers:
        worker.end()
    results = {cell.library: [log.held.get((cell, k)) for k in range(rounds)] for cell in there}
    return {library: found for library, found in results.items() if None not in found}


def tell(cell: Cell, number: int, found: dict[str, Any]) -> None:
    robust = 100 * found["robust"].count("1") / cell.images
    print(
        f"{cell.model} {cell.attack} round {number + 1} {cell.library}: {found['cpu'] * 1000 / cell.images:.2f} CPU s "
        f"for 1,000; {found['forwards']:.1f} forward, {found['backwards']:.1f} backward; "
        f"{robust:.1f} % robust; {found['memory']:.0f} MiB",
        flush=True,
    )


def summary(results: dict[str, list[dict[str, Any]]], images: int) -> list[dict[str, Any]]:
    """A row for each library: medians over the rounds, and for ours the factor over the fastest other library.

    A factor is the median over the rounds of the quotient of CPU seconds in the same round.
    """
    rivals = [library for library in results if library not in OURS]
    rows = []
    for library, found in results.items():
        quotients = [
            statistics.median(theirs["cpu"] / own["cpu"] for theirs, own in zip(results[rival], found, strict=True))
            for rival in rivals
        ]
        row: dict[str, Any] = {
            name: statistics.median(one[name] for one in found) for name in ("forwards", "backwards")
        }
        row["cpu"] = 1000 / images * statistics.median(one["cpu"] for one in found)
        row |= {"library": library, "images": images, "rounds": len(found), "memory": found[0]["memory"]}
        row |= {"robust": found[0]["robust"], "factor": min(quotients) if quotients and library in OURS else None}
        rows.append(row)
    return rows


def plan(arguments: argparse.Namespace) -> dict[tuple[str, str], tuple[int, int]]:
    """Images and rounds by model and attack."""
    if arguments.parity:
        return {(model, "autoattack"): (arguments.images or 64, 1) for model in arguments.models}
    chosen = {key: size for key, size in PLAN.items() if key[0] in arguments.models and key[1] in arguments.attacks}
    if arguments.smoke:
        return dict.fromkeys(chosen, (8, 2))
    return {key: (arguments.images or images, arguments.rounds or rounds) for key, (images, rounds) in chosen.items()}


def run(arguments: argparse.Namespace) -> None:
    """Measure what the plan says, and print or write what came out."""
    torchvision()
    if "vit" in arguments.models:
        load_vit(arguments.data, arguments.work)
    log = Log(arguments.work / "attacks.jsonl", fresh=arguments.fresh)
    start, sizes = time.time(), plan(arguments)

    def row_of(key: tuple[str, str]) -> list[dict[str, Any]]:
        (model, attack), (images, rounds) = key, sizes[key]
        libraries = [name for name in ATTACKS[attack] if not arguments.parity or name in (*OURS, "pyautoattack")]
        common = {"images": images, "eps": arguments.eps, "batch": arguments.batch, "threads": arguments.threads}
        cells = [Cell(library=name, attack=attack, model=model, **common) for name in libraries]
        return summary(collect(cells, rounds, log, arguments), images)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        rows = dict(zip(sizes, pool.map(row_of, sizes), strict=True))
    table = {(model, attack): rows[model, attack] for model in MODELS for attack in ATTACKS if (model, attack) in rows}
    print(f"{(time.time() - start) / 60:.1f} minutes\n")
    settings = {name: getattr(arguments, name) for name in ("eps", "batch", "threads")}
    text = parity_page(table, settings) if arguments.parity else page(table, settings)
    print(text)
    if arguments.out:
        write_section(arguments.out, text, PARITY if arguments.parity else PAGE)


def parse() -> argparse.Namespace:
    here = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="write the page here; its other sections are kept")
    parser.add_argument("--data", type=Path, default=here / "build/data", help="where cifar-10-batches-py lies")
    parser.add_argument("--zoo", type=Path, required=True, help="holds zoo.py and weights: docs/benchmarks.md")
    parser.add_argument("--work", type=Path, default=here / "build/bench", help="the log, and the ViT's weights")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS), choices=list(ATTACKS))
    parser.add_argument("--images", type=int, help="for every model and attack, instead of the plan's numbers")
    parser.add_argument("--rounds", type=int, help="for every model and attack, instead of the plan's numbers")
    parser.add_argument(
        "--eps", type=int, default=4, help="in pixel levels; 40 to 60 %% withstand 4 on the first model"
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="for every library")
    parser.add_argument(
        "--jobs", type=int, default=min(2, os.cpu_count() or 1), help="measured at once, on a core each"
    )
    parser.add_argument("--parity", action="store_true", help="AutoAttack standard only, ours and pyautoattack")
    parser.add_argument("--smoke", action="store_true", help="8 images, two rounds")
    parser.add_argument("--fresh", action="store_true", help="forget the log")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.worker:
        folders = {name: getattr(arguments, name) for name in ("data", "zoo", "work")}
        work_off(Cell(**json.loads(arguments.worker)), folders)
    else:
        run(arguments)


if __name__ == "__main__":
    main()
