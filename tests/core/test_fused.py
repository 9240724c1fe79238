"""Functions that are compiled where that is asked for, and stand as they are elsewhere."""

from functools import partial

import pytest
import torch

from darht.core import fused as module
from darht.core.errors import ModelError
from darht.core.fused import compile_function, fused, fusing
from darht.core.rng import RowRng, word


@pytest.fixture
def frontend(monkeypatch):
    """Traces for real, and runs what was traced without Inductor, whose C++ compiler takes minutes."""
    torch._dynamo.reset()
    compile_function.cache_clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    yield
    compile_function.cache_clear()
    torch._dynamo.reset()


@fused
def doubled(x: torch.Tensor, times: int = 1) -> torch.Tensor:
    """Marked, and made of another one."""
    return added(x, x) * times


@fused
def added(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x + y


@fused
def asking(x: torch.Tensor) -> torch.Tensor:
    return x + 1 if bool(x.sum() > 0) else x


def test_only_tensors_of_the_device_that_is_named_are_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(module, "compile_function", lambda function: compiled.append(function.__name__) or function)
    x = torch.arange(3)
    assert doubled(x).tolist() == [0, 2, 4] and not compiled
    with fusing("cuda"):
        assert doubled(x).tolist() == [0, 2, 4] and not compiled
    with fusing("cpu"):
        assert doubled(x, times=2).tolist() == [0, 4, 8] and compiled == ["doubled", "added"]
    assert doubled(x).tolist() == [0, 2, 4] and len(compiled) == 2


def test_random_numbers_keep_their_bits_and_another_key_compiles_nothing(frontend):
    """Another epoch, and so another key, is another argument and not another function."""
    draws, counters = [], torch._dynamo.utils.counters
    for kind in ("", "cpu"):
        with fusing(kind):
            counters.clear()
            every = [RowRng.create(seed, "a", rows=torch.arange(4), views=torch.arange(4)) for seed in range(3)]
            draws.append([(one.integers(-8, 8, (3, 2, 2)), one.uniform((5,)), one.normal((3,))) for one in every])
    assert counters["stats"]["unique_graphs"] == 3
    for one, other in zip(*draws, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_word_needs_no_tensor():
    rows = torch.tensor([0, 1, 5, 2**20, 2**32 - 1])
    expected = RowRng.create(3, "coin", 4, rows=rows).words((1,))[:, 0].tolist()
    assert [word(row, 3, "coin", 4) for row in rows.tolist()] == expected


def test_what_is_no_whole_graph_is_an_error_that_names_it(frontend):
    with fusing("cpu"), pytest.raises(ModelError, match=r"test_fused.asking as one graph .*leave compile out"):
        asking(torch.ones(2))
