"""WebDataset exports: what is in them, that they read back as the cache, and that damage is an error."""

import dataclasses
import io
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from click.testing import Result
from PIL import Image

from darht.cache.export.webdataset import INDEX, export_webdataset
from darht.cache.format.layout import block_rows
from darht.cache.format.tar_index import Index
from darht.cache.read.reader import open_cache
from darht.cache.read.webdataset import open_shards
from darht.core.config import canonical_json, parse_canonical
from darht.core.errors import CacheError, ConfigError, CorruptError, IncompleteError
from darht.trainer.config import load_recipe
from darht.trainer.student.train import train

LAYOUTS = ["samples", "blocks"]


@pytest.fixture(scope="module", params=LAYOUTS)
def exported(request: pytest.FixtureRequest, tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / request.param
    export_webdataset(open_cache(tiny_cache), folder, request.param)
    return folder


@pytest.fixture
def damaged(exported: Path, tmp_path: Path) -> Path:
    shutil.copytree(exported, tmp_path / "damaged")
    return tmp_path / "damaged"


def test_an_export_reads_as_the_cache_it_came_from(exported: Path, tiny_cache: Path) -> None:
    original, copy = open_cache(tiny_cache), open_shards(exported)
    assert copy.root_hash == original.root_hash
    assert list(copy.arrays) == list(original.arrays)
    for name in original.arrays:
        expected, found = original.read(name), copy.read(name)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(copy.read(name, slice(1, 5)), expected[1:5])


@pytest.mark.parametrize("name", ["c{1,2}", "a{0..3", "b}"])
def test_a_folder_may_have_braces_in_its_name(exported: Path, tiny_cache: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to(exported)
    (tmp_path / f"sealed-{name}").symlink_to(tiny_cache)
    root = open_cache(tiny_cache).root_hash
    for location in (name, f"sealed-{name}", f"{name}/shard-{{00000..00003}}.tar"):
        assert open_shards(f"{tmp_path}/{location}").root_hash == root


def test_braces_that_do_not_close_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder and no pattern of tars"):
        open_shards(tmp_path / "a{0..3")


def test_the_same_cache_gives_the_same_bytes(exported: Path, tiny_cache: Path, tmp_path: Path) -> None:
    export_webdataset(open_cache(tiny_cache), tmp_path / "again", exported.name)  # type: ignore[arg-type]
    files = sorted(path.name for path in exported.iterdir())
    assert files == ["index.json", *(f"shard-{k:05d}.tar" for k in range(4))]
    for name in files:
        assert (tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes()


def test_the_tars_are_those_of_webdatasets_own_writer(exported: Path, tmp_path: Path) -> None:
    for path in exported.glob("*.tar"):
        entries: dict[str, dict[str, object]] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, name = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                entries.setdefault(key, {"__key__": key})[name] = file.read()
        buffer = io.BytesIO()
        writer = webdataset.TarWriter(buffer, user="darht", group="darht", encoder=False, mtime=0)
        for entry in entries.values():
            writer.write(entry)
        writer.close()
        data = path.read_bytes()
        assert data.startswith(buffer.getvalue()) and not any(data[len(buffer.getvalue()) :])


def test_any_webdataset_user_can_read_the_samples(tiny_cache: Path, tmp_path: Path) -> None:
    cache = open_cache(tiny_cache)
    export_webdataset(cache, tmp_path / "out", "samples")
    urls = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files to the collector
        rows = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [int(row["__key__"]) for row in rows] == list(range(cache.rows))
    row = rows[37]
    pixels = np.asarray(Image.open(io.BytesIO(row["png"])))
    np.testing.assert_array_equal(pixels.transpose(2, 0, 1), cache.read("image")[37])
    assert int(row["cls"]) == cache.read("label")[37]
    deltas = np.load(io.BytesIO(row["delta.npy"]))
    assert deltas.dtype == np.int8 and deltas.shape == (3, 3, 8, 8)
    np.testing.assert_array_equal(deltas[1:], cache.read("delta/pgd-vit")[37])
    logits = np.load(io.BytesIO(row["logits.npz"]))
    np.testing.assert_array_equal(logits["vit/clean"], cache.read("logits/vit/clean")[37])
    about = json.loads(row["json"])
    assert about["source_index"] == 37 and about["delta"] == {"pgd-cnn": 1, "pgd-vit": 2}
    assert about["cache"] == cache.root_hash


def test_a_run_from_an_export_equals_the_run_from_the_cache_bit_for_bit(
    exported: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    small = ("student.arch=resnet18", "student.kwargs.width=4", "student.kwargs.blocks=[1, 1, 1, 1]")
    config = load_recipe(None, (*small, "inner.kind=cached", "inner.eps=32", "optim.epochs=2", "optim.batch_size=32"))
    states = []
    for name, folder in (("zarr", tiny_cache), ("tar", exported)):
        train(config, open_shards(folder), tmp_path / name, device=torch.device("cpu"))
        states.append((tmp_path / name / "last" / "model.safetensors").read_bytes())
    assert states[0] == states[1]


def test_a_cut_tar_is_an_error(damaged: Path) -> None:
    tar = damaged / "shard-00001.tar"
    tar.write_bytes(tar.read_bytes()[:-10240])  # at a block boundary, where readers of tar lose samples in silence
    with pytest.raises(CorruptError, match="it is cut"):
        open_shards(damaged).read("label")


def test_a_flipped_byte_or_a_missing_tar_is_an_error(damaged: Path) -> None:
    tar = damaged / "shard-00000.tar"
    data = bytearray(tar.read_bytes())
    data[1000] ^= 1
    tar.write_bytes(data)
    with pytest.raises(CorruptError, match="does not have the sha256"):
        open_shards(damaged).read("image")
    tar.unlink()
    with pytest.raises(IncompleteError, match="is missing"):
        open_shards(damaged).read("image")


def test_a_damaged_index_is_an_error(damaged: Path) -> None:
    text = (damaged / INDEX).read_text()
    for wrong in (text[: len(text) // 2], text.replace('"seed":10', '"seed":11'), "[]"):
        (damaged / INDEX).write_text(wrong)
        with pytest.raises(CorruptError, match=r"index\.json"):
            open_shards(damaged)


def test_an_array_that_is_not_there_is_refused(exported: Path) -> None:
    with pytest.raises(ConfigError, match="has no array 'logits/vit/x'"):
        open_shards(exported).read("logits/vit/x")


def test_a_folder_that_is_not_empty_is_left_alone(tiny_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(CacheError, match="is not empty"):
        export_webdataset(open_cache(tiny_cache), tmp_path, "blocks")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from darht.cache.export import webdataset
    from darht.cache.read.reader import open_cache
    from darht.core import files
    moment, count = sys.argv[3], int(sys.argv[4])
    replace, seen = Path.replace, 0

    def mortal(self, target):
        global seen
        seen += 1
        if seen == count and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(self, target)
        if seen == count:
            os.kill(os.getpid(), signal.SIGKILL)

    Path.replace = mortal
    webdataset.export_webdataset(open_cache(Path(sys.argv[1])), Path(sys.argv[2]), "blocks")
"""


@pytest.mark.parametrize(
    ("moment", "count"),  # files in order: the claim, each of four tars and a record of it, the index
    [("before", 1), ("after", 1), ("before", 4), ("after", 4), ("after", 5), ("before", 10), ("after", 10)],
)
def test_a_killed_export_goes_on_to_the_same_bytes(tiny_cache: Path, tmp_path: Path, moment: str, count: int) -> None:
    out, layout = tmp_path / "out", "blocks"
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tiny_cache), str(out), moment, str(count)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert len(export_webdataset(open_cache(tiny_cache), out, layout).tars) == 4
    export_webdataset(open_cache(tiny_cache), tmp_path / "whole", layout)
    assert contents(out) == contents(tmp_path / "whole")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_whole_export_is_left_as_it_is_and_a_damaged_one_repaired(
    damaged: Path, exported: Path, tiny_cache: Path
) -> None:
    before, layout = contents(damaged), exported.name
    times = {path.name: path.stat().st_mtime_ns for path in damaged.glob("*.tar")}
    export_webdataset(open_cache(tiny_cache), damaged, layout)  # type: ignore[arg-type]
    assert times == {path.name: path.stat().st_mtime_ns for path in damaged.glob("*.tar")}
    tar = damaged / "shard-00002.tar"
    data = bytearray(before[tar.name])
    data[700] ^= 4
    tar.write_bytes(data)
    (damaged / "shard-00001.tar").unlink()
    export_webdataset(open_cache(tiny_cache), damaged, layout)  # type: ignore[arg-type]
    assert contents(damaged) == before


def test_another_export_is_left_alone(damaged: Path, exported: Path, tiny_cache: Path, fine_cache: Path) -> None:
    before, other = contents(damaged), next(name for name in LAYOUTS if name != exported.name)
    with pytest.raises(CacheError, match=f"with layout {exported.name}, this is .* with layout {other}"):
        export_webdataset(open_cache(tiny_cache), damaged, other)  # type: ignore[arg-type]
    with pytest.raises(CacheError, match="holds an export of the cache"):
        export_webdataset(open_cache(fine_cache), damaged, exported.name)  # type: ignore[arg-type]
    (damaged / INDEX).write_bytes(b"{")
    with pytest.raises(CacheError, match="no export that goes on"):
        export_webdataset(open_cache(tiny_cache), damaged, exported.name)  # type: ignore[arg-type]
    assert contents(damaged) == before | {INDEX: b"{"}


def test_the_command_says_what_it_wrote(invoke: Callable[..., Result], tiny_cache: Path, tmp_path: Path) -> None:
    words = ["export", str(tiny_cache), "--format", "webdataset", "--layout", "blocks", "--out", str(tmp_path / "out")]
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    assert "4 tars" in result.output and "100 rows, layout blocks" in result.output


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("shard-{00000..00002}.tar", r"does not name the 4 tars of .*index\.json: it lacks shard-00003\.tar"),
        ("shard-{00000..00004}.tar", r"it names shard-00004\.tar, which the index does not hold"),
        ("{a,b}/shard-00000.tar", "names tars in several folders"),
    ],
)
def test_a_pattern_that_does_not_cover_the_index_is_an_error(exported: Path, pattern: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        open_shards(f"{exported}/{pattern}")


def test_a_pattern_reads_as_the_folder(exported: Path, tiny_cache: Path) -> None:
    for location in (f"{exported}/shard-{{00000..00003}}.tar", exported / "shard-0000{0,1,2,3}.tar"):
        np.testing.assert_array_equal(open_shards(location).read("label"), open_cache(tiny_cache).read("label"))


def test_a_pattern_without_an_index_is_an_error(damaged: Path) -> None:
    (damaged / INDEX).unlink()
    with pytest.raises(CacheError, match=r"is not an export: .*index\.json is missing"):
        open_shards(f"{damaged}/shard-{{00000..00003}}.tar")


def test_a_missing_or_cut_tar_is_noticed_before_anything_is_read(damaged: Path) -> None:
    tar = damaged / "shard-00003.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(CorruptError, match="it is cut"):
        open_shards(damaged)
    tar.unlink()
    with pytest.raises(IncompleteError, match="is missing"):
        open_shards(f"{damaged}/shard-{{00000..00003}}.tar")


def test_an_index_of_other_tars_is_an_error(damaged: Path) -> None:
    text = (damaged / INDEX).read_text()
    index = parse_canonical(Index, text.replace('"rows":[32,64]', '"rows":[32,63]').encode(), INDEX)
    (damaged / INDEX).write_text(canonical_json(dataclasses.replace(index, sha256=index.checksum())))
    with pytest.raises(CorruptError, match="does not list one tar for each shard of rows"):
        open_shards(damaged)


def test_an_index_cannot_name_a_file_of_the_user(damaged: Path) -> None:
    index = parse_canonical(Index, (damaged / INDEX).read_bytes(), INDEX)
    tars = (dataclasses.replace(index.tars[0], sha256="../../.bashrc"), *index.tars[1:])
    forged = dataclasses.replace(index, tars=tars)
    (damaged / INDEX).write_text(canonical_json(dataclasses.replace(forged, sha256=forged.checksum())))
    with pytest.raises(CorruptError, match="where a sha256 must be"):
        open_shards(damaged)


def test_an_export_holds_one_block_at_a_time(tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However large the cache: nothing asks for more rows than a block has, and a tar is written as it is made."""
    cache, asked = open_cache(tiny_cache), []
    original = cache.read

    def read(name: str, rows: slice | None = None) -> np.ndarray:
        if name != "views/offset":
            assert rows is not None
            asked.append(rows.stop - rows.start)
        return original(name, rows)

    monkeypatch.setattr(cache, "read", read)
    export_webdataset(cache, tmp_path / "out", "blocks")
    assert max(asked) == block_rows(cache.spec.store) == 32


def test_blocks_are_whole_chunks_of_about_256_rows() -> None:
    from darht.cache.format.spec import StoreSpec

    sizes = [(1024, 128, 256), (1000, 125, 250), (512, 512, 512), (64, 16, 64), (2000, 100, 200), (4096, 1, 256)]
    for shard, chunk, block in sizes:
        assert block_rows(StoreSpec(rows_per_shard=shard, rows_per_chunk=chunk)) == block
