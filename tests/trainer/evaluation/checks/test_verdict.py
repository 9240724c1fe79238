"""What condemns, what warns, and what outranks a suspicion."""

import pytest
import torch
from frauds import Brightness

from darht.attacks import Threat
from darht.trainer.evaluation.checks.verdict import Check, outranked, surely_above, surely_below, verdict
from darht.trainer.evaluation.measure import EvalSetup, begin
from darht.trainer.evaluation.score import Score

SUSPICION = Check("uphill", False, "", suspicion=True)
PROOF = Check("gradient", False, "")


def measurement(greys):
    setup = EvalSetup(model=Brightness().eval(), source=greys, threat=Threat(eps=8), device=torch.device("cpu"))
    return begin(setup)


def later(m, name, alive, family="white-box", after=None):
    about = {"alive_after": alive, **({"after": after} if after else {})}
    m.scores.append(Score(name, alive, 10, about, family))
    m.alive[:] = False
    m.alive[:alive] = True


def test_a_rule_is_broken_when_the_whole_interval_is_beyond_it():
    assert [surely_above(k, 100, 0.01) for k in (2, 3)] == [False, True]
    assert not surely_above(2, 2, 0.01)  # two images are chance
    assert [surely_below(k, 16, 0.75) for k in (9, 7)] == [False, True]


def test_what_warns_does_not_condemn():
    warned = Check("ratio", False, "", condemns=False)
    kept = Check("noise", True, "")
    assert [check.status for check in (PROOF, warned, kept)] == ["FAIL", "warn", "pass"]
    assert verdict((kept, kept)) == "nothing found"
    assert verdict((kept, warned)) == "nothing found, 1 of 2 checks warn"
    assert verdict((PROOF, warned)) == "1 of 2 checks failed"


def test_without_later_attacks_a_suspicion_stands(greys):
    assert outranked(measurement(greys), (SUSPICION,), 9) == (SUSPICION,)


def test_an_autoattack_that_takes_nothing_outranks_a_suspicion_and_no_proof(greys):
    m = measurement(greys)
    later(m, "autoattack", 9, after={"apgd-ce": 9, "fab-t": 9, "square": 9})
    assert [check.status for check in outranked(m, (SUSPICION, PROOF), 9)] == ["warn", "FAIL", "pass"]


def test_an_autoattack_that_takes_more_leaves_the_suspicion(greys):
    m = measurement(greys)
    later(m, "autoattack", 4, after={"apgd-ce": 5, "fab-t": 4, "square": 4})
    found = outranked(m, (SUSPICION,), 9)
    assert [check.status for check in found] == ["FAIL", "pass"]
    assert found[-1].figures == {"alive before": 9, "taken after": 5, "taken without a gradient": 0}


@pytest.mark.parametrize(
    ("name", "family", "after"),
    [("autoattack", "white-box", {"fab-t": 9, "square": 5}), ("rays", "black-box", None),
     ("surrogate:other", "black-box", None)],
)  # fmt: skip
def test_what_falls_without_a_gradient_condemns(greys, name, family, after):
    m = measurement(greys)
    m.scores[0].attack["alive_after"] = 9
    later(m, name, 5, family, after)
    (found,) = outranked(m, (), 9)
    assert found.status == "FAIL" and found.figures["taken without a gradient"] == 4
