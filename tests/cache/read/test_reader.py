"""Reading a sealed cache, and refusing one that is not whole."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from darht.cache.builder.seal import seal
from darht.cache.format.commit import read_commit, write_commit
from darht.cache.format.manifest import read_manifest, read_spec, root_hash
from darht.cache.format.store import Store
from darht.cache.read.reader import open_cache
from darht.core.config import canonical_json, fingerprint
from darht.core.errors import CacheError, ConfigError, CorruptError, IncompleteError
from darht.core.storage import open_storage


def test_what_an_open_cache_offers(tiny_cache: Path):
    cache = open_cache(tiny_cache)
    assert cache.rows == 100
    assert cache.root_hash == json.loads((tiny_cache / "manifest.json").read_text())["root_hash"]
    assert cache.size("label") == sum(path.stat().st_size for path in (tiny_cache / "data.zarr/label/c").iterdir())
    assert (cache.teachers, cache.attacks) == (tuple(cache.spec.teachers), tuple(cache.spec.attacks))
    assert cache.classes == tuple("0123456789")
    assert list(cache.arrays)[:4] == ["source_index", "label", "image", "views/offset"]


@pytest.mark.parametrize(
    "rows",
    [slice(0, 100), slice(31, 33), slice(99, 100), slice(None), slice(90, None), slice(-3, None), slice(95, 500)],
)
def test_slices_mean_what_they_mean_elsewhere(tiny_cache: Path, rows):
    cache = open_cache(tiny_cache)
    np.testing.assert_array_equal(cache.read("source_index", rows), np.arange(100)[rows])
    np.testing.assert_array_equal(cache.read("image", rows), cache.read("image")[rows])


def test_an_array_that_is_not_there(tiny_cache: Path):
    with pytest.raises(ConfigError, match="has no array 'logits/bit/clean'; it has source_index, label, image"):
        open_cache(tiny_cache).read("logits/bit/clean")


def test_a_folder_that_is_no_cache(tmp_path: Path):
    with pytest.raises(CacheError, match="is not a cache"):
        open_cache(tmp_path)


def test_an_unsealed_cache(copied: Path):
    (copied / "manifest.json").unlink()
    with pytest.raises(IncompleteError, match="is not sealed"):
        open_cache(copied)


def test_a_missing_shard(copied: Path):
    (copied / "data.zarr/image/c/2/0/0/0").unlink()
    with pytest.raises(IncompleteError, match=r"image/c/2/0/0/0 is missing: run darht-cache build again"):
        open_cache(copied)


@pytest.mark.parametrize("keep", [0, 17, -1])
def test_a_cut_shard(copied: Path, keep):
    path = copied / "data.zarr/logits/cnn/clean/c/1/0/0"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptError) as caught:
        open_cache(copied)
    left = keep % size if keep else 0
    assert str(caught.value) == f"{path} has {left} bytes, the manifest says {size}; build again"


@pytest.mark.parametrize("name", ["label", "image", "delta/pgd-vit", "logits/vit/clean", "views/offset"])
def test_a_flipped_byte_is_noticed_when_it_is_read(copied: Path, name):
    path = next(path for path in sorted((copied / "data.zarr" / name / "c").rglob("*")) if path.is_file())
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    cache = open_cache(copied)
    with pytest.raises(
        CorruptError, match=rf"of {name}\) does not have the sha256 that was sealed: run darht-cache build"
    ):
        cache.read(name)
    with pytest.raises(CorruptError, match=f"of {name} do not decode"):  # and the store's own checksum says it too
        Store(copied).read(cache.arrays[name], slice(0, cache.arrays[name].shape[0]))


def test_logits_that_are_not_finite_do_not_pass_for_data(copied: Path):
    """A broken writer whose hashes all fit: the values themselves are the last line."""
    array, store = open_cache(copied).arrays["logits/vit/clean"], Store(copied)
    values = store.read(array, slice(32, 64)).copy()
    values[3, 4, 5] = np.nan
    size, sha256, _ = store.write(array, 1, values)
    commit = read_commit(open_storage(copied), array, 1)
    assert commit is not None
    write_commit(open_storage(copied), array, dataclasses.replace(commit, size=size, sha256=sha256))
    seal(copied)
    with pytest.raises(CorruptError, match=r"logits/vit/clean holds values that are not finite in rows 0\.\.99"):
        open_cache(copied).read(array.name)


def test_the_origin_may_be_absent(copied: Path):
    (copied / "origin.json").unlink()
    assert open_cache(copied).origin() == {}


def test_another_format_version_has_another_fingerprint(copied: Path):
    spec = json.loads((copied / "spec.json").read_text())
    assert spec["format_version"] == 1
    assert fingerprint(spec) != fingerprint({**spec, "format_version": 2})
    (copied / "spec.json").write_text(canonical_json({**spec, "format_version": 2}))
    with pytest.raises(CacheError):
        open_cache(copied)


def forge(folder: Path, **changes: object) -> None:
    """A manifest that names its own root hash and says something that no seal writes."""
    manifest = dataclasses.replace(read_manifest(folder, read_spec(folder)), **changes)
    (folder / "manifest.json").write_text(canonical_json(dataclasses.replace(manifest, root_hash=root_hash(manifest))))


@pytest.mark.parametrize(
    "what", ["lacks a shard", "has one twice", "shard elsewhere", "metadata elsewhere", "hash", "holdout"]
)
def test_a_forged_manifest_is_one_line(copied: Path, what):
    manifest = read_manifest(copied, read_spec(copied))
    first, *others = manifest.shards
    changes: dict[str, dict[str, object]] = {
        "lacks a shard": {"shards": tuple(others)},
        "has one twice": {"shards": (first, first, *others[1:])},
        "shard elsewhere": {"shards": (dataclasses.replace(first, path=f"../cache/{first.path}"), *others)},
        "metadata elsewhere": {"metadata": (dataclasses.replace(manifest.metadata[0], path="/etc/zarr.json"),)},
        "hash": {"shards": (dataclasses.replace(first, sha256="../../.bashrc"), *others)},
        "holdout": {"holdout": (5, 100)},
    }
    forge(copied, **changes[what])
    with pytest.raises(CorruptError, match=r"manifest\.json .+ run darht-cache seal again") as caught:
        open_cache(copied)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["teachers", "attacks"])
def test_a_spec_that_names_a_folder_elsewhere(copied: Path, field):
    spec = json.loads((copied / "spec.json").read_text())
    spec[field] = {f"../../{name}": value for name, value in spec[field].items()}
    (copied / "spec.json").write_text(canonical_json(spec))
    with pytest.raises(CorruptError, match=r"named by letters, digits, '_', '\.' or '-'; got '\.\./\.\./"):
        open_cache(copied)


@pytest.mark.parametrize(
    "text", ['{"teachers": 5}', "[" * 2000 + "]" * 2000, "7", '{"data_root": 3}', '{"image_size": "a"}', "{"]
)
def test_a_damaged_origin_is_one_line(copied: Path, text):
    (copied / "origin.json").write_text(text)
    with pytest.raises(CorruptError, match=r"origin\.json .+: run darht-cache build again") as caught:
        open_cache(copied).origin()
    assert "\n" not in str(caught.value)
