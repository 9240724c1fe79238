"""Evaluations side by side: sorted, with a paired bootstrap, and only of the same images."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests import browser

from darht.core.errors import CacheError, ConfigError
from darht.core.sealed import read_sealed, write_sealed
from darht.core.stats import wilson
from darht.trainer.evaluation.attacks.adaptive import ALIVE
from darht.trainer.evaluation.report.compare import compare_runs, paired_bootstrap
from darht.trainer.evaluation.score import EVERYONE, SCHEMA_VERSION


def written(folder, name, alive, *, passed=True, eps=8.0, sha="a", over=("clean", "pgd-20"), more=()):
    alive = np.asarray(alive, dtype=bool)
    low, high = wilson(int(alive.sum()), len(alive))
    record = {
        "schema_version": SCHEMA_VERSION,
        "model": {"name": name},
        "data": {"source": "digits", "split": "test", "rows": len(alive), "sha256": sha},
        "threat": {"norm": "linf", "eps": eps},
        "scores": [
            {"name": "clean", "accuracy": 90.0, "on": EVERYONE},
            {"name": "pgd-20", "accuracy": 60.0, "on": EVERYONE},
            *({"name": each, "accuracy": 61.5, "on": EVERYONE} for each in more),
            {"name": "adaptive:z, ce", "accuracy": 99.0, "on": ALIVE},
            {"name": "check:noise", "accuracy": 80.0, "on": "the sample of 100 images"},
            {"name": "worst case", "accuracy": 100 * alive.mean(), "on": EVERYONE},
        ],
        "robust_accuracy": {"interval95": [100 * low, 100 * high], "attack": {"over": list(over)}},
        "masking": {"passed": passed},
        "per_image": "eval.npz",
    }
    folder.mkdir()
    (folder / "eval.json").write_text(json.dumps(record))
    np.savez(
        folder / "eval.npz",
        attacks=np.array(["clean", "worst case"]),
        right=np.stack([np.ones(len(alive)), alive]).astype(np.int8),
    )
    return folder


@pytest.fixture
def three(tmp_path):
    rng = np.random.default_rng(0)
    base = rng.random(400) < 0.5
    better = base | (rng.random(400) < 0.1)
    same = base.copy()
    same[:4] = ~same[:4]
    return [
        written(tmp_path / name, name, alive) for name, alive in (("base", base), ("better", better), ("same", same))
    ]


def test_the_most_robust_comes_first_and_differences_have_a_significance(three):
    result = compare_runs(three)
    assert result.rows[0].name == "better"
    assert (result.rows[0].behind, result.rows[0].p) == (0.0, 1.0)
    accuracies = [row.accuracies["worst case"] for row in result.rows]
    assert accuracies == sorted(accuracies, reverse=True)
    for row in result.rows[1:]:
        assert row.behind == pytest.approx(accuracies[0] - row.accuracies["worst case"])
        assert row.behind_interval[0] < row.behind < row.behind_interval[1]
        assert row.p < 0.01
    assert result.shared == ("pgd-20",)  # what only the survivors or a sample were asked about cannot be compared
    assert result.cells()[0][:2] == ["better", "90.0"] and result.cells()[0][3:] == ["", "", "60.0"]
    assert compare_runs(three) == result


def test_files_may_be_named_and_paths_tell_equal_names_apart(three, tmp_path):
    twin = written(tmp_path / "twin", "base", [True] * 400)
    result = compare_runs([three[0] / "eval.json", twin])
    assert {row.name for row in result.rows} == {str(three[0] / "eval.json"), str(twin)}


@pytest.mark.parametrize(("change", "part"), [({"eps": 4.0}, "differ in threat"), ({"sha": "b"}, "differ in data")])
def test_only_the_same_images_in_the_same_ball(three, tmp_path, change, part):
    with pytest.raises(ConfigError, match=part):
        compare_runs([three[0], written(tmp_path / "other", "other", [True] * 400, **change)])


def test_masking_and_other_attacks_are_told(three, tmp_path):
    fraud = written(tmp_path / "fraud", "fraud", [True] * 400, passed=False, over=("clean", "pgd-20", "square"))
    result = compare_runs([three[0], fraud])
    assert "(masking!)" in result.cells()[0][2]
    assert "Not all ran the same attacks" in result.note


def test_what_is_no_evaluation(three, tmp_path):
    with pytest.raises(ConfigError, match="at least two evaluations; got 1"):
        compare_runs(three[:1])
    with pytest.raises(CacheError, match="is not an evaluation of this version"):
        compare_runs([three[0], tmp_path / "nothing"])


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"schema_version": 1}'])
def test_a_damaged_record_is_one_line(three, text):
    (three[1] / "eval.json").write_text(text)
    with pytest.raises(CacheError, match="is not an evaluation of this version") as caught:
        compare_runs(three)
    assert "\n" not in str(caught.value)


def test_a_record_of_another_schema_is_refused_though_it_reads(three):
    path = three[1] / "eval.json"
    write_sealed(path, {**read_sealed(path, "").value, "schema_version": 99})
    with pytest.raises(CacheError, match=rf"its schema is 99, this is {SCHEMA_VERSION}"):
        compare_runs(three)


def cut(data):
    return data[: len(data) // 2]


def flipped(data):
    """One byte of the first array's header."""
    at = data.index(b"NUMPY") + 30
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def unknown_method(data):
    at = data.rindex(b"PK\x01\x02") + 10
    return data[:at] + b"\x63" + data[at + 1 :]


def encrypted(data):
    at = data.rindex(b"PK\x01\x02") + 8
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("damage", [cut, flipped, unknown_method, encrypted, lambda data: b""])
def test_damaged_images_are_one_line(three, damage):
    path = three[1] / "eval.npz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CacheError, match="is not an evaluation of this version") as caught:
        compare_runs(three)
    assert "\n" not in str(caught.value)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_the_bootstrap_keeps_its_bounds(pairs):
    first, second = (np.array(side) for side in zip(*pairs, strict=True))
    behind, (low, high), p = paired_bootstrap(first, second, resamples=500)
    assert behind == pytest.approx(100 * (first.mean() - second.mean()))
    assert low <= high and low >= -100 and high <= 100
    assert 1 / 500 <= p <= 1
    assert paired_bootstrap(second, first, resamples=500)[0] == pytest.approx(-behind)


def test_pairing_sees_what_two_intervals_do_not():
    rng = np.random.default_rng(1)
    first = rng.random(1000) < 0.5
    second = first.copy()
    second[np.flatnonzero(first)[:15]] = False
    _, (low, _), p = paired_bootstrap(first, second)
    assert low > 0 and p < 0.001
    a, b = (wilson(int(x.sum()), 1000) for x in (first, second))
    assert a[0] < b[1]  # the unpaired intervals overlap


@pytest.mark.parametrize("width", [1400, 400])
def test_the_page_in_a_browser(three, tmp_path, width):
    browser.require()
    paths = compare_runs(three).save(tmp_path / "out")
    assert [path.name for path in paths] == ["compare.json", "compare.md", "compare.html"]
    assert browser.screenshot(paths[2], width, tmp_path / "out.png") == []


@pytest.mark.parametrize("width", [1400, 400])
def test_a_page_with_many_shared_attacks_fits(tmp_path, width):
    browser.require()
    more = [f"transfer:a teacher of a long name {k}" for k in range(20)]
    runs = [written(tmp_path / name, name, [True] * 50 + [name == "a"] * 50, more=more) for name in ("a", "b")]
    page = compare_runs(runs).save(tmp_path / "out")[2]
    assert page.read_text().count("a teacher of a long name 19") >= 2
    assert browser.screenshot(page, width, tmp_path / "out.png") == []
