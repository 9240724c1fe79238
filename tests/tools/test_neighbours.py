"""Nearest rows: equal to a brute-force search, and refused with the numbers where there are none."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from darht.cache.reader import Cache, open_cache
from darht.core.errors import ConfigError
from darht.tools.cli import inspect
from darht.tools.neighbours import draw, find_neighbours


def vectors_of(cache: Cache, space: str) -> np.ndarray:
    kind, name = space.split("/")
    if kind == "delta":
        return cache.read(space)[:, 0].reshape(cache.rows, -1).astype(np.float64)
    logits = cache.read(f"logits/{name}/clean")[:, 0].astype(np.float64)
    return logits - logits.mean(1, keepdims=True)


def test_hits_are_those_of_a_brute_force_search(tiny_cache: Path) -> None:
    cache = open_cache(tiny_cache)
    spaces = find_neighbours(cache, row=7, k=4)
    assert [space.name for space in spaces] == ["delta/pgd-cnn", "delta/pgd-vit", "logits/cnn", "logits/vit"]
    for space in spaces:
        vectors = vectors_of(cache, space.name)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        cosines = vectors @ vectors[7]
        cosines[7] = -2
        expected = np.sort(cosines)[::-1][:4]
        assert [hit.cosine for hit in space.hits] == pytest.approx(expected.tolist(), abs=1e-5)
        assert [cosines[hit.row] for hit in space.hits] == pytest.approx(expected.tolist(), abs=1e-5)
        assert space.query.row == 7 and space.query.cosine == pytest.approx(1, abs=1e-5)


def test_a_hit_carries_its_label_and_what_the_teacher_of_the_space_says(tiny_cache: Path) -> None:
    cache = open_cache(tiny_cache)
    labels = cache.read("label")
    for space in find_neighbours(cache, row=0, k=3):
        kind, name = space.name.split("/")
        answers = cache.read(f"logits/{space.teacher}/{name if kind == 'delta' else 'clean'}")[:, 0].argmax(1)
        for hit in (space.query, *space.hits):
            assert hit.label == labels[hit.row]
            assert hit.predicted == answers[hit.row]


@pytest.mark.parametrize(
    ("row", "k", "said"), [(-1, 3, "0..99"), (100, 3, "0..99"), (0, 0, "1..99"), (0, 100, "1..99")]
)
def test_a_row_or_count_that_is_not_there_is_refused(tiny_cache: Path, row: int, k: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
        find_neighbours(open_cache(tiny_cache), row=row, k=k)


def test_all_other_rows_can_be_asked_for(tiny_cache: Path) -> None:
    for space in find_neighbours(open_cache(tiny_cache), row=3, k=99):
        assert sorted(hit.row for hit in space.hits) == [row for row in range(100) if row != 3]


def test_the_sheet_grows_with_what_it_shows(tiny_cache: Path, tmp_path: Path) -> None:
    cache = open_cache(tiny_cache)
    sizes = []
    for k in (2, 4):
        draw(cache, find_neighbours(cache, row=1, k=k), tmp_path / f"{k}.png")
        with Image.open(tmp_path / f"{k}.png") as image:
            sizes.append(image.size)
    assert sizes[1][0] > sizes[0][0] and sizes[1][1] == sizes[0][1]


def test_the_command_prints_every_space_and_writes_the_picture(tiny_cache: Path, tmp_path: Path) -> None:
    picture = tmp_path / "near.png"
    words = ["neighbours", str(tiny_cache), "--row", "7", "--k", "2", "--picture", str(picture)]
    result = CliRunner().invoke(inspect, words)
    assert result.exit_code == 0, result.output
    assert picture.is_file()
    for name in ("delta/pgd-cnn", "delta/pgd-vit", "logits/cnn", "logits/vit"):
        assert name in result.output
    wrong = CliRunner().invoke(inspect, ["neighbours", str(tiny_cache), "--row", "500"])
    assert wrong.exit_code == 2 and wrong.output.startswith("error: --row must lie in 0..99")
