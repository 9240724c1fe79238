"""A stronger evaluation of the same model is not written over."""

import json

import pytest

from darht.attacks import Threat
from darht.core.errors import ConfigError
from darht.trainer.evaluation.report.overwrite_guard import check_overwrite

BALL = Threat(eps=8)


@pytest.fixture
def path(tmp_path):
    record = {
        "model": {"weights": "abc"},
        "tier": "standard",
        "data": {"rows": 1000},
        "threat": {"norm": "linf", "eps": 8.0},
    }
    (tmp_path / "eval.json").write_text(json.dumps(record))
    return tmp_path / "eval.json"


@pytest.mark.parametrize(
    ("tier", "rows", "ball", "what"),
    [
        ("quick", 1000, BALL, "a stronger evaluation"),
        ("quick", 100, BALL, "a stronger evaluation"),
        ("standard", 999, BALL, "a stronger evaluation"),
        ("standard", 1000, Threat(eps=4), "an evaluation in another ball"),
        ("full", 10_000, Threat(eps=8, norm="l2"), "an evaluation in another ball"),
    ],
)
def test_a_weaker_one_is_refused(path, tier, rows, ball, what):
    with pytest.raises(ConfigError) as caught:
        check_overwrite(path, "abc", tier=tier, rows=rows, ball=ball)
    named = {"linf": "L-inf", "l2": "L2"}[ball.norm]
    assert str(caught.value) == (
        f"{path} holds {what} (standard, 1,000 images, L-inf 8/255) than this one "
        f"({tier}, {rows:,} images, {named} {ball.eps:g}/255): give --out DIR, or remove it"
    )


@pytest.mark.parametrize(
    ("tier", "rows"), [("standard", 1000), ("standard", 2000), ("full", 1000), ("full", 10), ("quick", 2000)]
)
def test_an_equal_or_other_one_goes_on(path, tier, rows):
    check_overwrite(path, "abc", tier=tier, rows=rows, ball=BALL)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"model": 3}', '{"model": {"weights": "abc"}, "tier": []}'])
def test_what_cannot_be_read_does_not_matter(path, text):
    path.write_text(text)
    check_overwrite(path, "abc", tier="quick", rows=1, ball=Threat(eps=1))


def test_another_model_and_an_empty_folder_do_not_matter(path):
    check_overwrite(path, "other", tier="quick", rows=1, ball=Threat(eps=1))
    check_overwrite(path.with_name("eval-last.json"), "abc", tier="quick", rows=1, ball=Threat(eps=1))
