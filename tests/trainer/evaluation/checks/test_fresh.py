"""Copies that have seen nothing."""

import os

import frauds
import pytest
import torch
from torch import nn

from darht.trainer.evaluation.checks.fresh import Fresh

ASKED = [0]
HERE = os.getpid()


class Counting(nn.Module):
    """Adds how often it was asked, in the object and outside of it."""

    def __init__(self):
        super().__init__()
        self.own = 0

    def forward(self, x):
        self.own += 1
        ASKED[0] += 1
        return x.flatten(1)[:, :3] + self.own + ASKED[0]


class Dies(nn.Module):
    """Does not survive a fork."""

    def forward(self, x):
        if os.getpid() != HERE:
            os._exit(3)
        return 2 * x.flatten(1)[:, :3]


def test_every_question_goes_to_a_copy_that_has_seen_nothing():
    x = torch.zeros(2, 3, 2, 2)
    with Fresh(Counting()) as fresh:
        assert [fresh.logits(x).tolist() for _ in range(3)] == [[[2.0] * 3] * 2] * 3
        assert fresh.gradient(x, torch.zeros(2, dtype=torch.int64)).shape == x.shape
    assert ASKED == [0]


def test_its_gradient_is_that_of_the_margin(sound):
    x = torch.full((2, 3, 8, 8), 0.5)
    with Fresh(frauds.honest()) as fresh:
        assert fresh.gradient(x, torch.zeros(2, dtype=torch.int64)).abs().sum() > 0
    with Fresh(frauds.detached()) as fresh:
        assert fresh.gradient(x, torch.zeros(2, dtype=torch.int64)).abs().sum() == 0


@pytest.mark.parametrize("forks", [True, False])
def test_where_a_process_fails_a_deep_copy_answers(monkeypatch, forks):
    if not forks:
        monkeypatch.delattr(os, "fork")
    with Fresh(Dies()) as fresh:
        assert fresh.logits(torch.ones(1, 3, 2, 2)).tolist() == [[2.0] * 3]
        assert fresh.logits(torch.ones(1, 3, 2, 2)).tolist() == [[2.0] * 3]
