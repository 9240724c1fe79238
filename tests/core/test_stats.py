"""Wilson's interval."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darht.core.stats import beyond_chance, wilson


def test_against_published_values():
    # Newcombe 1998, table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_nothing_counted():
    assert wilson(0, 0) == (0.0, 1.0)


@given(st.integers(1, 10**6).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
def test_the_interval_holds_the_share_and_is_symmetric(pair):
    successes, count = pair
    low, high = wilson(successes, count)
    assert 0 <= low <= successes / count + 1e-12 and successes / count - 1e-12 <= high <= 1
    assert wilson(count - successes, count) == pytest.approx((1 - high, 1 - low), abs=1e-9)


@given(st.integers(1, 1000))
def test_more_counts_make_it_narrower(count):
    few, many = wilson(count, 2 * count), wilson(4 * count, 8 * count)
    assert many[1] - many[0] < few[1] - few[0]


def test_what_guessing_seldom_reaches():
    from scipy.stats import binom

    for count, share in ((256, 0.1), (256, 0.01), (256, 0.001), (40, 0.5), (12, 0.1)):
        k = beyond_chance(count, share)
        assert binom.sf(k - 1, count, share) < 1e-3 <= binom.sf(k - 2, count, share)
    assert beyond_chance(2, 0.5) == 3  # two of two are no surprise
