"""Freed memory: glibc is told once to share a heap and asked to give back, other C libraries are left alone."""

from types import SimpleNamespace

import pytest

from darht.core import memory
from darht.core.memory import give_back, share_one_heap


def test_glibc_is_told_in_its_own_numbers(monkeypatch):
    told = []
    libc = SimpleNamespace(mallopt=lambda what, value: told.append((what, value)), malloc_trim=told.append)
    monkeypatch.setattr(memory, "_libc", lambda: libc)
    share_one_heap.__wrapped__()
    give_back()
    assert told == [(-8, 1), 0]  # M_ARENA_MAX; nothing is kept at the top


@pytest.mark.parametrize("libc", [None, SimpleNamespace()])
def test_others_are_left_alone(monkeypatch, libc):
    monkeypatch.setattr(memory, "_libc", lambda: libc)
    share_one_heap.__wrapped__()
    give_back()


def test_this_machine_takes_it():
    share_one_heap()
    give_back()
