"""Each outer loss against plain loops in float64, and losses from the cache against those with live teachers."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from darht.cache.builder.teachers import load_teacher
from darht.cache.read.loader import load_training_set
from darht.cache.read.reader import open_cache
from darht.cache.read.stream import Feed
from darht.core.errors import ConfigError
from darht.trainer.config import InnerConfig, StudentConfig, TrainConfig
from darht.trainer.student.distances import kl_rows, mean_log_probabilities, teacher_weights
from darht.trainer.student.inner import Examples
from darht.trainer.student.losses import RECIPES, Ard, Darht
from darht.trainer.student.model import StudentOutput
from darht.trainer.student.setup import feed_plan, make_student
from darht.trainer.student.step import Step

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


def make_step(done=0.0, robust=(True, True, True), clean=False):
    """Random images and targets; `answer` is a linear function of the pixels, so that no two points answer alike."""
    generator = torch.Generator().manual_seed(1)
    x, x_adv = (torch.rand(B, 3, 2, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    targets, clean_targets = (torch.randn(B, T, C, dtype=torch.float64, generator=generator) * 3 for _ in range(2))
    slopes = torch.randn(12, T, C, dtype=torch.float64, generator=generator)
    y, robust = torch.randint(0, C, (B,), generator=generator), torch.tensor(robust)
    return Step(
        x=x if clean else x_adv,
        clean=x,
        y=y,
        answer=lambda point: clean_targets + torch.einsum("bp,ptc->btc", (point - x).flatten(1), slopes),
        targets=clean_targets if clean else targets,
        clean_targets=clean_targets,
        supervises=robust.expand(B, T),
        robust=robust,
        done=done,
        average=torch.randn(B, C, dtype=torch.float64, generator=generator),
    )


def loss_of(recipe, student, step, learned=None):
    return recipe.loss(student, step, student(step.x), {} if learned is None else learned).value


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


def darht_by_hand(student, step, recipe):
    logits, maps = outputs(student, step.x)
    supervised = np.mean([ce(logits[b], step.y[b]) for b in range(B)])
    weights, distilled = weights_by_hand(step, recipe.weights), []
    for b in range(B):
        row = 0.0
        for t in range(T):
            if not step.supervises[b, t]:
                continue
            distance = kl(step.targets[b, t], maps[b, t])
            if recipe.kd == "mse":
                distance = np.mean([(float(step.targets[b, t, c]) - maps[b, t, c]) ** 2 for c in range(C)])
            row += weights[b][t] * distance
        distilled.append(row)
    phase = sum(step.done >= share for share in recipe.phases)
    return (supervised, supervised + np.mean(distilled), np.mean(distilled))[phase]


@pytest.mark.parametrize("done", [0.0, 0.199, 0.2, 0.499, 0.5, 0.99])
@pytest.mark.parametrize("kd", ["kl", "mse"])
@pytest.mark.parametrize("weights", ["batch", "row"])
def test_darht_in_its_three_phases(student, done, kd, weights):
    recipe, step = Darht(phases=(0.2, 0.5), kd=kd, weights=weights), make_step(done)
    found = loss_of(recipe, student, step)
    assert found.shape == ()
    assert found.item() == pytest.approx(darht_by_hand(student, step, recipe), rel=1e-10)


@pytest.mark.parametrize("done", [0.3, 0.9])
def test_darht_does_not_listen_to_vanilla_teachers_on_adversarial_images(student, done):
    recipe, step = Darht(phases=(0.2, 0.5)), make_step(done, robust=(True, False, True))
    found = loss_of(recipe, student, step)
    assert found.item() == pytest.approx(darht_by_hand(student, step, recipe), rel=1e-10)
    step.targets[:, 1] += 100 * torch.randn(B, C, generator=torch.Generator().manual_seed(3))
    assert loss_of(recipe, student, step).item() == found.item()
    found.backward()
    assert student.map.weight.grad.view(T, C, -1)[0].abs().sum() > 0
    if done > 0.5:  # without CE nothing reaches the vanilla teacher's row of the map
        assert student.map.weight.grad.view(T, C, -1)[1].abs().sum() == 0


def test_darht_listens_to_vanilla_teachers_on_the_clean_rows_of_a_mixed_batch(student):
    recipe, step = Darht(phases=(0.0, 0.0), clean_by="row"), make_step(0.5, robust=(True, False, True))
    clean = torch.tensor([True, True, False, False, False, False])
    step = step._replace(supervises=clean[:, None] | step.robust)
    found = loss_of(recipe, student, step).item()
    assert found == pytest.approx(darht_by_hand(student, step, recipe), rel=1e-10)
    step.targets[2:, 1] += 1.0  # a shift of logits changes no probability: only weights could move
    assert loss_of(recipe, student, step).item() == pytest.approx(found, rel=1e-10)
    step.targets[0, 1, 0] += 1.0
    assert loss_of(recipe, student, step).item() != pytest.approx(found, rel=1e-6)


def probabilities(logits, heard, tau=1.0):
    """The teachers `[T, C]` that are heard as one."""
    return np.mean([softmax(logits[t] / tau) for t in heard], axis=0)


def kl_to(target, logits):
    """KL of given probabilities to those of logits."""
    return sum(p * math.log(p / q) for p, q in zip(target, softmax(logits), strict=True))


def mean_over_rows(number):
    return np.mean([number(b) for b in range(B)])


ROLES = [(True, True, True), (True, False, True), (False, True, False)]


@pytest.mark.parametrize("robust", ROLES)
def test_rslad(student, robust):
    recipe, step = RECIPES["rslad"](clean_weight=0.25), make_step(robust=robust)
    adversarial, clean = outputs(student, step.x)[0], outputs(student, step.clean)[0]
    heard = [t for t in range(T) if robust[t]]

    def row(b):
        target = probabilities(step.clean_targets[b], heard)
        return 0.75 * kl_to(target, adversarial[b]) + 0.25 * kl_to(target, clean[b])

    assert loss_of(recipe, student, step).item() == pytest.approx(mean_over_rows(row), rel=1e-10)


@pytest.mark.parametrize("robust", ROLES)
@pytest.mark.parametrize("alpha", [1.0, 0.3, 0.0])
def test_ard_with_its_temperature(student, robust, alpha):
    recipe, step = Ard(tau=5.0, alpha=alpha), make_step(robust=robust)
    adversarial, clean = outputs(student, step.x)[0], outputs(student, step.clean)[0]
    heard = [t for t in range(T) if robust[t]]

    def row(b):
        target = probabilities(step.clean_targets[b], heard, 5.0)
        return alpha * 25 * kl_to(target, adversarial[b] / 5) + (1 - alpha) * ce(clean[b], step.y[b])

    assert loss_of(recipe, student, step).item() == pytest.approx(mean_over_rows(row), rel=1e-10)


@pytest.mark.parametrize("beta", [1.0, 2.5, 0.0])
def test_mtard_learns_its_weights_over_the_steps(student, beta):
    """Equations 7 to 9: each loss relative to its first value; the slower one gains weight, at the given rate."""
    recipe, learned, robust = RECIPES["mtard"](rate=0.2, beta=beta), {}, (True, False, True)
    weight, first, step = 0.5, None, make_step(robust=robust)
    for number in range(5):
        adversarial, clean = outputs(student, step.x)[0], outputs(student, step.clean)[0]
        said = (
            mean_over_rows(lambda b, z=clean: kl_to(probabilities(step.clean_targets[b], [1]), z[b])),
            mean_over_rows(lambda b, z=adversarial: kl_to(probabilities(step.targets[b], [0, 2]), z[b])),
        )
        first = first or said
        fast, slow = ((now / then) ** beta for now, then in zip(said, first, strict=True))
        weight = 0.2 * slow / (slow + fast) + 0.8 * weight
        loss = loss_of(recipe, student, step, learned)
        assert loss.item() == pytest.approx((1 - weight) * said[0] + weight * said[1], rel=1e-10), number
        assert learned["weight"].item() == pytest.approx(weight, rel=1e-10)
        assert not any(value.requires_grad for value in learned.values())
        student.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.sub_(0.05 * parameter.grad)
    assert weight == pytest.approx(0.5) if beta == 0 else abs(weight - 0.5) > 1e-4


def test_mtard_goes_on_with_what_it_had_learned(student):
    recipe, step = RECIPES["mtard"](rate=0.5), make_step(robust=(True, False, True))
    learned = {name: torch.tensor(value, dtype=torch.float64) for name, value in
               (("clean", 0.5), ("adversarial", 2.0), ("weight", 0.9))}  # fmt: skip
    copied = dict(learned)
    assert loss_of(recipe, student, step, learned).item() == loss_of(recipe, student, step, copied).item()
    assert learned["weight"].item() == copied["weight"].item() != 0.9
    assert (learned["clean"].item(), learned["adversarial"].item()) == (0.5, 2.0)


@pytest.mark.parametrize(("done", "falls"), [(0.0, 0), (0.49, 0), (0.5, 1), (0.9, 2)])
def test_mtard_s_rate_falls_with_the_learning_rate(student, done, falls):
    recipe, step = RECIPES["mtard"](rate=0.4, milestones=(0.5, 0.8)), make_step(robust=(True, False, True), done=done)
    learned = {name: torch.tensor(value, dtype=torch.float64) for name, value in
               (("clean", 1.0), ("adversarial", 1.0), ("weight", 1.0))}  # fmt: skip
    quickest = dict(learned)
    loss_of(recipe, student, step, learned)
    loss_of(RECIPES["mtard"](rate=0.4, milestones=()), student, step, quickest)
    moved, most = (1 - found["weight"].item() for found in (learned, quickest))
    assert moved == pytest.approx(most / 10**falls) and most > 0.01


@pytest.mark.parametrize("robust", ROLES)
@pytest.mark.parametrize("alpha", [1.0, 0.4])
@pytest.mark.parametrize(("igdm", "done"), [(0.0, 0.5), (20.0, 0.0), (20.0, 0.75)])
def test_adaad_and_its_indirect_gradient_matching(student, robust, alpha, igdm, done):
    """The matching term grows in proportion to what is done of the run."""
    recipe, step = RECIPES["adaad"](alpha=alpha, igdm=igdm), make_step(robust=robust, done=done)
    mirrored = step.clean - (step.x - step.clean)
    heard, opposite = [t for t in range(T) if robust[t]], step.answer(mirrored)
    adversarial, clean, other = (outputs(student, x)[0] for x in (step.x, step.clean, mirrored))

    def row(b):
        loss = alpha * kl_to(probabilities(step.targets[b], heard), adversarial[b])
        loss += (1 - alpha) * kl_to(probabilities(step.clean_targets[b], heard), clean[b])
        theirs = np.mean([(step.targets[b, t] - opposite[b, t]).numpy() for t in heard], axis=0)
        return loss + done * igdm * kl(theirs, adversarial[b] - other[b])

    assert loss_of(recipe, student, step).item() == pytest.approx(mean_over_rows(row), rel=1e-10)


@pytest.mark.parametrize("alpha", [0.9, 1.0, 0.0])
def test_kd_hears_every_teacher_on_clean_images(student, alpha):
    recipe, step = RECIPES["kd"](tau=3.0, alpha=alpha), make_step(robust=(True, False, False), clean=True)
    logits = outputs(student, step.x)[0]

    def row(b):
        target = probabilities(step.clean_targets[b], range(T), 3.0)
        return alpha * 9 * kl_to(target, logits[b] / 3) + (1 - alpha) * ce(logits[b], step.y[b])

    assert loss_of(recipe, student, step).item() == pytest.approx(mean_over_rows(row), rel=1e-10)


def test_trades(student):
    recipe, step = RECIPES["trades"](beta=2.5), make_step()
    adversarial, clean = outputs(student, step.x)[0], outputs(student, step.clean)[0]
    expected = mean_over_rows(lambda b: ce(clean[b], step.y[b]) + 2.5 * kl(clean[b], adversarial[b]))
    assert loss_of(recipe, student, step).item() == pytest.approx(expected, rel=1e-10)


def test_adversarial_training_is_cross_entropy_on_the_step_s_images(student):
    step = make_step()
    logits, _ = outputs(student, step.x)
    expected = mean_over_rows(lambda b: ce(logits[b], step.y[b]))
    assert loss_of(RECIPES["at"](), student, step).item() == pytest.approx(expected, rel=1e-10)


def test_the_mean_of_teachers_is_that_of_their_probabilities():
    logits = make_step().targets
    for tau in (1.0, 4.0):
        found = mean_log_probabilities(logits, tau).exp()
        np.testing.assert_allclose(found, [probabilities(logits[b], range(T), tau) for b in range(B)], rtol=1e-10)


@pytest.mark.parametrize("recipe", ["darht", "ard", "mtard", "kd", "at"])
def test_most_inner_objectives_are_cross_entropy(student, recipe):
    step = make_step(robust=(True, True, False))
    logits = student(step.x).logits.detach()
    found = RECIPES[recipe]().inner(student, step)(logits, step.x)
    np.testing.assert_allclose(found, [ce(logits[b], step.y[b]) for b in range(B)], rtol=1e-10)


def test_rslad_s_inner_objective_asks_about_clean_images_and_adaad_s_about_the_very_point(student):
    step = make_step(robust=(True, True, False))
    logits, point = student(step.x).logits.detach(), step.clean + 0.1
    answers = {"rslad": step.clean_targets, "adaad": step.answer(point)}
    for recipe, said in answers.items():
        found = RECIPES[recipe]().inner(student, step)(logits, point)
        expected = [kl_to(probabilities(said[b], (0, 1)), logits[b]) for b in range(B)]
        np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_trades_inner_objective_is_the_distance_from_what_the_student_says_now(student):
    step = make_step()
    logits, now = student(step.x).logits.detach(), outputs(student, step.clean)[0]
    found = RECIPES["trades"]().inner(student, step)(logits, step.x)
    np.testing.assert_allclose(found, [kl(now[b], logits[b]) for b in range(B)], rtol=1e-10)
    assert not found.requires_grad


def settings(recipe):
    return {"phases": (0.2, 0.5)} if recipe == "darht" else {"igdm": 2.0, "alpha": 0.5} if recipe == "adaad" else {}


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_reach_every_weight_of_the_student_and_nothing_else(student, recipe):
    step = make_step(done=0.3, robust=(True, False, True))
    loss_of(RECIPES[recipe](**settings(recipe)), student, step).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    assert not any(value.requires_grad for value in step if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_stay_finite_on_extreme_logits(student, recipe):
    step = make_step(done=0.3, robust=(True, False, True))
    step = step._replace(targets=step.targets * 1e4, clean_targets=step.clean_targets * 1e4)
    loss = loss_of(RECIPES[recipe](**settings(recipe)), student, step)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in student.parameters())


@pytest.mark.parametrize(
    ("recipe", "wrong", "message"),
    [
        ("darht", {"phases": (0.5,)}, "phases are two rising shares in [0, 1]; got [0.5]"),
        ("darht", {"phases": (0.5, 0.2)}, "phases are two rising shares in [0, 1]; got [0.5, 0.2]"),
        ("darht", {"clean_share": 2.0}, "clean_share must be a number in [0, 1]; got 2"),
        ("at", {"clean_share": -0.1}, "clean_share must be a number in [0, 1]; got -0.1"),
        ("rslad", {"clean_weight": -0.5}, "clean_weight must be a number in [0, 1]; got -0.5"),
        ("ard", {"alpha": 1.5}, "alpha must be a number in [0, 1]; got 1.5"),
        ("ard", {"tau": 0.0}, "tau must be a number of at least 0.001; got 0"),
        ("mtard", {"rate": 1.1}, "rate must be a number in [0, 1]; got 1.1"),
        ("mtard", {"beta": -1.0}, "beta must be a number of at least 0; got -1"),
        ("adaad", {"alpha": -1.0}, "alpha must be a number in [0, 1]; got -1"),
        ("adaad", {"igdm": -1.0}, "igdm must be a number of at least 0; got -1"),
        ("adaad", {"gradient": -1.0}, "gradient must be a number of at least 0; got -1"),
        ("saad", {"scale": -1.0}, "scale must be a number of at least 0; got -1"),
        ("adr", {"trust": (0.7, 1.5)}, "trust must be a number in [0, 1]; got 1.5"),
        ("adr", {"temperature": (2.0,)}, "temperature is a value for each end of the run; got [2.0]"),
        ("kd", {"alpha": 2.0}, "alpha must be a number in [0, 1]; got 2"),
        ("kd", {"tau": -4.0}, "tau must be a number of at least 0.001; got -4"),
        ("trades", {"beta": -6.0}, "beta must be a number of at least 0; got -6"),
    ],
)
def test_a_broken_rule_of_a_recipe(recipe, wrong, message):
    with pytest.raises(ConfigError) as caught:
        RECIPES[recipe](**wrong)
    assert str(caught.value) == message


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
    examples = Examples(config, config.objective())
    return cache, student, examples.draw(student, data, rows, epoch=1, number=5, done=0.25, pgd_share=0.0)


SMALL = StudentConfig(arch="resnet18", kwargs={"width": 4, "blocks": [1, 1, 1, 1]})


def test_rslad_from_the_cache_equals_rslad_with_live_teachers(tiny_cache, tiny_teachers):
    config = TrainConfig(recipe="rslad", student=SMALL, inner=InnerConfig(eps=16, step=4, steps=2))
    cache, student, step = cached_step(tiny_cache, config, torch.arange(0, 100, 2))
    live = step._replace(clean_targets=live_targets(cache, tiny_teachers, step.clean))
    assert not torch.equal(step.x, step.clean)
    cached_loss = loss_of(config.objective(), student, step).item()
    assert cached_loss == pytest.approx(loss_of(config.objective(), student, live).item(), rel=1e-3)


@pytest.mark.parametrize("clean_share", [0.0, 1.0])
def test_darht_from_the_cache_equals_darht_with_live_teachers(tiny_cache, tiny_teachers, clean_share):
    inner = InnerConfig(kind="cached")
    config = TrainConfig(student=SMALL, inner=inner, loss={"clean_share": clean_share, "phases": (0, 0)})
    cache, student, step = cached_step(tiny_cache, config, torch.arange(1, 100, 2))
    assert torch.equal(step.x, step.clean) is (clean_share == 1.0)
    live = step._replace(targets=live_targets(cache, tiny_teachers, step.x))
    np.testing.assert_allclose(step.targets, live.targets, atol=5e-3)
    cached_loss = loss_of(config.objective(), student, step).item()
    assert cached_loss == pytest.approx(loss_of(config.objective(), student, live).item(), rel=1e-3)
