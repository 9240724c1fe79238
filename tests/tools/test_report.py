"""The report: complete, self-contained, right at two widths, and true to what was measured."""

import re
from dataclasses import replace
from pathlib import Path

import browser
import numpy as np
import pytest
import torch
from planted import one_hot, write_cache

from darht.cache.read.reader import Cache, open_cache
from darht.core.stats import wilson
from darht.tools import report as report_module
from darht.tools.gaas import Gaas
from darht.tools.index import Indexes, IndexSettings, build_indexes
from darht.tools.live import load_teachers
from darht.tools.predictions import read_predictions
from darht.tools.report import OUTCOMES, CacheReport, collect, hardest_rows, outcomes
from darht.tools.report_figures import class_figure
from darht.tools.report_page import CANDIDATES, draw, render, table
from darht.tools.rows import LoneRow
from darht.tools.vectors import cache_spaces

NAMES = ("bit", "res", "vit")
DIRECTIONS = Gaas(
    teachers=NAMES,
    rows=np.arange(5),
    dims=np.array([[4, 1, 0, 4, 16], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]),
    shared=np.ones((3, 3, 5), dtype=np.int64),
    eps=8.0,
)


@pytest.fixture(scope="module")
def lively(tmp_path_factory: pytest.TempPathFactory) -> CacheReport:
    """Three teachers who are right on most rows, and examples that fool the own teacher often and others at times."""
    generator, N, C = np.random.default_rng(0), 240, 4
    labels = np.arange(N) % C

    def answers(error: float) -> np.ndarray:
        wrong = generator.random(N) < error
        return one_hot(np.where(wrong, (labels + 1) % C, labels), C, 3.0)

    rates = {name: 0.05 + 0.1 * t for t, name in enumerate(NAMES)}
    logits = {
        name: {"clean": answers(rates[name]), **{f"pgd-{s}": answers(0.6 if s == name else 0.2) for s in NAMES}}
        for name in NAMES
    }
    folder = write_cache(
        tmp_path_factory.mktemp("lively") / "cache",
        images=generator.integers(20, 230, (N, 3, 8, 8), dtype=np.uint8),
        labels=labels,
        deltas={name: generator.integers(-8, 9, (N, 3, 8, 8)).astype(np.int8) for name in NAMES},
        logits=logits,
        rows_per_shard=80,
    )
    cache = open_cache(folder)
    indexes = build_indexes(cache, cache_spaces(cache), folder / "index", IndexSettings(dim=16))[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_module, "_umap", lambda vectors: None)  # it takes ten seconds where it is installed
        return replace(collect(cache, indexes, {}, k=4), gaas=DIRECTIONS)


@pytest.fixture(scope="module")
def page(lively: CacheReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render(lively))
    return path


def test_the_page_holds_everything_and_is_small_enough(page: Path, lively: CacheReport) -> None:
    text = page.read_text()
    assert len(text) < 15e6
    for part in ("transfer", "classes", "angles", "pca-attack", "pca-outcome", "sizes", "seconds"):
        assert f'id="{part}"' in text
    assert "bit can be fooled in 5.0 orthogonal directions at once" in text
    for word in (*NAMES, "pgd-bit", "pgd-vit", lively.cache.root_hash, "recall@10", "entropy"):
        assert word in text
    body = re.sub(r"<script>.*?</script>", "", text, flags=re.S)
    assert not re.findall(r'(?:src|href)="(?!data:)', body) and "http" not in body
    candidates = min(len(lively.rows.label_candidates), CANDIDATES)
    assert body.count("<img") == 3 * len(lively.hardest) + candidates and candidates > 0
    assert body.count("all teachers say") == candidates + 1 and "likely wrong" not in body


@pytest.mark.parametrize("width", [1400, 400])
def test_it_fits_its_window_and_complains_of_nothing(page: Path, tmp_path: Path, width: int) -> None:
    browser.require()
    assert browser.screenshot(page, width, tmp_path / "page.png") == []


def test_figures_are_drawn_hover_gives_numbers_and_tables_sort(page: Path) -> None:
    browser.require()
    with browser.opened(page, 1400) as tab:
        drawn = "[...document.querySelectorAll('.plot')].every(p => p.querySelector('.main-svg'))"
        assert tab.evaluate(drawn) is True
        assert tab.evaluate("document.querySelectorAll('.plot').length") == 7
        box = "document.querySelector('#transfer .nsewdrag').getBoundingClientRect()"
        tab.evaluate("document.querySelector('#transfer .nsewdrag').scrollIntoView()")
        x = tab.evaluate(f"{box}.left + {box}.width / 2")
        y = tab.evaluate(f"{box}.top + {box}.height / 2")
        hover = None
        for step in range(200):  # plotly waits a moment between the pointer and the label
            tab.send("Input.dispatchMouseEvent", type="mouseMoved", x=x + step % 2, y=y)
            hover = tab.evaluate("document.querySelector('#transfer .hovertext')?.textContent")
            if hover:
                break
        assert hover is not None
        assert re.search(r"[\d.]+ % still right \(95 %: [\d.]+ to [\d.]+\)", hover)
        clean = "document.querySelector('table').querySelectorAll('tbody tr td:nth-child(2)')"
        read = f"[...{clean}].map(td => Number(td.textContent))"
        tab.evaluate("document.querySelectorAll('table')[0].querySelectorAll('th button')[1].click()")
        down = tab.evaluate(read)
        tab.evaluate("document.querySelectorAll('table')[0].querySelectorAll('th button')[1].click()")
        up = tab.evaluate(read)
        assert down == sorted(down, reverse=True) and up == down[::-1] and len(set(up)) > 1
        assert tab.complaints == []


def test_hardest_rows_are_right_when_clean_and_fooled_most(planted: Cache, lively: CacheReport) -> None:
    assert hardest_rows(planted, read_predictions(planted)) == ()  # nothing there is ever fooled
    cache, predictions = lively.cache, read_predictions(lively.cache)
    for hard in lively.hardest:
        assert predictions.right_clean[:, hard.row].all()
        a = predictions.attacks.index(hard.attack)
        assert (~predictions.right[a, :, hard.row]).any()
        assert {name: top[0][0] for name, top in hard.top.items()} == {
            name: predictions.adversarial[a, t, hard.row] for t, name in enumerate(predictions.teachers)
        }
        assert all(p == sorted(p, reverse=True) for p in ([share for _, share in top] for top in hard.top.values()))
        moved = hard.image.astype(int) + cache.read(f"delta/{hard.attack}")[hard.row, 0].transpose(1, 2, 0)
        assert np.array_equal(moved, hard.adversarial)


def test_outcomes_by_hand(lively: CacheReport) -> None:
    predictions = read_predictions(lively.cache)
    found = outcomes(predictions, 0, np.arange(lively.cache.rows))
    for row, outcome in enumerate(found):
        fools = [predictions.right_clean[t, row] and not predictions.right[0, t, row] for t in range(3)]
        right = predictions.right_clean[0, row]
        expected = 0 if not right else 3 if fools[1] or fools[2] else 2 if fools[0] else 1
        assert outcome == expected, OUTCOMES[outcome]


def test_without_teachers_and_records_the_page_says_so(lively: CacheReport) -> None:
    arrays = tuple(replace(array, seconds=float("nan")) for array in lively.arrays)
    assert {outcome for plane in lively.maps for outcome in plane.outcome} == {0, 1, 2, 3}
    text = render(replace(lively, gaas=None, arrays=arrays, environment={}, hardest=()))
    assert "not counted: that needs every teacher; not at hand: bit, res, vit." in text and 'id="seconds"' not in text


def test_shares_are_of_the_rows_that_have_labels(blend: Path, tmp_path: Path) -> None:
    cache = open_cache(blend)
    indexes = build_indexes(cache, cache_spaces(cache), tmp_path / "index", IndexSettings(dim=16))[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_module, "_umap", lambda vectors: None)
        found = collect(cache, indexes, {}, k=4)
    one = replace(found.candidates[0], robust=50.0)
    text = render(
        replace(found, candidates=(one,), rows=replace(found.rows, only_one=(LoneRow(row=3, teacher="cnn"),) * 6))
    )
    assert f"{len(found.rows.fooled_all)} of 60 images with labels have one example" in text
    low, high = wilson(30, 60)
    assert f"{100 * low:.1f} - {100 * high:.1f}" in text
    alone = text[text.index("images that it alone gets right") :]
    assert re.findall(r"<td[^>]*>(.*?)</td>", alone, flags=re.S)[:3] == ["cnn", "6", "10.0"]


def test_a_second_map_is_drawn_where_umap_is_installed(lively: CacheReport) -> None:
    plane = lively.maps[0]
    both = replace(lively, maps=(plane, replace(plane, method="UMAP", held=float("nan"))))
    text = render(both)
    assert 'id="umap-attack"' in text and 'id="umap-outcome"' in text


def test_umap_gives_a_point_for_every_vector() -> None:
    pytest.importorskip("umap", reason="umap-learn is not installed")
    vectors = np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32)
    flat = report_module._umap(vectors)
    assert flat is not None and flat.shape == (40, 2) and np.isfinite(flat).all()


def test_directions_are_counted_where_every_teacher_is_there(tiny_cache: Path, tiny_indexes: Indexes) -> None:
    """Teachers who were never trained agree on next to nothing: the page must bear that too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_module, "_umap", lambda vectors: None)
        cache = open_cache(tiny_cache)
        teachers = dict(load_teachers(cache, {}, torch.device("cpu")).teachers)
        found = collect(cache, tiny_indexes, teachers, k=4, gaas_rows=2)
        none = collect(cache, tiny_indexes, teachers, k=4, gaas_rows=0)
        assert none.gaas is None and "not counted: none were asked for (--gaas 0)." in render(none)
        patch.setattr(report_module, "measure_gaas", lambda *_, **__: replace(DIRECTIONS, rows=np.arange(0)))
        assert "no row was drawn that all teachers answer rightly" in render(
            collect(cache, tiny_indexes, teachers, k=4, gaas_rows=2)
        )
    both = read_predictions(cache).right_clean.all(0).any()
    assert (found.gaas is not None) == both
    assert "effective rank" in render(found)


def test_too_many_classes_are_not_drawn(lively: CacheReport, monkeypatch: pytest.MonkeyPatch) -> None:
    assert class_figure(lively) is not None
    monkeypatch.setattr("darht.tools.report_figures._MOST_CELLS", 5)
    assert class_figure(lively) is None


def test_names_cannot_become_markup() -> None:
    part = table(["<b>"], [["<script>alert(1)</script>"], [("<i>", 1.0)]])
    text = draw("table.html", {"part": part})
    assert "<script>" not in text and "<i>" not in text and "&lt;b&gt;" in text
