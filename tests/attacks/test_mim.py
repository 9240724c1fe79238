"""MIM: its iterates are the paper's."""

import torch
from tiny import double_net, rng

from darht.attacks import MIM
from darht.attacks.objectives import cross_entropy


def test_mim_iterates_equal_the_paper():
    model, x, y = double_net()
    for steps in (1, 4, 10):
        found = MIM(eps=8, step=1, steps=steps, decay=0.9)(model, x, y, generator=rng(6))
        point, momentum = x.clone(), torch.zeros_like(x)
        for _ in range(steps):
            point.requires_grad_()
            (gradient,) = torch.autograd.grad(cross_entropy(model(point), y).sum(), point)
            momentum = 0.9 * momentum + gradient / gradient.abs().sum((1, 2, 3), keepdim=True)
            point = point.detach() + momentum.sign() / 255
            point = torch.max(torch.min(point, x + 8 / 255), x - 8 / 255).clamp(0, 1)
        torch.testing.assert_close(found, point, rtol=0, atol=1e-9)
