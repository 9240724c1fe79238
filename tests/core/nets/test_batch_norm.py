"""BatchNorm in eval mode folded into convolutions that are still trained."""

import pytest
import torch
from torch import nn

from darht.core.nets.batch_norm import FoldedConvs, pairs, replace, trace
from darht.core.nets.layout import PointConv2d

CONVS = {
    "bias": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "groups": lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False),
    "point": lambda: PointConv2d.of(nn.Conv2d(4, 6, 1, stride=2, bias=False)),
}


class Own(nn.Conv2d):
    """Does otherwise with its weight."""

    def forward(self, x):
        return super().forward(x) / self.weight.abs().amax()


def a_net(conv):
    torch.manual_seed(0)
    net = nn.Sequential(conv(), nn.BatchNorm2d(6, eps=0.1), nn.ReLU(), nn.Conv2d(6, 2, 1), nn.BatchNorm2d(2))
    for norm in (net[1], net[4]):
        for tensor in (*norm.parameters(), norm.running_mean, norm.running_var):
            nn.init.uniform_(tensor, 0.2, 2.0)
    return net.eval()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", CONVS)
def test_folded_convolutions_take_over_what_their_pairs_are_worth(kind, channels_last):
    with torch.random.fork_rng(devices=[]):
        net, x = a_net(CONVS[kind]), torch.rand(3, 4, 6, 6)
    traced = trace(net)
    found = pairs(traced)
    convs = FoldedConvs([pair.modules(traced) for pair in found], channels_last=channels_last)
    replace(traced, list(zip(found, convs.folded, strict=True)))
    assert len(found) == 2 and not any(isinstance(part, nn.BatchNorm2d) for part in traced.modules())
    places = [tensor.data_ptr() for tensor in traced.parameters()]
    for _ in range(2):
        convs.refresh()
        torch.testing.assert_close(traced(x), net(x), rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            for tensor in (*net.parameters(), net[1].running_var, net[4].running_mean):
                tensor.mul_(1.5).add_(0.1)
    assert places == [tensor.data_ptr() for tensor in traced.parameters()]
    assert not any(tensor.requires_grad for tensor in traced.parameters())
    assert type(convs.folded[0]) is type(net[0]) and net[0].weight.requires_grad


@pytest.mark.parametrize("norm", [{"affine": False}, {"track_running_stats": False}])
def test_other_norms_and_convolutions_of_their_own_are_left_alone(norm):
    assert not pairs(trace(nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, **norm)).eval()))
    assert not pairs(trace(nn.Sequential(Own(4, 6, 1), nn.BatchNorm2d(6)).eval()))
    assert not pairs(trace(nn.Sequential(nn.ConvTranspose2d(4, 6, 1), nn.BatchNorm2d(6)).eval()))
