"""Indexes: recall is what it says, nothing is built twice, and another cache's index is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from planted import one_hot, write_cache

from darht.cache.read.reader import Cache, open_cache
from darht.core.errors import CacheError, ConfigError, CorruptError, SpecMismatchError
from darht.tools.index import CARD, Indexes, IndexSettings, build_indexes, default_folder, make_index, open_indexes
from darht.tools.nearest import Nearest, recall, without_self
from darht.tools.project import fit_projection, project
from darht.tools.vectors import cache_spaces, take, unit


def test_an_exact_index_in_all_dimensions_finds_what_comparing_everything_finds(
    planted: Cache, planted_indexes: Indexes
) -> None:
    space = cache_spaces(planted)["delta/pgd-a"]
    vectors = take(planted, space, np.arange(planted.rows))
    cosines, _ = planted_indexes.load("delta/pgd-a").search(vectors[:5], 10)
    expected = np.sort(vectors[:5] @ vectors.T, axis=1)[:, ::-1][:, :10]
    assert cosines == pytest.approx(expected, abs=1e-5)
    record = planted_indexes.card.indexes["delta/pgd-a"]
    assert (record.recall, record.kept, record.kind, record.dims) == (1.0, 1.0, "exact", (192, 192))
    assert planted_indexes.axes("delta/pgd-a") is None


def test_attacks_share_one_projection_and_other_spaces_have_their_own(tiny_indexes: Indexes) -> None:
    first, second = tiny_indexes.axes("delta/pgd-cnn"), tiny_indexes.axes("delta/pgd-vit")
    assert first is not None and second is not None and first.shape == (16, 192)
    assert np.array_equal(first, second)
    image = tiny_indexes.axes("image")
    assert image is not None and not np.array_equal(image, first)
    assert tiny_indexes.axes("logits/cnn") is None
    assert all(record.kept < 1 for name, record in tiny_indexes.card.indexes.items() if name.startswith("delta"))


def test_a_second_build_builds_nothing_and_a_lost_file_only_itself(tiny_cache: Path, tmp_path: Path) -> None:
    cache, settings = open_cache(tiny_cache), IndexSettings(dim=8)
    spaces = cache_spaces(cache)
    first, built = build_indexes(cache, spaces, tmp_path / "i", settings)
    assert built == tuple(spaces)
    assert build_indexes(cache, spaces, tmp_path / "i", settings)[1] == ()
    (tmp_path / "i" / "delta-pgd-vit.faiss").unlink()
    second, built = build_indexes(cache, spaces, tmp_path / "i", settings)
    assert built == ("delta/pgd-vit",)
    assert [one.sha256 for one in second.card.indexes.values()] == [one.sha256 for one in first.card.indexes.values()]
    assert build_indexes(cache, spaces, tmp_path / "i", IndexSettings(dim=9))[1] == tuple(spaces)


def test_features_are_built_again_when_the_student_changed(tiny_cache: Path, tmp_path: Path) -> None:
    cache = open_cache(tiny_cache)
    spaces = cache_spaces(cache, {"me": (6, lambda images: images.reshape(len(images), -1)[:, :6] + np.float32(1))})
    for weights, expected in (("one", tuple(spaces)), ("one", ()), ("two", ("features/me",))):
        built = build_indexes(cache, spaces, tmp_path, IndexSettings(dim=8), identities={"features/me": weights})[1]
        assert built == expected


def test_auto_takes_hnsw_from_a_size_on_and_measures_its_recall(planted: Cache, tmp_path: Path) -> None:
    settings = IndexSettings(dim=8, exact_below=500)
    spaces = {name: space for name, space in cache_spaces(planted).items() if name == "image"}
    record = build_indexes(planted, spaces, tmp_path, settings)[0].card.indexes["image"]
    assert record.kind == "hnsw" and 0.9 < record.recall <= 1
    assert [settings.kind_for(n) for n in (499, 500, 499_999, 500_000)] == ["exact", "hnsw", "hnsw", "ivfpq"]


def test_product_quantisation_is_smaller_and_less_exact() -> None:
    generator = np.random.default_rng(0)
    vectors = unit(generator.standard_normal((10_000, 16)).astype(np.float32))
    exact, packed = make_index("exact", vectors, "x"), make_index("ivfpq", vectors, "x")
    near = exact.search(vectors[:50], 11)[1]
    found = packed.search(vectors[:50], 11)[1]
    assert 0.2 < recall(found, near) < 1
    with pytest.raises(ConfigError, match="at least 9984 vectors"):
        make_index("ivfpq", vectors[:100], "x")


def test_the_index_of_another_cache_is_refused_by_readers_and_replaced_by_a_build(
    tiny_cache: Path, planted: Cache, tmp_path: Path
) -> None:
    cache, settings = open_cache(tiny_cache), IndexSettings(dim=8)
    build_indexes(cache, cache_spaces(cache), tmp_path / "i", settings)
    with pytest.raises(SpecMismatchError, match=r"index of another cache .*run darht-inspect index again"):
        open_indexes(planted, tmp_path / "i")
    build_indexes(planted, cache_spaces(planted), tmp_path / "i", settings)
    assert open_indexes(planted, tmp_path / "i").card.root_hash == planted.root_hash


def test_a_folder_without_an_index_or_with_a_damaged_one_is_named(tiny_cache: Path, tmp_path: Path) -> None:
    cache = open_cache(tiny_cache)
    with pytest.raises(CacheError, match="holds no index"):
        open_indexes(cache, tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(CacheError, match="is not empty and holds no index"):
        build_indexes(cache, cache_spaces(cache), tmp_path, IndexSettings())
    made = build_indexes(cache, cache_spaces(cache), tmp_path / "i", IndexSettings(dim=8))[0]
    (tmp_path / "i" / "image.faiss").write_bytes(b"no index")
    with pytest.raises(CorruptError, match="is not what was written"):
        made.load("image")
    (tmp_path / "i" / CARD).write_text("{")
    with pytest.raises(CorruptError, match="does not describe an index"):
        open_indexes(cache, tmp_path / "i")


def test_a_space_that_is_not_there_is_named(tiny_cache: Path, tmp_path: Path) -> None:
    cache = open_cache(tiny_cache)
    first = {name: space for name, space in cache_spaces(cache).items() if name == "image"}
    made = build_indexes(cache, first, tmp_path / "i", IndexSettings(dim=8))[0]
    for look in (made.load, made.axes):
        with pytest.raises(CacheError, match=r"holds no index of delta/pgd-vit, .*: run darht-inspect index again"):
            look("delta/pgd-vit")


def test_the_card_names_the_cache_and_the_default_folder_lies_in_it(tiny_cache: Path, tiny_indexes: Indexes) -> None:
    cache = open_cache(tiny_cache)
    assert json.loads((tiny_indexes.folder / CARD).read_text())["root_hash"] == cache.root_hash
    assert default_folder(cache) == tiny_cache / "index"


def test_more_dimensions_than_vectors_are_refused(tmp_path: Path) -> None:
    labels = np.arange(16) % 2
    right = one_hot(labels, 2)
    images = np.random.default_rng(0).integers(0, 256, (16, 3, 8, 8), dtype=np.uint8)
    folder = write_cache(
        tmp_path / "c", images=images, labels=labels, deltas={}, logits={"t": {"clean": right}}, rows_per_shard=16
    )
    cache = open_cache(folder)
    with pytest.raises(ConfigError, match="64 dimensions of image need as many vectors, there are 16"):
        build_indexes(cache, cache_spaces(cache), tmp_path / "i", IndexSettings(dim=64))
    with pytest.raises(ConfigError, match="dim is at least 1"):
        IndexSettings(dim=0)


def test_a_stream_of_blocks_finds_what_one_block_finds() -> None:
    vectors = unit(np.random.default_rng(0).standard_normal((57, 6)).astype(np.float32))
    queries = np.array([3, 50])
    whole, parts = Nearest(vectors[queries], 5, exclude=queries), Nearest(vectors[queries], 5, exclude=queries)
    whole.see(0, vectors)
    for first in range(0, 57, 4):
        parts.see(first, vectors[first : first + 4])
    assert np.array_equal(whole.rows, parts.rows) and not (whole.rows == queries[:, None]).any()
    assert whole.cosines == pytest.approx(np.take_along_axis(vectors[queries] @ vectors.T, whole.rows, 1), abs=1e-6)
    few = Nearest(vectors[:1], 5, exclude=np.array([0]))
    few.see(0, vectors[:3])
    assert few.rows[0].tolist()[2:] == [-1, -1, -1] and set(few.rows[0, :2]) == {1, 2}


def test_recall_counts_shared_neighbours_and_a_query_leaves_its_own_list() -> None:
    assert recall(np.array([[1, 2], [3, 9]]), np.array([[2, 1], [3, 4]])) == 0.75
    rows = np.array([[7, 1, 2], [4, 5, 6]])
    assert without_self(rows, np.array([7, 0]), 2).tolist() == [[1, 2], [4, 5]]


def test_pca_keeps_the_angles_of_vectors_in_a_small_subspace_and_random_ones_roughly() -> None:
    generator = np.random.default_rng(0)
    vectors = unit((generator.standard_normal((200, 5)) @ generator.standard_normal((5, 90))).astype(np.float32))
    axes = fit_projection(vectors, 5, "pca")
    assert axes @ axes.T == pytest.approx(np.eye(5), abs=1e-4)
    assert project(vectors, axes) @ project(vectors, axes).T == pytest.approx(vectors @ vectors.T, abs=1e-3)
    loose = project(vectors, fit_projection(vectors, 80, "random"))
    assert np.abs(loose @ loose.T - vectors @ vectors.T).mean() < 0.12
    assert np.array_equal(fit_projection(vectors, 4, "random"), fit_projection(vectors[:3], 4, "random"))
