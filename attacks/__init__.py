"""Craft adversarial examples against any callable from pixels `[B, 3, H, W]` in [0, 1] to logits `[B, C]`."""

from typing import Any

from darht.attacks.engine import Engine, Outcome
from darht.attacks.fgsm import FGSM
from darht.attacks.mim import MIM
from darht.attacks.pgd import PGD
from darht.attacks.threat import Threat, parse_eps

ATTACKS: dict[str, type[Any]] = {"pgd": PGD, "fgsm": FGSM, "mim": MIM}
"""The attacks against one model that a spec can name, by `kind`."""

__all__ = ["ATTACKS", "FGSM", "MIM", "PGD", "Engine", "Outcome", "Threat", "parse_eps"]
