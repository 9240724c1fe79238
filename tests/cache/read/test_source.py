"""A source as a cache: its rows in views, whether they fit the memory or are streamed."""

import numpy as np
import pytest
import torch

from darht.cache.format.views import view_table
from darht.cache.read.feed_plan import plan_feed
from darht.cache.read.source import SourceCache
from darht.cache.read.stream import Feed
from darht.cache.sources.load import Source
from darht.core.errors import ConfigError
from darht.trainer.teacher.config import TeachConfig
from darht.trainer.teacher.train import source_cache

ROWS = 1500
IMAGES = np.random.default_rng(0).integers(0, 256, (ROWS, 3, 6, 6), dtype=np.uint8)
SOURCE = Source("npz", "train", IMAGES, np.arange(ROWS) % 3, ("a", "b", "c"), sha256="s")


def cache(**changes) -> SourceCache:
    return source_cache(TeachConfig(**{"holdout": 0.1, "seed": 3} | changes), SOURCE)


def test_rows_are_those_of_the_source():
    found = cache()
    assert np.array_equal(found.read("image"), SOURCE.images)
    assert np.array_equal(found.read("image", slice(7, 9)), SOURCE.images[7:9])
    assert np.array_equal(found.read("label", slice(-2, None)), SOURCE.labels[-2:])
    assert np.array_equal(found.read("views/offset"), view_table(**vars(found.spec.views), seed=3))
    assert (found.rows, found.teachers, found.classes, found.origin()) == (ROWS, (), ("a", "b", "c"), {})
    assert len(found.manifest.holdout) == 150
    with pytest.raises(ConfigError, match="the train split of npz has no array 'delta/pgd'; it has"):
        found.read("delta/pgd")


def test_its_identity_is_that_of_what_is_trained_on():
    assert cache().root_hash == cache().root_hash
    assert len({one.root_hash for one in (cache(), cache(seed=4), cache(holdout=0.2), cache(holdout=0.0))}) == 4


@pytest.mark.parametrize("budget", [1.0, 0.0001])
def test_every_row_is_fed_once(budget):
    found, device = cache(), torch.device("cpu")
    plan = plan_feed(found, device=device, adversarial=False, batch=30, budget_gib=budget)
    assert plan.kind == ("device" if budget == 1 else "streamed")
    seen = []
    with Feed(found, plan, seed=0, epochs=1) as feed:
        for data, at in feed.batches(0):
            rows = data.rows[at]
            assert np.array_equal(data.images[at], SOURCE.images[rows])
            assert np.array_equal(data.labels[at], SOURCE.labels[rows])
            seen += rows.tolist()
        held, labels = feed.fetch(feed.holdout)
    assert sorted(seen) == sorted(set(range(ROWS)) - set(found.manifest.holdout))
    assert np.array_equal(held, SOURCE.images[list(found.manifest.holdout)])
    assert np.array_equal(labels, SOURCE.labels[list(found.manifest.holdout)])
