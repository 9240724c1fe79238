"""Friendly adversarial training: rows stop where they should, in one shape."""

import pytest
import torch
from torch import nn

from darht.core.rng import RowRng
from darht.trainer.config import InnerConfig
from darht.trainer.student.baselines import At
from darht.trainer.student.inner import maximise
from darht.trainer.student.model import StudentOutput
from darht.trainer.student.step import Step


class Linear(nn.Module):
    """Classes from one linear layer, in float64."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3 * 4 * 4, 5).double()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            self.layer.weight.copy_(torch.randn(5, 48, generator=generator, dtype=torch.float64))
            self.layer.bias.zero_()

    def forward(self, x):
        logits = self.layer(x.flatten(1).double())
        return StudentOutput(logits, logits.new_zeros(len(x), 0, 5))


def friendly_by_hand(model, image, y, start, inner):
    """One row of friendly adversarial training, as its authors' loop does it; also how many steps it took."""
    image = image.double()
    levels, patience = (image + start).clamp(0, 255), inner.tau
    for step in range(inner.steps):
        pixels = (levels / 255).requires_grad_()
        logits = model(pixels[None]).logits
        if int(logits.argmax()) != y:
            if patience == 0:
                return levels, step
            patience -= 1
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(logits, torch.tensor([y])), pixels)
        moved = (levels - image + inner.step * gradient.sign()).clamp(-inner.eps, inner.eps)
        levels = (image + moved).clamp(0, 255)
    return levels, inner.steps


@pytest.mark.parametrize("tau", [0, 1, 2, 9])
def test_rows_stop_tau_steps_after_they_are_misclassified_first(tau):
    images = torch.randint(0, 256, (32, 3, 4, 4), generator=torch.Generator().manual_seed(1))
    x, model = images.float() / 255, Linear().train()
    y = model(x).logits.argmax(1)
    y[::8] = (y[::8] + 1) % 5  # some are wrong from the start
    inner, generator = (
        InnerConfig(kind="fat", tau=tau, eps=24, step=3, steps=9),
        RowRng.create(0, rows=torch.arange(32)),
    )
    none = torch.zeros(32, 0, 5)
    step = Step(x, x, y, lambda x: none, none, none, torch.zeros(32, 0).bool(), torch.zeros(0).bool(), 0.0)
    found = maximise(model, step, inner.pgd(), At(), generator, tau=tau)
    assert model.training
    start, steps = inner.pgd().threat.random_start(x.shape, generator), []
    for row in range(len(x)):
        expected, taken = friendly_by_hand(model, images[row], int(y[row]), start[row], inner)
        assert torch.equal((found[row] * 255).round().long(), expected.long()), row
        steps.append(taken)
    assert (found * 255 - images).abs().max() < 24.01
    if tau == 9:
        assert set(steps) == {9}
    else:
        assert min(steps) == tau  # wrong from the start: tau steps and no more
        assert len(set(steps)) > 2
