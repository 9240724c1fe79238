"""Each outer loss against plain loops in float64, and losses from the cache against those with live teachers."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from darht.cache.loader import load_training_set
from darht.cache.reader import open_cache
from darht.cache.stream import Feed
from darht.cache.teachers import load_teacher
from darht.trainer.config import InnerConfig, StudentConfig, TrainConfig
from darht.trainer.inner import draw_step
from darht.trainer.losses import RECIPES, Step, kl_rows, teacher_weights
from darht.trainer.student import StudentOutput
from darht.trainer.train import feed_plan, make_student

B, T, C = 6, 3, 4


class Linear(nn.Module):
    """A student of two linear layers in float64."""

    def __init__(self):
        super().__init__()
        self.map, self.head = nn.Linear(3 * 2 * 2, T * C).double(), nn.Linear(T * C, C).double()

    def forward(self, x):
        rows = self.map(x.flatten(1))
        return StudentOutput(self.head(rows), rows.view(len(x), T, C))


@pytest.fixture
def student():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Linear()


def make_step(done=0.0, supervises=(True, True, True), clean=False):
    generator = torch.Generator().manual_seed(1)
    x, x_adv = (torch.rand(B, 3, 2, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    targets, clean_targets = (torch.randn(B, T, C, dtype=torch.float64, generator=generator) * 3 for _ in range(2))
    y = torch.randint(0, C, (B,), generator=generator)
    return Step(
        x=x if clean else x_adv,
        clean=x,
        y=y,
        targets=clean_targets if clean else targets,
        clean_targets=clean_targets,
        supervises=torch.tensor(supervises),
        done=done,
    )


def softmax(logits):
    powers = [math.exp(float(value)) for value in logits]
    return [power / sum(powers) for power in powers]


def kl(target, logits):
    return sum(p * math.log(p / q) for p, q in zip(softmax(target), softmax(logits), strict=True))


def ce(logits, label):
    return -math.log(softmax(logits)[label])


def outputs(student, x):
    with torch.no_grad():
        out = student(x)
    return out.logits.numpy(), out.feature_map.numpy()


def weights_by_hand(step, per):
    each = [[ce(step.targets[b, t], step.y[b]) for t in range(T)] for b in range(B)]
    means = [np.mean([each[b][t] for b in range(B)]) for t in range(T)]
    return [[math.exp(-(means[t] if per == "batch" else each[b][t])) for t in range(T)] for b in range(B)]


def test_kl_rows_is_the_sum_over_classes():
    step = make_step()
    found = kl_rows(step.targets, step.clean_targets)
    assert found.shape == (B, T)
    for b in range(B):
        for t in range(T):
            assert found[b, t].item() == pytest.approx(kl(step.targets[b, t], step.clean_targets[b, t]), rel=1e-10)


def test_kl_rows_of_itself_is_zero_and_a_shift_of_logits_changes_nothing():
    logits = make_step().targets
    assert kl_rows(logits, logits).abs().max() == 0
    torch.testing.assert_close(kl_rows(logits, logits + 5), torch.zeros(B, T, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("per", ["batch", "row"])
def test_teacher_weights_fall_with_their_cross_entropy(per):
    step = make_step()
    found = teacher_weights(step.targets, step.y, per)
    assert found.shape == (B, T)
    np.testing.assert_allclose(found.numpy(), weights_by_hand(step, per), rtol=1e-10)
    if per == "batch":
        assert (found == found[:1]).all()


def darht_by_hand(student, step, config):
    logits, maps = outputs(student, step.x)
    supervised = np.mean([ce(logits[b], step.y[b]) for b in range(B)])
    weights, distilled = weights_by_hand(step, config.weights), []
    for b in range(B):
        row = 0.0
        for t in range(T):
            if not step.supervises[t]:
                continue
            distance = kl(step.targets[b, t], maps[b, t])
            if config.kd_loss == "mse":
                distance = np.mean([(float(step.targets[b, t, c]) - maps[b, t, c]) ** 2 for c in range(C)])
            row += weights[b][t] * distance
        distilled.append(row)
    phase = sum(step.done >= share for share in config.phases)
    return (supervised, supervised + np.mean(distilled), np.mean(distilled))[phase]


@pytest.mark.parametrize("done", [0.0, 0.199, 0.2, 0.499, 0.5, 0.99])
@pytest.mark.parametrize("kd_loss", ["kl", "mse"])
@pytest.mark.parametrize("weights", ["batch", "row"])
def test_darht_in_its_three_phases(student, done, kd_loss, weights):
    config = TrainConfig(phases=(0.2, 0.5), kd_loss=kd_loss, weights=weights)
    step = make_step(done)
    found = RECIPES["darht"].loss(student, step, config)
    assert found.shape == ()
    assert found.item() == pytest.approx(darht_by_hand(student, step, config), rel=1e-10)


@pytest.mark.parametrize("done", [0.3, 0.9])
def test_darht_does_not_listen_to_vanilla_teachers_on_adversarial_images(student, done):
    config = TrainConfig(phases=(0.2, 0.5))
    step = make_step(done, supervises=(True, False, True))
    found = RECIPES["darht"].loss(student, step, config)
    assert found.item() == pytest.approx(darht_by_hand(student, step, config), rel=1e-10)
    step.targets[:, 1] += 100 * torch.randn(B, C, generator=torch.Generator().manual_seed(3))
    assert RECIPES["darht"].loss(student, step, config).item() == found.item()
    found.backward()
    assert student.map.weight.grad.view(T, C, -1)[0].abs().sum() > 0
    if done > 0.5:  # without CE nothing reaches the vanilla teacher's row of the map
        assert student.map.weight.grad.view(T, C, -1)[1].abs().sum() == 0


@pytest.mark.parametrize("supervises", [(True, True, True), (True, False, True), (False, True, False)])
def test_rslad(student, supervises):
    config, step = TrainConfig(recipe="rslad", rslad_clean=0.25), make_step(supervises=supervises)
    logits_adv, clean = outputs(student, step.x)[0], outputs(student, step.clean)[0]
    heard = [t for t in range(T) if supervises[t]]
    loss = 0.0
    for b in range(B):
        target = np.mean([softmax(step.clean_targets[b, t]) for t in heard], axis=0)
        for share, logits in ((0.75, logits_adv[b]), (0.25, clean[b])):
            said = softmax(logits)
            loss += share * sum(p * math.log(p / q) for p, q in zip(target, said, strict=True)) / B
    assert RECIPES["rslad"].loss(student, step, config).item() == pytest.approx(loss, rel=1e-10)


def test_adversarial_training_is_cross_entropy_on_the_step_s_images(student):
    step = make_step()
    logits, _ = outputs(student, step.x)
    expected = np.mean([ce(logits[b], step.y[b]) for b in range(B)])
    assert RECIPES["at"].loss(student, step, TrainConfig(recipe="at")).item() == pytest.approx(expected, rel=1e-10)


def test_inner_objectives_give_one_number_per_row(student):
    step = make_step(supervises=(True, True, False))
    logits = student(step.x).logits.detach()
    for recipe in ("darht", "at"):
        found = RECIPES[recipe].inner(logits, step)
        np.testing.assert_allclose(found, [ce(logits[b], step.y[b]) for b in range(B)], rtol=1e-10)
    expected = []
    for b in range(B):
        target = np.mean([softmax(step.clean_targets[b, t]) for t in (0, 1)], axis=0)
        expected.append(sum(p * math.log(p / q) for p, q in zip(target, softmax(logits[b]), strict=True)))
    np.testing.assert_allclose(RECIPES["rslad"].inner(logits, step), expected, rtol=1e-10)


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_reach_every_weight_of_the_student_and_nothing_else(student, recipe):
    step = make_step(done=0.3)
    RECIPES[recipe].loss(student, step, TrainConfig(recipe=recipe, phases=(0.2, 0.5))).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    assert not any(value.requires_grad for value in step if isinstance(value, torch.Tensor))


def test_losses_stay_finite_on_extreme_logits(student):
    step = make_step(done=0.3)
    step = step._replace(targets=step.targets * 1e4, clean_targets=step.clean_targets * 1e4)
    for recipe in RECIPES.values():
        assert torch.isfinite(recipe.loss(student, step, TrainConfig(phases=(0.2, 0.5))))


def live_targets(cache, tiny_teachers, x):
    teachers = [load_teacher(tiny_teachers[name], torch.device("cpu"))[0] for name in cache.spec.teachers]
    with torch.no_grad():
        return torch.stack([teacher(x) for teacher in teachers], dim=1)


def cached_step(tiny_cache, config, rows):
    cache = open_cache(tiny_cache)
    cpu = torch.device("cpu")
    data = load_training_set(cache, device=cpu, adversarial=True, budget_gib=1)
    with Feed(cache, feed_plan(config, cache, cpu, 1.0), seed=config.seed, epochs=1) as feed:
        student = make_student(config, feed, cache.spec.data.classes)
    return cache, student, draw_step(student, data, rows, config, epoch=1, number=5, done=0.25)


SMALL = StudentConfig(arch="resnet18", kwargs={"width": 4, "blocks": [1, 1, 1, 1]})


def test_rslad_from_the_cache_equals_rslad_with_live_teachers(tiny_cache, tiny_teachers):
    config = TrainConfig(recipe="rslad", student=SMALL, inner=InnerConfig(eps=16, step=4, steps=2))
    cache, student, step = cached_step(tiny_cache, config, torch.arange(0, 100, 2))
    live = step._replace(clean_targets=live_targets(cache, tiny_teachers, step.clean))
    assert not torch.equal(step.x, step.clean)
    cached_loss = RECIPES["rslad"].loss(student, step, config).item()
    assert cached_loss == pytest.approx(RECIPES["rslad"].loss(student, live, config).item(), rel=1e-3)


@pytest.mark.parametrize("clean_share", [0.0, 1.0])
def test_darht_from_the_cache_equals_darht_with_live_teachers(tiny_cache, tiny_teachers, clean_share):
    inner = InnerConfig(kind="cached")
    config = TrainConfig(student=SMALL, inner=inner, clean_share=clean_share, phases=(0.0, 0.0))
    cache, student, step = cached_step(tiny_cache, config, torch.arange(1, 100, 2))
    assert torch.equal(step.x, step.clean) is (clean_share == 1.0)
    live = step._replace(targets=live_targets(cache, tiny_teachers, step.x))
    np.testing.assert_allclose(step.targets, live.targets, atol=5e-3)
    cached_loss = RECIPES["darht"].loss(student, step, config).item()
    assert cached_loss == pytest.approx(RECIPES["darht"].loss(student, live, config).item(), rel=1e-3)
