"""One step without a memory of rows: the labels' patterns of LIET and the noise of N-FGSM, by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import CPU, assert_same_bits, changed, log, stop_after

from darht.core.errors import ConfigError
from darht.core.rng import RowRng
from darht.trainer.config import InnerConfig, WarmConfig
from darht.trainer.student.inner import Examples
from darht.trainer.student.losses import RECIPES
from darht.trainer.student.single_step import EVERY, LabelPatterns, jensen_shannon
from darht.trainer.student.train import Callbacks, train

N, C, EPS = 24, 5, 16
AT = RECIPES["at"]()
LABEL = InnerConfig(kind="warm", eps=EPS, warm=WarmConfig(start="label", check_rows=8))
NOISE = InnerConfig(kind="n-fgsm", eps=EPS, warm=WarmConfig(check_rows=8))


def draw(student, data, inner, memory, number=0):
    config = changed(recipe="at", inner=vars(inner))
    return Examples(config, AT, memory).draw(
        student, data, torch.arange(N), epoch=0, number=number, done=0.5, pgd_share=0.0
    )


def patterns():
    return LabelPatterns.create(C, (3, 4, 4), CPU)


def test_a_label_s_pattern_is_the_sign_of_its_gradient_on_grey(student):
    found, before = patterns(), {name: value.clone() for name, value in student.state_dict().items()}
    student.train()
    found.refresh(student, 3)
    assert student.training
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    student.eval()
    for label in range(C):
        grey = torch.full((1, 3, 4, 4), 0.5, requires_grad=True)
        F.cross_entropy(student(grey).logits, torch.tensor([label])).backward()
        assert torch.equal(found.signs[label].float(), grey.grad[0].sign())
    student.train().zero_grad()


def test_patterns_are_taken_every_twenty_steps(student):
    found, taken = patterns(), []
    for number in range(3, 3 + 2 * EVERY + 1):
        if found.is_due(number):
            found.refresh(student, number)
        taken.append(found.step)
    assert taken == [3] * EVERY + [3 + EVERY] * EVERY + [3 + 2 * EVERY]
    other = patterns()
    other.load(found.state())
    assert other.step == found.step and torch.equal(other.signs, found.signs)
    other.join(lambda votes: votes.mul_(2), None)
    assert torch.equal(other.signs, found.signs)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=20)
def test_a_start_is_the_pattern_with_a_tenth_to_a_half_of_its_pixels_replaced(seed):
    signs = torch.randint(0, 2, (C, 3, 16, 16), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    found, y = LabelPatterns(signs.to(torch.int8)), torch.arange(N) % C
    start = found.starts(y, EPS, RowRng.create(seed, "x", rows=torch.arange(N)))
    assert start.abs().max() <= EPS and torch.equal(start, start.round())
    agree = torch.stack([(start == side * EPS * signs[y]).all(1).flatten(1).float().mean(1) for side in (1, -1)])
    kept = agree.amax(0)  # a pixel of noise may agree by chance
    assert kept.min() > 0.35 and kept.max() < 1
    assert {int(side) for side in agree.argmax(0)} == {0, 1}
    again = found.starts(y[4:6], EPS, RowRng.create(seed, "x", rows=torch.arange(4, 6)))
    assert torch.equal(again, start[4:6])


@pytest.mark.parametrize("inner", [LABEL, NOISE], ids=["label", "n-fgsm"])
def test_one_step_by_hand(student, data, inner):
    memory = patterns() if inner is LABEL else None
    student.eval()  # no dropout: the same answer again
    step = draw(student, data, inner, memory)
    generator = RowRng.create(7, "single", 0, rows=torch.arange(N))  # 7 is the seed of the recipe
    clean = step.clean * 255
    if inner is LABEL:
        start = (clean + memory.starts(step.y, EPS, generator)).clamp(0, 255)
    else:
        start = (clean + generator.integers(-2 * EPS, 2 * EPS, (3, 4, 4))).clamp(0, 255)
    first = student(start / 255).logits
    x = (start / 255).requires_grad_()
    F.cross_entropy(student(x).logits, step.y, reduction="sum").backward()
    student.train().zero_grad()
    end = start + EPS * x.grad.sign()
    if inner is LABEL:
        end = clean + (end - clean).clamp(-EPS, EPS)
        assert step.start.requires_grad and torch.equal(step.start, first)
    else:
        assert step.start is None and (end - clean).abs().max() > 2 * EPS  # no projection
    torch.testing.assert_close(step.x, end.clamp(0, 255) / 255)


def test_the_divergence_by_hand():
    one, other = (torch.randn(3, C, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    found = jensen_shannon(one, other)
    for row in range(3):
        p, q = one[row].softmax(0).tolist(), other[row].softmax(0).tolist()
        want = sum(
            0.5 * a * math.log(2 * a / (a + b)) + 0.5 * b * math.log(2 * b / (a + b)) for a, b in zip(p, q, strict=True)
        )
        assert float(found[row]) == pytest.approx(want, rel=1e-10)
    assert jensen_shannon(one, one).abs().max() < 1e-12
    assert jensen_shannon(1e3 * one, -1e3 * one).max() <= math.log(2) + 1e-9


@pytest.mark.parametrize("inner", [LABEL, NOISE], ids=["label", "n-fgsm"])
def test_a_stopped_run_goes_on_and_collapse_is_watched(mixed_cache, tmp_path, inner):
    config = changed(recipe="at", inner=vars(inner), optim={"batch_size": 16, "epochs": 2})
    train(config, mixed_cache, tmp_path / "whole", device=CPU)
    with pytest.raises(Exception, match="stopped"):
        train(config, mixed_cache, tmp_path / "cut", device=CPU, callbacks=Callbacks(on_step=stop_after(4)))
    train(config, mixed_cache, tmp_path / "cut", device=CPU, resume=True)
    assert_same_bits(tmp_path / "cut", tmp_path / "whole")
    assert all("training_pgd" in row for row in log(tmp_path / "whole"))


def test_what_has_no_effect_is_refused():
    with pytest.raises(ConfigError, match="remembers nothing"):
        WarmConfig(start="label", momentum=0.1)
    with pytest.raises(ConfigError, match="remembers nothing"):
        WarmConfig(start="label", reset=3)
    with pytest.raises(ConfigError, match="sets up inner"):
        InnerConfig(kind="n-fgsm", warm=WarmConfig(consistency=1.0))
    assert NOISE.length == LABEL.length == EPS
