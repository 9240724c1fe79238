"""What was measured, as markdown."""

import datetime
import os
import platform
from pathlib import Path
from typing import Any

import torch
from attack_models import MODELS

Table = dict[tuple[str, str], list[dict[str, Any]]]
PAGE = "<!-- written by bench/attacks.py -->", "<!-- end of bench/attacks.py -->"
PARITY = "<!-- written by bench/attacks.py --parity -->", "<!-- end of bench/attacks.py --parity -->"
TARGETS = (
    ("PGD-20 on the robust ResNet", "resnet4b_adv", "pgd-20", 1.6),
    ("PGD-20 on the undefended ResNet", "resnet20", "pgd-20", 3.0),
    ("AutoAttack `standard` on the robust ResNet", "resnet4b_adv", "autoattack", 1.8),
)


def measurements(table: Table) -> str:
    lines = [
        "| model | attack | images x rounds | library | CPU s / 1,000 | forward | backward | robust % | MiB "
        "| faster by |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (model, attack), rows in table.items():
        for row in rows:
            factor = "" if row["factor"] is None else f"{row['factor']:.2f}"
            lines.append(
                f"| {model} | {attack} | {row['images']} x {row['rounds']} | {row['library']} | {row['cpu']:.2f} | "
                f"{row['forwards']:.1f} | {row['backwards']:.1f} | {percent(row):.1f} | "
                f"{row['memory']:.0f} | {factor} |"
            )
    return "\n".join(lines)


def percent(row: dict[str, Any]) -> float:
    """Robust accuracy."""
    return 100 * row["robust"].count("1") / len(row["robust"])


def targets_table(table: Table) -> str:
    lines = ["| at least as fast as the fastest library, times | to reach | float32 | bf16 |", "|---|---|---|---|"]
    for title, model, attack, least in TARGETS:
        found = {row["library"]: row["factor"] for row in table.get((model, attack), [])}
        reached = [found.get(library) for library in ("darht", "darht bf16")]
        cells = ["not measured" if one is None else f"{one:.2f}" for one in reached]
        lines.append(f"| {title} | {least:.1f} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def accuracy_gap(table: Table) -> str:
    """How far our robust accuracy lies above the strongest other library's, at most."""
    gaps = []
    for (model, attack), rows in table.items():
        own = [percent(row) for row in rows if row["library"] == "darht"]
        theirs = [percent(row) for row in rows if not row["library"].startswith("darht")]
        if own and theirs:
            gaps.append((own[0] - min(theirs), f"{model}, {attack}"))
    if not gaps:
        return ""
    worst, where = max(gaps)
    return (
        f"Robust accuracy in float32 lies at most {worst:+.1f} points from the strongest other library's ({where}); "
        "the limit is +0.3."
    )


def parity_table(table: Table) -> str:
    """AutoAttack standard, ours and the authors' package, image by image."""
    lines = [
        "| model | images | library | robust % | pyautoattack's % | difference | images that differ | CPU s "
        "| pyautoattack's |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (model, attack), rows in table.items():
        by_name = {row["library"]: row for row in rows}
        theirs = by_name.get("pyautoattack")
        if attack != "autoattack" or theirs is None:
            continue
        for own in (by_name[name] for name in ("darht", "darht bf16") if name in by_name):
            differ = sum(a != b for a, b in zip(own["robust"], theirs["robust"], strict=True))
            seconds = [one["cpu"] * one["images"] / 1000 for one in (own, theirs)]
            lines.append(
                f"| {model} | {own['images']} | {own['library']} | {percent(own):.2f} | {percent(theirs):.2f} | "
                f"{percent(own) - percent(theirs):+.2f} | {differ} | {seconds[0]:.1f} | {seconds[1]:.1f} |"
            )
    return "\n".join(lines)


def page(table: Table, settings: dict[str, int]) -> str:
    """The section on attacks."""
    named = {model for model, _ in table}
    models = "; ".join(f"`{name}`: {what}" for name, what in MODELS.items() if name in named)
    cores = f"{os.cpu_count()}-core {platform.machine()} CPU"
    return f"""## Attacks

`python bench/attacks.py --zoo DIR --out docs/benchmarks.md`, {datetime.date.today().isoformat()}, {cores},
{settings["threads"]} thread(s) for every library, torch {torch.__version__.split("+")[0]}. CIFAR-10 test images,
L-inf {settings["eps"]}/255,
batch {settings["batch"]}, PGD's step epsilon / 4. {models}.

Every library runs in a process of its own; rounds are interleaved. Seconds are medians over the rounds, for 1,000
images. "faster by" is the quotient of CPU seconds over the fastest other library, the median of the quotients within a
round. Forward and backward are passes per image; of our Square, questions whose answer counted. Robust accuracy is
recomputed by one function: right when clean and right on the returned pixels, which must lie in the ball. MiB is the
growth of the process's peak memory. `darht bf16` crafts in bfloat16 and confirms each hit in float32. torchattacks'
AutoAttack runs 10 steps; here its parts are given the paper's numbers.

{measurements(table)}

{targets_table(table)}

{accuracy_gap(table)}

### AutoAttack against pyautoattack

The rows of AutoAttack above, image by image. `python bench/attacks.py --zoo DIR --parity --images 1000` measures this
alone.

{parity_table(table)}
"""


def parity_page(table: Table, settings: dict[str, int]) -> str:
    """A section of its own for AutoAttack on many images."""
    cores = f"{os.cpu_count()}-core {platform.machine()} CPU"
    images = max(row["images"] for rows in table.values() for row in rows)
    today, version = datetime.date.today().isoformat(), torch.__version__.split("+")[0]
    return f"""## AutoAttack against pyautoattack on many images

`python bench/attacks.py --zoo DIR --parity --images {images} --out docs/benchmarks.md`, {today}, {cores},
{settings["threads"]} thread(s) for either, torch {version}. L-inf {settings["eps"]}/255, batch {settings["batch"]}, one
round. Accuracies are what is compared; other work may run on the machine, so that CPU seconds are upper bounds.

{parity_table(table)}
"""


def write_section(path: Path, text: str, marks: tuple[str, str] = PAGE) -> None:
    """Put the text between its marks, and leave the rest of the page alone."""
    begin, end = marks
    old = path.read_text() if path.is_file() else "# Benchmarks\n"
    section = f"{begin}\n{text.strip()}\n{end}\n"
    if begin in old and end in old:
        head, rest = old.split(begin, 1)
        path.write_text(head + section + rest.split(end, 1)[1].removeprefix("\n"))
    else:
        path.write_text(f"{old.rstrip()}\n\n{section}")
