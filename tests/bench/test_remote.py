"""The page of reading over a network says which goals were reached, with a peer and without."""

import argparse
from pathlib import Path

from scripts import load_script

PAGE = load_script(Path("bench/remote_page.py"))
ARGUMENTS = argparse.Namespace(rows=1000, rate=10.0, rounds=2)


def line(name: str, first: float, fetched: int) -> object:
    """A reader at the longest latency whose later epochs have 900 rows a second, and the disk 1,000 beside them."""
    epochs = [PAGE.Epoch(first, 7, fetched), PAGE.Epoch(900.0, 0, 0, disk=1000.0), PAGE.Epoch(800.0, 0, 0, disk=500.0)]
    return PAGE.Line(
        name, PAGE.LATENCIES[-1], [epochs, [PAGE.Epoch(first / 2, 7, fetched), *epochs[1:]]], 10**7, 3000.0
    )


def test_goals_stand_beside_what_was_measured():
    lines = [line(name, 800.0, 10_100_000) for name in ("darht, HTTP, local copy", "darht, S3, local copy")]
    lines.append(line("darht, HTTP, no copy", 100.0, 20_000_000))
    together = {"rows": 32_000, "seconds": 9.0, "peak": 70.0}
    for more, says in (([], "no peer was there"), ([line("LitData, S3, local copy", 250.0, 10**7)], "3.2 (one stream")):
        text = PAGE.page(lines + more, {"darht": 10**7}, together, ARGUMENTS)
        assert "0.95 of the disk | 0.90, 0.90 |" in text and "(HTTP, S3) | 0.80, 0.80 |" in text
        assert "with a copy and without | 1.010, 2.000 |" in text and f"at 50 ms | {says}" in text
        assert "| their requests | 0 |" in text and "| 70 MB, 32,000 rows in 9 s |" in text
