"""The format without darht: whoever has zarr and numpy reads a cache, and the layout on disk is the documented one."""

import hashlib
import json
from pathlib import Path

import numpy as np
import zarr

from darht.cache.read.reader import open_cache


def read_cache(folder: Path) -> dict[str, np.ndarray]:
    """Every array of a sealed cache by name, checked against the manifest. It knows nothing of darht."""
    spec_bytes = (folder / "spec.json").read_bytes()
    manifest = json.loads((folder / "manifest.json").read_bytes())
    if manifest["format_version"] != 1:
        raise ValueError(f"format version {manifest['format_version']}")
    if hashlib.sha256(spec_bytes).hexdigest() != manifest["fingerprint"]:
        raise ValueError("the manifest belongs to another spec")
    body = {key: value for key, value in manifest.items() if key not in ("root_hash", "metadata")}
    body = json.dumps(body, sort_keys=True, separators=(",", ":")) + "\n"
    if hashlib.sha256(body.encode()).hexdigest() != manifest["root_hash"]:
        raise ValueError("the manifest was changed")
    for shard in manifest["shards"]:
        data = (folder / shard["path"]).read_bytes()
        if (len(data), hashlib.sha256(data).hexdigest()) != (shard["size"], shard["sha256"]):
            raise ValueError(f"{shard['path']} was changed")
    group = zarr.open_group(folder / "data.zarr", mode="r")
    return {name: group[name][...] for name in {shard["array"] for shard in manifest["shards"]}}


def adversarial(arrays: dict[str, np.ndarray], attack: str, row: int, view: int) -> np.ndarray:
    """The adversarial image uint8 `[3, H, W]` that the teachers were asked about: the view plus its perturbation."""
    dy, dx, flip = (int(value) for value in arrays["views/offset"][view])
    image = arrays["image"][row]
    reach = max(abs(dy), abs(dx))
    padded = np.pad(image, ((0, 0), (reach, reach), (reach, reach)))
    height, width = image.shape[1:]
    moved = padded[:, reach + dy : reach + dy + height, reach + dx : reach + dx + width]
    moved = moved[:, :, ::-1] if flip else moved
    return (moved.astype(np.int16) + arrays[f"delta/{attack}"][row, view]).astype(np.uint8)


def test_another_reader_reads_the_same(tiny_cache: Path):
    cache, arrays = open_cache(tiny_cache), read_cache(tiny_cache)
    assert set(arrays) == set(cache.arrays)
    for name, array in arrays.items():
        expected = cache.read(name)
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected)


def test_the_adversarial_image_is_view_plus_delta(tiny_cache: Path):
    import torch

    from darht.cache.format.apply_views import apply_views

    cache, arrays = open_cache(tiny_cache), read_cache(tiny_cache)
    for row, view in [(0, 0), (31, 1), (99, 1)]:
        offset = torch.from_numpy(cache.read("views/offset")[[view]])
        moved = apply_views(torch.from_numpy(cache.read("image")[[row]]), offset)[0].short()
        expected = moved + torch.from_numpy(cache.read("delta/pgd-vit")[row, view])
        np.testing.assert_array_equal(adversarial(arrays, "pgd-vit", row, view), expected.to(torch.uint8).numpy())


def test_the_files_are_those_of_the_design(tiny_cache: Path):
    files = {path.relative_to(tiny_cache).as_posix() for path in tiny_cache.rglob("*") if path.is_file()}
    expected = {"spec.json", "origin.json", "manifest.json", "data.zarr/zarr.json"}
    expected |= {f"data.zarr/{group}/zarr.json" for group in ("views", "delta", "logits", "logits/cnn", "logits/vit")}
    for name, array in open_cache(tiny_cache).arrays.items():
        zeros = "/0" * (len(array.shape) - 1)
        expected.add(f"data.zarr/{name}/zarr.json")
        expected |= {f"data.zarr/{name}/c/{shard}{zeros}" for shard in range(array.shards)}
        expected |= {f"commits/{name}/{shard:05d}.json" for shard in range(array.shards)}
    assert files == expected


def test_every_chunk_of_every_array_has_a_checksum(tiny_cache: Path):
    for name, array in open_cache(tiny_cache).arrays.items():
        meta = json.loads((tiny_cache / "data.zarr" / name / "zarr.json").read_text())
        codecs = [codec["name"] for codec in meta["codecs"][0]["configuration"]["codecs"]]
        assert codecs == (["bytes", "zstd", "crc32c"] if array.packed else ["bytes", "crc32c"])


def test_the_spec_is_canonical_and_holds_no_paths(tiny_cache: Path, tiny_teachers: dict[str, Path]):
    text = (tiny_cache / "spec.json").read_text()
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":")) + "\n"
    assert not any(str(folder) in text for folder in tiny_teachers.values())


def test_the_other_reader_notices_changes(copied: Path):
    path = copied / "data.zarr" / "label" / "c" / "0"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    try:
        read_cache(copied)
    except ValueError as error:
        assert str(error) == "data.zarr/label/c/0 was changed"
    else:
        raise AssertionError("a changed shard was read")
