"""Every command prints what it found and writes what it promised; every mistake is one line."""

import json
import shutil
from pathlib import Path

import fsspec
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from reseal import rewrite

from darht.cache.read.reader import open_cache
from darht.tools import report as report_module
from darht.tools.cli import inspect
from darht.tools.index import Indexes, IndexSettings, build_indexes, open_indexes
from darht.tools.predictions import read_predictions
from darht.tools.vectors import cache_spaces
from darht.trainer.student.exclude import exclude_rows


def run(*words: object) -> Result:
    return CliRunner().invoke(inspect, [str(word) for word in words])


@pytest.fixture
def copy(tiny_cache: Path, tmp_path: Path) -> Path:
    """A copy to index, of which the teachers are still found."""
    folder = tmp_path / "mine"
    shutil.copytree(tiny_cache, folder)
    origin = json.loads((tiny_cache / "origin.json").read_text())
    teachers = {name: str((tiny_cache / path).resolve()) for name, path in origin["teachers"].items()}
    rewrite(folder / "origin.json", teachers=teachers)
    return folder


def test_index_then_neighbours_of_a_row_and_of_an_image(copy: Path, tmp_path: Path) -> None:
    result = run("index", copy, "--dim", 16)
    assert result.exit_code == 0, result.output
    assert "delta/pgd-cnn" in result.output and "5 built, 0 kept" in result.output
    assert "0 built, 5 kept" in run("index", copy, "--dim", 16).output
    result = run("neighbours", copy, 7, "--k", 2)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "mine-neighbours-7.png").is_file() and "delta/pgd-vit" in result.output
    Image.new("RGB", (8, 8), (90, 20, 200)).save(tmp_path / "mine.png")
    result = run("neighbours", copy, tmp_path / "mine.png", "--k", 2, "--picture", tmp_path / "out.png")
    assert result.exit_code == 0, result.output
    assert "outside" in result.output and (tmp_path / "out.png").is_file()


def test_subspace_makes_the_index_that_it_needs(copy: Path) -> None:
    result = run("subspace", copy, "--k", 4, "--gaas", 1, "--index", copy.parent / "elsewhere")
    assert result.exit_code == 2 and "128 dimensions" in result.output  # 100 rows of two attacks, one of images
    assert run("index", copy, "--dim", 16).exit_code == 0
    result = run("subspace", copy, "--k", 4, "--gaas", 1)
    assert result.exit_code == 0, result.output
    for word in ("effective", "mixing", "all teachers answer rightly"):
        assert word in result.output


def test_subspace_finishes_an_index_that_was_stopped(copy: Path) -> None:
    cache = open_cache(copy)
    first = {name: space for name, space in cache_spaces(cache).items() if name == "image"}
    made = build_indexes(cache, first, copy / "index", IndexSettings(dim=16))[0]
    result = run("subspace", copy, "--k", 4, "--gaas", 0)
    assert result.exit_code == 0, result.output
    whole = open_indexes(cache, copy / "index").card
    assert whole.settings == made.card.settings and whole.indexes.keys() == cache_spaces(cache).keys()
    assert whole.indexes["image"] == made.card.indexes["image"]


def test_transfer_by_class_and_balanced(tiny_cache: Path, tmp_path: Path) -> None:
    result = run("transfer", tiny_cache, "--by-class", "--balanced", "--picture", tmp_path / "t.png")
    assert result.exit_code == 0, result.output
    assert result.output.count("crafted on") >= 11 and (tmp_path / "t.png").is_file()


def test_select_prints_the_set_and_its_spec(tiny_cache: Path) -> None:
    result = run("select", tiny_cache, "--size", 2)
    assert result.exit_code == 0, result.output
    assert "take cnn vit:" in result.output and "kind: pgd" in result.output


def test_rows_writes_list_and_gallery(copy: Path, tmp_path: Path) -> None:
    result = run("rows", copy, "--filter", "only-one,duplicate")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "mine-rows.json").read_text())["kinds"] == ["only-one", "duplicate"]
    assert (tmp_path / "mine-rows.png").is_file()


def test_rows_are_chosen_by_entropy(blend: Path, tmp_path: Path) -> None:
    result = run("rows", blend, "--by", "entropy", "--keep", "0.3", "--out", tmp_path / "rows.json")
    assert result.exit_code == 0 and "21 of 70 rows are kept" in result.output
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["selection"] == {"by": "entropy", "keep": 0.3, "end": "lowest"} and len(written["rows"]) == 49
    assert exclude_rows(open_cache(blend), tmp_path / "rows.json") == 49


def test_rows_without_labels_are_looked_at_and_not_judged(blend: Path, tmp_path: Path) -> None:
    predictions = read_predictions(open_cache(blend))
    assert len(predictions.labels) == 60 and predictions.clean.shape == (1, 60) and predictions.labels.min() >= 0
    shutil.copytree(blend, tmp_path / "mine")
    result = run("neighbours", tmp_path / "mine", "--row", 100, "--k", 3)
    assert result.exit_code == 0 and "no label" in result.output, result.output
    assert run("rows", tmp_path / "mine").exit_code == 0


def test_report_writes_one_page(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_module, "_umap", lambda vectors: None)
    assert run("index", copy, "--dim", 16).exit_code == 0
    result = run("report", copy, "--k", 3, "--gaas", 0)
    assert result.exit_code == 0, result.output
    assert "no network needed" in result.output
    assert (tmp_path / "mine-report.html").read_text().startswith("<!doctype html>")


COMMANDS = [["index"], ["neighbours", "--row", "0"], ["subspace"], ["transfer"], ["select", "--size", "2"], ["rows"],
            ["report"]]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_folder_that_is_no_cache_or_is_not_sealed_is_refused(
    command: list[str], tiny_cache: Path, tmp_path: Path
) -> None:
    unsealed, foreign = tmp_path / "unsealed", tmp_path / "foreign"
    shutil.copytree(tiny_cache, unsealed)
    (unsealed / "manifest.json").unlink()
    shutil.copytree(tiny_cache, foreign)
    spec = json.loads((foreign / "spec.json").read_text()) | {"seed": 77}
    (foreign / "spec.json").write_text(json.dumps(spec, sort_keys=True, separators=(",", ":")) + "\n")
    cases = ((unsealed, "is not sealed"), (foreign, "belongs to another spec"), (tmp_path / "no", "is not a cache"))
    for folder, said in cases:
        result = run(command[0], folder, *command[1:])
        assert result.exit_code == 2, result.output
        assert result.output.startswith("error: ") and said in result.output
        assert len(result.output.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("neighbours",), "say what to look around"),
        (("neighbours", "3", "--row", "3"), "say what to look around"),
        (("neighbours", "3", "--k", "100"), "--k must lie in 1..99, the other rows of the cache; got 100"),
        (("neighbours", "no.png"), "does not read as an image"),
        (("select", "--size", "3"), "--size must lie in 2..2"),
        (("rows", "--margin", "2"), "--margin is a difference of probabilities"),
        (("rows", "--keep", "0.5"), "--keep and --end say which rows --by keeps"),
        (("rows", "--by", "entropy", "--keep", "2"), "keep is a share in (0, 1]; got 2"),
        (("subspace", "--teacher", "cnn"), "--teacher reads NAME=FOLDER"),
    ],
)
def test_mistakes_are_one_line(copy: Path, words: tuple[str, ...], said: str) -> None:
    assert run("index", copy, "--dim", 16).exit_code == 0
    result = run(words[0], copy, *words[1:])
    assert result.exit_code == 2 and said in result.output
    assert "Traceback" not in result.output and result.output.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("command", ["subspace", "report"])
def test_rows_for_directions_are_counted_from_zero(command: str, tiny_cache: Path) -> None:
    result = run(command, tiny_cache, "--gaas", "-1")
    assert result.exit_code == 2 and "Invalid value for '--gaas'" in result.output


def test_the_index_of_another_cache_is_named(planted_indexes: Indexes, tiny_cache: Path) -> None:
    for words in (("neighbours", tiny_cache, "3"), ("subspace", tiny_cache), ("report", tiny_cache)):
        result = run(*words, "--index", planted_indexes.folder)
        assert result.exit_code == 2 and "holds the index of another cache" in result.output


def test_a_cache_behind_a_url_is_read_and_its_index_needs_a_place(tiny_cache: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(tiny_cache), "/inspected", recursive=True)
    try:
        result = run("index", "memory://inspected")
        assert result.exit_code == 2 and "say where the index goes with --out DIR" in result.output
        result = run("subspace", "memory://inspected")
        assert result.exit_code == 2 and "say where the index goes with --index DIR" in result.output
        result = run("index", "memory://inspected", "--dim", 16, "--out", tmp_path / "index")
        assert result.exit_code == 0, result.output
        result = run("transfer", "memory://inspected", "--picture", tmp_path / "t.png")
        assert result.exit_code == 0, result.output
    finally:
        memory.rm("/inspected", recursive=True)
