"""PGD: its iterates are the paper's."""

import pytest
import torch
from tiny import double_net, rng

from darht.attacks import PGD
from darht.attacks.objectives import cross_entropy


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_iterates_equal_the_paper(norm):
    model, x, y = double_net()
    eps, step = (8.0, 2.0) if norm == "linf" else (300.0, 70.0)
    for steps in (1, 5, 10):
        found = PGD(eps=eps, step=step, steps=steps, norm=norm, random_start=False)(model, x, y, generator=rng(6))
        point = x.clone()
        for _ in range(steps):
            point.requires_grad_()
            (gradient,) = torch.autograd.grad(cross_entropy(model(point), y).sum(), point)
            point = point.detach()
            if norm == "linf":
                point = point + step / 255 * gradient.sign()
                point = torch.max(torch.min(point, x + eps / 255), x - eps / 255).clamp(0, 1)
            else:
                length = gradient.flatten(1).norm(dim=1)[:, None, None, None]
                delta = point + step / 255 * gradient / length - x
                length = delta.flatten(1).norm(dim=1)[:, None, None, None]
                point = (x + delta * (eps / 255 / length).clamp(max=1)).clamp(0, 1)
        torch.testing.assert_close(found, point, rtol=0, atol=1e-9)
