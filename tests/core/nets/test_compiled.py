"""Networks through the real `torch.compile`: what it takes is one graph, and what it does not take is an error."""

from functools import partial

import pytest
import torch
import torch._dynamo
from torch import nn

from darht.core.errors import ModelError
from darht.core.nets import compiled
from darht.core.nets.compiled import Compiled, begin_step


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.linear(x.flatten(1)))


class Asks(Net):
    """A branch on a value cannot be one graph."""

    def forward(self, x):
        return self.linear(x.flatten(1)) * (2 if x.sum() > 0 else 3)


class Counts(Net):
    """A number that changes with every call is compiled into the graph."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return self.linear(x.flatten(1)) * self.calls


@pytest.fixture(autouse=True)
def light(monkeypatch):
    """The frontend is the real one; Inductor's C++ compiler would take longer than all other tests of a folder."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    yield
    torch._dynamo.reset()


def test_a_branch_on_a_value_is_refused():
    with pytest.raises(ModelError, match="does not take this network as one graph"):
        Compiled(Asks())(torch.ones(2, 3, 2, 2))


def test_a_network_that_changes_with_every_call_is_refused_and_never_runs_uncompiled(monkeypatch):
    monkeypatch.setattr("darht.core.nets.compiled._LIMIT", 2)
    net = Compiled(Counts())
    with pytest.raises(ModelError, match="more than 2 graphs"):
        for rows in range(2, 8):
            net(torch.ones(rows, 3, 2, 2))


def test_the_backward_pass_can_be_taken_twice():
    """`warm` takes the gradient of its pixels first and that of its weights afterwards."""
    torch.manual_seed(0)
    plain = Net()
    net, x = Compiled(plain), torch.rand(4, 3, 2, 2, requires_grad=True)
    out = net(x).square().sum()
    (pixels,) = torch.autograd.grad(out, x, retain_graph=True)
    out.backward()
    expected = plain.train()(x).square().sum()
    torch.testing.assert_close(torch.autograd.grad(expected, x)[0], pixels)
    assert plain.linear.weight.grad is not None


CUDA = torch.device("cuda")  # played


def test_a_pass_is_a_cuda_graph_where_there_is_a_gpu_and_its_shape_is_constant(monkeypatch):
    made = []
    monkeypatch.setattr(torch, "compile", lambda function, **how: made.append(how) or function)
    net = torch.nn.Linear(2, 2)
    assert torch.equal(Compiled(net)(torch.ones(1, 2)), net(torch.ones(1, 2)))
    monkeypatch.setattr(compiled, "device_of", lambda net: CUDA)
    Compiled(net)
    assert made == [
        {"fullgraph": True, "options": None},
        {
            "fullgraph": True,
            "options": {"triton.cudagraphs": True, "triton.cudagraph_skip_dynamic_graphs": True},
        },
    ]
    known = torch._inductor.list_options()
    assert set(made[1]["options"]) <= set(known)


def test_only_a_gpu_is_told_that_a_step_begins(monkeypatch):
    told = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: told.append(True))
    begin_step(torch.device("cpu"))
    assert not told
    begin_step(CUDA)
    assert told == [True]
