"""Attacks that know the student: each climbs what it says, and only z counts."""

import numpy as np
import pytest
import torch

from darht.attacks import Threat
from darht.cache.sources.load import Source
from darht.core.preprocessing import Preprocessing
from darht.core.rng import RowRng
from darht.trainer.evaluation.attacks import adaptive
from darht.trainer.evaluation.measure import EvalSetup, begin
from darht.trainer.student.model import Student, StudentOutput

CPU = torch.device("cpu")


@pytest.fixture
def student():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = Student("wrn-10-1", {"width": 4}, teachers=2, num_classes=5, preprocessing=Preprocessing())
    made = made.eval().requires_grad_(False)
    x = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    made.head.bias -= made(x).logits.mean(0)  # fresh weights name one class for everything
    return made


@pytest.fixture
def source(student):
    images = np.random.default_rng(0).integers(0, 256, (24, 3, 8, 8)).astype(np.uint8)
    with torch.no_grad():
        labels = student(torch.from_numpy(images).float() / 255).logits.argmax(1).numpy()
    return Source("npz", "test", images, labels, tuple("abcde"), "0" * 64)


def measurement(student, source):
    return begin(EvalSetup(model=student.fold().requires_grad_(False), source=source, threat=Threat(eps=8), device=CPU))


def teachers(source):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        nets = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 5)) for _ in range(2)]
    return {name: net.eval().requires_grad_(False) for name, net in zip(("cnn", "vit"), nets, strict=True)}


def test_every_loss_of_the_issue_is_there():
    assert list(adaptive.row_losses(2, 5)) == [
        "z, ce", "z, dlr", "row 0, ce", "row 0, dlr", "row 1, ce", "row 1, dlr", "all rows, ce", "nearest row",
        "ensemble of z and rows",
    ]  # fmt: skip


def test_the_losses_by_hand():
    out = StudentOutput(
        torch.tensor([[2.0, 0.0, 1.0, -1.0]]), torch.tensor([[[1.0, 3.0, 0.0, 0.0], [5.0, 0.0, 4.0, 0.0]]])
    )
    y, losses = torch.tensor([0]), adaptive.row_losses(2, 4)
    value = {name: float(loss(out, y, torch.zeros(1, 0))) for name, loss in losses.items()}
    rows = [-torch.log_softmax(row, 0)[0].item() for row in out.feature_map[0]]
    assert value["row 0, ce"] == pytest.approx(rows[0])
    assert value["all rows, ce"] == pytest.approx(sum(rows) / 2)
    assert value["nearest row"] == pytest.approx(2.0)  # margins are 3 - 1 and 4 - 5
    assert value["z, dlr"] == pytest.approx((1 - 2) / (2 - 0))
    probability = torch.stack([part.softmax(0)[0] for part in (out.logits[0], *out.feature_map[0])]).mean()
    assert value["ensemble of z and rows"] == pytest.approx(-float(probability.log()))
    assert float(adaptive.away_from_teachers(out, y, out.feature_map)) == pytest.approx(0.0, abs=1e-6)


def test_a_climb_stays_in_the_ball_and_fools_z(student, source):
    x, y = torch.from_numpy(source.images).float() / 255, torch.from_numpy(source.labels)
    threat = Threat(eps=24)
    climb = adaptive.Climb(student, adaptive.row_losses(2, 5)["z, ce"], threat)
    generator = RowRng.create(0, "test", rows=torch.arange(24))
    x_adv = climb(x, y, generator, torch.zeros(24, 0))
    assert bool((threat.distance(x_adv, x) <= threat.radius + 1e-6).all())
    assert bool(((x_adv * 255).round() / 255 - x_adv).abs().max() < 1e-6)  # on whole levels
    assert (student(x_adv).logits.argmax(1) != y).float().mean() > 0.5
    assert torch.equal(x_adv, climb(x, y, generator, torch.zeros(24, 0)))


def test_the_student_itself_confirms_what_fools_its_faster_twin(student, source):
    x, y = torch.from_numpy(source.images).float() / 255, torch.from_numpy(source.labels)
    fast, loss = adaptive.fast_student(student, x[:2]), adaptive.row_losses(2, 5)["z, ce"]
    noisy = (x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    want = student(noisy).logits.argmax(1) != y

    def always_fooled(z):
        return StudentOutput(torch.nn.functional.one_hot((y + 1) % 5).float(), z)

    for net in (fast, always_fooled):
        climb = adaptive.Climb(student, loss, Threat(eps=24), fast=net)
        assert int(want.sum()) > 0 and torch.equal(climb._fooled(noisy, y), want)
    torch.testing.assert_close(fast(x).feature_map, student(x).feature_map, rtol=1e-4, atol=1e-5)


def test_all_of_them_run_and_count(student, source, monkeypatch):
    monkeypatch.setattr(adaptive, "STEPS", 4)
    m = measurement(student, source)
    said = torch.zeros(24, 2, 5)
    adaptive.run_adaptive(m, student, ("cnn", "vit"), teachers(source), said)
    names = {score.name for score in m.scores[1:]} | set(m.left_out)
    for name in ("row cnn, ce", "row vit, dlr", "all rows, ce", "nearest row", "kl away from teachers", "saga",
                 "auto-saga", "apgd from cnn", "apgd from vit"):  # fmt: skip
        assert f"adaptive:{name}" in names
    assert m.finish().correct == int(m.alive.sum()) < 24
    counts = [score.count for score in m.scores[1:-1]]
    assert counts == sorted(counts, reverse=True)  # each is asked of the survivors


def test_what_is_left_out_says_why(student, source, monkeypatch):
    monkeypatch.setattr(adaptive, "STEPS", 1)
    m = measurement(student, source)
    adaptive.run_adaptive(m, student, ("cnn", "vit"), {}, None)
    assert "give --teacher NAME=FOLDER" in m.left_out["adaptive:kl away from teachers"]
    assert "at least two teachers; 0 are there" in m.left_out["adaptive:saga"]


def test_the_folded_student_is_compared_bit_by_bit(student, source):
    x = torch.from_numpy(source.images).float() / 255
    same = adaptive.compare_folded(student, student.fold(), [x])
    assert (same.images, same.differing) == (24, 0) and same.largest < 1e-5
    other = adaptive.compare_folded(student, torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 5)), [x])
    assert other.differing > 0 and other.largest > 1e-2
