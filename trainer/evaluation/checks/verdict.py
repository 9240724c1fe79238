"""What checks say together: which of them condemn, and what outranks a suspicion.

A share is held against its rule by a 95 % Wilson interval, so that few images condemn nobody. A rule that honest models
break as well warns; it never condemns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from darht.core.stats import wilson
from darht.trainer.evaluation.measure import Measurement

Status = Literal["pass", "warn", "FAIL"]
NOTHING_MORE = 0.01  # of all images: what may fall to attacks of another kind that find nothing of importance
_FEWEST = 3  # images that a check needs on its wrong side: fewer are chance
_OTHER_KIND = ("autoattack", "square", "rays", "surrogate:", "substitute:", "adaptive:")
_NO_GRADIENT = ("square", "rays", "surrogate:", "substitute:")


@dataclass(frozen=True)
class Check:
    """One sign that a number deceives.

    Attributes:
        name: what is checked.
        passed: whether the figures keep the rule.
        rule: the rule in words.
        figures: what was measured, by name.
        condemns: whether a broken rule says that the numbers are not to be believed; else it warns.
        suspicion: whether it is about the attacks' gradients, so that attacks of another kind outrank it.
    """

    name: str
    passed: bool
    rule: str
    figures: dict[str, float] = field(default_factory=dict)
    condemns: bool = True
    suspicion: bool = False

    @property
    def status(self) -> Status:
        """How reports mark it."""
        return "pass" if self.passed else "FAIL" if self.condemns else "warn"

    def record(self) -> dict[str, Any]:
        """As it stands in `eval.json`."""
        return {"name": self.name, "status": self.status, "passed": self.passed, "rule": self.rule,
                "figures": self.figures}  # fmt: skip


def surely_above(images: int, count: int, share: float) -> bool:
    """Whether the whole 95 % interval of `images` of `count` lies above a share, and at least three images do."""
    return images >= _FEWEST and wilson(images, count)[0] > share


def surely_below(images: int, count: int, share: float) -> bool:
    """Whether the whole 95 % interval lies below a share, and at least three images are on the wrong side."""
    return count - images >= _FEWEST and wilson(images, count)[1] < share


def verdict(checks: Sequence[Check]) -> str:
    """All checks in a few words."""
    states = [check.status for check in checks]
    failed, warned = states.count("FAIL"), states.count("warn")
    if failed:
        return f"{failed} of {len(checks)} checks failed"
    return f"nothing found, {warned} of {len(checks)} checks warn" if warned else "nothing found"


def outranked(m: Measurement, checks: Sequence[Check], before: int) -> tuple[Check, ...]:
    """The checks after everything has run: what attacks of another kind found stands above a suspicion.

    AutoAttack, Square, RayS, transfer from independent models and the adaptive attacks count where they ran after the
    checks. Where they take nothing more, a broken rule about gradients only warns. Where those that follow no gradient
    fool what had withstood the others, that is a failed check of its own.

    Args:
        m: the evaluation.
        checks: as they were made.
        before: images alive when they were made.
    """
    later = [score for score in m.scores if score.name.startswith(_OTHER_KIND) and score.family != "check"]
    if not later or not before:
        return tuple(checks)
    taken, blind = before - int(m.alive.sum()), _taken_blindly(m)
    figures = {"alive before": float(before), "taken after": float(taken), "taken without a gradient": float(blind)}
    found = Check(
        "other attacks take nothing more", not surely_above(blind, before, NOTHING_MORE),
        f"of the images alive, those that follow no gradient fool at most {NOTHING_MORE:.0%} after those that do",
        figures,
    )  # fmt: skip
    strong = any(score.name == "autoattack" for score in later)
    if strong and found.passed and taken <= max(1, NOTHING_MORE * m.count):
        checks = [replace(check, condemns=check.condemns and not check.suspicion) for check in checks]
    return (*checks, found)


def _taken_blindly(m: Measurement) -> int:
    """Images that fell first to an attack that follows no gradient of the model, after the masking checks."""
    taken, alive = 0, m.count
    for score in m.scores:
        now = score.attack.get("alive_after", alive)
        after = list(score.attack.get("after", {}).items())
        if score.name.startswith(_NO_GRADIENT) and score.family == "black-box":
            taken += alive - now
        elif after and after[-1][0] == "square" and len(after) > 1:
            taken += min(alive - now, after[-2][1] - after[-1][1])
        alive = now
    return taken
