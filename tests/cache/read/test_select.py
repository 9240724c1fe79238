"""Rows chosen by what teachers said about them."""

import numpy as np
import pytest

from darht.cache.read.mixture import training_groups
from darht.cache.read.reader import open_cache
from darht.cache.read.select import Selection, candidates, entropies, rows_to_leave_out, select
from darht.core.errors import ConfigError


def test_the_entropy_is_that_of_the_mean_probabilities(tiny_cache):
    cache, rows = open_cache(tiny_cache), np.array([3, 50, 99])
    p = [np.exp(cache.read(f"logits/{name}/clean")[rows, 0].astype(np.float64)) for name in cache.teachers]
    mean = np.mean([one / one.sum(1, keepdims=True) for one in p], axis=0)
    np.testing.assert_allclose(entropies(cache, rows), -(mean * np.log(mean)).sum(1), rtol=1e-12)


@pytest.mark.parametrize("end", ["lowest", "highest"])
def test_rows_without_labels_are_chosen_and_the_others_stay(blend, end):
    cache = open_cache(blend)
    chosen = select(cache, Selection(keep=0.3, end=end))
    assert cache.excluded == () and len(chosen.excluded) == 49 and min(chosen.excluded) >= 60
    labelled, made = training_groups(chosen, 8)
    assert len(labelled.rows) == 54 and len(made.rows) == 21
    kept, left = entropies(cache, made.rows), entropies(cache, np.array(chosen.excluded))
    assert kept.max() <= left.min() if end == "lowest" else kept.min() >= left.max()


def test_a_cache_with_labels_throughout_is_chosen_from_as_a_whole(tiny_cache):
    cache = open_cache(tiny_cache)
    assert len(candidates(cache)) == 90
    assert len(rows_to_leave_out(cache, Selection(keep=0.5))) == 45
    assert len(rows_to_leave_out(cache, Selection(keep=1e-9))) == 89
    assert select(cache, None) is cache and select(cache, Selection(keep=1.0)).excluded == ()


@pytest.mark.parametrize("keep", [0.0, 1.1])
def test_a_share_that_is_none(keep):
    with pytest.raises(ConfigError, match="keep is a share"):
        Selection(keep=keep)
