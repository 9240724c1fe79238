"""Views that lie apart: the same numbers, for zarr too, and an epoch reads, holds and sends one view of each row."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
import zarr
from built import sealed_cache

from darht.cache.admin.verify import verify
from darht.cache.read.dataset import CacheDataset
from darht.cache.read.draw import choose_views, view_logits
from darht.cache.read.loader import GIB, load_training_set
from darht.cache.read.reader import Cache, open_cache
from darht.cache.read.sizes import row_bytes
from darht.core.errors import CorruptError
from darht.core.storage import LocalStorage

CPU, VIEWS, CHUNK = torch.device("cpu"), 5, 4
CLEAN = "logits/cnn/clean"


class Counted(LocalStorage):
    """A folder that counts the bytes which are read of clean logits."""

    bytes_read = 0

    def read_tagged(self, key: str, start: int = 0, stop: int | None = None) -> tuple[bytes, str] | None:
        found = super().read_tagged(key, start, stop)
        if found is not None and "/clean/c/" in key:
            self.bytes_read += len(found[0])
        return found


@pytest.fixture(scope="module")
def folders(tiny_cache_config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same cache with views together and apart."""
    config: dict[str, Any] = copy.deepcopy(yaml.safe_load(tiny_cache_config.read_text()))
    config["data"]["limit"], config["views"]["count"], config["attacks"] = 60, VIEWS, {}
    made = {}
    for name, by_view in (("together", False), ("apart", True)):
        config["store"] = {"rows_per_shard": 16, "rows_per_chunk": CHUNK, "by_view": by_view}
        made[name] = sealed_cache(config, tmp_path_factory.mktemp(name))
    return made


@pytest.fixture
def cache(folders: dict[str, Path]) -> Cache:
    return open_cache(Counted(folders["apart"]))


def test_the_numbers_are_those_of_views_together(cache: Cache, folders: dict[str, Path]) -> None:
    assert (cache.manifest.format_version, verify(folders["apart"])) == (2, [])
    together, group = open_cache(folders["together"]), zarr.open_group(folders["apart"] / "data.zarr", mode="r")
    for name in together.arrays:
        expected = together.read(name)
        np.testing.assert_array_equal(cache.read(name), expected)
        np.testing.assert_array_equal(cache.read(name, slice(3, 21)), expected[3:21])
        np.testing.assert_array_equal(group[name][...], expected)
    np.testing.assert_array_equal(
        cache.logits("vit", view=3, rows=slice(14, 35)), together.logits("vit", view=3)[14:35]
    )


def test_one_view_is_read_alone_and_trusted_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    cache = open_cache(Counted(folders["apart"]))
    shard = cache.folder.size(f"data.zarr/{CLEAN}/c/0/0/0") or 0
    cache.logits("cnn", view=2, rows=slice(0, 16))
    counted = cache.folder
    assert isinstance(counted, Counted) and counted.bytes_read <= 2 * shard / VIEWS  # for its sha256, and the rows
    cache.logits("cnn", view=2, rows=slice(0, 16))
    assert counted.bytes_read <= 3 * shard / VIEWS


def test_damage_of_another_view_is_no_matter_and_its_own_is_found(folders: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    shutil.copytree(folders["apart"], tmp_path / "copy")
    path = tmp_path / "copy" / "data.zarr" / CLEAN / "c" / "0" / "0" / "0"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # in view 2 of 5
    path.write_bytes(data)
    cache = open_cache(tmp_path / "copy")
    cache.logits("cnn", view=1, rows=slice(0, 16))
    with pytest.raises(CorruptError, match="does not have the sha256 that was sealed"):
        cache.logits("cnn", view=2, rows=slice(0, 16))
    assert len(verify(tmp_path / "copy")) == 1


def test_an_epoch_reads_one_view_and_gives_what_was_said_about_it(cache: Cache) -> None:
    budget = 2.6 * 30 * row_bytes(cache, adversarial=False, one_view=True) / GIB
    dataset = CacheDataset(cache, batch_size=8, memory_gib=budget, seed=3, drop_last=False)
    assert dataset.plan.kind == "streamed"
    said = {name: np.stack([cache.logits(name, view=view) for view in range(VIEWS)], axis=1) for name in cache.teachers}
    counted, whole = cache.folder, sum(record.size for record in cache.manifest.shards if "/clean" in record.array)
    assert isinstance(counted, Counted)
    for epoch in (0, 1):
        counted.bytes_read = 0
        dataset.set_epoch(epoch)
        seen: dict[int, int] = {}
        for batch in dataset:
            assert batch.teacher_logits is not None
            for t, name in enumerate(cache.teachers):
                np.testing.assert_array_equal(
                    batch.teacher_logits[:, t], said[name][batch.rows, batch.views].astype("f4")
                )
            seen |= dict(zip(batch.rows.tolist(), batch.views.tolist(), strict=True))
        for row, view in seen.items():
            assert seen.get(row // CHUNK * CHUNK, view) == view  # neighbours of one chunk show the same view
        assert len(set(seen.values())) > 1
        assert counted.bytes_read <= 2 * whole / VIEWS  # of this epoch, and of the next one's first window


def test_what_is_sent_is_one_view(cache: Cache) -> None:
    data = load_training_set(cache, device=CPU, adversarial=False, budget_gib=1)
    at = torch.tensor([5, 59, 0, 31])
    views = choose_views(data, at, seed=1, epoch=2)
    sent = data.take_views(at, views[:, None])
    here = torch.arange(4)
    assert sent.clean.shape == (4, 1, 2, 10)
    assert torch.equal(choose_views(sent, here, seed=1, epoch=2), views)
    assert torch.equal(view_logits(sent, here, views), view_logits(data, at, views))
