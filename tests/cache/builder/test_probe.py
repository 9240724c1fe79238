"""Teachers that make no sense are told from those that do, by a few hundred images."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darht.attacks import PGD, Square
from darht.cache.builder.answers import find_cycle, is_distribution
from darht.cache.builder.probe import probe_steadiness, probe_teacher, steadiness_problems
from darht.cache.sources.load import load_source
from darht.core.errors import ModelError
from darht.core.nets.classifier import Classifier
from darht.core.preprocessing import Preprocessing

CPU = torch.device("cpu")
SCALED = Preprocessing(mean=(0.6, 0.5, 0.4), std=(0.05, 0.05, 0.05))


class Through(nn.Module):
    """A network with something before and after it."""

    def __init__(self, net: nn.Module, before=lambda x: x, after=lambda z: z):
        super().__init__()
        self.net, self.before, self.after = net, before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.net(self.before(x)))


class Remembers(Through):
    """Says of an image near one that it has seen what it said of that."""

    def forward(self, x: Tensor) -> Tensor:
        seen = self.__dict__.setdefault("seen", [])
        for one in x:
            if not any((one - pixels).abs().max() < 9 / 255 / 0.05 for pixels, _ in seen):
                seen.append((one.detach().clone(), self.net(one[None])[0].detach()))
        return torch.stack([min(seen, key=lambda known: float((one.detach() - known[0]).abs().max()))[1] for one in x])


@pytest.fixture(scope="module")
def digits():
    return load_source("digits", None, "train", limit=600)


@pytest.fixture(scope="module")
def net(digits) -> nn.Module:
    """A linear classifier of digits that wants its own normalisation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        linear = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
        x, y = torch.from_numpy(digits.images).float() / 255, torch.from_numpy(digits.labels)
        x = Classifier(nn.Identity(), SCALED)(x)
        optimizer = torch.optim.Adam(linear.parameters(), 3e-3)
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(linear(x), y).backward()
            optimizer.step()
    return linear.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def problems(digits):
    """`problems(net)` are those of a teacher made of it."""

    def ask(net: nn.Module, preprocessing: Preprocessing = SCALED, source=digits, **options) -> str:
        probe = probe_teacher(Classifier(net, preprocessing).eval(), source, **options, device=CPU)
        return "; ".join(probe.problems(digits.classes))

    return ask


def test_a_teacher_that_makes_sense(net, digits, problems):
    assert problems(net) == ""
    probe = probe_teacher(Classifier(net, SCALED).eval(), digits, attack=PGD(eps=8, step=2, steps=20), device=CPU)
    assert probe.right > 220 and probe.robust < 32 and probe.bound == 42
    assert "PGD-10 at 8/255" in probe.line() and "0 of 32 without gradient, outputs are logits" in probe.line()
    assert probe.warning == ""
    assert problems(Through(net, after=lambda z: z.bfloat16())) == ""  # half precision


@pytest.mark.parametrize(
    "after", [lambda z: z.softmax(1), lambda z: z.softmax(1).half(), lambda z: z.bfloat16().softmax(1), torch.sigmoid,
              lambda z: 100 * z.softmax(1)],
)  # fmt: skip
def test_probabilities(after, net, problems):
    assert "its outputs are probabilities" in problems(Through(net, after=after))


def test_classes_in_another_order(net, problems):
    said = problems(Through(net, after=lambda z: z.roll(1, 1)))
    assert "guessing among 10 classes reaches 41" in said and "0 -> 1 -> 2 -> 3" in said
    two = torch.tensor([0, 1, 2, 5, 4, 3, 6, 7, 8, 9])
    assert problems(Through(net, after=lambda z: z[:, two])).startswith(
        "its outputs are in another class order (3 -> 5"
    )
    assert find_cycle([0] * 6 + [1] * 6, [1] * 6 + [1] * 6, 2) == ()  # one way only
    assert find_cycle([0] * 4 + [1] * 4, [1] * 4 + [0] * 4, 2) == ()  # too few to tell


def test_normalisation_that_was_forgotten_or_is_on_the_wrong_scale(net, problems):
    assert "with --mean 0.31" in (said := problems(net, Preprocessing())) and "import it so" in said
    large = Preprocessing(mean=tuple(255 * v for v in SCALED.mean), std=tuple(255 * v for v in SCALED.std))
    assert "with --mean 0.600,0.500,0.400 --std 0.050,0.050,0.050" in problems(net, large)
    inside = Through(net, before=Classifier(nn.Identity(), SCALED))
    assert problems(inside, Preprocessing()) == ""
    twice = Preprocessing(mean=(-3.0, -3.0, -3.0), std=(1.0, 1.0, 1.0))
    assert "without --mean and --std" in problems(inside, twice)


def test_one_answer_to_everything(net, problems):
    said = problems(Through(net, after=lambda z: z * 1e-3 + torch.eye(10)[3]))
    assert "guessing among" in said or "all get one answer" in said


@pytest.mark.parametrize("before", [torch.round, lambda x: x.detach()])
def test_no_gradient(before, net, problems):
    rounds = Through(net, before=before)
    assert "no gradient reaches the pixels of 32 of 32 images" in problems(rounds)
    assert problems(rounds, attack=Square(queries=5), gradient_needed=False) == ""


def test_answers_that_depend_on_batch_history_or_chance(net, problems):
    def batch_norm(x):
        return F.batch_norm(x, None, None, training=True)

    for changed, reason in (
        (Through(net, before=batch_norm), "normalises over its batch"),
        (Through(net, before=lambda x: F.dropout(x, 0.1)), "draws random numbers"),
        (Remembers(net), "remembers what it has seen"),
    ):
        assert reason in problems(changed)
    batch, again = probe_steadiness(Classifier(Through(net, before=batch_norm), SCALED).eval(), 8)
    assert "alone or in another order" in steadiness_problems(batch, again)[0]


def test_rounding_that_depends_on_the_batch_is_told_and_not_refused(net, digits):
    slightly = Through(net, after=lambda z: z * (1 + 1e-3 * len(z) / 32) + 1e-2 * torch.arange(10) * len(z) / 32)
    probe = probe_teacher(Classifier(slightly, SCALED).eval(), digits, device=CPU)
    assert probe.problems(digits.classes) == [] and "by the size of rounding" in probe.warning


def test_modules_left_in_train_mode(net, problems):
    class Stays(nn.Identity):
        def train(self, mode: bool = True) -> nn.Module:
            return super().train(True)

    assert "it stays in train mode (net.before)" in problems(Through(net, before=Stays()))


def test_nothing_is_touched(net, digits):
    teacher = Classifier(Through(net, before=lambda x: F.dropout(x, 0.1)), SCALED).eval()
    torch.manual_seed(5)
    before = torch.get_rng_state().clone()
    probe_teacher(teacher, digits, device=CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(parameter.requires_grad for parameter in teacher.parameters()) and not teacher.training


def test_few_images_prove_nothing(net, digits, problems):
    few = dataclasses.replace(digits, images=digits.images[:2], labels=(digits.labels[:2] + 1) % 10)
    assert problems(net, source=few) == ""


def test_what_cannot_be_asked(net, problems):
    with pytest.raises(ModelError, match="answers 32 images and not one by itself"):
        problems(Through(net, after=lambda z: z[(0, 1) if len(z) == 1 else slice(None)]))
    with pytest.raises(ModelError, match="NaN or infinite for 256 of 256 images"):
        problems(Through(net, after=lambda z: z / 0))


def test_what_looks_like_a_distribution():
    logits = torch.randn(50, 10)
    assert not is_distribution(logits) and not is_distribution(logits.relu()) and not is_distribution(logits * 0)
    assert not is_distribution(logits.log_softmax(1))
