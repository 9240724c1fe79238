"""Freed memory: given back where the C library can, and nothing else happens."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from darht.core import memory
from darht.core.memory import give_back, share_one_heap


def resident() -> float:
    """MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(memory._libc(), "malloc_trim"), reason="of glibc")
def test_what_threads_freed_is_given_back():
    share_one_heap()
    with ThreadPoolExecutor(4) as pool:
        held = [
            block for part in pool.map(lambda _: [bytes([1]) * 100_000 for _ in range(100)], range(8)) for block in part
        ]
    before = resident()
    del held[:-1], held
    give_back()
    assert resident() < before - 60  # of the 76 MiB that were held


def test_other_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(memory, "_libc", lambda: None)
    share_one_heap.__wrapped__()
    give_back()
