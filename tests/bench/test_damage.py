"""One flipped bit in every class of file that a command reads back is noticed, and none ends in a traceback."""

import dataclasses
import random
from pathlib import Path

import pytest
from scripts import load_script


@pytest.fixture(scope="module")
def bench():
    return load_script(Path("bench/damage.py"))


def test_every_class_of_file(bench, tmp_path, monkeypatch):
    bench.prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    kinds, rng = list(bench.classes(tmp_path)), random.Random(0)
    for words in {kind.verify for kind in kinds}:
        assert bench.ask(words) == (False, False), words  # nothing is said of what is whole
    found = {}
    for number, kind in enumerate(kinds):  # of every third also the command that needs it, which costs more
        one = kind if number % 3 == 1 else dataclasses.replace(kind, command=())
        found[kind.name] = bench.measure(tmp_path, one, 1, rng)
    assert len(found) == 21
    for name, count in found.items():
        assert (count.flips, count.noticed, count.tracebacks) == (1, 1, 0), name


def test_a_page_keeps_what_stands_around_the_table(bench, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n")
    for text in ("one\n", bench.table({"a": bench.Count(3, 1, 4, 0)})):
        bench.write_page(page, text)
    assert page.read_text().startswith("# Title\n\n") and "one" not in page.read_text()
    assert page.read_text().count("| a | 3 | 1 | 4 | 0 |\n| all | 3 | 1 | 4 | 0 |") == 1
