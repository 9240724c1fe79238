"""Candidates are left out by default only where teachers are known to be right about them."""

from pathlib import Path

import numpy as np
import pytest
from planted import one_hot, write_cache

from darht.cache.read.reader import Cache, open_cache
from darht.cache.sources.load import Source
from darht.core.stats import wilson
from darht.tools.label_judgement import LabelJudgement, survey_rows

ROWS, TESTED, CLASSES = 400, 2000, 4
PLANTED = 40  # rows with wrong labels


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """One teacher that sees the true classes; the first rows have other labels."""
    generator = np.random.default_rng(0)
    truth = generator.integers(0, CLASSES, ROWS)
    labels = truth.copy()
    labels[:PLANTED] = (truth[:PLANTED] + 1) % CLASSES
    folder = write_cache(
        tmp_path_factory.mktemp("judged") / "cache",
        images=generator.integers(0, 256, (ROWS, 3, 8, 8), dtype=np.uint8),
        labels=labels,
        deltas={"a": np.zeros((ROWS, 3, 8, 8), dtype=np.int8)},
        logits={"a": {"clean": one_hot(truth, CLASSES), "pgd-a": one_hot(truth, CLASSES)}},
        rows_per_shard=400,
    )
    return open_cache(folder)


def asked(cache: Cache, mistakes: int) -> tuple[Source, dict[str, np.ndarray]]:
    """A test split, and a teacher that is sure of another class than the label's on some of its images."""
    generator = np.random.default_rng(1)
    labels = generator.integers(0, CLASSES, TESTED)
    said = labels.copy()
    said[:mistakes] = (labels[:mistakes] + 1) % CLASSES
    images = generator.integers(0, 256, (TESTED, 3, 8, 8), dtype=np.uint8)
    logits = {"a": one_hot(said, CLASSES).astype(np.float32)}
    return Source("npz", "test", images, labels, cache.spec.data.classes, ""), logits


@pytest.mark.parametrize(("mistakes", "trusted"), [(0, True), (5, True), (40, False), (200, False)])
def test_teachers_are_trusted_as_far_as_they_are_right_on_the_test_split(planted: Cache, mistakes: int, trusted: bool):
    source, logits = asked(planted, mistakes)
    found = survey_rows(planted, source, logits)
    assert {one.row for one in found.report.label_candidates} == set(range(PLANTED))
    judgement = found.judgement
    assert (judgement.candidates, judgement.doubted, judgement.tested) == (PLANTED, mistakes, TESTED)
    least = 1 - wilson(mistakes, TESTED)[1] * ROWS / PLANTED
    assert judgement.right == pytest.approx(max(0, least)) and judgement.trusted == trusted
    assert ("label-candidate" in judgement.kinds) == trusted and "duplicate" in judgement.kinds
    assert f"{mistakes} of {TESTED} test labels" in judgement.text


def test_nobody_is_trusted_without_a_test_split_or_a_teacher(planted: Cache):
    source, _ = asked(planted, 0)
    for test in (None, source):
        judgement = survey_rows(planted, test, {}).judgement
        assert not judgement.trusted and judgement.kinds == ("duplicate",) and "not known" in judgement.text


def test_no_candidates_are_nothing_to_trust():
    assert not LabelJudgement(candidates=0, rows=100, doubted=0, tested=1000).trusted


def test_too_few_rows_to_tell_duplicates(tmp_path: Path):
    labels = np.arange(24) % CLASSES
    few = open_cache(write_cache(
        tmp_path / "few", images=np.zeros((24, 3, 8, 8), np.uint8), labels=labels,
        deltas={"a": np.zeros((24, 3, 8, 8), dtype=np.int8)},
        logits={"a": {"clean": one_hot(labels, CLASSES), "pgd-a": one_hot(labels, CLASSES)}}, rows_per_shard=24,
    ))  # fmt: skip
    found = survey_rows(few, asked(few, 0)[0], {})
    assert found.report.duplicates is None
    assert found.notes == (
        "near-duplicates cannot be told: how alike different rows are takes 30 rows to say; there are 24",
    )
