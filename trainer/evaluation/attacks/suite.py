"""White-box attacks and transfer: what every evaluation begins with, and AutoAttack."""

import dataclasses
import importlib.util
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from darht.attacks import APGD, FGSM, PGD, Attack, AutoAttack
from darht.attacks.autoattack import on_survivors, reference, square_warning
from darht.attacks.engine.engine import FULL, Engine
from darht.attacks.objectives import Model, ObjectiveName
from darht.attacks.threat import Threat
from darht.core.config import to_plain
from darht.core.errors import ConfigError
from darht.core.rng import RowRng
from darht.core.tensors import hash_weights
from darht.trainer.evaluation.measure import AttackStep, Family, Measurement
from darht.trainer.evaluation.score import EVERYONE, Score

SELF = "the evaluated model"
AUTOATTACK = "autoattack"
_REFERENCE_TARGETS = 9  # of pyautoattack's targeted attacks, which fail where there are fewer


def logit_ratio(m: Measurement) -> ObjectiveName:
    """DLR, or the margin where there are too few classes for it."""
    return "dlr" if m.logits.shape[1] > 3 else "margin"


def for_dlr(m: Measurement) -> dict[str, str]:
    """What an attack that is named after DLR says of itself where the margin stands in for it."""
    return {} if logit_ratio(m) == "dlr" else {"for_dlr": logit_ratio(m)}


def step_of(threat: Threat, *, share: float = 4.0) -> float:
    """The usual step of PGD, a quarter of epsilon: in L-inf whole pixel levels, at least one."""
    return threat.eps / share if threat.norm == "l2" else float(max(1, round(threat.eps / share)))


def white_box(
    m: Measurement, name: str, attack: Attack, *, engine: Engine | None = None, family: Family = "white-box"
) -> AttackStep:
    """An attack on the evaluated model itself, by the engine."""
    used = engine or m.setup.engine

    def craft(x: Tensor, y: Tensor, generator: RowRng) -> Tensor:
        return used.run(attack, m.setup.model, x, y, generator=generator).x_adv

    about = {"kind": type(attack).__name__.lower(), **to_plain(attack), "against": SELF, "restarts": used.restarts}
    return AttackStep(name=name, family=family, craft=craft, about=about, threat=attack.threat)


def from_other(
    name: str, attack: Any, model: Model, label: str, family: Family = "transfer", *, engine: Engine = FULL
) -> AttackStep:
    """An attack with its whole budget on another model, whose examples the evaluated one is asked about."""

    def craft(x: Tensor, y: Tensor, generator: RowRng) -> Tensor:
        return engine.run(attack, model, x, y, generator=generator).x_adv

    about = {"kind": type(attack).__name__.lower(), **to_plain(attack), "against": label, "weights": weights_of(model)}
    return AttackStep(name=name, family=family, craft=craft, about=about, threat=attack.threat)


def weights_of(model: Model) -> str:
    """What tells another model of the same name apart: a hash of its weights and preprocessing, 16 digits."""
    assert isinstance(model, nn.Module)
    return hash_weights(model, getattr(getattr(model, "preprocess", None), "resize", None))[:16]


def pgd_20(threat: Threat) -> PGD:
    """PGD of 20 steps, what the quick tier asks and teachers are checked with."""
    return PGD(eps=threat.eps, norm=threat.norm, step=step_of(threat), steps=20)


def run_quick(m: Measurement, teachers: Mapping[str, Model]) -> None:
    """FGSM and PGD-20 on the model itself, and PGD-20 examples of every teacher, on every image that is right."""
    threat = m.setup.threat
    pgd = pgd_20(threat)
    steps = [white_box(m, "fgsm", FGSM(eps=threat.eps, norm=threat.norm)), white_box(m, "pgd-20", pgd)]
    used = m.setup.transfer_engine
    steps += [from_other(f"transfer:{name}", pgd, model, name, engine=used) for name, model in teachers.items()]
    for step in steps:
        m.ask(step, m.correct, on=EVERYONE)


def run_autoattack(m: Measurement, suite: AutoAttack) -> None:
    """AutoAttack on every image that is right when clean; each part on those that the parts before left.

    For a model that draws random numbers the parts are those of version `rand`; the model is then an expectation over
    draws already, so that they do not average again.
    """
    if m.setup.random:
        suite = dataclasses.replace(suite, version="rand")
    after: dict[str, int] = {}

    def ask(part: str, attack: Attack, left: Tensor) -> Tensor:
        once = dataclasses.replace(attack, eot=1) if m.setup.random and isinstance(attack, APGD) else attack
        step = dataclasses.replace(white_box(m, f"{AUTOATTACK}:{part}", once), stream=(AUTOATTACK, part))
        on = f"those that withstood {', '.join(after) or 'nothing yet'}"
        return torch.from_numpy(m.ask(step, left.numpy(), on=on, quiet=True))

    withstood = torch.from_numpy(m.correct)
    for part, left in on_survivors(suite.parts(m.logits.shape[1]), withstood, ask):
        withstood = left
        after[part] = len(left)
        if part == "square" and (text := square_warning(after, m.count)):
            m.warnings.append(text)
    about = {key: value for key, value in to_plain(suite).items() if key != "engine"}
    _suite_score(m, withstood.numpy(), {"kind": AUTOATTACK, **about, **for_dlr(m), "by": "darht", "after": after})


def check_reference(classes: int) -> None:
    """Say that the reference cannot run before anything has been measured.

    Raises:
        ConfigError: the package is not installed, or the data has fewer classes than its attacks aim at.
    """
    if importlib.util.find_spec("pyautoattack") is None:
        raise ConfigError("--reference needs the package pyautoattack: pip install 'darht[eval]'")
    if classes <= _REFERENCE_TARGETS:
        raise ConfigError(
            f"--reference aims at {_REFERENCE_TARGETS} wrong classes of each image and so needs at least "
            f"{_REFERENCE_TARGETS + 1}; the data has {classes}: leave it out, darht's own AutoAttack takes any number"
        )


def run_reference(m: Measurement, suite: AutoAttack) -> None:
    """The authors' own AutoAttack (package `pyautoattack`) on every image that is right when clean.

    A model that draws random numbers gets its version `rand`, which averages gradients over more draws of its own.

    Raises:
        ConfigError: the package is not installed.
    """
    if m.setup.random:
        suite = dataclasses.replace(suite, version="rand")

    def craft(x: Tensor, y: Tensor, generator: RowRng) -> Tensor:
        with torch.enable_grad():
            return reference(
                m.setup.model, x, y, eps=suite.eps, norm=suite.norm, version=suite.version, seed=m.setup.seed
            )

    about = {"kind": AUTOATTACK, "version": suite.version, "eps": suite.eps, "norm": suite.norm, "by": "pyautoattack"}
    step = AttackStep(name=f"{AUTOATTACK}:reference", family="white-box", craft=craft, about=about, threat=suite.threat)
    left = m.correct[m.ask(step, m.correct, on=EVERYONE, quiet=True)]
    _suite_score(m, left, about)


def _suite_score(m: Measurement, left: np.ndarray, about: dict[str, Any]) -> None:
    known = np.full(m.count, -1, dtype=np.int8)
    known[m.correct] = 0
    known[left] = 1
    m.right[AUTOATTACK] = known
    about = {**about, "against": SELF, "seed": m.setup.seed, "alive_after": int(m.alive.sum())}
    m.scores.append(Score(AUTOATTACK, len(left), m.count, about, "white-box"))
