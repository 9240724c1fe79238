"""A training that is killed at any moment goes on to the bits of one that was left alone."""

import random
import signal

import pytest
import torch
from killed_runs import TrainServer
from runs import CPU, STATEFUL, assert_same_bits

from darht.cache.read.reader import open_cache
from darht.trainer.state.checkpoint import CHECKPOINT
from darht.trainer.student.train import train


@pytest.fixture(scope="module")
def server(tiny_cache):
    with TrainServer(tiny_cache, STATEFUL) as running:
        yield running


@pytest.fixture(scope="module")
def whole(tiny_cache, tmp_path_factory):
    out, threads = tmp_path_factory.mktemp("whole") / "run", torch.get_num_threads()
    torch.set_num_threads(1)  # as the server: the bits are those of a number of threads
    train(STATEFUL, open_cache(tiny_cache), out, device=CPU)
    torch.set_num_threads(threads)
    return out


def test_killed_at_six_random_moments(server, whole, tmp_path):
    """A run that is killed again and again; one that ends before its kill is followed by another."""
    spent = server.train(tmp_path / "0").seconds
    assert_same_bits(tmp_path / "0", whole)  # another process, the same bits
    draw, killed, number = random.Random(5), 0, 1
    for _ in range(6):
        ended = server.train(tmp_path / str(number), kill_after=draw.uniform(0, spent / 2))
        killed += ended.signal == signal.SIGKILL
        number += not ended.signal
    assert killed >= 3  # the other lives were shorter than they were to be
    assert server.train(tmp_path / str(number)).error == ""
    for run in range(1, number + 1):
        assert_same_bits(tmp_path / str(run), whole)


def test_killed_again_and_again_between_the_files_of_an_epoch(server, whole, tmp_path):
    """One run, killed four times, each time right before another of the files that an epoch writes gets its name."""
    out = tmp_path / "run"
    for rename in (2, 5, 13, 7):
        assert server.train(out, kill_at_rename=rename).signal == signal.SIGKILL
    assert (out / CHECKPOINT).is_file()
    assert server.train(out).error == ""
    assert_same_bits(out, whole)
    assert [path.name for path in out.rglob("*") if path.name.startswith("paused")] == []
