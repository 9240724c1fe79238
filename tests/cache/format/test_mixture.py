"""Several sources in a spec: what is refused, which rows are whose, and which of them have which views."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darht.cache.format.layout import layouts, row_blocks
from darht.cache.format.manifest import read_spec
from darht.cache.format.mixture import SourceSpec, check_sources, spans, view_bands
from darht.core.config import canonical_json, parse_canonical
from darht.core.errors import ConfigError

REAL = SourceSpec("cifar10", "train", 10, "a", True, None, 0.1, 9)
MADE = SourceSpec("npz", "train", 20, "b", False, 0.7, 0.0, 1)


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ((MADE, REAL), "sources with labels first"),
        ((REAL, dataclasses.replace(MADE, share=None)), "give each source with labels: none its share"),
        ((dataclasses.replace(REAL, share=0.2), MADE), "leave share out of one"),
        ((REAL, dataclasses.replace(MADE, share=1.0)), "shares lie in (0, 1)"),
        ((REAL, MADE, dataclasses.replace(MADE, share=0.3)), "got 0.7, 0.3"),
        ((dataclasses.replace(REAL, views=1), dataclasses.replace(MADE, views=2)), "more views first; npz has 2"),
        ((REAL, dataclasses.replace(MADE, rows=21)), "must have 30 rows together; they have 31"),
    ],
)
def test_a_broken_rule(sources, expected):
    with pytest.raises(ConfigError) as caught:
        check_sources(sources, sum(source.rows for source in sources) if "rows together" not in expected else 30)
    assert expected in str(caught.value)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=5))
def test_bands_hold_every_view_of_every_row_once(parts):
    parts = sorted(parts, key=lambda part: -part[1])
    sources = [dataclasses.replace(REAL, rows=rows, views=views) for rows, views in parts]
    total = sum(rows for rows, _ in parts)
    bands = view_bands(sources, total, parts[0][1])
    assert bands[0].rows == total and bands[0].first == 0 and bands[-1].stop == parts[0][1]
    for source, span in zip(sources, spans(sources, total), strict=True):
        for row in range(span.start, span.stop):
            views = [view for band in bands if row < band.rows for view in range(band.first, band.stop)]
            assert views == list(range(source.views))


def test_a_cache_of_one_source_has_one_band_and_its_spec_does_not_name_it(tiny_cache):
    spec = read_spec(tiny_cache)
    assert spec.bands == ((0, 9, 100),) and spec.data.labelled == 100
    assert "sources" not in canonical_json(spec)
    assert not [name for name in layouts(spec) if "from" in name]


def test_a_spec_of_several_sources_reads_back(blend):
    spec = read_spec(blend)
    assert parse_canonical(type(spec), canonical_json(spec).encode(), "spec") == spec
    assert spec.format_version == 2
    assert (spec.data.rows, spec.data.labelled, spec.bands) == (130, 60, ((0, 1, 130), (1, 9, 60)))
    arrays = layouts(spec)
    assert arrays["logits/cnn/clean"].shape == (130, 1, 10)
    assert arrays["logits/cnn/clean-from-1"].shape == (60, 8, 10)
    assert arrays["delta/pgd-cnn"].attributes["unlabelled"] == "against the attacked teacher's own answer to the view"


def test_blocks_end_where_a_source_does(blend):
    blocks = row_blocks(read_spec(blend)).tolist()
    assert [60, 64] in blocks and [48, 60] in blocks
    assert [row for first, last in blocks for row in range(first, last)] == list(range(130))


def test_views_of_attacks_are_those_that_all_rows_have(blend):
    spec = read_spec(blend)
    attacks = {"more": dataclasses.replace(spec.attacks["pgd-cnn"], views=2)}
    with pytest.raises(ConfigError, match="attacks run on views that all rows have, here the first 1; more asks"):
        dataclasses.replace(spec, attacks=attacks)
