"""Whether teachers make sense, asked before a build begins: see `probe.py` for what is looked at."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from darht.cache.builder.build import spec_in
from darht.cache.builder.plan import Plan
from darht.cache.builder.probe import TeacherProbe, probe_teacher
from darht.cache.format.spec import CacheSpec
from darht.core.errors import ConfigError, ModelError
from darht.core.storage import Location, open_storage

_NO_GRADIENT = ("square",)  # kinds of attack that take none


def check_teachers(
    plan: Plan,
    out: Location,
    *,
    extending: bool = False,
    device: torch.device,
    allow: Collection[str] = (),
    on_line: Callable[[str], None] = lambda line: None,
) -> None:
    """Ask each teacher that a cache begins with some images, and stop where one makes no sense.

    A build that goes on asks nobody: its teachers were taken when it began.

    Args:
        plan: of the build.
        out: the cache's folder or URL.
        extending: whether the cache that lies there gets other teachers; those that it has are not asked.
        device: where to ask.
        allow: teachers to take as they are.
        on_line: told the figures of each teacher.

    Raises:
        ConfigError: `allow` names a teacher that is not there.
        ModelError: a teacher guesses, answers with probabilities or in another class order, has no gradient where one
            is needed, needs another normalisation, or answers by batch, history or chance.
    """
    check_allowed(allow, plan.spec.teachers)
    folder, known = open_storage(out), spec_in(out)
    if extending != (known is not None) or not (extending or folder.is_free()):
        return  # goes on, or whoever claims the folder says what is wrong with it
    old = {} if known is None else known.teachers
    probes = {}
    for name, teacher in plan.teachers.items():
        if old.get(name) != plan.spec.teachers[name]:
            asked = _attack_of(plan.spec, name) | {"size": plan.spec.views.size}
            try:
                probes[name] = probe_teacher(teacher, plan.source, **asked, device=device)
            except ModelError as error:
                raise ModelError(f"teacher '{name}': {error}") from error
            tell_probe(name, probes[name], on_line)
    refuse(probes, plan.spec.data.classes, allow)


def _attack_of(spec: CacheSpec, name: str) -> dict[str, Any]:
    """What of a cache is made from a teacher's gradient, or else what the others are attacked with."""
    own = [attack for attack in spec.attacks.values() if attack.teacher == name]
    gradient = name in spec.jacobians or any(attack.kind not in _NO_GRADIENT for attack in own)
    chosen = next(iter([*own, *spec.attacks.values()]), None)
    return {"attack": None if chosen is None else chosen.attack(), "gradient_needed": gradient}


def check_allowed(allow: Collection[str], teachers: Collection[str]) -> None:
    """Refuse names in `allow` that no teacher has.

    Raises:
        ConfigError: with the names that there are.
    """
    unknown = [f"'{name}'" for name in allow if name not in teachers]
    if unknown:
        raise ConfigError(f"--allow names a teacher; there is no {', '.join(unknown)}, only {', '.join(teachers)}")


def tell_probe(name: str, probe: TeacherProbe, on_line: Callable[[str], None]) -> None:
    """Say a teacher's figures, and what is suspicious but not refused."""
    on_line(f"{name}: {probe.line()}")
    if probe.warning:
        on_line(f"{name}: {probe.warning}")


def refuse(probes: Mapping[str, TeacherProbe], classes: tuple[str, ...], allow: Collection[str]) -> None:
    """Stop where a teacher that is not allowed makes no sense; `classes` are the names of the data's.

    Raises:
        ModelError: with all that is wrong, of all teachers.
    """
    wrong = {name: probe.problems(classes) for name, probe in probes.items() if name not in allow}
    texts = [f"teacher '{name}': {'; '.join(problems)}" for name, problems in wrong.items() if problems]
    if texts:
        names = " ".join(f"--allow {name}" for name, problems in wrong.items() if problems)
        raise ModelError(f"{'. '.join(texts)}. To take it as it is: {names} (allow= in Python)")
