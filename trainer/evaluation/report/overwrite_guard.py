"""What lies in a report's folder already: a stronger evaluation of the same model is not replaced by a weaker one."""

from pathlib import Path
from typing import Any

from darht.attacks.threat import Threat
from darht.core.errors import ConfigError, CorruptError
from darht.core.sealed import read_sealed
from darht.trainer.evaluation.score import NORMS

TIERS = ("quick", "standard", "full")  # each has what the one before has


def check_overwrite(path: Path, weights: str, *, tier: str, rows: int, ball: Threat) -> None:
    """Refuse to write over an evaluation of the same weights that says more, or that is in another ball.

    Args:
        path: of the `eval.json` that would be written.
        weights: the model's fingerprint.
        tier: of the evaluation to come.
        rows: how many images it takes.
        ball: what its attacks stay in.

    Raises:
        ConfigError: what is there has a higher tier and no fewer images, or more images and no lower tier, or another
            norm or radius.
    """
    held = _read(path, weights)
    if held is None:
        return
    their_tier, their_rows, theirs = held
    above, more = TIERS.index(their_tier) - TIERS.index(tier), their_rows - rows
    elsewhere = theirs != (ball.norm, ball.eps)
    if not elsewhere and not (above > 0 and more >= 0) and not (above >= 0 and more > 0):
        return
    what = "an evaluation in another ball" if elsewhere else "a stronger evaluation"
    there, here = _said(their_tier, their_rows, *theirs), _said(tier, rows, ball.norm, ball.eps)
    raise ConfigError(f"{path} holds {what} ({there}) than this one ({here}): give --out DIR, or remove it")


def _read(path: Path, weights: str) -> tuple[str, int, tuple[str, float]] | None:
    """Tier, images and ball; None where there is no evaluation of these weights that can be read."""
    try:
        record: Any = read_sealed(path, "").value
        if record["model"]["weights"] != weights or record["tier"] not in TIERS:
            return None
        norm, eps = record["threat"]["norm"], float(record["threat"]["eps"])
        return record["tier"], int(record["data"]["rows"]), (str(norm), eps)
    except (CorruptError, ValueError, KeyError, TypeError):
        return None


def _said(tier: str, rows: int, norm: str, eps: float) -> str:
    return f"{tier}, {rows:,} images, {NORMS.get(norm, norm)} {eps:g}/255"
