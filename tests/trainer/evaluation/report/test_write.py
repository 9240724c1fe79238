"""What is written: figures that agree with each other, nothing unescaped, and a page that looks right."""

import dataclasses
import html.parser
import json
import re

import numpy as np
import pytest
import torch
from tests import browser

from darht.attacks import AutoAttack
from darht.cache.sources.load import content_sha256
from darht.core.stats import wilson
from darht.trainer.evaluation import load as subject
from darht.trainer.evaluation.config import EvalConfig
from darht.trainer.evaluation.report import charts
from darht.trainer.evaluation.report.write import describe
from darht.trainer.evaluation.run import evaluate

CPU = torch.device("cpu")
NASTY = '<script>alert("x")</script>'


@pytest.fixture(scope="module")
def report(sound, digits, tmp_path_factory):
    """A standard evaluation with corruptions, of a class with a nasty name."""
    classes = ("a very long name of a class", NASTY, "W" * 20, "aquarium_fish", *digits.classes[4:])
    source = dataclasses.replace(
        digits, images=digits.images[:60], labels=digits.labels[:60], classes=classes,
        sha256=content_sha256(digits.images[:60], digits.labels[:60], classes),
    )  # fmt: skip
    config = EvalConfig(tier="standard", data="digits", eps=16, corruptions=True, queries=(20, 100),
                        autoattack=AutoAttack(steps=5, queries=20))  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subject, "load_source", lambda *args, **kwargs: source)
        return evaluate("python:frauds:honest", config, out=tmp_path_factory.mktemp("report"), device=CPU)


def test_the_figures_agree(report):
    record = json.loads(report.path.read_text())
    scores = {score["name"]: score for score in record["scores"]}
    worst = scores["worst case"]
    assert {**record["robust_accuracy"], "in_words": worst["in_words"]} == worst
    assert record["clean_robust_mean"] == pytest.approx((scores["clean"]["accuracy"] + worst["accuracy"]) / 2, abs=1e-3)
    assert sum(row["robust"] for row in record["per_class"]) == worst["correct"]
    assert sum(row["clean"] for row in record["per_class"]) == scores["clean"]["correct"]
    matrix = np.array(record["confusion"]["matrix"])
    assert matrix.sum() == 60
    held = np.load(report.path.with_suffix(".npz"))
    assert np.trace(matrix) == (held["clean"] == held["adversarial"]).sum()
    for score in record["scores"][1:]:
        assert {"eps", "norm", "seed"} <= set(score["attack"])
        low, high = score["interval95"]
        assert low <= score["accuracy"] <= high and score["on"]


def test_the_markdown_begins_with_the_worst_case(report):
    text = report.path.with_suffix(".md").read_text()
    worst = report.scores[-1]
    assert text.startswith("# python:frauds:honest\n\nRobust accuracy")
    assert f"**{worst.accuracy:.1f} %**" in text.splitlines()[2]
    assert "the worst case per image over everything that ran, on 60 test images" in text
    for score in report.scores:
        assert f"| {score.name} |" in text
    assert "| jpeg |" in text and "Gradient masking" in text


class Links(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.targets, self.ids, self.outside = [], set(), []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids.add(found.get("id"))
        for name in ("href", "src"):
            value = found.get(name)
            if value and value.startswith("#"):
                self.targets.append(value[1:])
            elif value and not value.startswith("data:"):
                self.outside.append(value)


def test_the_page_stands_alone_and_its_links_work(report):
    text = report.page.read_text()
    links = Links()
    links.feed(text)
    assert links.outside == []
    assert {"attacks", "masking", "classes", "calibration", "corruptions", "gallery"} == set(links.targets)
    assert set(links.targets) <= links.ids
    assert NASTY not in text and "&lt;script&gt;" in text
    assert "http-equiv" not in text and "@import" not in text


LETTERS = """[...document.querySelectorAll('svg')].flatMap((svg, k) => {
  const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
  return [...svg.querySelectorAll('text')].map(e => {
    const b = e.getBoundingClientRect(), size = parseFloat(getComputedStyle(e).fontSize) * scale;
    return [size, k, e.hasAttribute('transform'), b.left, b.right, b.top, b.bottom, e.textContent]
  })})"""  # size on the screen, chart, whether it is turned, where it stands, what it says
OUTSIDE = """[...document.querySelectorAll('svg text')].filter(e => {
  const text = e.getBoundingClientRect(), chart = e.ownerSVGElement.getBoundingClientRect();
  return text.left < chart.left - 1 || text.right > chart.right + 1 || text.bottom > chart.bottom + 2
}).map(e => e.textContent)"""


def overlapping(letters):
    """Pairs of level texts of one chart whose boxes share more than an edge; a line box is taller than its letters."""
    level = [one for one in letters if not one[2]]
    return [
        (a[7], b[7])
        for k, a in enumerate(level)
        for b in level[:k]
        if a[1] == b[1]
        and min(a[4], b[4]) - max(a[3], b[3]) > 1
        and min(a[6], b[6]) - max(a[5], b[5]) > 0.35 * (a[6] - a[5])
    ]


@pytest.mark.parametrize("width", [1400, 400])
def test_the_page_in_a_browser(report, tmp_path, width):
    browser.require()
    assert browser.screenshot(report.page, width, tmp_path / "page.png") == []
    with browser.opened(report.page, width) as page:
        assert page.evaluate("document.querySelectorAll('svg').length") == 5
        assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert page.evaluate("document.querySelectorAll('.card').length") == 12
        sizes = "[...document.querySelectorAll('td, p, th')].map(e => parseFloat(getComputedStyle(e).fontSize))"
        assert min(page.evaluate(sizes)) >= 12
        letters = page.evaluate(LETTERS)
        assert len(letters) > 50 and min(size for size, *_ in letters) >= 11
        assert overlapping(letters) == []
        assert page.evaluate(OUTSIDE) == []
        assert page.pdf().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("attack", "text"),
    [
        ({}, ""),
        ({"over": ["clean", "a", "b"], "eps": 8.0, "norm": "linf"},
         "per image, over everything that ran (2 attack steps)"),
        ({"norm": "linf", "eps": 8.0, "against": "it"}, "L-inf 8/255, on it"),
        ({"norm": "l2", "eps": 128.0, "step": 2.0, "steps": 20, "restarts": 5, "against": "it"},
         "L2 128/255, 20 steps of 2, 5 starts, on it"),
        ({"norm": "linf", "eps": 8.0, "queries": 50, "against": "it"}, "L-inf 8/255, 50 queries, on it"),
        ({"norm": "linf", "eps": 8.0, "version": "standard", "by": "darht", "for_dlr": "margin", "against": "it",
          "after": {"apgd-ce": 42, "square": 39}},
         "L-inf 8/255, version standard, by darht, the margin stands in for DLR, on it; left after apgd-ce 42, "
         "square 39"),
    ],
)  # fmt: skip
def test_an_attack_in_a_few_words(attack, text):
    assert describe(attack) == text


def test_intervals_stand_beside_every_share(report):
    record = json.loads(report.path.read_text())
    assert record["schema_version"] == 2
    for row in record["per_class"]:
        for key in ("clean", "robust"):
            want = [100 * end for end in wilson(row[key], row["count"])]
            assert row[f"{key}_interval95"] == pytest.approx(want, abs=1e-3)
    for point in record["masking"]["curve"]:
        low, high = point["interval95"]
        assert low <= 100 * point["correct"] / point["count"] <= high and high - low > 1
    table = record["corruptions"]
    assert table["images"] == 60
    for name, values in table["accuracy"].items():
        for value, ends in zip(values, table["interval95"][name], strict=True):
            assert ends == pytest.approx([100 * end for end in wilson(round(0.6 * value), 60)], abs=1e-3)


def test_it_is_said_on_which_images_checks_and_curve_are(report):
    images = report.record["masking"]["images"]
    words = f"on the first {images} images that are right when clean"
    assert words in report.path.with_suffix(".md").read_text()
    page = report.page.read_text()
    assert page.lower().count(words) == 2 and "All on the same" not in page
    assert f"over everything that ran ({len(report.scores[-1].attack['over']) - 1} attack steps)" in page


def luminance(rgb):
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_numbers_in_the_matrix_can_be_read(report):
    """The contrast of the ink with every cell, by day and by night."""
    css = report.page.read_text()
    themes = [dict(re.findall(r"--(\w+): #([0-9a-f]{6})", block)) for block in re.findall(r":root \{([^}]*)\}", css)]
    svg = charts.matrix([[1000, 900], [800, 600]], ["a", "b"]) + charts.matrix([[0, 1], [2, 1000]], ["a", "b"])
    opacities = {float(value) for value in re.findall(r'fill-opacity="([0-9.]+)"', svg)}
    assert len(themes) >= 2 and max(opacities) > 0.4 and "onfill" not in svg
    for theme in themes[:2]:
        ink, paper, good, accent = (
            np.array([int(theme[name][k : k + 2], 16) / 255 for k in (0, 2, 4)])
            for name in ("ink", "paper", "good", "accent")
        )
        for fill in (good, accent):
            for a in opacities:
                bright, dim = sorted((luminance(ink), luminance(a * fill + (1 - a) * paper)), reverse=True)
                assert (bright + 0.05) / (dim + 0.05) >= 4.5


def test_the_area_of_a_dot_is_its_images():
    svg = charts.reliability([(0.5, 0.5, 10), (0.9, 0.8, 90)])
    first, second = (float(r) for r in re.findall(r'dot see"[^>]* r="([0-9.]+)"', svg))
    assert (second / first) ** 2 == pytest.approx(9, rel=0.01)


def test_charts_of_nothing_and_of_one_point():
    assert charts.curve([], 8) == ""
    assert "circle" in charts.curve([(8, 50.0, 40.0, 60.0)], 8)
    assert "NaN" not in charts.surface([[1.0, 1.0], [1.0, 1.0]], 8)
