"""Nearest rows: equal to a brute-force search, and refused with the numbers where there are none."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from darht.cache.read.reader import Cache, open_cache
from darht.core.errors import ConfigError, DataError
from darht.tools.index import Indexes, IndexSettings, build_indexes
from darht.tools.live import load_teachers
from darht.tools.neighbours import Outside, draw, find_neighbours, outside_image, picture_of, read_image, spoken
from darht.tools.vectors import cache_spaces

SPACES = ["image", "delta/pgd-cnn", "delta/pgd-vit", "logits/cnn", "logits/vit"]


def vectors_of(cache: Cache, space: str) -> np.ndarray:
    kind, _, name = space.partition("/")
    if kind == "delta":
        return cache.read(space)[:, 0].reshape(cache.rows, -1).astype(np.float64)
    array = "image" if kind == "image" else f"logits/{name}/clean"
    values = cache.read(array).reshape(cache.rows, -1) if kind == "image" else cache.read(array)[:, 0]
    return values.astype(np.float64) - values.astype(np.float64).mean(1, keepdims=True)


@pytest.mark.parametrize("indexed", [False, True])
def test_hits_are_those_of_a_brute_force_search(tiny_cache: Path, tmp_path: Path, indexed: bool) -> None:
    cache = open_cache(tiny_cache)
    settings = IndexSettings(dim=64)
    indexes = build_indexes(cache, cache_spaces(cache), tmp_path, settings)[0] if indexed else None
    spaces = find_neighbours(cache, 7, 4, indexes)
    assert [space.space for space in spaces] == SPACES
    for space in spaces:
        vectors = vectors_of(cache, space.space)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        cosines = vectors @ vectors[7]
        cosines[7] = -2
        expected = np.sort(cosines)[::-1][:4]
        assert [hit.cosine for hit in space.hits] == pytest.approx(expected.tolist(), abs=1e-5)
        assert [cosines[hit.row] for hit in space.hits] == pytest.approx(expected.tolist(), abs=1e-5)
        assert (space.query.row, space.query.cosine) == (7, 1.0)


def test_a_hit_carries_its_label_and_what_the_teachers_of_the_space_say(tiny_cache: Path) -> None:
    cache = open_cache(tiny_cache)
    labels = cache.read("label")
    for space in find_neighbours(cache, 0, 3):
        kind, _, name = space.space.partition("/")
        teachers = {"image": ["cnn", "vit"], "delta": [name.removeprefix("pgd-")], "logits": [name]}[kind]
        for hit in (space.query, *space.hits):
            assert hit.label == labels[hit.row] and list(hit.said) == teachers
            for teacher, said in hit.said.items():
                answers = cache.read(f"logits/{teacher}/{name if kind == 'delta' else 'clean'}")[:, 0].argmax(1)
                assert said == answers[hit.row]


@pytest.mark.parametrize(
    ("row", "k", "said"), [(-1, 3, "0..99"), (100, 3, "0..99"), (0, 0, "1..99"), (0, 100, "1..99")]
)
def test_a_row_or_count_that_is_not_there_is_refused(tiny_cache: Path, row: int, k: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
        find_neighbours(open_cache(tiny_cache), row, k)


def test_all_other_rows_can_be_asked_for_with_and_without_an_index(tiny_cache: Path, tiny_indexes: Indexes) -> None:
    for indexes in (None, tiny_indexes):
        for space in find_neighbours(open_cache(tiny_cache), 3, 99, indexes):
            assert sorted(hit.row for hit in space.hits) == [row for row in range(100) if row != 3]


@pytest.fixture(scope="module")
def outside(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Cache, Outside]:
    """Row 12 of the cache, as a file."""
    cache = open_cache(tiny_cache)
    path = tmp_path_factory.mktemp("image") / "twelve.png"
    Image.fromarray(cache.read("image")[12].transpose(1, 2, 0)).save(path)
    loaded = load_teachers(cache, {}, torch.device("cpu"))
    assert not loaded.missing
    return cache, outside_image(cache, path, dict(loaded.teachers))


def test_an_image_from_outside_finds_itself_in_image_and_logits(outside: tuple[Cache, Outside]) -> None:
    cache, image = outside
    found = {hits.space: hits for hits in find_neighbours(cache, image, 3)}
    assert list(found) == SPACES
    for space in ("image", "logits/cnn", "logits/vit"):
        assert found[space].hits[0].row == 12 and found[space].hits[0].cosine == pytest.approx(1, abs=1e-3)
    assert all(hits.query.row == -1 for hits in found.values())
    assert found["image"].query.said == {
        name: int(cache.read(f"logits/{name}/clean")[12, 0].argmax()) for name in ("cnn", "vit")
    }
    for attack, delta in image.deltas.items():
        moved = cache.read("image")[12] + cache.spec.attacks[attack].scale * delta[0]
        assert moved.min() >= 0 and moved.max() <= 255
        assert np.abs(delta).max() * cache.spec.attacks[attack].scale <= 32


def test_without_teachers_only_images_are_compared(outside: tuple[Cache, Outside], tmp_path: Path) -> None:
    cache, image = outside
    path = tmp_path / "x.png"
    Image.fromarray(image.image.transpose(1, 2, 0)).save(path)
    alone = outside_image(cache, path, {})
    assert [hits.space for hits in find_neighbours(cache, alone, 100)] == ["image"]
    with pytest.raises(ConfigError, match=r"1\.\.100, the rows"):
        find_neighbours(cache, alone, 101)


def test_an_image_of_another_size_or_no_image_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (10, 6)).save(tmp_path / "wide.png")
    with pytest.raises(DataError, match="has 10x6 pixels, the images of the cache have 8x8: resize or cut it first"):
        read_image(tmp_path / "wide.png", (3, 8, 8))
    (tmp_path / "text.png").write_text("no image")
    for name in ("text.png", "missing.png"):
        with pytest.raises(DataError, match="does not read as an image"):
            read_image(tmp_path / name, (3, 8, 8))
    Image.new("L", (8, 8), 9).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png", (3, 8, 8)).shape == (3, 8, 8)


def test_the_sheet_grows_with_what_it_shows(outside: tuple[Cache, Outside], tmp_path: Path) -> None:
    cache, image = outside
    sizes = []
    for k in (2, 4):
        draw(cache, find_neighbours(cache, image, k), tmp_path / f"{k}.png", image)
        with Image.open(tmp_path / f"{k}.png") as sheet:
            sizes.append(sheet.size)
    assert sizes[1][0] > sizes[0][0] and sizes[1][1] == sizes[0][1]


def test_pictures_are_the_image_or_the_perturbation_at_full_contrast(outside: tuple[Cache, Outside]) -> None:
    cache, image = outside
    assert picture_of(cache, "image", 12) == pytest.approx(picture_of(cache, "logits/cnn", -1, image))
    delta = picture_of(cache, "delta/pgd-cnn", 5)
    stored = cache.read("delta/pgd-cnn")[5, 0].transpose(1, 2, 0)
    assert delta == pytest.approx(0.5 + stored / 64, abs=1e-6)
    assert picture_of(cache, "delta/pgd-cnn", -1, image).shape == (8, 8, 3)


def test_teachers_that_agree_are_named_once() -> None:
    assert spoken({"a": 1, "b": 1}, ("cat", "dog")) == "dog"
    assert spoken({"a": 1, "b": 0}, ("cat", "dog")) == "a: dog, b: cat"
    assert spoken({}, ("cat",)) == ""
