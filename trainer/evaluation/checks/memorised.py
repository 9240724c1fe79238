"""Whether the answers are about images like these, or about these very test images, looked up in a table.

A table of the test images answers rightly to everything near one of them, and no attack inside of the ball can show it.
It does not know the same image in paler colours.
"""

import numpy as np
import torch
from torch import Tensor

from darht.attacks.engine.query_model import NoGradientError
from darht.attacks.threat import LEVELS, Threat
from darht.core.rng import RowRng
from darht.trainer.evaluation.attacks.suite import pgd_20
from darht.trainer.evaluation.checks.verdict import Check, surely_above
from darht.trainer.evaluation.measure import Measurement

_LEVEL = 0.4  # of noise: less than what rounding to whole pixel levels changes
_TINY = 0.01  # of the sample whose answer such noise may change
_PALER = 0.75  # of the contrast, and of the radius
_LOST = 0.6  # of the images that withstand which may fall when paler; honest networks lost up to a half


def check_memorised(m: Measurement, rows: np.ndarray) -> tuple[Check, ...]:
    """Ask about images that nobody could tell from the sample, and about those that withstand, in paler colours.

    Args:
        m: the evaluation, after its white-box attacks.
        rows: positions of images that are right when clean; the sample.
    """
    if not len(rows):
        return ()
    alive = rows[m.alive[rows]]
    facts = {"rows": rows.tolist(), "alive": alive.tolist(), "seed": m.setup.seed,
             "ball": [m.setup.threat.eps, m.setup.threat.norm]}  # fmt: skip
    found = m.setup.ledger.get(
        "paler images", facts, lambda: {"wrong": np.array([_changed(m, rows), _fallen(m, alive)])}
    )
    tiny, lost = found["wrong"].tolist()
    return (
        Check("what cannot be seen changes nothing", not surely_above(tiny, len(rows), _TINY),
              f"noise of {_LEVEL} pixel levels changes at most {_TINY:.0%} of the sample's answers",
              {"changed": float(tiny), "of": float(len(rows))}),
        Check("robustness is not of these very images",
              2 * len(alive) < len(rows) or not surely_above(lost, len(alive), _LOST),
              f"where half of the sample withstands, at most {_LOST:.0%} of it fall at {_PALER:.0%} of contrast and "
              "radius",
              {"fallen": float(lost), "of": float(len(alive))}),
    )  # fmt: skip


def _stream(m: Measurement, rows: np.ndarray) -> RowRng:
    return RowRng.create(m.setup.seed, "paler images", rows=torch.from_numpy(rows).to(m.setup.device))


def _wrong(m: Measurement, x: Tensor, y: Tensor) -> int:
    return int((m.setup.ask(x).argmax(1) != y).sum())


def _changed(m: Measurement, rows: np.ndarray) -> int:
    x, y = m.setup.tensors(rows)
    signs = _stream(m, rows).integers(0, 1, tuple(x.shape[1:])).to(x) * 2 - 1
    with m.setup.drawing("what cannot be seen", rows):
        return _wrong(m, (x + _LEVEL / LEVELS * signs).clamp(0, 1), y)


def _fallen(m: Measurement, rows: np.ndarray) -> int:
    if not len(rows):
        return 0
    x, y = m.setup.tensors(rows)
    threat, pale = m.setup.threat, 0.5 + _PALER * (x - 0.5)
    radius = _PALER * threat.eps if threat.norm == "l2" else max(1, int(_PALER * threat.eps))
    attack = pgd_20(Threat(eps=radius, norm=threat.norm))
    with m.setup.drawing("paler images", rows):
        try:
            x_adv = m.setup.engine.run(attack, m.setup.model, pale, y, generator=_stream(m, rows)).x_adv
        except NoGradientError:
            x_adv = pale
        return _wrong(m, x_adv, y)
