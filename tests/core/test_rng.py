"""The counter-based generator: known answers, independence, and the shape of what it draws."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from darht.core.keys import derive_key, derive_seed
from darht.core.rng import RowRng, philox4x32

INDEX = st.integers(0, 2**32 - 1)
SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_the_known_answers_of_random123(counter, key, expected):
    words = tuple(torch.tensor([int(word, 16)]) for word in counter.split())
    k0, k1 = (int(word, 16) for word in key.split())
    assert " ".join(f"{int(word):08x}" for word in philox4x32(words, (k0, k1))) == expected


def test_keys_and_seeds_are_pinned():
    assert derive_key(0, "attack", "pgd") == (2056678650, 1390118838)
    assert derive_seed(0, "order", 3) == 7969273670047146399
    assert 0 <= derive_seed("x") < 2**63


def test_parts_do_not_run_together():
    assert len({derive_key("a", "bc"), derive_key("ab", "c"), derive_key("abc")}) == 3


def test_what_a_row_draws_is_pinned():
    rng = RowRng.create(7, "attack", "pgd", rows=torch.tensor([0, 49_999]), views=torch.tensor([0, 161]))
    assert rng.integers(-8, 8, (6,)).tolist() == [[-8, 8, 0, 8, -6, 6], [6, 0, 7, -7, 0, 5]]
    assert rng.words((2,), draw=1).tolist() == [[1907472223, 829913854], [1459869334, 2410005389]]


@settings(max_examples=50)
@given(
    pairs=st.lists(st.tuples(INDEX, INDEX), min_size=1, max_size=8),
    shape=SHAPES,
    draw=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_a_row_does_not_depend_on_its_batch(pairs, shape, draw, data):
    rows, views = torch.tensor(pairs).unbind(1)
    whole = RowRng.create(3, "x", rows=rows, views=views)
    order = torch.tensor(data.draw(st.permutations(range(len(pairs)))))
    subset = order[: data.draw(st.integers(1, len(pairs)))]
    words = whole.words(shape, draw)
    assert words.shape == (len(pairs), *shape)
    assert torch.equal(whole[subset].words(shape, draw), words[subset])
    assert torch.equal(whole[order].normal(shape, draw), whole.normal(shape, draw)[order])
    for i in range(len(pairs)):
        alone = RowRng.create(3, "x", rows=rows[i : i + 1], views=views[i : i + 1])
        assert torch.equal(alone.words(shape, draw)[0], words[i])


def test_a_mask_selects_rows():
    rng = RowRng.create(0, "x", rows=torch.arange(5))
    mask = torch.tensor([True, False, True, False, True])
    assert torch.equal(rng[mask].words((4,)), rng.words((4,))[mask])


@settings(max_examples=50)
@given(low=st.integers(-1000, 1000), size=st.integers(1, 2000), row=INDEX)
def test_integers_stay_in_bounds(low, size, row):
    values = RowRng.create(1, "x", rows=torch.tensor([row])).integers(low, low + size - 1, (64,))
    assert values.dtype == torch.int64
    assert low <= int(values.min()) and int(values.max()) <= low + size - 1


def test_integers_reach_every_value_evenly():
    values = RowRng.create(1, "x", rows=torch.arange(500)).integers(-8, 8, (34,))
    counts = torch.bincount(values.flatten() + 8, minlength=17)
    assert counts.sum() == 17_000
    # chi-squared with 16 degrees of freedom: 39.25 is its 99.9 % quantile
    assert ((counts - 1000.0) ** 2 / 1000).sum() < 39.25


def test_moments():
    rng = RowRng.create(5, "moments", rows=torch.arange(2000))
    uniform, normal = rng.uniform((50,)).double(), rng.normal((50,)).double()
    assert uniform.min() >= 0 and uniform.max() < 1
    assert uniform.mean().item() == pytest.approx(0.5, abs=4 * (1 / 12 / 1e5) ** 0.5)
    assert uniform.var().item() == pytest.approx(1 / 12, rel=0.02)
    assert normal.mean().item() == pytest.approx(0, abs=4 / 1e5**0.5)
    assert normal.var().item() == pytest.approx(1, rel=0.02)
    assert (normal**4).mean().item() == pytest.approx(3, rel=0.05)
    assert normal.isfinite().all()
    neighbours = torch.corrcoef(torch.stack([normal[:-1].flatten(), normal[1:].flatten()]))[0, 1]
    assert abs(neighbours.item()) < 4 / 1e5**0.5


def test_streams_are_independent():
    rows = torch.arange(4)
    streams = [
        RowRng.create(0, "a", rows=rows).words((8,)),
        RowRng.create(1, "a", rows=rows).words((8,)),
        RowRng.create(0, "b", rows=rows).words((8,)),
        RowRng.create(0, "a", 1, rows=rows).words((8,)),
        RowRng.create(0, "a", rows=rows + 4).words((8,)),
        RowRng.create(0, "a", rows=rows, views=torch.ones_like(rows)).words((8,)),
        RowRng.create(0, "a", rows=rows).words((8,), draw=1),
        RowRng.create(0, "a", rows=rows).fold("restart").words((8,)),
        RowRng.create(0, "a", rows=rows).fold("restart", 1).words((8,)),
    ]
    assert len(torch.cat(streams).unique()) == len(streams) * 32


def test_the_same_purpose_gives_the_same_numbers():
    rows = torch.arange(3)
    first, second = (RowRng.create(9, "a", "b", rows=rows) for _ in range(2))
    assert torch.equal(first.words((5, 2)), second.words((5, 2)))
    assert torch.equal(first.fold(1).words((5, 2)), second.fold(1).words((5, 2)))


def test_a_longer_draw_begins_with_the_shorter_one():
    rng = RowRng.create(2, "x", rows=torch.arange(3))
    assert torch.equal(rng.words((10,))[:, :7], rng.words((7,)))


def test_global_state_is_not_touched():
    before = torch.random.get_rng_state()
    RowRng.create(2, "x", rows=torch.arange(3)).normal((3,))
    assert torch.equal(before, torch.random.get_rng_state())
