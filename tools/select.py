"""Which teachers to take: sets whose adversarial examples seldom transfer inside the set.

The main path is `rank_sets`: one table of what each teacher is worth alone, one of how often the examples of one fool
another, and a search over sets.
"""

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray

from darht.cache.read.reader import Cache
from darht.core.config import to_plain
from darht.core.errors import ConfigError
from darht.tools.predictions import Bools, Predictions, read_predictions, softmax
from darht.tools.vectors import blocks, need_attacks

Criterion = Literal["transfer", "student", "entropy"]
Doubles = NDArray[np.float64]

EXACT_TEACHERS = 20  # 184,756 sets of ten: a second; above, one teacher at a time
WEAK = 20.0  # per cent kept under the own attack; the released DARHT teacher ViT-B/32 kept 16.7 %
_RESAMPLES = 200  # of the rows, for the intervals
_TOGETHER = 8  # of them: 48 bytes a row, and the rows' outcomes are turned to numbers 25 times


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One teacher.

    Attributes:
        name: of the teacher.
        clean: accuracy on the clean images in per cent.
        robust: per cent of all rows right on every example crafted on it; NaN when the cache has none.
        kept: of the rows right when clean, those still right on every own example, in per cent.
        entropy: mean entropy of its answers to all stored adversarial examples, in nats.
        student: how often the student's examples fool it, as a share; NaN without a student.
    """

    name: str
    clean: float
    robust: float
    kept: float
    entropy: float
    student: float = float("nan")


@dataclass(frozen=True, kw_only=True)
class TeacherSet:
    """A set with its scores.

    Attributes:
        names: of the teachers.
        transfer: the mean over ordered pairs of how often the examples of one fool the other.
        interval: 95 % bootstrap interval of that, over rows.
        worst: the largest of the pairs.
        entropy: the mean of its teachers'.
        student: the mean of its teachers'.
    """

    names: tuple[str, ...]
    transfer: float
    interval: tuple[float, float]
    worst: float
    entropy: float
    student: float


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """What `rank_sets` finds.

    Attributes:
        candidates: every teacher of the cache.
        refused: why a teacher may not be taken, by name.
        rates: `[T, T]`, source by target: how often the source's examples fool the target, of the rows that both
            answer rightly when clean; the diagonal is white-box.
        sets: the best ones, best first.
        searched: how many sets were compared.
        exact: whether those were all of them.
        warnings: of teachers in the best set, in sentences.
    """

    candidates: tuple[Candidate, ...]
    refused: dict[str, str]
    rates: Doubles
    sets: tuple[TeacherSet, ...]
    searched: int
    exact: bool
    warnings: tuple[str, ...]


def candidates_of(cache: Cache, predictions: Predictions, student: dict[str, tuple[int, int]]) -> tuple[Candidate, ...]:
    """What each teacher of a cache is worth alone; `student` holds (fooled, rows) by name, or nothing."""
    found, clean = [], predictions.right_clean
    for t, name in enumerate(predictions.teachers):
        fooled, both = student.get(name, (0, 0))
        has_own = bool(predictions.own(name))
        stands = predictions.withstood(name)[t] & clean[t]
        found.append(
            Candidate(
                name=name,
                clean=100 * float(clean[t].mean()),
                robust=100 * float(stands.mean()) if has_own else float("nan"),
                kept=100 * float(stands.sum() / max(1, clean[t].sum())) if has_own else float("nan"),
                entropy=_entropy(cache, name),
                student=fooled / both if both else float("nan"),
            )
        )
    return tuple(found)


def _entropy(cache: Cache, teacher: str) -> float:
    total = count = 0.0
    for attack in cache.spec.attacks:
        for rows in blocks(cache, f"logits/{teacher}/{attack}"):
            p = softmax(cache.logits(teacher, attack, rows=rows))
            total += float(-(p * np.log(np.maximum(p, 1e-30))).sum(dtype=np.float64))
            count += len(p)
    return total / count


def fooling(predictions: Predictions) -> tuple[Bools, Bools]:
    """For every source and target, `[T, T, N]` each: the rows that count (both right when clean), and those fooled."""
    clean = predictions.right_clean
    counts = clean[:, None] & clean[None]
    withstood = np.stack([predictions.withstood(source) for source in predictions.teachers])
    return counts, counts & ~withstood


def rank_sets(
    cache: Cache,
    size: int,
    *,
    min_clean: float = 0.0,
    min_robust: float = 0.0,
    by: Criterion = "transfer",
    student: dict[str, tuple[int, int]] | None = None,
    most: int = 10,
) -> Ranking:
    """Rank sets of `size` teachers.

    Args:
        cache: a sealed cache.
        size: T of the set.
        min_clean: floor on clean accuracy, per cent.
        min_robust: floor on accuracy under the own attacks, per cent.
        by: `transfer` takes the least mutual transfer (Deng et al., arXiv 2402.15586); `student` the teachers that
            the student's examples fool most often (SAAD, arXiv 2512.10275); `entropy` those least certain of
            adversarial rows (after "Toward Understanding Adversarial Distillation", ICML 2026).
        student: from `student_transfer`.
        most: how many sets to return.

    Raises:
        ConfigError: the cache has no attacks, a size that cannot be had, or `student` without a student.
    """
    need_attacks(cache)
    if by == "student" and not student:
        raise ConfigError("--by student needs the student: give --student RUN, and teachers that can be loaded")
    candidates = candidates_of(cache, predictions := read_predictions(cache), student or {})
    refused = {c.name: why for c in candidates if (why := _refusal(c, min_clean, min_robust))}
    allowed = np.array([t for t, c in enumerate(candidates) if c.name not in refused], dtype=np.int64)
    _check_size(size, len(allowed), refused)
    counts, fooled = fooling(predictions)
    rates = _rates(counts.sum(2), fooled.sum(2))
    value = np.array([{"student": c.student, "entropy": c.entropy, "transfer": 0.0}[by] for c in candidates])
    exact = len(allowed) <= EXACT_TEACHERS
    sets = _all_sets(allowed, size) if exact else _greedy_sets(allowed, size, rates, value, by)
    costs = _costs(sets, rates) if by == "transfer" else -value[sets].mean(1)
    order, draws = np.argsort(costs, kind="stable")[:most], _resampled(counts, fooled)
    best = tuple(_described(tuple(sets[i].tolist()), candidates, rates, draws) for i in order)
    return Ranking(
        candidates=candidates,
        refused=refused,
        rates=rates,
        sets=best,
        searched=len(sets),
        exact=exact,
        warnings=_warnings(best[0], candidates),
    )


def _check_size(size: int, allowed: int, refused: dict[str, str]) -> None:
    if not 2 <= size <= allowed:
        said = "; ".join(f"{name}: {why}" for name, why in refused.items()) or "none is refused"
        raise ConfigError(f"--size must lie in 2..{allowed}, the teachers that may be taken ({said}); got {size}")


def _refusal(candidate: Candidate, min_clean: float, min_robust: float) -> str:
    if math.isnan(candidate.robust):
        return "no attack of the cache was crafted on it"
    if candidate.clean < min_clean:
        return f"clean {candidate.clean:.1f} % is below {min_clean:g} %"
    if candidate.robust < min_robust:
        return f"robust {candidate.robust:.1f} % is below {min_robust:g} %"
    return ""


def _rates(counts: np.ndarray, fooled: np.ndarray) -> Doubles:
    """Shares; where no row counts, 1: nothing speaks for such a pair."""
    return np.where(counts > 0, fooled / np.maximum(counts, 1), 1.0)


def _all_sets(allowed: np.ndarray, size: int) -> np.ndarray:
    return np.array(list(combinations(allowed.tolist(), size)), dtype=np.int64)


def _costs(sets: np.ndarray, rates: Doubles) -> Doubles:
    """Mean transfer over the ordered pairs of each set `[S, size]`."""
    size = sets.shape[1]
    total = np.zeros(len(sets))
    for i in range(size):
        for j in range(size):
            if i != j:
                total += rates[sets[:, i], sets[:, j]]
    mean: Doubles = total / (size * (size - 1))
    return mean


def _greedy_sets(allowed: np.ndarray, size: int, rates: Doubles, value: Doubles, by: Criterion) -> np.ndarray:
    """From every teacher as a start, add the one that costs least; then change single teachers while that helps."""
    if by != "transfer":
        return np.sort(allowed[np.argsort(-value[allowed], kind="stable")[:size]])[None]
    found = set()
    for first in allowed.tolist():
        chosen = [first]
        while len(chosen) < size:
            rest = [t for t in allowed.tolist() if t not in chosen]
            chosen.append(min(rest, key=lambda t: sum(rates[s, t] + rates[t, s] for s in chosen)))
        found.add(_improved(tuple(sorted(chosen)), allowed.tolist(), rates))
    return np.array(sorted(found), dtype=np.int64)


def _improved(chosen: tuple[int, ...], allowed: list[int], rates: Doubles) -> tuple[int, ...]:
    while True:
        others = [t for t in allowed if t not in chosen]
        swaps = [tuple(sorted({*chosen, new} - {old})) for old in chosen for new in others]
        costs = _costs(np.array([chosen, *swaps], dtype=np.int64), rates)
        if costs.argmin() == 0:
            return chosen
        chosen = swaps[int(costs.argmin()) - 1]


def _resampled(counts: Bools, fooled: Bools) -> Doubles:
    """The rates `[resamples, T, T]` under rows drawn with replacement, the same rows for all pairs."""
    T, N = counts.shape[0], counts.shape[2]
    generator, chances = np.random.default_rng(0), np.full(N, 1 / N)
    weights, out = np.empty((_TOGETHER, N), dtype=np.float32), np.empty((_RESAMPLES, T, T))
    for first in range(0, _RESAMPLES, _TOGETHER):
        for drawn in weights:
            drawn[:] = generator.multinomial(N, chances)
        for s in range(T):
            rates = _rates(weights @ counts[s].T.astype(np.float32), weights @ fooled[s].T.astype(np.float32))
            out[first : first + _TOGETHER, s] = rates
    return out


def _described(
    chosen: tuple[int, ...], candidates: tuple[Candidate, ...], rates: Doubles, draws: Doubles
) -> TeacherSet:
    one = np.array([chosen])
    spread = np.percentile([_costs(one, draw)[0] for draw in draws], [2.5, 97.5])
    return TeacherSet(
        names=tuple(candidates[t].name for t in chosen),
        transfer=float(_costs(one, rates)[0]),
        interval=(float(spread[0]), float(spread[1])),
        worst=max(float(rates[s, t]) for s in chosen for t in chosen if s != t),
        entropy=float(np.mean([candidates[t].entropy for t in chosen])),
        student=float(np.mean([candidates[t].student for t in chosen])),
    )


def _warnings(best: TeacherSet, candidates: tuple[Candidate, ...]) -> tuple[str, ...]:
    return tuple(
        f"{c.name} keeps {c.kept:.1f} % of its right answers under its own attack, below {WEAK:g} %: its low transfer "
        "may only say that it answers wrongly anyway"
        for c in candidates
        if c.name in best.names and c.kept < WEAK
    )


def spec_snippet(cache: Cache, names: tuple[str, ...]) -> str:
    """The `teachers` and `attacks` of a cache spec (YAML) for a set."""
    folders = cache.origin().get("teachers", {})
    teachers = {}
    for name in names:
        role = cache.spec.teachers[name].role  # robust where a spec says nothing
        teachers[name] = {"path": folders.get(name, f"teachers/{name}"), **({} if role == "robust" else {"role": role})}
    attacks: dict[str, Any] = {}
    for name, attack in cache.spec.attacks.items():
        if attack.teacher in names:
            views = {} if attack.views == 1 else {"views": attack.views}
            attacks[name] = {"kind": attack.kind, "teacher": attack.teacher, **views, **to_plain(attack.parameters)}
    text: str = yaml.safe_dump({"teachers": teachers, "attacks": attacks}, sort_keys=False, default_flow_style=None)
    return text
