"""Craft adversarial examples against any callable from pixels `[B, 3, H, W]` in [0, 1] to logits `[B, C]`."""

from typing import Any

from darht.attacks.apgd import APGD, APGDT
from darht.attacks.autoattack import AutoAttack, Evaluation
from darht.attacks.cw import CW, CWLinf
from darht.attacks.engine.engine import Engine, Outcome
from darht.attacks.engine.state import Attack
from darht.attacks.fab import FABT
from darht.attacks.fgsm import FGSM
from darht.attacks.mim import MIM
from darht.attacks.pgd import PGD
from darht.attacks.saga import SAGA, SET_ATTACKS, AutoSAGA
from darht.attacks.square import Square
from darht.attacks.threat import Threat, parse_eps
from darht.attacks.validate import AttackWarning
from darht.core.rng import RowRng

ATTACKS: dict[str, type[Any]] = {
    "pgd": PGD,
    "fgsm": FGSM,
    "mim": MIM,
    "apgd": APGD,
    "apgd-t": APGDT,
    "fab-t": FABT,
    "cw": CW,
    "cw-linf": CWLinf,
    "square": Square,
}
"""The attacks against one model that a spec can name, by `kind`."""

__all__ = [
    "APGD",
    "APGDT",
    "ATTACKS",
    "CW",
    "FABT",
    "FGSM",
    "MIM",
    "PGD",
    "SAGA",
    "SET_ATTACKS",
    "Attack",
    "AttackWarning",
    "AutoAttack",
    "AutoSAGA",
    "CWLinf",
    "Engine",
    "Evaluation",
    "Outcome",
    "RowRng",
    "Square",
    "Threat",
    "parse_eps",
]
