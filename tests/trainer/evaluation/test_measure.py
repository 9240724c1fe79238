"""The books of an evaluation: who was asked, who fell, what is kept on disk."""

import numpy as np
import pytest
import torch
from frauds import Brightness

from darht.attacks import FGSM, PGD, Threat
from darht.attacks.engine.query_model import NoGradientError
from darht.trainer.evaluation.attacks.suite import white_box
from darht.trainer.evaluation.ledger import Ledger
from darht.trainer.evaluation.measure import AttackStep, EvalSetup, begin

CPU = torch.device("cpu")


def measurement(source, **options):
    return begin(
        EvalSetup(**{"model": Brightness().eval(), "source": source, "threat": Threat(eps=8), "device": CPU, **options})
    )


def towards(m, rows, name="planted", **about):
    """A step that moves the given rows against their answer by 8 levels and leaves the others alone."""

    def craft(x, y, generator):
        chosen = torch.isin(generator.rows, torch.tensor(rows))[:, None, None, None]
        push = torch.where(y == 1, -1.0, 1.0)[:, None, None, None] * 8 / 255
        return torch.where(chosen, (x + push).clamp(0, 1), x)

    return AttackStep(name=name, family="white-box", craft=craft, about=about, threat=m.setup.threat)


def test_the_clean_answers_come_first(greys):
    m = measurement(greys)
    assert m.correct.tolist() == list(range(9))
    assert [(score.name, score.correct, score.count) for score in m.scores] == [("clean", 9, 10)]


def test_an_image_is_alive_while_it_withstands_everything(greys):
    m = measurement(greys)
    assert m.ask(towards(m, [3, 4], "a"), m.correct, on="all images").tolist() == [True] * 3 + [False] * 2 + [True] * 4
    m.ask(towards(m, [4, 5], "b"), m.correct, on="all images")
    assert np.flatnonzero(m.alive).tolist() == [0, 1, 2, 6, 7, 8]
    worst = m.finish()
    assert (worst.correct, worst.count) == (6, 10)
    assert worst.attack["over"] == ["clean", "a", "b"]
    assert [score.attack["alive_after"] for score in m.scores[1:3]] == [7, 6]
    assert m.right["b"].tolist() == [1, 1, 1, 1, 0, 0, 1, 1, 1, -1]
    assert m.adversarial.tolist() == [0, 0, 0, 1, 1, 0, 1, 1, 1, 1]


def test_a_score_says_which_images_were_asked(greys):
    m = measurement(greys)
    m.ask(towards(m, [3], "first"), m.correct, on="all images")
    m.ask(towards(m, [4], "second"), np.flatnonzero(m.alive), on="the images still alive")
    first, second = m.scores[1:]
    assert (first.correct, first.count, first.on) == (8, 10, "all images")
    assert (second.correct, second.count, second.on) == (7, 8, "the images still alive")


def test_nobody_left_is_said_and_not_asked(greys):
    m = measurement(greys)
    m.ask(towards(m, []), np.zeros(0, dtype=np.int64), on="the images still alive")
    assert m.left_out == {"planted": "none of the images still alive is left"}
    assert len(m.scores) == 1


def test_a_larger_ball_does_not_count_for_the_worst_case(greys):
    m = measurement(greys)
    m.ask(white_box(m, "far", PGD(eps=64, step=16, steps=5)), m.correct, on="all images")
    assert m.alive.sum() == 9
    m.ask(white_box(m, "near", FGSM(eps=4)), m.correct, on="all images")
    assert np.flatnonzero(m.alive).tolist() == [0, 1, 2, 7, 8]
    assert m.finish().attack["over"] == ["clean", "near"]


def test_an_example_outside_of_its_ball_is_a_mistake_of_ours(greys):
    m = measurement(greys)
    step = AttackStep(name="far", family="white-box", craft=lambda x, y, g: 1 - x, about={}, threat=m.setup.threat)
    with pytest.raises(AssertionError):
        m.ask(step, m.correct, on="all images")


def test_an_attack_without_gradient_is_left_out(greys):
    def craft(x, y, generator):
        raise NoGradientError("no gradient")

    m = measurement(greys)
    step = AttackStep(name="blind", family="white-box", craft=craft, about={}, threat=m.setup.threat)
    assert m.ask(step, m.correct, on="all images").all()
    assert m.left_out == {"blind": "no gradient"}
    assert m.finish().attack["over"] == ["clean"]


def test_the_examples_are_those_the_model_is_surest_of(greys):
    m = measurement(greys)
    m.ask(towards(m, [3, 4]), m.correct, on="all images")
    assert sorted(m.examples) == [3, 4]
    assert m.examples[4].confidence > m.examples[3].confidence > 0.5
    assert np.allclose(m.examples[3].delta, 8)
    assert m.examples[3].prediction == 1


class Counted:
    """A step that counts the images it crafts."""

    def __init__(self, m):
        self.images = 0
        self.step = towards(m, [3, 4])
        inner = self.step.craft

        def craft(x, y, generator):
            self.images += len(x)
            return inner(x, y, generator)

        self.step = AttackStep(name="planted", family="white-box", craft=craft, about={}, threat=m.setup.threat)


def test_what_is_in_the_ledger_is_not_made_again(greys, tmp_path):
    ledger = Ledger(tmp_path, {"model": "a"})
    first = measurement(greys, ledger=ledger, batch=4)
    counted = Counted(first)
    first.ask(counted.step, first.correct, on="all images")
    assert counted.images == 9
    next(tmp_path.glob("planted-*.npz")).unlink()  # one of three batches is lost
    second = measurement(greys, ledger=ledger, batch=4)
    counted = Counted(second)
    second.ask(counted.step, second.correct, on="all images")
    assert 0 < counted.images < 9
    assert second.scores == first.scores
    assert (second.alive == first.alive).all()
    for options in ({"seed": 1}, {"ledger": Ledger(tmp_path, {"model": "b"})}):
        other = measurement(greys, **{"ledger": ledger, "batch": 4, **options})
        counted = Counted(other)
        other.ask(counted.step, other.correct, on="all images")
        assert counted.images == 9


def test_progress_tells_images_and_who_is_alive(greys):
    told = []
    m = measurement(greys, batch=5, on_batch=lambda *batch: told.append(batch))
    m.ask(towards(m, [3]), m.correct, on="all images")
    assert told[:3] == [("clean", 0, 10, 10), ("clean", 5, 10, 5), ("clean", 10, 10, 10)]
    assert told[3:] == [("planted", 0, 9, 9), ("planted", 5, 9, 8), ("planted", 9, 9, 8)]
