"""The gradient of a step: label smoothing and adversarial weight perturbation by hand in float64."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from runs import CONFIG, changed
from torch import nn
from torch.func import functional_call

from darht.core.errors import ConfigError
from darht.trainer.config import ComputeConfig, TrainConfig
from darht.trainer.progress.metrics import Metrics
from darht.trainer.student.distributed import Ranks
from darht.trainer.student.gradients import compute_gradients
from darht.trainer.student.losses import RECIPES
from darht.trainer.student.model import StudentOutput
from darht.trainer.student.run import TrainState
from darht.trainer.student.step import LabelRecipe, Step

B, C = 6, 3


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.first = nn.BatchNorm1d(12).double(), nn.Linear(12, 4).double()
        self.head = nn.Linear(4, C).double()

    def forward(self, x):
        logits = self.head(torch.tanh(self.first(self.norm(x.flatten(1)))))
        return StudentOutput(logits, logits.new_zeros(len(x), 0, C))


@pytest.fixture
def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().train()


def step_of(at):
    generator = torch.Generator().manual_seed(1)
    x, clean = (torch.rand(B, 3, 2, 2, dtype=torch.float64, generator=generator)[at] for _ in range(2))
    y = torch.randint(0, C, (B,), generator=generator)[at]
    logits = torch.randn(B, 1, C, dtype=torch.float64, generator=generator)[at]
    robust = torch.tensor([True])
    return Step(x, clean, y, lambda z: logits, logits, logits, robust.expand(len(at), 1), robust, 0.5)


def gradients(net, recipe, *, accumulate=1):
    config = dataclasses.replace(CONFIG, compute=ComputeConfig(accumulate=accumulate))
    examples = SimpleNamespace(config=config, recipe=recipe, draw=lambda student, data, at, **_: step_of(at))
    state, metrics = TrainState(net, net, torch.optim.SGD(net.parameters()), None), Metrics(torch.device("cpu"))
    compute_gradients(state, examples, Ranks(), metrics, data=None, batch=torch.arange(B), number=0, done=0.5)
    return {name: value.grad for name, value in net.named_parameters()}, metrics


@pytest.mark.parametrize("accumulate", [1, 2])
def test_awp_takes_the_gradient_at_the_perturbed_weights_and_puts_them_back(net, accumulate):
    pieces = torch.arange(B).tensor_split(accumulate)

    def at(weights):
        weights = {name: value.detach().clone().requires_grad_() for name, value in weights.items()}
        for piece in pieces:
            step = step_of(piece)
            logits = functional_call(net, (weights, {}), (step.x,)).logits
            (nn.functional.cross_entropy(logits, step.y) * len(piece) / B).backward()
        return {name: value.grad for name, value in weights.items()}

    twin = Net()
    twin.load_state_dict(net.state_dict())
    before = {name: value.detach().clone() for name, value in net.named_parameters()}
    slopes, moved = at(before), dict(before)
    for name in ("first.weight", "head.weight"):  # biases and batch norm stay
        moved[name] = before[name] + 0.3 * before[name].norm() * slopes[name] / slopes[name].norm()
    want = at(moved)
    net.load_state_dict(twin.state_dict())
    found, metrics = gradients(net, RECIPES["at"](awp=0.3), accumulate=accumulate)
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12)
        assert torch.equal(dict(net.named_parameters())[name], before[name])
    plain, _ = gradients(twin, RECIPES["at"](), accumulate=accumulate)
    assert int(net.norm.num_batches_tracked) == int(twin.norm.num_batches_tracked) == accumulate
    assert torch.equal(net.norm.running_mean, twin.norm.running_mean)
    assert not torch.allclose(plain["head.weight"], found["head.weight"])
    assert metrics.counts[0] == pytest.approx(1)


def test_a_recipe_that_learns_does_not_learn_from_the_pass_that_is_thrown_away(net):
    recipe, seen = RECIPES["trades"](awp=0.1), []
    loss = type(recipe).loss

    def look(self, student, step, out, learned):
        learned["seen"] = learned.get("seen", torch.zeros(())) + 1
        seen.append(learned)
        return loss(self, student, step, out, learned)

    counting = type("Counting", (type(recipe),), {"loss": look})(awp=0.1)
    gradients(net, counting)
    assert len(seen) == 2 and int(seen[-1]["seen"]) == 1


def test_smoothing_is_cross_entropy_with_a_share_for_all_classes():
    recipe, step = RECIPES["at"](smoothing=0.4), step_of(torch.arange(B))
    logits = step.targets[:, 0]
    want = 0.0
    for row, label in zip(logits.tolist(), step.y.tolist(), strict=True):
        logs = [value - math.log(sum(map(math.exp, row))) for value in row]
        want -= 0.6 * logs[label] + 0.4 * sum(logs) / C
    assert float(recipe.label_loss(logits, step.y)) == pytest.approx(want / B, rel=1e-12)


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if issubclass(recipe, LabelRecipe)])
def test_every_recipe_with_labels_smooths_them(name, net):
    changes = {"alpha": 0.5} if name in ("ard", "kd") else {}
    step, losses = step_of(torch.arange(B)), []
    if name == "darht":
        step = step._replace(done=0.0)
    net.eval()
    for smoothing in (0.0, 0.4):
        recipe = RECIPES[name](smoothing=smoothing, **changes)
        losses.append(recipe.loss(net, step, net(step.x), {}).value)
    assert losses[0] != losses[1]


def test_what_has_no_effect_is_refused():
    for name in ("ard", "kd"):
        with pytest.raises(ConfigError, match="smoothing is of a term with labels"):
            RECIPES[name](alpha=1.0, smoothing=0.1)
    for recipe in RECIPES.values():
        with pytest.raises(ConfigError, match="awp must be a number"):
            recipe(awp=-1.0)
    with pytest.raises(ConfigError, match="smoothing"):
        changed(recipe="rslad", loss={"smoothing": 0.1})
    assert TrainConfig(recipe="at", loss={"awp": 0.005}).objective().awp == 0.005


def test_adaad_matches_the_teacher_s_input_gradient_by_hand(net):
    """The teacher is linear, so that its gradient is `J^T (p - y)`; the student's is taken row by row."""
    step = step_of(torch.arange(B))
    generator = torch.Generator().manual_seed(5)
    jacobian = torch.randn(C, 12, dtype=torch.float64, generator=generator)
    step = step._replace(answer=lambda z: step.clean_targets + ((z - step.clean).flatten(1) @ jacobian.T)[:, None])
    net.eval()
    want = 0.0
    for b in range(B):
        said = step.clean_targets[b, 0].softmax(0)
        theirs = jacobian.T @ (said - nn.functional.one_hot(step.y[b], C))
        x = step.clean[b : b + 1].clone().requires_grad_()
        nn.functional.cross_entropy(net(x).logits, step.y[b : b + 1]).backward()
        want += float((x.grad.flatten() - theirs).square().sum()) / B
    net.zero_grad()
    plain, matched = (RECIPES["adaad"](gradient=weight).loss(net, step, net(step.x), {}).value for weight in (0.0, 2.0))
    assert (matched - plain).item() == pytest.approx(2 * want, rel=1e-8)
    matched.backward()
    assert all(value.grad.abs().sum() > 0 for value in net.first.parameters())
    assert RECIPES["adaad"](gradient=1.0).compares_points() == "gradient"
    with pytest.raises(ConfigError, match="gradient of a gradient"):
        compute = ComputeConfig(compile=True)
        changed(recipe="adaad", loss={"gradient": 1.0}, targets="first-order", compute=compute)
