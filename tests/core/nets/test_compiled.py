"""Networks through the real `torch.compile`: what it takes is one graph, and what it does not take is an error."""

from functools import partial

import pytest
import torch
import torch._dynamo
from torch import nn

from darht.core.errors import ModelError
from darht.core.nets.compiled import Compiled


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
