"""ADR's soft labels by hand, and that they come from the averaged student."""

import math

import pytest
import torch
from runs import CONFIG, CPU, changed

from darht.core.errors import ConfigError
from darht.trainer.config import AverageConfig
from darht.trainer.student.adr import annealed
from darht.trainer.student.inner import Examples
from darht.trainer.student.losses import RECIPES
from darht.trainer.student.model import StudentOutput
from darht.trainer.student.step import Step
from darht.trainer.student.train import train

B, C = 4, 3


def make_step(done, y, average):
    x, none = torch.zeros(len(y), 3, 2, 2, dtype=torch.float64), torch.zeros(len(y), 0, C)
    robust = torch.zeros(0, dtype=torch.bool)
    return Step(x, x, torch.tensor(y), lambda z: none, none, none, robust, robust, done, average=average)


def softmax(logits, tau):
    powers = [math.exp(value / tau) for value in logits]
    return [power / sum(powers) for power in powers]


def test_soft_labels_and_loss_by_hand():
    average = torch.randn(B, C, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 3
    y, done = [0, 1, 2, 0], 0.3
    step, recipe = make_step(done, y, average), RECIPES["adr"](temperature=(3.0, 1.0), trust=(0.5, 0.9))
    wave = 0.5 * (1 + math.cos(math.pi * done))
    tau, trust, want = 1 + 2 * wave, 0.9 - 0.4 * wave, 0.0
    logits = torch.randn(B, C, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    shares = []
    for b in range(B):
        said = softmax(average[b].tolist(), tau)
        share = min(1.0, max(0.0, trust - (max(said) - said[y[b]])))
        shares.append(share)
        target = [share * p + (1 - share) * (c == y[b]) for c, p in enumerate(said)]
        own = softmax(logits[b].tolist(), 1)
        want -= sum(t * math.log(p) for t, p in zip(target, own, strict=True)) / B
        torch.testing.assert_close(recipe.target(step)[b], torch.tensor(target, dtype=torch.float64))
    assert len(set(shares)) > 1
    found = recipe.loss(None, step, StudentOutput(logits, logits), {}).value
    assert float(found) == pytest.approx(want, rel=1e-10)
    rows = recipe.inner(None, step)(logits, step.x)
    assert rows.shape == (B,) and float(rows.mean()) == pytest.approx(want, rel=1e-10)


def test_both_ends_of_the_annealing():
    assert annealed((2.0, 1.0), 0.0) == 2.0 and annealed((2.0, 1.0), 1.0) == pytest.approx(1.0)
    assert annealed((0.0, 1.0), 0.5) == pytest.approx(0.5)


def test_the_average_is_asked_about_clean_images_in_eval_mode(mixed_cache, tmp_path, monkeypatch):
    asked, draw = [], Examples.draw

    def look(self, *arguments, **more):
        step = draw(self, *arguments, **more)
        assert not self.average.training
        asked.append(torch.equal(self.average(step.clean).logits, step.average))
        return step

    monkeypatch.setattr(Examples, "draw", look)
    config = changed(recipe="adr", average=None, optim={"epochs": 2, "batch_size": 16})
    train(config, mixed_cache, tmp_path, device=CPU)
    assert len(asked) >= 4 and all(asked)


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="learns from the student's average"):
        changed(recipe="adr", average=AverageConfig(kind="none"))
    with pytest.raises(ConfigError, match="the student's own examples"):
        changed(recipe="adr", average=None, inner={"kind": "cached"})
    assert CONFIG.average.kind == "none"
