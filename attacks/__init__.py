"""Craft adversarial examples against any callable from pixels `[B, 3, H, W]` in [0, 1] to logits `[B, C]`."""

from darht.attacks.fgsm import FGSM
from darht.attacks.pgd import PGD
from darht.attacks.threat import Threat

ATTACKS: dict[str, type[PGD] | type[FGSM]] = {"pgd": PGD, "fgsm": FGSM}
"""The attacks that a spec can name, by `kind`."""

__all__ = ["ATTACKS", "FGSM", "PGD", "Threat"]
