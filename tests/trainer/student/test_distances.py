"""Rows that teachers get wrong: left out or put right, by hand in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from darht.core.errors import ConfigError
from darht.trainer.student.distances import correct_targets, kl_rows, mean_kept, mean_log_probabilities
from darht.trainer.student.losses import RECIPES
from darht.trainer.student.model import StudentOutput
from darht.trainer.student.step import Step

B, T, C = 8, 2, 4


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.map, self.head = nn.Linear(12, T * C).double(), nn.Linear(T * C, C).double()

    def forward(self, x):
        rows = self.map(x.flatten(1))
        return StudentOutput(self.head(rows), rows.view(len(x), T, C))


def make_step():
    x, clean = (logits_of(seed, B, 3, 2, 2).sigmoid() for seed in (1, 2))
    said, answers, robust = logits_of(3, B, T, C), logits_of(4, B, T, C), torch.tensor([True, True])
    y = torch.arange(B) % C
    return Step(x, clean, y, lambda point: answers, answers, said, robust.expand(B, T), robust, 1.0)


def logits_of(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3


@given(seed=st.integers(0, 10**6), teachers=st.integers(0, 3))
@settings(max_examples=40)
def test_a_mixed_answer_has_the_label_in_front_and_a_right_one_stays(seed, teachers):
    logits, y = logits_of(seed, *((8, teachers, 4) if teachers else (8, 4))), torch.arange(8) % 4
    found, kept = correct_targets(logits, y, "mix")
    labels = y.view(-1, *[1] * (logits.dim() - 2)).expand(logits.shape[:-1])
    wrong = logits.argmax(-1) != labels
    assert kept is None and torch.equal(found.argmax(-1), labels)
    assert torch.equal(found[~wrong], logits[~wrong])
    p, q = logits.softmax(-1), found.softmax(-1)
    torch.testing.assert_close(q[wrong].sum(-1), torch.ones_like(q[wrong].sum(-1)))
    others = torch.ones_like(p, dtype=torch.bool).scatter(-1, labels[..., None], False) & wrong[..., None]
    ratio = (q / p).masked_fill(~others, 0).amax(-1)[wrong]
    torch.testing.assert_close(
        (q / p)[others].view(-1, 3), ratio[:, None].expand(-1, 3)
    )  # the others keep their ratios


def test_dropped_rows_by_hand():
    logits = torch.tensor([[2.0, 1.0], [1.0, 2.0], [0.0, 3.0]])
    same, kept = correct_targets(logits, torch.tensor([0, 0, 1]), "drop")
    assert torch.equal(same, logits) and kept.tolist() == [1, 0, 1]
    assert float(mean_kept(torch.tensor([1.0, 100.0, 3.0]), kept)) == 2
    assert float(mean_kept(torch.ones(3), torch.zeros(3))) == 0
    assert correct_targets(logits, torch.tensor([0, 0, 1]), "none") == (logits, None)


@pytest.mark.parametrize("recipe", ["darht", "rslad", "adaad"])
def test_a_recipe_leaves_wrong_rows_out_or_puts_them_right(recipe):
    torch.manual_seed(0)
    student, step = Linear(), make_step()
    losses = {}
    for how in ("none", "drop", "mix"):
        chosen = RECIPES[recipe](correct=how)
        losses[how] = chosen.loss(student, step, student(step.x), {}).value.item()
    assert len(set(losses.values())) == 3
    out = student(step.x)
    if recipe == "adaad":
        target = mean_log_probabilities(step.targets)
        right = target.argmax(-1) == step.y
        assert losses["drop"] == pytest.approx(kl_rows(target, out.logits)[right].mean().item(), rel=1e-10)
    if recipe == "rslad":
        target, _ = correct_targets(mean_log_probabilities(step.clean_targets), step.y, "mix")
        want = kl_rows(target, student(step.clean).logits).mean() / 6 + 5 * kl_rows(target, out.logits).mean() / 6
        assert losses["mix"] == pytest.approx(want.item(), rel=1e-10)
        found = RECIPES[recipe](correct="mix").inner(student, step)(out.logits, step.x)
        torch.testing.assert_close(found, kl_rows(target, out.logits))


def test_mixing_logits_is_refused():
    with pytest.raises(ConfigError, match="mixes probabilities"):
        RECIPES["darht"](kd="mse", correct="mix")
