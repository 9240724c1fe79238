"""What is written: figures that agree with each other, nothing unescaped, and a page that looks right."""

import dataclasses
import html.parser
import json

import numpy as np
import pytest
import torch
from tests import browser

from darht.attacks import AutoAttack
from darht.cache.source import content_sha256
from darht.trainer.evaluation import charts, subject
from darht.trainer.evaluation.config import EvalConfig
from darht.trainer.evaluation.report import describe
from darht.trainer.evaluation.run import evaluate

CPU = torch.device("cpu")
NASTY = '<script>alert("x")</script>'


@pytest.fixture(scope="module")
def report(sound, digits, tmp_path_factory):
    """A standard evaluation with corruptions, of a class with a nasty name."""
    classes = ("a very long name of a class", NASTY, *digits.classes[2:])
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
        assert page.pdf().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("attack", "text"),
    [
        ({}, ""),
        ({"over": ["clean", "a", "b"], "eps": 8.0, "norm": "linf"}, "per image, over all 2 attacks and clean"),
        ({"norm": "linf", "eps": 8.0, "against": "it"}, "L-inf 8/255, on it"),
        ({"norm": "l2", "eps": 128.0, "step": 2.0, "steps": 20, "restarts": 5, "against": "it"},
         "L2 128/255, 20 steps of 2, 5 starts, on it"),
        ({"norm": "linf", "eps": 8.0, "queries": 50, "against": "it"}, "L-inf 8/255, 50 queries, on it"),
    ],
)  # fmt: skip
def test_an_attack_in_a_few_words(attack, text):
    assert describe(attack) == text


def test_charts_of_nothing_and_of_one_point():
    assert charts.curve([], 8) == ""
    assert "circle" in charts.curve([(8, 50.0, 40.0, 60.0)], 8)
    assert "NaN" not in charts.surface([[1.0, 1.0], [1.0, 1.0]], 8)
