"""The page of `bench/quality.py`."""

import datetime
import math
import os
import platform
from typing import Any

import torch

LIVE, AT, WARM = "darht, live", "at", "darht, warm"
Results = dict[str, list[dict[str, Any]]]


def share(bits: str) -> float:
    """Per cent."""
    return 100 * bits.count("1") / len(bits)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def spread(values: list[float], digits: int = 1) -> str:
    """Mean and standard deviation over seeds."""
    middle = mean(values)
    if len(values) == 1:
        return f"{middle:.{digits}f}"
    deviation = math.sqrt(sum((value - middle) ** 2 for value in values) / (len(values) - 1))
    return f"{middle:.{digits}f} ± {deviation:.{digits}f}"


def difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], key: str) -> tuple[float, float]:
    """Points between two ways, and the half width of its 95 % interval over the test images that both have."""
    shared = min(len(one[key]) for one in (*ours, *theirs))
    images = [
        100 * (mean([int(one[key][i]) for one in ours]) - mean([int(one[key][i]) for one in theirs]))
        for i in range(shared)
    ]
    middle = mean(images)
    variance = sum((value - middle) ** 2 for value in images) / (len(images) - 1)
    return middle, 1.96 * math.sqrt(variance / len(images))


def main_table(results: Results) -> str:
    lines = [
        "| way | clean | PGD-20 | AutoAttack | on images | AutoAttack less that of live | CPU s | times live | seeds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    live = results.get(LIVE)
    for name, rows in results.items():
        cells = [spread([share(row[key]) for row in rows]) for key in ("clean", "pgd-20", "autoattack")]
        seconds, gap, times = mean([row["seconds"] for row in rows]), "", ""
        if live and name != LIVE:
            both = {row["seed"] for row in live} & {row["seed"] for row in rows}
            pair = [[row for row in which if row["seed"] in both] for which in (rows, live)]
            gap = "{:+.1f} ± {:.1f}".format(*difference(*pair, "autoattack")) if both else ""
            times = f"{seconds / mean([row['seconds'] for row in live]):.2f}"
        spent = spread([row["seconds"] for row in rows], digits=0)
        cells.append(str(min(len(row["autoattack"]) for row in rows)))
        lines.append(f"| {name} | {' | '.join(cells)} | {gap} | {spent} | {times} | {len(rows)} |")
    return "\n".join(lines)


def targets_table(results: Results) -> str:
    """What was to be reached."""
    if not {LIVE, AT, WARM} <= results.keys():
        return ""
    seeds = set.intersection(*({row["seed"] for row in results[name]} for name in (LIVE, AT, WARM)))
    warm, live, at = ([row for row in results[name] if row["seed"] in seeds] for name in (WARM, LIVE, AT))
    ratio = mean([row["seconds"] for row in warm]) / mean([row["seconds"] for row in live])
    rows = []
    for what, key in (("AutoAttack", "autoattack"), ("PGD-20 on 1,000 images", "pgd-20")):
        for least, other, whose in (("at least -1", live, "live"), ("above 0", at, "`at`")):
            gap, half = difference(warm, other, key)
            rows.append((f"{what}: `warm` less {whose}", least, f"{gap:+.1f} ± {half:.1f}"))
    rows.append(("seconds of `warm` over seconds of live", "below 0.5", f"{ratio:.2f}"))
    return "\n".join(["| | to reach | measured |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)])


def teachers_table(teachers: dict[str, dict[str, float]]) -> str:
    lines = ["| teacher | clean | PGD-20 |", "|---|---|---|"]
    lines += [f"| {name} | {one['clean']:.1f} | {one['pgd-20']:.1f} |" for name, one in teachers.items()]
    return "\n".join(lines)


def closeness_table(found: dict[str, Any]) -> str:
    lines = ["| stand-in | mean KL, nats | same top class |", "|---|---|---|"]
    lines += [f"| {name} | {one['kl']:.4f} | {100 * one['agreement']:.1f} % |" for name, one in found.items()]
    return "\n".join(lines)


def page(
    results: list[dict[str, Any]], facts: dict[str, Any], targets: dict[str, Any], options: dict[str, Any],
    order: list[str],
) -> str:  # fmt: skip
    """Everything measured so far."""
    by_name = {name: [row for row in results if row["name"] == name] for name in order}
    by_name = {name: sorted(rows, key=lambda row: row["seed"]) for name, rows in by_name.items() if rows}
    n = facts["rows"]
    warnings = sorted({f"{row['name']}: {text}" for row in results for text in row["warnings"]})
    said = "\n".join(f"- {text}" for text in warnings) or "AutoAttack gave no warnings."
    rows = next(iter(targets.values()))["rows"] if targets else 0
    seeds, epochs = options["seeds"], options["epochs"]
    images = f"--images {options['images']} --core-images {options['core_images']}"
    machine = f"{os.cpu_count()}-core {platform.machine()} CPU, torch {torch.__version__.split('+')[0]}, no GPU"
    more, before = facts["bytes"] / n, facts["bytes_before"] / n
    return f"""# Quality against cost

`python bench/quality.py --data DIR --seeds {seeds} --epochs {epochs} {images} --out PAGE`,
{datetime.date.today().isoformat()}, {machine}.

CIFAR-10, the first {n:,} training images (5 % held out for selection), {epochs} epochs in batches of 128, cosine
schedule; the student is a ResNet of 78,000 parameters in bfloat16. L-inf, epsilon 8/255; `pgd:10` has step 2. Clean and
PGD-20 are on the first 1,000 test images, AutoAttack `standard` on as many of the first as the table says. "±" after a
mean is the standard deviation over seeds; after a difference it is half of the 95 % interval over the test images that
both ways have, for the seeds that both have. CPU seconds are those of the whole `darht-train`, with start and scoring,
on one thread, {options["jobs"]} at once; where they differ much between seeds, other work ran beside.

{main_table(by_name)}

{targets_table(by_name)}

{said}

The teachers. The set of one family is resnet, resnet-1, resnet-2 (the latter two trained {options["same"]} epochs).

{teachers_table(facts["teachers"])}

## What teachers would have said

Stand-ins for the teachers' answers, held against the teachers themselves on PGD-10 examples of {rows} training rows
made on the student of `darht, pgd:10` (seed 0), all teachers together.

{closeness_table(targets)}

Jacobians of three teachers and ten classes add {more:,.0f} bytes a row to {before:,.0f} and took
{facts["seconds"] / n * 1000:.1f} CPU ms a row (`darht-cache extend`); everything before
them, with three PGD-10 attacks and 16 views, took {facts["build_seconds"] / n * 1000:.1f}.
"""
