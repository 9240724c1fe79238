"""Write docs/benchmarks-gpu.md: what can be known about a GPU without one, each section by its own bench.

    python bench/gpu_page.py --out docs/benchmarks-gpu.md                     every section but the last
    python bench/gpu_page.py --out docs/benchmarks-gpu.md --only engine       one alone
    python bench/gpu_page.py --out docs/benchmarks-gpu.md --cache CACHE --before CHECKOUT    and the last one

A section that is not made anew stays as the page has it, so that the command may be run again for any of them.
"""

import argparse
import datetime
import os
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path

import epoch_end
import epoch_gap
import folding
import launches
import launches_engine
import torch

from darht.core.files import write_atomic

HEAD = """# On a GPU, without one

What a GPU would be asked to do is counted on torch's `meta` device and on a CPU, and what a CPU shows as well is timed
there, as ratios within one run. `python bench/gpu.py` measures a card.
"""
MADE: dict[str, tuple[str, Callable[[], str]]] = {
    "steps": (launches.TITLE, launches.section),
    "engine": (launches_engine.TITLE, launches_engine.section),
    "folding": (folding.TITLE, folding.section),
    "kept": (epoch_end.TITLE, epoch_end.section),
}
TITLES = [*(title for title, _ in MADE.values()), epoch_gap.TITLE]


def sections_of(text: str) -> dict[str, str]:
    """The sections of a page by their titles, in order."""
    parts = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)[1:]
    return {title: body.strip("\n") for title, body in zip(parts[::2], parts[1::2], strict=True)}


def page(sections: dict[str, str]) -> str:
    """The whole page; sections that it does not know are left out."""
    return "\n".join([HEAD, *(f"## {title}\n\n{sections[title]}\n" for title in TITLES if title in sections)])


def made(command: str, body: str) -> str:
    """A section with the line that says how it came about."""
    where = f"{os.cpu_count()}-core {platform.machine()} CPU, no GPU, torch {torch.__version__.split('+')[0]}"
    return f"`{command}`, {datetime.date.today()}, {where}.\n\n{body}".strip("\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the page")
    parser.add_argument("--only", nargs="+", choices=MADE, help="make these sections alone; none with --cache")
    parser.add_argument("--cache", type=Path, help="of 50,000 rows, for the last section")
    parser.add_argument("--before", type=Path, help="a working tree of darht from before the change that it is about")
    given = parser.parse_args()
    if (given.cache is None) != (given.before is None):
        parser.error("--cache and --before belong together")
    sections = sections_of(given.out.read_text()) if given.out.is_file() else {}
    for name in given.only or ([] if given.cache else MADE):
        title, section = MADE[name]
        sections[title] = made(f"python bench/gpu_page.py --out {given.out} --only {name}", section())
        write_atomic(given.out, page(sections).encode())
    if given.cache:
        command = f"python bench/gpu_page.py --out {given.out} --cache CACHE --before CHECKOUT"
        sections[epoch_gap.TITLE] = made(command, epoch_gap.section(given.cache, given.before))
        write_atomic(given.out, page(sections).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
