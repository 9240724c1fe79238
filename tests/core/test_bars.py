"""In a file a bar is a plain line now and then, and nothing else."""

import io

from rich.console import Console
from rich.progress import BarColumn, TextColumn

from darht.core import bars
from darht.core.bars import Bar


def lines(every, monkeypatch):
    monkeypatch.setattr(bars, "_EVERY", every)
    file = io.StringIO()
    with Bar(
        TextColumn("{task.description}"), BarColumn(), console=Console(file=file, width=40), transient=True
    ) as bar:
        task = bar.add_task("pgd-20", total=1000, note="")
        bar.update(task, completed=300, note="images, 5 [alive]")
        bar.advance(task, 700)
    return file.getvalue().splitlines()


def test_lines_when_it_is_time(monkeypatch):
    first, second = lines(0, monkeypatch)
    assert first.startswith("pgd-20: 300 of 1000, images, 5 [alive]")
    assert second.startswith("pgd-20: 1000 of 1000")


def test_silence_before(monkeypatch):
    assert lines(30, monkeypatch) == []


def test_a_clock():
    assert [bars._clock(seconds) for seconds in (0, 61.4, 36_610)] == ["0:00:00", "0:01:01", "10:10:10"]
