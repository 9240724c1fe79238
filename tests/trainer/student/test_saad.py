"""SAAD by plain loops in float64."""

import math

import pytest
import torch
from torch import nn

from darht.trainer.student.losses import RECIPES
from darht.trainer.student.model import StudentOutput
from darht.trainer.student.saad import entropy
from darht.trainer.student.step import Step

B, T, C, DONE = 5, 2, 4, 0.25


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(12, C).double()

    def forward(self, x):
        logits = self.head(torch.tanh(x.flatten(1)))
        return StudentOutput(logits, logits.new_zeros(len(x), 0, C))


def make_step():
    generator = torch.Generator().manual_seed(1)
    x, clean = (torch.rand(B, 3, 2, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    slopes = torch.randn(12, T + 1, C, dtype=torch.float64, generator=generator)
    robust = torch.tensor([True, True, False])
    own = torch.randn(B, T + 1, C, dtype=torch.float64, generator=generator)

    def answer(point):
        return own + torch.einsum("bp,ptc->btc", (point - clean).flatten(1), slopes)

    y = torch.arange(B) % C
    return Step(x, clean, y, answer, answer(x), own, robust.expand(B, T + 1), robust, DONE)


def softmax(logits):
    powers = [math.exp(value) for value in logits]
    return [power / sum(powers) for power in powers]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def mean_of(logits):
    rows = [softmax(row) for row in logits[:T].tolist()]  # the last teacher is vanilla
    return [sum(values) / T for values in zip(*rows, strict=True)]


def test_the_loss_by_hand():
    torch.manual_seed(0)
    student, step = Net(), make_step()
    mirrored = 2 * step.clean - step.x
    theirs, at_mirror = step.targets, step.answer(mirrored)
    own, clean, back = (student(point).logits.detach() for point in (step.x, step.clean, mirrored))
    unsure = [-sum(p * math.log(p) for p in mean_of(theirs[b])) for b in range(B)]
    weights = [5 * (value - min(unsure)) for value in unsure]
    want = 0.0
    for b in range(B):
        match = kl(softmax((theirs[b] - at_mirror[b])[:T].mean(0).tolist()), softmax((own[b] - back[b]).tolist()))
        quiet = 1 - (weights[b] - min(weights)) / (max(weights) - min(weights))
        first = kl(mean_of(theirs[b]), softmax(own[b].tolist())) + 3.0 * DONE * match
        last = kl(mean_of(step.clean_targets[b]), softmax(clean[b].tolist()))
        want += (weights[b] * first + 0.5 * quiet * last) / B
    recipe = RECIPES["saad"](igdm=3.0, beta=0.5)
    found = recipe.loss(student, step, student(step.x), {})
    assert found.value.item() == pytest.approx(want, rel=1e-10)
    assert torch.equal(found.clean.logits, clean)
    assert recipe.compares_points() == "igdm" and RECIPES["saad"](igdm=0.0).compares_points() == ""


def test_the_entropy_by_hand():
    logits = make_step().targets
    want = [[-sum(p * math.log(p) for p in softmax(row)) for row in rows] for rows in logits.tolist()]
    torch.testing.assert_close(entropy(logits), torch.tensor(want, dtype=torch.float64))
