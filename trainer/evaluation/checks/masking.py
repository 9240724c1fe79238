"""Signs that a model hides its gradients instead of being robust (Athalye et al. 2018; Carlini et al. 2019).

Each check is a figure, the rule that it is held against, and pass or fail. They run on a sample, all on the same
images, so that the figures can be compared; attacks in the evaluation's own ball count for the worst case as well.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from darht.attacks import FGSM, PGD, Engine, Square
from darht.attacks.objectives import Objective, cross_entropy, input_gradient, margin
from darht.attacks.threat import Norm, Threat
from darht.core.rng import RowRng
from darht.trainer.evaluation.attacks.suite import SELF, logit_ratio, step_of, white_box
from darht.trainer.evaluation.checks.calibration import interval
from darht.trainer.evaluation.checks.verdict import Check, surely_above, surely_below, verdict
from darht.trainer.evaluation.ledger import Arrays
from darht.trainer.evaluation.measure import AttackStep, Measurement

CURVE = (2, 4, 8, 12, 16, 32, 64)
_BEYOND = (128, 255)  # a curve must end where any image can become any other
_ZERO = 0.02  # of the sample that may be left where an attack can do almost anything
_ALONE = 0.01  # of the sample that a weaker kind of attack may fool alone
_MORE = 0.1  # of the sample that five times the steps, or restarts, may gain; undefended nets gained up to 6
_SATURATED = 0.05  # of the sample that the logit ratio may gain on cross-entropy
_DEAD = 0.02  # of the sample that may have no gradient
_NOISES = 20  # draws of noise for each image
_UPHILL = 0.75  # of the sample on which the margin's gradient must raise it more than a random direction
_WORDS = {"dlr": "DLR", "margin": "the margin, which stands in for DLR below 4 classes"}
_GRID, SURFACE_IMAGES = 9, 16


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
        """Whether no check condemns."""
        return all(check.status != "FAIL" for check in self.checks)

    @property
    def verdict(self) -> str:
        """All checks in a few words."""
        return verdict(self.checks)

    def record(self) -> dict[str, Any]:
        """As it stands in `eval.json`."""
        return {
            "passed": self.passed,
            "verdict": self.verdict,
            "images": self.count,
            "checks": [check.record() for check in self.checks],
            "curve": [self._point(eps, right) for eps, right in self.curve],
            "surface": [[round(float(value), 4) for value in row] for row in self.surface],
        }

    def _point(self, eps: float, right: int) -> dict[str, Any]:
        return {"eps": eps, "correct": right, "count": self.count, "interval95": interval(right, self.count)}


def curve_of(eps: float, norm: Norm) -> tuple[float, ...]:
    """The radii of the curve in pixel levels: 2 to 255, where any image can become any other; in L2 to 64 times eps.

    A curve that has come down ends at 64 where eps is at most 8, and at 16 times eps in L2.
    """
    if norm == "l2":
        return tuple(eps * share for share in (0.25, 0.5, 1.0, 1.5, 2.0, 4.0, 8.0, 16.0, 64.0))
    return tuple(float(e) for e in sorted({*CURVE, eps, *_BEYOND}))


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
    surface, uphill, dead = _surface(m, rows)
    random = Check(
        "the answer is not random", not m.setup.random or known_draws,
        "two answers to the same pixels agree, but for a student's own dropout, which is attacked in expectation",
        {"random": float(m.setup.random), **({} if m.setup.seeded else {"deaf to the seed": 1.0})},
    )  # fmt: skip
    checks = (*_falls(curve, len(rows)), *_compared(right, logit_ratio(m)), *_followed(uphill, dead, len(rows)), random)
    return Masking(checks, curve, len(rows), surface)


def _falls(curve: tuple[tuple[float, int], ...], count: int) -> tuple[Check, ...]:
    radius, left = curve[-1]
    return (
        Check("accuracy falls to 0 as epsilon grows", not surely_above(left, count, _ZERO),
              f"at most {_ZERO:.0%} are right at the largest radius", {"epsilon": radius, "right": float(left),
                                                                      "of": float(count)}),
    )  # fmt: skip


def _compared(right: dict[str, np.ndarray], ratio: str) -> tuple[Check, ...]:
    """What attacks that should be weaker fool, image by image, where those that should be stronger do not."""
    count = len(right["pgd"])
    of = {"of": float(count)}
    multi = right["pgd"] & right["ratio"]
    white = multi & right["fgsm"] & right["more steps"] & right["restarts"]
    steps, restarts, gained, fgsm, square, noise = (
        int((held & ~right[name]).sum())
        for held, name in (
            (right["pgd"], "more steps"), (right["pgd"], "restarts"), (right["pgd"], "ratio"), (multi, "fgsm"),
            (white, "square"), (white, "noise"),
        )
    )  # fmt: skip
    return (
        Check("more steps and restarts do not help much", not surely_above(max(steps, restarts), count, _MORE),
              f"100 steps or 5 restarts fool at most {_MORE:.0%} of the sample that 20 steps do not",
              {"only 100 steps": float(steps), "only 5 restarts": float(restarts), **of}, suspicion=True),
        Check("single-step is weaker than multi-step", not surely_above(fgsm, count, _ALONE),
              f"FGSM fools at most {_ALONE:.0%} of the sample that 20 steps do not", {"only fgsm": float(fgsm), **of},
              suspicion=True),
        Check("cross-entropy is no weaker than the logit ratio", not surely_above(gained, count, _SATURATED),
              f"PGD on {_WORDS[ratio]} fools at most {_SATURATED:.0%} of the sample that PGD on cross-entropy does "
              "not; soft targets break this as well, so it warns", {f"only {ratio}": float(gained), **of},
              condemns=False),
        Check("black-box is weaker than white-box", not surely_above(square, count, _ALONE),
              f"Square fools at most {_ALONE:.0%} of the sample that withstand all white-box attacks",
              {"only square": float(square), **of}),
        Check("noise is weaker than gradients", not surely_above(noise, count, _ALONE),
              f"{_NOISES} draws of noise fool at most {_ALONE:.0%} of the sample that withstand all white-box attacks",
              {"only noise": float(noise), **of}),
    )  # fmt: skip


def _followed(uphill: int, dead: int, count: int) -> tuple[Check, ...]:
    of = {"of": float(count)}
    return (
        Check("the gradient leads uphill", not surely_below(uphill, count, _UPHILL),
              f"a step along the margin's gradient raises the margin more than five random steps, on {_UPHILL:.0%} of "
              "the sample", {"uphill": float(uphill), **of}, suspicion=True),
        Check("there is a gradient", not surely_above(dead, count, _DEAD),
              f"the gradient of the cross-entropy or the margin is zero on at most {_DEAD:.0%} of the sample",
              {"zero gradients": float(dead), **of}),
    )  # fmt: skip


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
    """Images right at each radius. The farthest are asked about only where something is left before them."""
    curve: list[tuple[float, int]] = []
    threat = m.setup.threat
    for eps in curve_of(threat.eps, threat.norm):
        fallen = curve and curve[-1][0] >= (64 if threat.norm == "linf" else 16 * threat.eps)
        if fallen and threat.eps <= 8 and curve[-1][1] <= _ZERO * len(rows):
            break
        ball = Threat(eps=eps, norm=threat.norm)
        attack = PGD(eps=eps, norm=ball.norm, step=step_of(ball), steps=20)
        step = _renamed(white_box(m, f"pgd-20 at {eps:g}/255", attack, family="check"))
        curve.append((eps, int(m.ask(step, rows, on="", quiet=True).sum())))
    return tuple(curve)


def _surface(m: Measurement, rows: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Mean margins of the first images on the grid, and of how many of all the gradient leads uphill, and is zero."""
    facts = {"rows": rows.tolist(), "seed": m.setup.seed, "ball": [m.setup.threat.eps, m.setup.threat.norm]}

    def make() -> Arrays:
        with m.setup.drawing("surface", rows):
            grid, uphill, dead = _measured_surface(m, rows)
        return {"grid": grid, "counts": np.array([uphill, dead])}

    found = m.setup.ledger.get("surface", facts, make)
    uphill, dead = found["counts"].tolist()
    return found["grid"], uphill, dead


def _measured_surface(m: Measurement, rows: np.ndarray) -> tuple[np.ndarray, int, int]:
    x, y = m.setup.tensors(rows)
    stream = RowRng.create(m.setup.seed, "surface", rows=torch.from_numpy(rows).to(m.setup.device))
    gradient = _gradient(m, margin, x, y)
    none = torch.stack([part.flatten(1).abs().amax(1) for part in (gradient, _gradient(m, cross_entropy, x, y))]) == 0
    few = slice(SURFACE_IMAGES)
    grid = _grid(m, x[few], y[few], gradient[few], _random_direction(x[few], stream[torch.arange(len(x[few]))], 0))
    rise = margin(m.setup.ask(_moved(x, gradient, m.setup.threat)), y)
    others = [margin(m.setup.ask(_moved(x, _random_direction(x, stream, k), m.setup.threat)), y) for k in range(1, 6)]
    uphill = rise > torch.stack(others).amax(0)
    return grid, int(uphill.sum()), int(none.any(0).sum())


def _grid(m: Measurement, x: Tensor, y: Tensor, gradient: Tensor, aside: Tensor) -> np.ndarray:
    along, across = m.setup.threat.direction(gradient), m.setup.threat.direction(aside)
    ticks = np.linspace(-1, 1, _GRID)
    grid = np.zeros((_GRID, _GRID))
    for i, a in enumerate(ticks):
        for j, b in enumerate(ticks):
            point = (x + m.setup.threat.radius * (float(a) * along + float(b) * across)).clamp(0.0, 1.0)
            grid[i, j] = float(margin(m.setup.ask(point), y).double().mean())
    return grid


def _gradient(m: Measurement, objective: Objective, x: Tensor, y: Tensor) -> Tensor:
    """Zero where none reaches the pixels."""
    try:
        parts = zip(x.split(m.setup.engine.slots), y.split(m.setup.engine.slots), strict=True)
        return torch.cat([input_gradient(partial(_loss, m, objective, b), a) for a, b in parts])
    except RuntimeError:
        return torch.zeros_like(x)


def _loss(m: Measurement, objective: Objective, y: Tensor, z: Tensor) -> Tensor:
    return objective(m.setup.model(z), y)
