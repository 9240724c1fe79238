"""The inner maximisation: what one step sees, and that nothing but (seed, epoch, row) decides it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from darht.cache.format.apply_views import apply_views
from darht.cache.read.sampler import coin, draw_choices
from darht.core.rng import RowRng
from darht.trainer.config import InnerConfig, TrainConfig
from darht.trainer.student.distances import kl_rows, mean_log_probabilities
from darht.trainer.student.inner import RECOVERY_STEPS, Examples, maximise
from darht.trainer.student.losses import RECIPES
from darht.trainer.student.step import Step
from darht.trainer.student.targets import clean_answer, first_order_answer
from darht.trainer.student.warm import WarmMemory

N, T, C, ATTACK_VIEWS = 24, 2, 5, 3
ALWAYS = [name for name, recipe in RECIPES.items() if recipe.adversarial_when == "always"]


def clean_step(data, rows):
    x = data.images[rows].float() / 255
    targets = data.clean[rows, 0].float()
    supervises = data.robust.expand(len(rows), T)
    step = Step(x, x, data.labels[rows], clean_answer(targets), targets, targets, supervises, data.robust, 0.0)
    return step._replace(average=targets[:, 0])


def draw(student, data, rows, config, *, epoch=0, number=0, done=0.0, pgd_share=0.0, memory=None):
    average = student if RECIPES[config.recipe].uses_average else None
    examples = Examples(config, config.objective(), memory, average=average)
    return examples.draw(student, data, rows, epoch=epoch, number=number, done=done, pgd_share=pgd_share)


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
    x_adv = maximise(student, clean, inner.pgd(), RECIPES[recipe](), generator(rows, seed))
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
    x_adv = maximise(student, clean, inner.pgd(), RECIPES[recipe](), generator(rows))
    student.eval()
    with torch.no_grad():
        objective = RECIPES[recipe]().inner(student, clean)
        before, after = (objective(student(x).logits, x) for x in (clean.clean, x_adv))
    student.train()
    assert (after > before).all()


@pytest.mark.parametrize("training", [True, False])
def test_pgd_gives_the_student_s_mode_and_weights_back(student, data, training):
    student.train(training)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    maximise(
        student, clean_step(data, torch.arange(4)), InnerConfig().pgd(), RECIPES["at"](), generator(torch.arange(4))
    )
    assert student.training is training
    assert student.body[1].training is training
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in student.parameters())
    student.train()


def test_mode_is_given_back_after_an_exception(student, data, monkeypatch):
    def broken(recipe, student, step):
        raise RuntimeError("no objective")

    monkeypatch.setattr(RECIPES["at"], "inner", broken)
    student.train()
    with pytest.raises(RuntimeError, match="no objective"):
        maximise(
            student, clean_step(data, torch.arange(4)), InnerConfig().pgd(), RECIPES["at"](), generator(torch.arange(4))
        )
    assert student.training
    assert student.rest[1].training


@pytest.mark.parametrize("config", [
    TrainConfig(recipe="rslad", inner=InnerConfig(steps=3), seed=4),
    TrainConfig(recipe="darht", inner=InnerConfig(steps=3), loss={"clean_share": 0.0}, seed=4),
    TrainConfig(recipe="darht", inner=InnerConfig(kind="cached"), loss={"clean_share": 0.0}, seed=4),
    TrainConfig(recipe="darht", loss={"clean_share": 1.0}, seed=4),
], ids=["rslad-pgd", "darht-pgd", "darht-cached", "darht-clean"])  # fmt: skip
def test_a_row_sees_the_same_in_any_batch(student, data, config):
    def seen(rows):
        return draw(student, data, rows, config, epoch=2, number=7, done=0.5)

    rows = torch.tensor([3, 17, 8, 21, 0, 12])
    whole, mixed = seen(rows), seen(torch.tensor([12, 5, 3, 9, 0, 21, 1, 8, 17]))
    place = torch.tensor([2, 8, 7, 5, 4, 0])
    for name in ("x", "clean", "y", "targets", "clean_targets", "supervises"):
        assert torch.equal(getattr(whole, name), getattr(mixed, name)[place]), name
    alone = seen(rows[2:3])
    assert torch.equal(alone.x, whole.x[2:3])


@pytest.mark.parametrize(("seed", "epoch"), [(5, 2), (4, 3)])
def test_another_seed_or_epoch_draws_otherwise(student, data, seed, epoch):
    rows = torch.arange(N)

    def seen(seed, epoch):
        config = TrainConfig(recipe="rslad", inner=InnerConfig(steps=1), seed=seed)
        return draw(student, data, rows, config, epoch=epoch)

    first, other = seen(4, 2), seen(seed, epoch)
    assert not torch.equal(first.clean, other.clean)
    assert not torch.equal(first.x - first.clean, other.x - other.clean)


def test_a_clean_step_quotes_every_teacher_on_exactly_the_drawn_view(student, data):
    config, rows = TrainConfig(loss={"clean_share": 1.0}), torch.tensor([5, 2, 11])
    step = draw(student, data, rows, config, epoch=1, number=0, done=0.25)
    views = draw_choices(rows, len(data.offsets), config.seed, 1, "view")
    assert views.min() >= 0
    assert torch.equal(step.x, apply_views(data.images[rows], data.offsets[views]).float() / 255)
    assert torch.equal(step.x, step.clean)
    assert torch.equal(step.targets, data.clean[rows, views].float())
    assert step.supervises.tolist() == [[True, True]] * 3  # a vanilla teacher may speak on clean images
    assert step.done == 0.25


def test_a_cached_step_is_image_plus_delta_exactly(student, data):
    config, rows = TrainConfig(inner=InnerConfig(kind="cached"), loss={"clean_share": 0.0}), torch.arange(N)
    seen = set()
    for number in range(8):
        step = draw(student, data, rows, config, epoch=number // 4, number=number, done=0.0)
        attack = int(draw_choices(torch.tensor([number]), 2, config.seed, 0, "attack"))
        views = draw_choices(rows, ATTACK_VIEWS, config.seed, number // 4, "view")
        pixels = apply_views(data.images[rows], data.offsets[views])
        stored = (pixels.short() + data.deltas[attack][rows, views]).to(torch.uint8)
        assert torch.equal(step.x, stored.float() / 255)
        assert torch.equal(step.clean, pixels.float() / 255)
        assert torch.equal(step.targets, data.adversarial[attack][rows, views].float())
        assert torch.equal(step.clean_targets, data.clean[rows, views].float())
        assert step.supervises.tolist() == [[True, False]] * N
        seen.add(attack)
    assert seen == {0, 1}


def test_a_pgd_step_quotes_robust_teachers_on_the_view_it_starts_from(student, data):
    config, rows = TrainConfig(inner=InnerConfig(eps=4, step=1, steps=2), loss={"clean_share": 0.0}), torch.arange(N)
    step = draw(student, data, rows, config, epoch=0, number=0, done=0.0)
    views = draw_choices(rows, len(data.offsets), config.seed, 0, "view")
    assert torch.equal(step.clean, apply_views(data.images[rows], data.offsets[views]).float() / 255)
    assert torch.equal(step.targets, data.clean[rows, views].float())
    assert step.supervises.tolist() == [[True, False]] * N
    assert 0 < ((step.x - step.clean) * 255).round().abs().max() <= 4


def test_a_coin_decides_between_clean_and_adversarial(student, data):
    config, rows = TrainConfig(inner=InnerConfig(kind="cached"), loss={"clean_share": 0.5}, seed=9), torch.arange(4)
    clean = [
        torch.equal(step.x, step.clean)
        for step in (draw(student, data, rows, config, epoch=0, number=n, done=0.0) for n in range(40))
    ]
    assert clean == [coin(0.5, 9, number) for number in range(40)]
    assert 8 <= sum(clean) <= 32


@pytest.mark.parametrize("recipe", ALWAYS)
def test_recipes_with_both_kinds_of_images_toss_no_coin(student, data, recipe):
    kind = "pgd" if RECIPES[recipe].uses_average else "cached"
    config = TrainConfig(recipe=recipe, inner=InnerConfig(kind=kind, steps=1))
    steps = [draw(student, data, torch.arange(N), config, number=n) for n in range(6)]
    assert not any(torch.equal(step.x, step.clean) for step in steps)


def test_kd_never_sees_an_adversarial_image(student, data):
    config = TrainConfig(recipe="kd")
    for number in range(6):
        step = draw(student, data, torch.arange(N), config, number=number)
        assert torch.equal(step.x, step.clean)
        assert step.supervises.all()


ROWS_TOSS = TrainConfig(inner=InnerConfig(eps=4, step=1, steps=2), loss={"clean_share": 0.4, "clean_by": "row"}, seed=3)


@pytest.mark.parametrize("recipe", ["darht", "at"])
def test_a_coin_for_each_row(student, data, recipe):
    """Each row is clean or adversarial on its own, in the same way in any batch, and with the targets of its kind."""
    config = TrainConfig(recipe=recipe, inner=ROWS_TOSS.inner, loss=ROWS_TOSS.loss, seed=3)
    seen, rows = [], torch.arange(N)
    for epoch in range(8):
        step = draw(student, data, rows, config, epoch=epoch, number=5)
        clean = RowRng.create(3, "coin", epoch, rows=rows).uniform((1,))[:, 0] < 0.4
        order = torch.cat([rows[clean], rows[~clean]])
        views = draw_choices(order, len(data.offsets), 3, epoch, "view")
        assert torch.equal(step.clean, apply_views(data.images[order], data.offsets[views]).float() / 255)
        assert torch.equal(step.y, data.labels[order])
        untouched = (step.x == step.clean).flatten(1).all(1)
        assert untouched.tolist() == [True] * int(clean.sum()) + [False] * int((~clean).sum())
        assert torch.equal(step.supervises, untouched[:, None] | data.robust)
        assert torch.equal(step.targets, data.clean[order, views].float())
        part = draw(student, data, order[5:12], config, epoch=epoch, number=9)
        for name in ("x", "clean", "y", "targets", "supervises"):
            assert torch.equal(getattr(part, name), getattr(step, name)[5:12]), name
        seen.append(clean)
    shares = torch.stack(seen).float().mean()
    assert 0.25 < shares < 0.55
    assert not torch.equal(seen[0], seen[1])


def test_a_coin_for_each_row_that_falls_the_same_for_all(student, data):
    for share, clean in ((0.0, False), (1.0, True)):
        config = TrainConfig(inner=ROWS_TOSS.inner, loss={"clean_share": share, "clean_by": "row"})
        step = draw(student, data, torch.arange(4), config)
        assert torch.equal(step.x, step.clean) is clean


def test_a_single_row_takes_no_warm_step(student, data):
    """In train mode a batch norm has nothing to compare it with."""
    inner = InnerConfig(kind="warm", eps=4)
    config = TrainConfig(inner=inner, loss={"clean_share": 0.4, "clean_by": "row"}, seed=3)
    rows = torch.arange(N)
    clean = RowRng.create(3, "coin", 0, rows=rows).uniform((1,))[:, 0] < 0.4
    pair = torch.cat([rows[clean][:3], rows[~clean][:1]])
    memory = WarmMemory.create(N, tuple(data.images.shape[1:]), data.offsets, torch.device("cpu"))
    average = student if RECIPES[config.recipe].uses_average else None
    examples = Examples(config, config.objective(), memory, average=average)
    step = examples.draw(student.train(), data, pair, epoch=0, number=0, done=0.5, pgd_share=0.0)
    assert torch.equal(step.x, step.clean) and len(step.y) == 4
    more = torch.cat([rows[clean][:3], rows[~clean][:2]])
    step = examples.draw(student.train(), data, more, epoch=0, number=0, done=0.5, pgd_share=0.0)
    assert not torch.equal(step.x, step.clean)


def test_the_answer_of_a_mixed_batch_goes_to_each_kind(student, data):
    config = TrainConfig(inner=ROWS_TOSS.inner, loss=ROWS_TOSS.loss, targets="first-order", seed=3)
    step = draw(student, data, torch.arange(N), config)
    assert torch.equal(step.answer(step.x), step.targets)
    clean = int((step.x == step.clean).flatten(1).all(1).sum())
    assert 0 < clean < N
    assert torch.equal(step.targets[:clean], step.clean_targets[:clean])
    assert not torch.equal(step.targets[clean:], step.clean_targets[clean:])


def first_order_step(data, rows):
    clean = clean_step(data, rows)
    upright = torch.zeros(len(rows), 3, dtype=torch.int8)
    answer = first_order_answer(data, rows, upright, clean.clean, clean.clean_targets)
    return clean._replace(answer=answer), upright


def test_adaad_climbs_with_the_gradient_of_both(student, data):
    """One step of PGD on `KL(T(x') || S(x'))`: the sign of the gradient through student and first-order teacher."""
    rows = torch.arange(N)
    step, _ = first_order_step(data, rows)
    inner = InnerConfig(eps=16, step=4, steps=1)
    found = maximise(student, step, inner.pgd(), RECIPES["adaad"](), generator(rows))
    start = inner.pgd().threat.random_start(step.clean.shape, generator(rows)).float()
    levels = (step.clean * 255).round()
    start = (levels + start).clamp(0, 255)
    gradients = []
    for frozen in (False, True):
        x = (start / 255).requires_grad_()
        student.eval()
        slopes, scales = data.jacobians[0].values[rows].double().flatten(2), data.jacobians[0].scales[rows].double()
        delta = (x.double() * 255 - levels.double()).flatten(1)
        teacher = step.clean_targets[:, 0].double() + (slopes * scales[..., None] * delta[:, None]).sum(2)
        said = teacher.detach() if frozen else teacher
        kl_rows(said, student(x).logits.double()).sum().backward()
        student.train()
        student.zero_grad(set_to_none=True)
        gradients.append(x.grad)
    both, of_student = gradients
    expected = (levels + (start - levels + 4 * both.sign()).clamp(-16, 16)).clamp(0, 255) / 255
    agree = (found - expected).abs() < 1e-6
    assert agree[both.abs() > 1e-6 * both.abs().max()].all()
    assert (both.sign() != of_student.sign()).float().mean() > 0.02  # the teacher's part matters


@pytest.mark.parametrize("recipe", ["darht", "ard", "mtard", "kd", "at", "rslad", "adaad", "trades"])
def test_inner_objectives(student, data, recipe):
    rows = torch.arange(N)
    step, _ = first_order_step(data, rows)
    student.eval()
    x = (step.clean + 4 / 255).clamp(0, 1)
    with torch.no_grad():
        logits = student(x).logits
        found = RECIPES[recipe]().inner(student, step)(logits, x)
        if recipe == "rslad":
            expected = kl_rows(step.clean_targets[:, 0], logits)  # the vanilla teacher is not heard
        elif recipe == "adaad":
            expected = kl_rows(mean_log_probabilities(step.answer(x)[:, :1]), logits)
            assert not torch.allclose(expected, kl_rows(step.clean_targets[:, 0], logits))
        elif recipe == "trades":
            expected = kl_rows(student(step.clean).logits, logits)
        else:
            expected = torch.nn.functional.cross_entropy(logits, step.y, reduction="none")
    student.train()
    torch.testing.assert_close(found, expected)


def test_careful_steps_are_pgd_steps_in_their_share(student, data):
    """After a collapse some `warm` steps are short PGD: which ones follows from the number of the step alone."""
    config = TrainConfig(recipe="at", inner=InnerConfig(kind="warm", eps=8), seed=2)
    rows, recovering = torch.arange(N), []
    for number in range(24):
        memory = WarmMemory.create(N, (3, 4, 4), data.offsets, torch.device("cpu"))
        step = draw(student, data, rows, config, number=number, pgd_share=0.5, memory=memory)
        recovering.append(step.start is None)
        assert memory.seen.any() != recovering[-1]  # the memory stays as it is in a PGD step
        if recovering[-1]:
            attack = config.inner.pgd(RECOVERY_STEPS)
            clean = step._replace(x=step.clean)
            expected = maximise(student, clean, attack, RECIPES["at"](), generator(rows, 2))
            assert torch.equal(step.x, expected)
    assert recovering == [coin(0.5, 2, number, "careful") for number in range(24)]
    assert 5 <= sum(recovering) <= 19
    for share, expected in ((0.0, False), (1.0, True)):
        memory = WarmMemory.create(N, (3, 4, 4), data.offsets, torch.device("cpu"))
        step = draw(student, data, rows, config, pgd_share=share, memory=memory)
        assert (step.start is None) is expected
