"""The time between two epochs of a run on a cache, in this checkout and in an earlier one, side by side.

    python bench/epoch_gap.py --cache CACHE --before CHECKOUT

CACHE is any sealed cache, CHECKOUT a working tree of darht from before a change. Steps are left out but for the first
two, which make the momenta: what is measured is everything between an epoch's last step and the next one's first.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT, EPOCHS, REAL_STEPS = Path(__file__).resolve().parents[1], 4, 2
TITLE = "A run on 50,000 rows"
SETTINGS: dict[str, Any] = {
    "recipe": "at",
    "student": {"arch": "resnet18", "kwargs": {"width": 16}, "feature_map": False},
    "inner": {"kind": "warm", "warm": {"start": "noise"}},
    "average": {"kind": "ema", "decay": 0.999},
    "optim": {"epochs": EPOCHS},
}


def run(cache: Path) -> dict[str, list[float]]:
    """Seconds of each gap with the darht that is imported: in all, and of them what scoring takes."""
    import torch

    from darht.cache.read.reader import open_cache
    from darht.core.config import parse
    from darht.trainer.config import TrainConfig
    from darht.trainer.student import train as trainer

    ends: list[float] = []
    gaps: list[float] = []
    scoring: list[float] = []
    parts: dict[str, Callable[..., Any]] = {name: getattr(trainer, name) for name in ("compute_gradients", "take_step")}

    def replaced(name: str) -> Callable[..., Any]:
        def step(*words: Any, **options: Any) -> Any:
            if ends and len(gaps) < state["epoch"]:
                gaps.append(time.perf_counter() - ends[-1])
            return parts[name](*words, **options) if state["steps"] < REAL_STEPS else None

        return step

    def scored(*words: Any) -> Any:
        start = time.perf_counter()
        found = score(*words)
        scoring.append(time.perf_counter() - start)
        return found

    def on_step(number: int, total: int, images: int, metrics: Any) -> None:
        state["steps"] += 1
        if number % (total // EPOCHS) == 0:
            state["epoch"] += 1
            ends.append(time.perf_counter())

    state, score = {"steps": 0, "epoch": 0}, trainer._scores
    trainer._scores = scored
    trainer.check_finite = lambda loss, epoch: None
    for name in parts:
        setattr(trainer, name, replaced(name))
    config = parse(TrainConfig, SETTINGS, "bench")
    callbacks = trainer.Callbacks(on_step=on_step)
    with tempfile.TemporaryDirectory() as out:
        trainer.train(config, open_cache(cache), Path(out) / "run", device=torch.device("cpu"), callbacks=callbacks)
    return {"gap": gaps, "scoring": scoring[: len(gaps)]}


def measured(cache: Path, before: Path) -> dict[str, dict[str, float]]:
    """Median seconds, before and after: of the gap, of scoring in it, and of the rest."""
    found = {}
    for name, tree in (("before", before.resolve()), ("after", ROOT)):
        environment = os.environ | {"PYTHONPATH": str(tree / "src")}
        words = [sys.executable, str(Path(__file__).resolve()), "--cache", str(cache.resolve()), "--child"]
        said = subprocess.run(words, env=environment, cwd=tree, check=True, stdout=subprocess.PIPE, text=True).stdout
        one = json.loads(said.splitlines()[-1])
        rest = [gap - spent for gap, spent in zip(one["gap"], one["scoring"], strict=True)]
        found[name] = {"gap": statistics.median(one["gap"]), "scoring": statistics.median(one["scoring"]),
                       "rest": statistics.median(rest)}  # fmt: skip
    return found


def page(found: dict[str, dict[str, float]]) -> str:
    """The table as Markdown, in parts of the whole gap before."""
    unit = found["before"]["gap"]
    names = {
        "gap": "in all",
        "scoring": "scoring held-out rows and the probe",
        "rest": "all else: keeping the run, the next order",
    }
    lines = ["| between an epoch's last step and the next one's first | before | after |", "|---|---|---|"]
    lines += [f"| {said} | {found['before'][name] / unit:.2f} | {found['after'][name] / unit:.2f} |"
              for name, said in names.items()]  # fmt: skip
    return "\n".join(lines)


def section(cache: Path, before: Path) -> str:
    """The page's section, measured now."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=before, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()
    return f"""\
CIFAR-10 in a cache without teachers (`--cache`), a ResNet-18 of 16 channels that has hardly been trained, `at` with
`inner: warm` and an average, on a CPU; `before` is commit {commit} (`--before`), which wrote all that a run is between
two epochs. The steps themselves are left out; medians of {EPOCHS - 1} gaps are told in parts of the whole one before.

{page(measured(cache, before))}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cache", type=Path, required=True, help="a sealed cache")
    parser.add_argument("--before", type=Path, help="a working tree of darht from before the change")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(run(given.cache)))
        return 0
    found = measured(given.cache, given.before)
    print(json.dumps(found))
    print(page(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
