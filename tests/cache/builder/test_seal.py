"""The seal, and everything that must break it."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from darht.cache.builder.seal import holdout_rows, seal
from darht.cache.format.manifest import Manifest, ShardRecord, read_manifest, read_spec, root_hash
from darht.cache.read.reader import open_cache
from darht.core.config import canonical_json, fingerprint
from darht.core.errors import CacheError, CorruptError, IncompleteError


def test_sealing_again_gives_the_same_manifest(copied: Path):
    before = (copied / "manifest.json").read_bytes()
    seal(copied)
    assert (copied / "manifest.json").read_bytes() == before
    (copied / "manifest.json").unlink()
    seal(copied)
    assert (copied / "manifest.json").read_bytes() == before


def test_what_a_manifest_says(tiny_cache: Path):
    spec = read_spec(tiny_cache)
    manifest = read_manifest(tiny_cache, spec)
    assert (manifest.rows, manifest.format_version, manifest.fingerprint) == (100, 1, fingerprint(spec))
    assert manifest.holdout == holdout_rows(100, 0.1, 10) and len(manifest.holdout) == 10
    assert len(manifest.shards) == 11 * 4 + 1
    assert {shard.path for shard in manifest.shards} == {
        path.relative_to(tiny_cache).as_posix()
        for path in (tiny_cache / "data.zarr").rglob("*")
        if path.is_file() and path.name != "zarr.json"
    }


def test_the_root_hash_is_pinned():
    shards = (ShardRecord("label", 0, "data.zarr/label/c/0", 12, "a" * 64),)
    manifest = Manifest("b" * 64, 3, (1,), shards, "whatever")
    assert root_hash(manifest) == "b883023f7e4b6c1758c8964801aac569aa6b3600f5863421852f8e805ea41e9b"
    assert root_hash(dataclasses.replace(manifest, root_hash="")) == root_hash(manifest)


@pytest.mark.parametrize(
    "fields",
    [
        {"fingerprint": "c" * 64},
        {"rows": 4},
        {"holdout": ()},
        {"shards": ()},
    ],
)
def test_the_root_hash_covers_every_field(fields):
    manifest = Manifest("b" * 64, 3, (1,), (ShardRecord("label", 0, "x", 12, "a" * 64),), "")
    assert root_hash(dataclasses.replace(manifest, **fields)) != root_hash(manifest)


def test_a_build_that_is_not_finished(copied: Path):
    (copied / "commits/label/00002.json").unlink()
    with pytest.raises(IncompleteError) as caught:
        seal(copied)
    assert str(caught.value) == (
        f"{copied}: 1 of 45 units are missing, first: label shard 2 has no commit record; run darht-cache build again"
    )
    path = copied / "data.zarr/logits/vit/clean/c/3/0/0"
    path.unlink()
    with pytest.raises(
        CorruptError, match=r"1 of 45 units are corrupt, first: .*c/3/0/0 is missing although its record"
    ):
        seal(copied)


def test_what_describes_the_arrays_is_sealed_but_not_part_of_the_identity(copied: Path):
    before = seal(copied)
    path = copied / "data.zarr/label/zarr.json"
    text = path.read_text()
    assert {file.path for file in before.metadata} == {
        found.relative_to(copied).as_posix() for found in (copied / "data.zarr").rglob("zarr.json")
    }
    path.write_text(text.replace("int16", "int32"))
    with pytest.raises(CorruptError, match=r"label/zarr\.json is not what was sealed"):
        open_cache(copied)
    assert seal(copied) == before
    assert path.read_text() == text
    open_cache(copied)


def test_a_manifest_of_another_version_is_refused(copied: Path):
    path = copied / "manifest.json"
    path.write_text(path.read_text().replace('"format_version":1', '"format_version":3'))
    with pytest.raises(CorruptError, match=r"format_version is 3, this darht knows 1\.\.2"):
        open_cache(copied)


def test_a_flipped_bit_in_any_array(copied: Path):
    shards = [path for path in (copied / "data.zarr").rglob("*") if path.is_file() and path.name != "zarr.json"]
    for path in shards[::5]:
        data = path.read_bytes()
        path.write_bytes(bytes([data[0] ^ 4]) + data[1:])
        with pytest.raises(CorruptError, match="does not have the sha256 of its record"):
            seal(copied)
        path.write_bytes(data)
    seal(copied)


def test_a_folder_that_is_no_cache(tmp_path: Path):
    with pytest.raises(CacheError, match=r"is not a cache: .*spec\.json is missing; darht-cache build SPEC\.yaml"):
        seal(tmp_path)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"{}", b"\xff"])
def test_a_damaged_spec(copied: Path, damage):
    (copied / "spec.json").write_bytes(damage)
    with pytest.raises(CorruptError, match=r"spec\.json is not a cache spec"):
        read_spec(copied)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"{}", b"\xff"])
def test_a_damaged_manifest(copied: Path, damage):
    (copied / "manifest.json").write_bytes(damage)
    with pytest.raises(CorruptError, match=r"manifest\.json is not a manifest: .*; run darht-cache seal again"):
        read_manifest(copied, read_spec(copied))


def test_no_manifest(copied: Path):
    (copied / "manifest.json").unlink()
    with pytest.raises(IncompleteError, match=r"is not sealed: .*; finish it with darht-cache build, then seal"):
        read_manifest(copied, read_spec(copied))


def test_an_edited_manifest(copied: Path):
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["holdout"] = []
    (copied / "manifest.json").write_text(canonical_json(manifest))
    with pytest.raises(CorruptError, match="does not have the root hash it names"):
        read_manifest(copied, read_spec(copied))


def test_the_manifest_of_another_spec(copied: Path):
    spec = json.loads((copied / "spec.json").read_text())
    spec["seed"] = 99
    (copied / "spec.json").write_text(canonical_json(spec))
    with pytest.raises(CorruptError, match="belongs to another spec"):
        read_manifest(copied, read_spec(copied))


def test_the_holdout_of_rules_1_is_pinned_and_does_not_move_with_more_rows():
    assert holdout_rows(60, 0.1, 0, rules=1) == (8, 15, 18, 34, 47, 54, 55, 57)
    few, many = holdout_rows(60, 0.1, 0, rules=1), holdout_rows(600, 0.1, 0, rules=1)
    assert tuple(row for row in many if row < 60) == few
    assert holdout_rows(60, 0.1, 1, rules=1) != few


def test_the_holdout_is_pinned_and_takes_the_smallest_hashes():
    few = holdout_rows(60, 0.1, 0)
    assert few == (15, 18, 34, 47, 54, 57) and set(few) < set(holdout_rows(60, 0.1, 0, rules=1))
    assert set(few) < set(holdout_rows(60, 0.5, 0)) and holdout_rows(60, 0.1, 1) != few


@given(st.integers(1, 400), st.floats(0, 0.999), st.integers(0, 2**31))
def test_the_holdout_has_its_exact_count(rows, share, seed):
    held = holdout_rows(rows, share, seed)
    assert list(held) == sorted(set(held)) and all(0 <= row < rows for row in held)
    assert len(held) == min(math.floor(share * rows + 0.5), rows - 1)
    if rows == 1:
        assert held == ()


def test_five_per_cent_of_205_rows_are_ten():
    assert len(holdout_rows(205, 0.05, 0)) == 10


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5])
def test_the_holdout_of_rules_1_has_its_share(share):
    rows = holdout_rows(50_000, share, 0, rules=1)
    assert list(rows) == sorted(set(rows)) and all(0 <= row < 50_000 for row in rows)
    assert abs(len(rows) / 50_000 - share) <= 4 * np.sqrt(share * (1 - share) / 50_000)
