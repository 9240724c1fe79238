"""The learning rate at its boundaries, for any share of the run, and one optimizer step."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from darht.trainer.config import OptimConfig
from darht.trainer.schedule import learning_rate, make_optimizer, take_step

SCHEDULES = ("piecewise", "cosine", "constant")


@pytest.mark.parametrize(
    ("done", "share"), [(0.0, 1.0), (0.7499, 1.0), (0.75, 0.1), (0.8999, 0.1), (0.9, 0.01), (0.9999, 0.01)]
)
def test_piecewise_divides_by_ten_at_each_milestone(done, share):
    assert learning_rate(OptimConfig(lr=0.2), done) == pytest.approx(0.2 * share, rel=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_rises_linearly_from_zero(schedule):
    config = OptimConfig(lr=0.4, warmup=0.2, schedule=schedule)
    assert learning_rate(config, 0.0) == 0.0
    assert learning_rate(config, 0.05) == pytest.approx(0.1)
    assert learning_rate(config, 0.15) == pytest.approx(0.3)
    assert learning_rate(config, 0.2) == pytest.approx(0.4)


@pytest.mark.parametrize(("done", "share"), [(0.2, 1.0), (0.4, 0.5 * (1 + math.sqrt(0.5))), (0.6, 0.5), (1.0, 0.0)])
def test_cosine_falls_over_what_warmup_leaves(done, share):
    config = OptimConfig(lr=0.1, warmup=0.2, schedule="cosine")
    assert learning_rate(config, done) == pytest.approx(0.1 * share, abs=1e-12)


def test_constant_stays():
    assert {learning_rate(OptimConfig(lr=0.3, schedule="constant"), done / 10) for done in range(10)} == {0.3}


@given(
    thousandths=st.integers(0, 999),
    warmup=st.integers(0, 99).map(lambda hundredths: hundredths / 100),
    schedule=st.sampled_from(SCHEDULES),
    lr=st.floats(1e-5, 10),
    milestones=st.lists(st.floats(0, 1), max_size=4),
)
def test_rate_lies_between_zero_and_the_configured_one(thousandths, warmup, schedule, lr, milestones):
    config = OptimConfig(lr=lr, warmup=warmup, schedule=schedule, milestones=tuple(milestones))
    rate = learning_rate(config, thousandths / 1000)
    if thousandths == 0 and warmup > 0:
        assert rate == 0
    else:
        assert 0 < rate <= lr


def one_step(config, done=0.0, scale=1.0):
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0, 0.5]]))
    before = model.weight.detach().clone()
    optimizer = make_optimizer(model, config)
    (scale * (model.weight * torch.tensor([3.0, 4.0, 0.0])).sum()).backward()
    take_step(model, optimizer, config, done)
    return before, model.weight.detach(), optimizer


def test_sgd_takes_the_scheduled_rate_and_decays_weights():
    config = OptimConfig(lr=0.5, momentum=0.9, weight_decay=0.1, warmup=0.5)
    before, after, optimizer = one_step(config, done=0.25)  # half of the warm-up: the rate is 0.25
    torch.testing.assert_close(after, before - 0.25 * (torch.tensor([[3.0, 4.0, 0.0]]) + 0.1 * before))
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert optimizer.param_groups[0]["momentum"] == 0.9


def test_clip_norm_limits_the_whole_gradient():
    before, after, _ = one_step(OptimConfig(lr=1.0, weight_decay=0.0, clip_norm=0.5))
    assert (before - after).norm().item() == pytest.approx(0.5, rel=1e-5)
    before, after, _ = one_step(OptimConfig(lr=1.0, weight_decay=0.0, clip_norm=0.5), scale=0.01)
    assert (before - after).norm().item() == pytest.approx(0.05, rel=1e-5)  # a smaller one is left alone


def test_optimizers():
    model = nn.Linear(2, 2)
    sgd = make_optimizer(model, OptimConfig(nesterov=True))
    assert isinstance(sgd, torch.optim.SGD)
    assert sgd.param_groups[0]["nesterov"] is True
    adamw = make_optimizer(model, OptimConfig(optimizer="adamw", lr=1e-3, weight_decay=0.05))
    assert isinstance(adamw, torch.optim.AdamW)
    assert (adamw.param_groups[0]["lr"], adamw.param_groups[0]["weight_decay"]) == (1e-3, 0.05)
    assert len(adamw.param_groups[0]["params"]) == 2  # biases decay like the rest
