"""How many bytes the teachers' answers take: a size is the same on every machine, so it is asserted."""

import numpy as np

from darht.cache.format.layout import ArrayLayout, layouts
from darht.cache.format.spec import CacheSpec, DataSpec, PrecisionSpec, StoreSpec, TeacherSpec, ViewSpec
from darht.cache.format.zarr_arrays import encode_shard
from darht.core.preprocessing import Preprocessing


def cifar_spec(rows: int, teachers: int) -> CacheSpec:
    """CIFAR-10 with all 162 crops and flips, cut as by default."""
    teacher = TeacherSpec("resnet18", {}, Preprocessing(), 10, "0" * 64, "robust")
    return CacheSpec(
        data=DataSpec("cifar10", "train", rows, (3, 32, 32), tuple("0123456789"), "0" * 64, 0.02),
        views=ViewSpec("crop-flip", 4, True, 162),
        teachers={f"t{number}": teacher for number in range(teachers)},
        attacks={},
        store=StoreSpec(),
        precision=PrecisionSpec(),
        seed=0,
    )


def stored(array: ArrayLayout) -> int:
    """Bytes of all shards; the whole ones are all of one size, since answers are not compressed."""
    generator = np.random.default_rng(0)

    def size(shard: int) -> int:
        rows = array.rows(shard)
        values = generator.normal(0, 5, (rows.stop - rows.start, *array.shape[1:])).astype(array.dtype)
        return len(encode_shard(array, shard, values))

    last = array.shards - 1
    return last * size(0) + size(last)


def test_all_views_of_cifar_take_less_than_70_bytes_per_row_and_view_for_three_teachers():
    rows, views = 50_000, 162
    arrays = layouts(cifar_spec(rows, teachers=3))
    assert arrays["views/offset"].shape == (views, 3)
    total = sum(stored(array) for name, array in arrays.items() if name.endswith("/clean"))
    per_view = total / (rows * views)
    assert 60 <= per_view < 60.1  # 3 teachers x 10 classes x 2 bytes, and a checksum for every 128 rows
    assert per_view < 70
