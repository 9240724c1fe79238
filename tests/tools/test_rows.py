"""Odd rows: planted label errors and duplicates are found with precision above 0.9, and the list is usable."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from planted import one_hot, write_cache

from darht.cache.read.reader import Cache, open_cache
from darht.core.errors import ConfigError
from darht.tools.duplicates import find_duplicates
from darht.tools.rows import RowReport, draw, find_rows, write_rows

ROWS, CLASSES = 800, 5


def pictures(count: int, seed: int) -> np.ndarray:
    """Smooth colours with detail on top, as photographs have; uint8 `[n, 3, 16, 16]`."""
    generator = np.random.default_rng(seed)
    coarse = np.kron(generator.uniform(40, 215, (count, 3, 4, 4)), np.ones((1, 1, 4, 4)))
    return np.clip(coarse + generator.normal(0, 18, coarse.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def planted_rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cache, dict[str, set[int]]]:
    """Two noisy teachers; rows 0..39 have another label than the teachers see, 40..44 fool both by `pgd-a`, 45..49 are
    right under attack for `b` alone."""
    generator = np.random.default_rng(1)
    truth = generator.integers(0, CLASSES, ROWS)
    labels = truth.copy()
    labels[:40] = (truth[:40] + 1 + generator.integers(0, CLASSES - 1, 40)) % CLASSES
    logits = {}
    for name in "ab":
        noise = generator.normal(0, 1.2, (ROWS, CLASSES))
        clean = one_hot(truth, CLASSES, 4).astype(np.float32) + noise
        clean[40:50] = one_hot(truth[40:50], CLASSES, 9)
        logits[name] = {"clean": clean.astype(np.float16)}
        for attack in ("pgd-a", "pgd-b"):
            seen = labels.copy()
            if attack == "pgd-a":
                seen[40:45] = (labels[40:45] + 1) % CLASSES
            if name == "a":
                seen[45:50] = (labels[45:50] + 1) % CLASSES
            logits[name][attack] = one_hot(seen, CLASSES)
    folder = write_cache(
        tmp_path_factory.mktemp("rows") / "cache",
        images=pictures(ROWS, 2),
        labels=labels,
        deltas={name: np.zeros((ROWS, 3, 16, 16), dtype=np.int8) for name in "ab"},
        logits=logits,
        rows_per_shard=400,
    )
    return open_cache(folder), {"label-candidate": set(range(40)), "fooled-all": set(range(40, 45))}


@pytest.fixture(scope="module")
def report(planted_rows: tuple[Cache, dict[str, set[int]]]) -> RowReport:
    return find_rows(planted_rows[0])


def test_label_candidates_are_found_with_precision(
    report: RowReport, planted_rows: tuple[Cache, dict[str, set[int]]]
) -> None:
    found, planted = set(report.rows("label-candidate")), planted_rows[1]["label-candidate"]
    assert len(found & planted) / len(found) > 0.9
    assert len(found & planted) / len(planted) > 0.6
    margins = [one.margin for one in report.label_candidates]
    assert margins == sorted(margins, reverse=True) and min(margins) >= 0.5
    cache = planted_rows[0]
    answers = [cache.read(f"logits/{name}/clean")[:, 0].argmax(1) for name in "ab"]
    assert all(said[one.row] == one.suggested != one.label for one in report.label_candidates for said in answers)


def test_rows_that_one_example_turns_for_all_are_those_planted(
    report: RowReport, planted_rows: tuple[Cache, dict[str, set[int]]]
) -> None:
    assert set(report.rows("fooled-all")) == planted_rows[1]["fooled-all"]
    assert all(one.attacks == ("pgd-a",) for one in report.fooled_all)


def test_rows_that_one_teacher_alone_gets_right(
    report: RowReport, planted_rows: tuple[Cache, dict[str, set[int]]]
) -> None:
    cache = planted_rows[0]
    labels = cache.read("label")
    stands = {
        name: np.all([
            cache.read(f"logits/{name}/{kind}")[:, 0].argmax(1) == labels for kind in ("clean", "pgd-a", "pgd-b")
        ], axis=0)
        for name in "ab"
    }  # fmt: skip
    for one in report.only_one:
        assert stands[one.teacher][one.row] and not stands["ab".replace(one.teacher, "")][one.row]
    assert len(report.only_one) == (stands["a"] ^ stands["b"]).sum()
    assert {one.teacher for one in report.only_one if 45 <= one.row < 50} == {"b"}


def test_near_duplicates_are_found_with_precision(planted_rows: tuple[Cache, dict[str, set[int]]]) -> None:
    """Copies that are noisy, brighter, or mirrored; and as many strangers."""
    cache, generator = planted_rows[0], np.random.default_rng(3)
    sources = generator.choice(ROWS, 60, replace=False)
    copies = cache.read("image")[sources].astype(np.float64)
    copies[:20] += generator.normal(0, 8, copies[:20].shape)
    copies[20:40] = 0.8 * copies[20:40] + 30
    copies[40:] = copies[40:, ..., ::-1]
    test = np.concatenate([np.clip(copies, 0, 255).astype(np.uint8), pictures(300, 9)])
    pairs = find_duplicates(cache, test, {})
    right = [pair for pair in pairs if pair.test < 60 and pair.row == sources[pair.test]]
    assert len(right) / len(pairs) > 0.9
    assert len({pair.test for pair in right}) / 60 > 0.9
    assert all(pair.mirrored == (pair.test >= 40) for pair in right)
    assert all(np.isnan(pair.logits) for pair in pairs)


def test_logits_bring_candidates_and_their_cosine(planted_rows: tuple[Cache, dict[str, set[int]]]) -> None:
    cache = planted_rows[0]
    test = cache.read("image")[[7, 300]]
    logits = {name: cache.read(f"logits/{name}/clean")[[7, 300], 0].astype(np.float32) for name in "ab"}
    pairs = find_duplicates(cache, test, logits)
    assert {(pair.row, pair.test) for pair in pairs} == {(7, 0), (300, 1)}
    assert all(pair.logits == pytest.approx(1, abs=1e-4) and pair.pixels == pytest.approx(1) for pair in pairs)


def test_the_list_holds_what_was_asked_for(
    report: RowReport, planted_rows: tuple[Cache, dict[str, set[int]]], tmp_path: Path
) -> None:
    cache = planted_rows[0]
    rows = write_rows(cache, report, tmp_path / "rows.json", ("label-candidate", "fooled-all"))
    content = json.loads((tmp_path / "rows.json").read_text())
    assert content["cache_root_hash"] == cache.root_hash
    assert content["rows"] == rows.tolist() == sorted({*report.rows("label-candidate"), *report.rows("fooled-all")})
    assert content["found"]["duplicates"] is None and len(content["found"]["only-one"]) == len(report.only_one)
    assert len(write_rows(cache, report, tmp_path / "none.json", ())) == 0
    with pytest.raises(ConfigError, match=r"kinds of rows are .*; got mislabelled"):
        write_rows(cache, report, tmp_path / "no.json", ("mislabelled",))


def test_a_pair_without_logits_is_still_json(planted_rows: tuple[Cache, dict[str, set[int]]], tmp_path: Path) -> None:
    cache = planted_rows[0]
    test = cache.read("image")[:2]
    report = find_rows(cache, duplicates=tuple(find_duplicates(cache, test, {})))
    write_rows(cache, report, tmp_path / "rows.json", ("duplicate",))
    content = json.loads((tmp_path / "rows.json").read_text())
    assert content["rows"] == [0, 1] and content["found"]["duplicates"][0]["logits"] is None
    draw(cache, report, tmp_path / "rows.png", test)
    with Image.open(tmp_path / "rows.png") as sheet:
        assert sheet.size[1] > 500


def test_a_gallery_of_nothing_says_so(planted_rows: tuple[Cache, dict[str, set[int]]], tmp_path: Path) -> None:
    draw(
        planted_rows[0], RowReport(fooled_all=(), only_one=(), label_candidates=(), duplicates=None), tmp_path / "e.png"
    )
    assert (tmp_path / "e.png").is_file()


def test_a_margin_out_of_range_is_refused(planted_rows: tuple[Cache, dict[str, set[int]]]) -> None:
    with pytest.raises(ConfigError, match=r"\[0, 1\); got 1"):
        find_rows(planted_rows[0], margin=1.0)
