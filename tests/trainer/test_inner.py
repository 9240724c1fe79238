"""The inner maximisation: what one step sees, and that nothing but (seed, epoch, row) decides it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from darht.cache.loader import TrainingSet
from darht.cache.sampler import coin, draw_choices
from darht.cache.views import apply_views, crop_flip_offsets
from darht.core.rng import RowRng
from darht.trainer.config import InnerConfig, TrainConfig
from darht.trainer.inner import draw_step, maximise
from darht.trainer.losses import RECIPES, Step
from darht.trainer.student import StudentOutput

N, SIDE, T, C, ATTACK_VIEWS = 24, 4, 2, 5, 3


class Small(nn.Module):
    """A student that couples rows in train mode (batch norm, dropout) and not in eval mode."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3 * SIDE * SIDE), nn.Linear(3 * SIDE * SIDE, 16))
        self.rest = nn.Sequential(nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, C))

    def forward(self, x):
        logits = self.rest(self.body(x))
        return StudentOutput(logits, logits.new_zeros(len(x), 0, C))


@pytest.fixture(scope="module")
def student():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Small()


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (N, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    offsets = torch.from_numpy(crop_flip_offsets(1, flip=True))
    deltas = []
    for _ in range(2):
        delta = torch.randint(-16, 17, (N, ATTACK_VIEWS, 3, SIDE, SIDE), generator=generator)
        for view in range(ATTACK_VIEWS):
            pixels = apply_views(images, offsets[view].expand(N, 3)).long()
            delta[:, view] = (pixels + delta[:, view]).clamp(0, 255) - pixels
        deltas.append(delta.to(torch.int8))
    return TrainingSet(
        rows=torch.arange(N),
        images=images,
        labels=torch.randint(0, C, (N,), generator=generator),
        offsets=offsets,
        teachers=("robust", "vanilla"),
        attacks=("first", "second"),
        clean=torch.randn(N, len(offsets), T, C, generator=generator).half(),
        deltas=tuple(deltas),
        units=tuple(1.0 for _ in deltas),
        adversarial=tuple(torch.randn(N, ATTACK_VIEWS, T, C, generator=generator).half() for _ in range(2)),
        robust=torch.tensor([True, False]),
        training=np.arange(N),
        holdout=np.arange(0),
    )


def clean_step(data, rows):
    x = data.images[rows].float() / 255
    targets = data.clean[rows, 0].float()
    return Step(x, x, data.labels[rows], targets, targets, data.robust, 0.0)


def generator(rows, seed=0):
    return RowRng.create(seed, "inner", 0, rows=rows)


@given(
    eps=st.integers(1, 255),
    step=st.integers(1, 64),
    steps=st.integers(1, 4),
    recipe=st.sampled_from(list(RECIPES)),
    seed=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_pgd_stays_in_the_ball_in_the_pixel_range_and_on_the_grid(student, data, eps, step, steps, recipe, seed):
    rows = torch.arange(8)
    clean = clean_step(data, rows)
    inner = InnerConfig(eps=eps, step=step, steps=steps)
    x_adv = maximise(student, clean, inner, recipe, generator(rows, seed))
    levels = (x_adv * 255).round()
    assert torch.equal(levels / 255, x_adv)  # bit for bit what a uint8 image would be
    assert (levels - data.images[rows]).abs().max() <= eps
    assert levels.min() >= 0
    assert levels.max() <= 255
    assert not x_adv.requires_grad


@pytest.mark.parametrize("recipe", RECIPES)
def test_pgd_raises_its_recipe_s_objective(student, data, recipe):
    rows, inner = torch.arange(N), InnerConfig(eps=16, step=4, steps=8)
    clean = clean_step(data, rows)
    x_adv = maximise(student, clean, inner, recipe, generator(rows))
    student.eval()
    with torch.no_grad():
        before, after = (RECIPES[recipe].inner(student(x).logits, clean) for x in (clean.clean, x_adv))
    student.train()
    assert (after > before).all()


@pytest.mark.parametrize("training", [True, False])
def test_pgd_gives_the_student_s_mode_and_weights_back(student, data, training):
    student.train(training)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    maximise(student, clean_step(data, torch.arange(4)), InnerConfig(), "at", generator(torch.arange(4)))
    assert student.training is training
    assert student.body[1].training is training
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in student.parameters())
    student.train()


def test_mode_is_given_back_after_an_exception(student, data, monkeypatch):
    def broken(logits, step):
        raise RuntimeError("no objective")

    recipe = RECIPES["at"]
    monkeypatch.setitem(RECIPES, "at", type(recipe)(recipe.loss, broken, recipe.always_adversarial))
    student.train()
    with pytest.raises(RuntimeError, match="no objective"):
        maximise(student, clean_step(data, torch.arange(4)), InnerConfig(), "at", generator(torch.arange(4)))
    assert student.training
    assert student.rest[1].training


@pytest.mark.parametrize("config", [
    TrainConfig(recipe="rslad", inner=InnerConfig(steps=3), seed=4),
    TrainConfig(recipe="darht", inner=InnerConfig(steps=3), clean_share=0.0, seed=4),
    TrainConfig(recipe="darht", inner=InnerConfig(kind="cached"), clean_share=0.0, seed=4),
    TrainConfig(recipe="darht", clean_share=1.0, seed=4),
], ids=["rslad-pgd", "darht-pgd", "darht-cached", "darht-clean"])  # fmt: skip
def test_a_row_sees_the_same_in_any_batch(student, data, config):
    def draw(rows):
        return draw_step(student, data, rows, config, epoch=2, number=7, done=0.5)

    rows = torch.tensor([3, 17, 8, 21, 0, 12])
    whole, mixed = draw(rows), draw(torch.tensor([12, 5, 3, 9, 0, 21, 1, 8, 17]))
    place = torch.tensor([2, 8, 7, 5, 4, 0])
    for name in ("x", "clean", "y", "targets", "clean_targets"):
        assert torch.equal(getattr(whole, name), getattr(mixed, name)[place]), name
    alone = draw(rows[2:3])
    assert torch.equal(alone.x, whole.x[2:3])


@pytest.mark.parametrize(("seed", "epoch"), [(5, 2), (4, 3)])
def test_another_seed_or_epoch_draws_otherwise(student, data, seed, epoch):
    rows = torch.arange(N)

    def draw(seed, epoch):
        config = TrainConfig(recipe="rslad", inner=InnerConfig(steps=1), seed=seed)
        return draw_step(student, data, rows, config, epoch=epoch, number=0, done=0.0)

    first, other = draw(4, 2), draw(seed, epoch)
    assert not torch.equal(first.clean, other.clean)
    assert not torch.equal(first.x - first.clean, other.x - other.clean)


def test_a_clean_step_quotes_every_teacher_on_exactly_the_drawn_view(student, data):
    config, rows = TrainConfig(clean_share=1.0), torch.tensor([5, 2, 11])
    step = draw_step(student, data, rows, config, epoch=1, number=0, done=0.25)
    views = draw_choices(rows, len(data.offsets), config.seed, 1, "view")
    assert views.min() >= 0
    assert torch.equal(step.x, apply_views(data.images[rows], data.offsets[views]).float() / 255)
    assert torch.equal(step.x, step.clean)
    assert torch.equal(step.targets, data.clean[rows, views].float())
    assert step.supervises.tolist() == [True, True]  # a vanilla teacher may speak on clean images
    assert step.done == 0.25


def test_a_cached_step_is_image_plus_delta_exactly(student, data):
    config, rows = TrainConfig(inner=InnerConfig(kind="cached"), clean_share=0.0), torch.arange(N)
    seen = set()
    for number in range(8):
        step = draw_step(student, data, rows, config, epoch=number // 4, number=number, done=0.0)
        attack = int(draw_choices(torch.tensor([number]), 2, config.seed, 0, "attack"))
        views = draw_choices(rows, ATTACK_VIEWS, config.seed, number // 4, "view")
        pixels = apply_views(data.images[rows], data.offsets[views])
        stored = (pixels.short() + data.deltas[attack][rows, views]).to(torch.uint8)
        assert torch.equal(step.x, stored.float() / 255)
        assert torch.equal(step.clean, pixels.float() / 255)
        assert torch.equal(step.targets, data.adversarial[attack][rows, views].float())
        assert torch.equal(step.clean_targets, data.clean[rows, views].float())
        assert step.supervises.tolist() == [True, False]
        seen.add(attack)
    assert seen == {0, 1}


def test_a_pgd_step_quotes_robust_teachers_on_the_view_it_starts_from(student, data):
    config, rows = TrainConfig(inner=InnerConfig(eps=4, step=1, steps=2), clean_share=0.0), torch.arange(N)
    step = draw_step(student, data, rows, config, epoch=0, number=0, done=0.0)
    views = draw_choices(rows, len(data.offsets), config.seed, 0, "view")
    assert torch.equal(step.clean, apply_views(data.images[rows], data.offsets[views]).float() / 255)
    assert torch.equal(step.targets, data.clean[rows, views].float())
    assert step.supervises.tolist() == [True, False]
    assert 0 < ((step.x - step.clean) * 255).round().abs().max() <= 4


def test_a_coin_decides_between_clean_and_adversarial(student, data):
    config, rows = TrainConfig(inner=InnerConfig(kind="cached"), clean_share=0.5, seed=9), torch.arange(4)
    clean = [
        torch.equal(step.x, step.clean)
        for step in (draw_step(student, data, rows, config, epoch=0, number=n, done=0.0) for n in range(40))
    ]
    assert clean == [coin(0.5, 9, number) for number in range(40)]
    assert 8 <= sum(clean) <= 32


def test_rslad_tosses_no_coin(student, data):
    config = TrainConfig(recipe="rslad", inner=InnerConfig(kind="cached"), clean_share=1.0)
    steps = [draw_step(student, data, torch.arange(N), config, epoch=0, number=n, done=0.0) for n in range(6)]
    assert not any(torch.equal(step.x, step.clean) for step in steps)
