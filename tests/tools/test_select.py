"""Sets of teachers: the planted best one is found, floors and warnings hold, and the search is exact or close to it."""

import tracemalloc
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import yaml
from planted import one_hot, write_cache

from darht.cache.read.reader import Cache, open_cache
from darht.core.errors import ConfigError
from darht.tools.predictions import read_predictions
from darht.tools.select import _costs, _greedy_sets, _resampled, rank_sets, spec_snippet
from darht.tools.transfer import stored_transfer

TEACHERS, ROWS, CLASSES = 12, 400, 4
BEST = (2, 5, 9)
NAMES = tuple(f"t{t:02d}" for t in range(TEACHERS))


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Examples of one teacher fool another in 30 % of rows, inside the planted set in 5 %; t00 is weak, t01 unclean."""
    generator = np.random.default_rng(0)
    labels = np.arange(ROWS) % CLASSES
    wrong = (labels + 1) % CLASSES
    logits: dict[str, dict[str, np.ndarray]] = {}
    for t, name in enumerate(NAMES):
        unclean = generator.random(ROWS) < (0.5 if t == 1 else 0.02)
        logits[name] = {"clean": one_hot(np.where(unclean, wrong, labels), CLASSES)}
        for s, source in enumerate(NAMES):
            rate = (0.9 if t == 0 else 0.4) if s == t else 0.05 if {s, t} <= set(BEST) else 0.3
            fooled = unclean | (generator.random(ROWS) < rate)
            sure = 0.5 if t == 3 else 6.0
            logits[name][f"pgd-{source}"] = one_hot(np.where(fooled, wrong, labels), CLASSES, sure)
    folder = write_cache(
        tmp_path_factory.mktemp("twelve") / "cache",
        images=np.zeros((ROWS, 3, 4, 4), dtype=np.uint8),
        labels=labels,
        deltas={name: np.zeros((ROWS, 3, 4, 4), dtype=np.int8) for name in NAMES},
        logits=logits,
        rows_per_shard=400,
    )
    return open_cache(folder)


def test_the_planted_set_is_first_by_a_wide_margin(twelve: Cache) -> None:
    ranking = rank_sets(twelve, 3)
    assert ranking.sets[0].names == tuple(NAMES[t] for t in BEST)
    assert ranking.exact and ranking.searched == 220
    low, high = ranking.sets[0].interval
    assert low < ranking.sets[0].transfer < high < ranking.sets[1].transfer
    assert ranking.sets[0].transfer == pytest.approx(0.05, abs=0.02)
    assert ranking.sets[0].worst >= ranking.sets[0].transfer
    costs = [one.transfer for one in ranking.sets]
    assert costs == sorted(costs) and len(costs) == 10


def test_rates_are_those_of_the_transfer_matrix(twelve: Cache) -> None:
    accuracy = stored_transfer(twelve).accuracy
    assert 100 * (1 - rank_sets(twelve, 2).rates) == pytest.approx(accuracy)


def test_greedy_search_with_exchange_finds_the_best_set_too(twelve: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("darht.tools.select.EXACT_TEACHERS", 5)
    ranking = rank_sets(twelve, 3)
    assert not ranking.exact and ranking.searched < 220
    assert ranking.sets[0].names == tuple(NAMES[t] for t in BEST)


def test_intervals_are_drawn_in_memory_of_a_few_resamples() -> None:
    T, N = 2, 20_000
    generator = np.random.default_rng(1)
    counts = generator.random((T, T, N)) < 0.8
    fooled = counts & (generator.random((T, T, N)) < 0.3)
    tracemalloc.start()
    rates = _resampled(counts, fooled)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150 * N
    weights = np.random.default_rng(0).multinomial(N, np.full(N, 1 / N), len(rates))
    expected = np.einsum("kn,stn->kst", weights, fooled) / np.einsum("kn,stn->kst", weights, counts)
    assert rates == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_greedy_sets_are_close_to_the_best_one(seed: int) -> None:
    rates = np.random.default_rng(seed).random((10, 10))
    allowed = np.arange(10)
    every = np.array(list(combinations(range(10), 4)))
    found = _greedy_sets(allowed, 4, rates, np.zeros(10), "transfer")
    assert _costs(found, rates).min() <= _costs(every, rates).min() * 1.1
    assert all(len(set(one)) == 4 for one in found.tolist())


def test_floors_refuse_teachers_with_the_reason(twelve: Cache) -> None:
    ranking = rank_sets(twelve, 3, min_clean=90, min_robust=20)
    assert set(ranking.refused) == {"t00", "t01"}
    assert "robust" in ranking.refused["t00"] and "below 20 %" in ranking.refused["t00"]
    assert "clean" in ranking.refused["t01"] and "below 90 %" in ranking.refused["t01"]
    with pytest.raises(ConfigError, match=r"--size must lie in 2\.\.10, .*t00: robust .* got 11"):
        rank_sets(twelve, 11, min_clean=90, min_robust=20)


def test_a_weak_teacher_in_the_set_is_warned_about(twelve: Cache) -> None:
    assert rank_sets(twelve, 3).warnings == ()
    ranking = rank_sets(twelve, TEACHERS)
    assert len(ranking.warnings) == 1
    assert ranking.warnings[0].startswith("t00 keeps ") and "below 20 %" in ranking.warnings[0]


def test_entropy_takes_the_least_certain(twelve: Cache) -> None:
    ranking = rank_sets(twelve, 2, by="entropy")
    assert "t03" in ranking.sets[0].names
    by_name = {one.name: one.entropy for one in ranking.candidates}
    p = np.exp([0.5, 0, 0, 0]) / np.exp([0.5, 0, 0, 0]).sum()
    assert by_name["t03"] == pytest.approx(float(-(p * np.log(p)).sum()), abs=1e-3)


def test_the_students_examples_decide_when_asked_to(twelve: Cache) -> None:
    measured = {name: (t, 100) for t, name in enumerate(NAMES)}
    ranking = rank_sets(twelve, 2, by="student", student=measured)
    assert ranking.sets[0].names == ("t10", "t11") and ranking.sets[0].student == pytest.approx(0.105)
    with pytest.raises(ConfigError, match="--by student needs the student"):
        rank_sets(twelve, 2, by="student")


def test_a_teacher_without_an_attack_cannot_be_taken_and_roles_are_kept(tmp_path: Path) -> None:
    labels = np.arange(8) % 2
    right = one_hot(labels, 2)
    kinds = {"clean": right, "pgd-a": right, "pgd-b": right}
    folder = write_cache(
        tmp_path / "c",
        images=np.zeros((8, 3, 4, 4), dtype=np.uint8),
        labels=labels,
        deltas={name: np.zeros((8, 3, 4, 4), dtype=np.int8) for name in "ab"},
        logits={"a": kinds, "b": kinds, "c": kinds},
        rows_per_shard=8,
        vanilla=("b",),
    )
    cache = open_cache(folder)
    ranking = rank_sets(cache, 2)
    assert ranking.refused == {"c": "no attack of the cache was crafted on it"}
    assert ranking.sets[0].names == ("a", "b")
    teachers = yaml.safe_load(spec_snippet(cache, ("a", "b")))["teachers"]
    assert teachers == {"a": {"path": "teachers/a"}, "b": {"path": "teachers/b", "role": "vanilla"}}


def test_the_snippet_is_a_spec_of_the_set(tiny_cache: Path) -> None:
    cache = open_cache(tiny_cache)
    snippet = yaml.safe_load(spec_snippet(cache, ("vit",)))
    assert set(snippet["teachers"]) == {"vit"} and set(snippet["attacks"]) == {"pgd-vit"}
    attack = snippet["attacks"]["pgd-vit"]
    assert (attack["teacher"], attack["views"], attack["eps"], attack["steps"]) == ("vit", 2, 32, 2)
    assert Path(snippet["teachers"]["vit"]["path"]).name == "vit"


def test_withstanding_an_own_attack_counts_all_of_its_examples(twelve: Cache) -> None:
    predictions = read_predictions(twelve)
    assert predictions.own("t05") == [predictions.attacks.index("pgd-t05")]
    t = predictions.teachers.index("t05")
    robust = 100 * (predictions.right_clean[t] & predictions.right[predictions.own("t05")[0], t]).mean()
    assert {one.name: one.robust for one in rank_sets(twelve, 2).candidates}["t05"] == pytest.approx(robust)
