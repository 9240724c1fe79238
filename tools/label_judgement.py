"""How far label candidates can be trusted, which decides whether they are left out of training by default."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from darht.cache.read.reader import Cache
from darht.cache.sources.load import Source
from darht.core.stats import wilson
from darht.tools.duplicates import find_duplicates, measure_null
from darht.tools.predictions import Ints, softmax
from darht.tools.rows import MARGIN, RowReport, class_confidence, find_doubts, find_rows, mean_probabilities
from darht.tools.vectors import Floats

TRUSTED = 0.9  # of ten candidates nine are wrong labels: a row that is lost costs less than a wrong label that stays


@dataclass(frozen=True, kw_only=True)
class LabelJudgement:
    """Whether candidates are wrong labels rather than teachers' mistakes, told from the test split.

    Teachers doubt labels of the test split by the same rule. Were all of these doubts mistakes, then as large a share
    of the cache's rows would be: what goes beyond that are wrong labels.

    Attributes:
        candidates: among the cache's rows.
        rows: N.
        doubted: test images whose label the teachers doubt.
        tested: test images.
    """

    candidates: int
    rows: int
    doubted: int
    tested: int

    @property
    def right(self) -> float:
        """The least share of candidates that are wrong labels: with the upper end of the test split's 95 % interval."""
        if not self.candidates or not self.tested:
            return 0.0
        mistakes = wilson(self.doubted, self.tested)[1] * self.rows
        return max(0.0, 1 - mistakes / self.candidates)

    @property
    def trusted(self) -> bool:
        """Whether the candidates may be left out of training unseen."""
        return self.right >= TRUSTED

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of rows that are left out where nobody says which."""
        return ("label-candidate", "duplicate") if self.trusted else ("duplicate",)

    @property
    def text(self) -> str:
        """A sentence on it; nothing where there are no candidates."""
        if not self.candidates:
            return ""
        if not self.tested:
            return "no test split was asked about, so how often the teachers are wrong is not known"
        return (f"the teachers doubt {self.doubted} of {self.tested} test labels in the same way, so at least "
                f"{100 * self.right:.0f} % of the {self.candidates} candidates are wrong labels "
                f"(at {100 * TRUSTED:.0f} % they are left out by default)")  # fmt: skip


def judge_labels(
    cache: Cache, report: RowReport, test_labels: Ints, logits: Mapping[str, Floats], *, margin: float = MARGIN
) -> LabelJudgement:
    """Say how many of the label candidates are more than the teachers' mistakes.

    Args:
        cache: whose teachers they are.
        report: of its rows, found with the same `margin`.
        test_labels: int `[M]`.
        logits: of the test images by teacher, `[M, C]`; without every teacher of the cache nothing is said.
        margin: as for `find_rows`.
    """
    found = {"candidates": len(report.label_candidates), "rows": cache.spec.data.labelled}
    if set(logits) != set(cache.spec.teachers):
        return LabelJudgement(**found, doubted=0, tested=0)
    p = np.mean([softmax(values) for values in logits.values()], axis=0)
    answers = np.stack([values.argmax(1) for values in logits.values()]).astype(np.int32)
    confidence = class_confidence(
        mean_probabilities(cache), cache.read("label", slice(0, cache.spec.data.labelled)).astype(np.int64)
    )
    best, _ = find_doubts(p, test_labels, confidence, answers, margin)
    return LabelJudgement(**found, doubted=int((best >= 0).sum()), tested=len(test_labels))


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What `survey_rows` finds: rows, how far their label candidates can be trusted, and why something is missing."""

    report: RowReport
    judgement: LabelJudgement
    notes: tuple[str, ...]


def survey_rows(cache: Cache, test: Source | None, logits: Mapping[str, Floats], *, margin: float = MARGIN) -> Survey:
    """Look through all rows, beside the test split where there is one.

    Args:
        cache: a sealed cache.
        test: its test split.
        logits: of the test images by teacher, `[M, C]`; of those teachers that are at hand.
        margin: as for `find_rows`.

    Raises:
        ConfigError: as for `find_rows`.
    """
    null = None if test is None else measure_null(cache)
    told = test is not None and null is not None and not null.refusal
    pairs = tuple(find_duplicates(cache, test.images, dict(logits), null)) if test is not None and told else None
    report = find_rows(cache, margin=margin, duplicates=pairs)
    labels = np.zeros(0, dtype=np.int64) if test is None else test.labels
    judgement = judge_labels(cache, report, labels, logits, margin=margin)
    refused = [f"near-duplicates cannot be told: {null.refusal}"] if null is not None and null.refusal else []
    return Survey(report=report, judgement=judgement, notes=(*(test.notes if test else ()), *refused))
