"""Honest networks and planted frauds through the quick tier: whom the checks condemn, as a table.

python bench/verdicts.py --images 100 [--only REGEX] [--cifar DIR --weights FOLDER]
"""

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from verdict_models import frauds, honest_nets

from darht.trainer.evaluation.config import EvalConfig
from darht.trainer.evaluation.run import evaluate

NAMES = ("cnn_a_adv4", "cnn_a_mix", "cnn_deep_kw", "cnn_sgd", "cnn_wide_kw", "resnet20", "resnet2b_adv", "resnet4b_adv",
         "resnet56", "resnet8_mlperf")  # fmt: skip


def public(folder: Path) -> Iterator[tuple[str, nn.Module]]:
    sys.path.insert(0, str(folder))
    import zoo  # type: ignore[import-not-found]

    yield from ((f"public {name}", zoo.load(name)) for name in NAMES)


def judge(kind: str, name: str, net: nn.Module, data: dict[str, Any]) -> dict[str, Any]:
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        report = evaluate(net, EvalConfig(**data), out=Path(folder), device=torch.device("cpu"))
    by_status = {state: [c.name for c in report.masking.checks if c.status == state] for state in ("FAIL", "warn")}
    return {
        "kind": kind, "model": name, "clean": report.scores[0].accuracy, "robust": report.scores[-1].accuracy,
        "condemned": not report.masking.passed, **by_status, "seconds": time.process_time() - start,
        "checks": report.masking.checks,
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    said = "condemned" if row["condemned"] else "not condemned"
    why = "; ".join([*row["FAIL"], *(f"warns: {name}" for name in row["warn"])])
    return f"| {row['model']} | {row['clean']:.0f} | {row['robust']:.0f} | {said} | {why} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--only", default="", help="a regular expression that names must hold")
    parser.add_argument("--kind", choices=["honest", "fraud"])
    parser.add_argument("--tier", default="quick")
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--figures", action="store_true")
    options = parser.parse_args()
    own = {"data": "digits", "limit": options.images, "tier": options.tier, "eps": 24.0}
    makers: dict[str, list[tuple[Any, dict[str, Any]]]] = {"honest": [(honest_nets(), own)], "fraud": [(frauds(), own)]}
    if options.cifar and options.weights:
        foreign = {**own, "data": "cifar10", "root": options.cifar, "eps": 8.0}
        makers["honest"].append((public(options.weights), foreign))
    for kind in [options.kind] if options.kind else makers:
        print("| model | clean % | worst case % | verdict | checks that fail or warn |\n|---|---:|---:|---|---|")
        rows = []
        for models, data in makers[kind]:
            for name, net in models:
                if re.search(options.only, name):
                    rows.append(judge(kind, name, net, data))
                    print(line(rows[-1]), flush=True)
                    if options.figures:
                        print(*(f"    {c.status} {c.name} {c.figures}" for c in rows[-1]["checks"]), sep="\n")
        count = sum(row["condemned"] for row in rows)
        print(f"\n{kind}: {count} of {len(rows)} condemned, {sum(row['seconds'] for row in rows):.0f} CPU seconds\n")


if __name__ == "__main__":
    main()
