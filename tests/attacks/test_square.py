"""Square: on a linear model, whose nearest boundary is known, and its queries."""

import pytest
from tiny import LinearModel, Tiny, images, labelled, rng

from darht.attacks import Engine, Square


def test_it_finds_no_more_than_there_is_and_most_of_it():
    model, x = LinearModel(classes=2), 0.25 + images(40, side=6) / 2
    y = labelled(model, x)
    beatable = model.distance(x, y, "linf") < 8 / 255
    found = Engine().run(Square(eps=8, queries=300), model, x, y, generator=rng(40)).success
    assert 0 < int(beatable.sum()) < 40
    assert not bool((found & ~beatable).any())
    assert float(found[beatable].float().mean()) > 0.8


@pytest.mark.parametrize("rule", ["full", "first_hit"])
def test_no_row_asks_more_than_its_queries_and_none_needs_a_gradient(rule):
    model, x = Tiny(), images(30)
    found = Engine(rule=rule).run(Square(eps=3, queries=25), model, x, labelled(model, x), generator=rng(30))
    assert int(found.backwards.sum()) == 0
    assert int(found.forwards.max()) <= 25 + 3  # and one on the clean row, the start, the result
    assert 0 < int(found.success.sum()) < 30


def test_more_queries_fool_more_rows():
    model, x = Tiny(), images(60)
    y = labelled(model, x)
    few, many = (
        Engine().run(Square(eps=3, queries=count), model, x, y, generator=rng(60)).success.sum() for count in (5, 200)
    )
    assert 0 < int(few) < int(many)
