"""Signs that a model hides its gradients instead of being robust (Athalye et al. 2018; Carlini et al. 2019).

Each check is a figure, the rule that it is held against, and pass or fail. They run on a sample, all on the same
images, so that the figures can be compared; attacks in the evaluation's own ball count for the worst case as well.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from darht.attacks import FGSM, PGD, Engine, Square
from darht.attacks.objectives import Model, cross_entropy, input_gradient, margin
from darht.attacks.threat import Norm, Threat
from darht.core.rng import RowRng
from darht.trainer.evaluation.attacks.suite import SELF, logit_ratio, step_of, white_box
from darht.trainer.evaluation.checks.calibration import interval
from darht.trainer.evaluation.measure import AttackStep, Measurement

CURVE = (2, 4, 8, 12, 16, 32, 64)
_BEYOND = (128, 255)  # for models trained at a large radius: a curve must end where any image can become any other
_ZERO = 2.0  # per cent that may be left where an attack can do almost anything
_SLACK = 2.0  # points that two accuracies on the same images may differ for chance
_MORE = 10.0  # points that five times the steps, or restarts, may gain; undefended nets gained up to 6
_SATURATED = 5.0  # points that cross-entropy may leave more than the logit ratio
_NOISES = 20  # draws of noise for each image
_UPHILL = 0.75  # of the images on which the gradient must raise the margin more than a random direction
_WORDS = {"dlr": "DLR", "margin": "the margin, which stands in for DLR below 4 classes"}
_GRID, SURFACE_IMAGES = 9, 16


@dataclass(frozen=True)
class Check:
    """One sign of masked gradients.

    Attributes:
        name: what is checked.
        passed: whether the figures keep the rule.
        rule: the rule in words.
        figures: what was measured, by name.
    """

    name: str
    passed: bool
    rule: str
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Masking:
    """All checks, the epsilon curve and the loss surface.

    Attributes:
        checks: in order.
        curve: epsilon in levels, and images still right, of `count`.
        count: images in the sample.
        surface: mean margin `[G, G]` over steps along the gradient (rows) and along a random direction (columns),
            from -eps to eps.
    """

    checks: tuple[Check, ...]
    curve: tuple[tuple[float, int], ...]
    count: int
    surface: np.ndarray

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def record(self) -> dict[str, Any]:
        """As it stands in `eval.json`."""
        return {
            "passed": self.passed,
            "images": self.count,
            "checks": [vars(check) for check in self.checks],
            "curve": [self._point(eps, right) for eps, right in self.curve],
            "surface": [[round(float(value), 4) for value in row] for row in self.surface],
        }

    def _point(self, eps: float, right: int) -> dict[str, Any]:
        return {"eps": eps, "correct": right, "count": self.count, "interval95": interval(right, self.count)}


def curve_of(eps: float, norm: Norm) -> tuple[float, ...]:
    """The radii of the curve in pixel levels: 2 to 64, and on to 255 above 8/255; in L2 from a quarter to 16 times."""
    if norm == "l2":
        return tuple(eps * share for share in (0.25, 0.5, 1.0, 1.5, 2.0, 4.0, 8.0, 16.0))
    return tuple(float(e) for e in sorted({*CURVE, eps, *(_BEYOND if eps > 8 else ())}))


def check_masking(m: Measurement, rows: np.ndarray, *, queries: int = 1000, known_draws: bool = False) -> Masking:
    """Run every check on these images.

    Args:
        m: the evaluation.
        rows: positions of images that are right when clean; the sample.
        queries: of Square for each image.
        known_draws: the model is a student whose card says what it draws (Monte-Carlo dropout).
    """
    if not len(rows):
        none = Check("something to attack", False, "at least one image is right when clean", {"images": 0.0})
        return Masking((none,), (), 0, np.zeros((_GRID, _GRID)))
    right = _attacks(m, rows, queries)
    curve = _curve(m, rows)
    share = {name: 100 * float(known.mean()) for name, known in right.items()}
    with m.setup.drawing("surface", rows):
        surface, uphill, dead = _surface(m, rows[:SURFACE_IMAGES])
    slack, three = max(_SLACK, 100.001 / len(rows)), 300.001 / len(rows)  # at least one image, or three
    white = right["fgsm"] & right["pgd"] & right["more steps"] & right["restarts"] & right["ratio"]
    only_square = 100 * float((white & ~right["square"]).mean())
    last = 100 * curve[-1][1] / len(rows)
    multi, ratio = min(share["pgd"], share["ratio"]), logit_ratio(m)
    gained = share["pgd"] - min(share["more steps"], share["restarts"])
    checks = (
        Check("accuracy falls to 0 as epsilon grows", last <= max(_ZERO, slack),
              f"at most {_ZERO:g} % right at the largest radius", {"eps": curve[-1][0], "accuracy": last}),
        Check("more steps and restarts do not help much", gained <= max(_MORE, three),
              f"100 steps or 5 restarts take at most {_MORE:g} points from 20 steps",
              {"20 steps": share["pgd"], "100 steps": share["more steps"], "5 restarts": share["restarts"]}),
        Check("single-step is weaker than multi-step", share["fgsm"] >= multi - slack,
              "FGSM leaves no fewer images than PGD", {"fgsm": share["fgsm"], "pgd-20": multi}),
        Check("cross-entropy is no weaker than the logit ratio",
              share["pgd"] - share["ratio"] <= max(_SATURATED, three),
              f"PGD on CE leaves at most {_SATURATED:g} points more than on {_WORDS[ratio]}: saturated logits fool CE "
              "alone", {"ce": share["pgd"], ratio: share["ratio"]}),
        Check("black-box is weaker than white-box", share["square"] >= multi - slack and only_square <= slack,
              "Square leaves no fewer images than PGD, and fools none that withstand all white-box attacks",
              {"square": share["square"], "pgd-20": multi, "fooled by square alone": only_square}),
        Check("noise is weaker than gradients", share["noise"] >= multi - slack,
              f"{_NOISES} draws of noise leave no fewer images than PGD", {"noise": share["noise"], "pgd-20": multi}),
        Check("the gradient leads uphill", uphill >= _UPHILL and dead == 0,
              f"along it the margin rises more than along random directions, on {_UPHILL:.0%} of images; none is zero",
              {"uphill, share of images": uphill, "zero gradients": float(dead)}),
        Check("the answer is not random", not m.setup.random or known_draws,
              "two answers to the same pixels agree, but for a student's own dropout, which is attacked in expectation",
              {"random": float(m.setup.random)}),
    )  # fmt: skip
    return Masking(checks, curve, len(rows), surface)


def _attacks(m: Measurement, rows: np.ndarray, queries: int) -> dict[str, np.ndarray]:
    """Which images of the sample withstand what, bool `[len(rows)]` by attack."""
    threat, step = m.setup.threat, step_of(m.setup.threat)
    ball: dict[str, Any] = {"eps": threat.eps, "norm": threat.norm}
    ratio = logit_ratio(m)
    engine: Engine = m.setup.engine
    steps = {
        "fgsm": white_box(m, "fgsm", FGSM(**ball), family="check"),
        "pgd": white_box(m, "pgd-20", PGD(**ball, step=step, steps=20), family="check"),
        "ratio": white_box(m, f"pgd-20 {ratio}", PGD(**ball, step=step, steps=20, objective=ratio), family="check"),
        "more steps": white_box(m, "pgd-100", PGD(**ball, step=step, steps=100), family="check"),
        "restarts": white_box(m, "pgd-20 five times", PGD(**ball, step=step, steps=20),
                              engine=replace(engine, restarts=5), family="check"),
        "noise": _noise(m),
        "square": white_box(m, "square", Square(**ball, queries=queries), family="check"),
    }  # fmt: skip
    on = f"the first {len(rows)} images that are right when clean"
    answers = {}
    for name, one in steps.items():
        quiet = one.name in m.right  # asked about all images already
        answers[name] = m.right[one.name][rows] == 1 if quiet else m.ask(_renamed(one), rows, on=on)
    return answers


def _renamed(step: AttackStep) -> AttackStep:
    return replace(step, name=f"check:{step.name}")


def _noise(m: Measurement) -> AttackStep:
    """Random corners of the ball (random directions in L2); of some draws the one with the largest margin."""

    def craft(x: Tensor, y: Tensor, generator: RowRng) -> Tensor:
        best, worst = x, torch.full((len(y),), -torch.inf, device=x.device)
        for draw in range(_NOISES):
            x_adv = _moved(x, _random_direction(x, generator, draw), m.setup.threat)
            found = margin(m.setup.ask(x_adv), y)
            best = torch.where((found > worst)[:, None, None, None], x_adv, best)
            worst = torch.maximum(found, worst)
        return best

    about = {"kind": "noise", "eps": m.setup.threat.eps, "norm": m.setup.threat.norm, "draws": _NOISES, "against": SELF}
    return AttackStep(name="noise", family="check", craft=craft, about=about, threat=m.setup.threat, stream=("noise",))


def _random_direction(x: Tensor, generator: RowRng, draw: int) -> Tensor:
    return generator.integers(0, 1, tuple(x.shape[1:]), draw).to(x.dtype) * 2 - 1


def _moved(x: Tensor, direction: Tensor, threat: Threat, share: float = 1.0) -> Tensor:
    """To the given share of the radius along a direction, cut to the pixel range."""
    return threat.clip(x + share * threat.radius * threat.direction(direction), x)


def _curve(m: Measurement, rows: np.ndarray) -> tuple[tuple[float, int], ...]:
    curve = []
    for eps in curve_of(m.setup.threat.eps, m.setup.threat.norm):
        ball = Threat(eps=eps, norm=m.setup.threat.norm)
        attack = PGD(eps=eps, norm=ball.norm, step=step_of(ball), steps=20)
        step = _renamed(white_box(m, f"pgd-20 at {eps:g}/255", attack, family="check"))
        curve.append((eps, int(m.ask(step, rows, on="", quiet=True).sum())))
    return tuple(curve)


def _surface(m: Measurement, rows: np.ndarray) -> tuple[np.ndarray, float, int]:
    """Mean margins on the grid, the share of images whose gradient leads uphill best, and how many have none."""
    x, y = m.setup.tensors(rows)
    stream = RowRng.create(m.setup.seed, "surface", rows=torch.from_numpy(rows).to(m.setup.device))
    gradient = _gradient(m, x, y)
    dead = int((gradient.flatten(1).abs().amax(1) == 0).sum())
    along, across = m.setup.threat.direction(gradient), m.setup.threat.direction(_random_direction(x, stream, 0))
    ticks = np.linspace(-1, 1, _GRID)
    grid = np.zeros((_GRID, _GRID))
    for i, a in enumerate(ticks):
        for j, b in enumerate(ticks):
            point = (x + m.setup.threat.radius * (float(a) * along + float(b) * across)).clamp(0.0, 1.0)
            grid[i, j] = float(margin(m.setup.ask(point), y).double().mean())
    rise = margin(m.setup.ask(_moved(x, gradient, m.setup.threat)), y)
    others = [margin(m.setup.ask(_moved(x, _random_direction(x, stream, k), m.setup.threat)), y) for k in range(1, 6)]
    uphill = float((rise > torch.stack(others).amax(0)).double().mean())
    return grid, uphill, dead


def _gradient(m: Measurement, x: Tensor, y: Tensor) -> Tensor:
    """Of the cross-entropy; zero where no gradient reaches the pixels."""
    try:
        parts = zip(x.split(m.setup.engine.slots), y.split(m.setup.engine.slots), strict=True)
        return torch.cat([input_gradient(partial(_loss, m.setup.model, b), a) for a, b in parts])
    except RuntimeError:
        return torch.zeros_like(x)


def _loss(model: Model, y: Tensor, z: Tensor) -> Tensor:
    return cross_entropy(model(z), y)
