"""Which arrays a spec asks for, and what each depends on."""

import dataclasses
import math
import re

import pytest

from darht.cache.format.layout import ArrayLayout, check_chunks, label_dtype, layouts
from darht.cache.format.manifest import read_spec
from darht.cache.format.spec import CacheSpec, JacobianSpec
from darht.core.errors import ConfigError


@pytest.fixture(scope="module")
def spec(tiny_cache) -> CacheSpec:
    return read_spec(tiny_cache)


@pytest.mark.parametrize(("classes", "dtype"), [(2, "int16"), (1000, "int16"), (32_767, "int16"), (32_768, "int32")])
def test_label_dtype(classes, dtype):
    assert label_dtype(classes) == dtype


def test_the_arrays_of_the_design(spec):
    found = {name: (array.dtype, array.shape, array.packed) for name, array in layouts(spec).items()}
    assert found == {
        "source_index": ("int64", (100,), False),
        "label": ("int16", (100,), False),
        "image": ("uint8", (100, 3, 8, 8), True),
        "views/offset": ("int8", (9, 3), False),
        "delta/pgd-cnn": ("int8", (100, 1, 3, 8, 8), True),
        "delta/pgd-vit": ("int8", (100, 2, 3, 8, 8), True),
        "logits/cnn/clean": ("float16", (100, 9, 10), False),
        "logits/cnn/pgd-cnn": ("float16", (100, 1, 10), False),
        "logits/cnn/pgd-vit": ("float16", (100, 2, 10), False),
        "logits/vit/clean": ("float16", (100, 9, 10), False),
        "logits/vit/pgd-cnn": ("float16", (100, 1, 10), False),
        "logits/vit/pgd-vit": ("float16", (100, 2, 10), False),
    }


def test_shards_share_their_row_blocks(spec):
    blocks = [slice(0, 32), slice(32, 64), slice(64, 96), slice(96, 100)]
    for name, array in layouts(spec).items():
        if name != "views/offset":
            assert [array.rows(shard) for shard in range(array.shards)] == blocks
    views = layouts(spec)["views/offset"]
    assert (views.shards, views.rows(0)) == (1, slice(0, 9))


def test_a_hole_in_floats_is_nan(spec):
    arrays = layouts(spec)
    assert math.isnan(arrays["logits/vit/clean"].fill_value)
    assert arrays["image"].fill_value == 0


def test_a_delta_says_what_its_units_are(spec):
    assert layouts(spec)["delta/pgd-cnn"].attributes == {"scale": 1.0, "eps": 32.0, "norm": "linf"}


def test_logits_can_be_float32(spec):
    exact = dataclasses.replace(spec, store=dataclasses.replace(spec.store, logits="float32"))
    assert layouts(exact)["logits/vit/clean"].dtype == "float32"


def changed(spec: CacheSpec, **fields) -> set[str]:
    """The arrays whose fingerprint moves with these fields."""
    old, new = layouts(spec), layouts(dataclasses.replace(spec, **fields))
    return {name for name in old if name in new and old[name].fingerprint != new[name].fingerprint}


def test_fingerprints_are_distinct(spec):
    arrays = layouts(spec).values()
    assert len({array.fingerprint for array in arrays}) == len(arrays)


def test_a_teacher_changes_its_logits_and_the_attacks_on_it(spec):
    teachers = {**spec.teachers, "vit": dataclasses.replace(spec.teachers["vit"], weights_sha256="0" * 64)}
    assert changed(spec, teachers=teachers) == {
        "delta/pgd-vit",
        "logits/cnn/pgd-vit",
        "logits/vit/clean",
        "logits/vit/pgd-cnn",
        "logits/vit/pgd-vit",
    }


def test_a_role_changes_no_bytes(spec):
    teachers = {**spec.teachers, "vit": dataclasses.replace(spec.teachers["vit"], role="vanilla")}
    assert changed(spec, teachers=teachers) == set()


def test_an_attack_changes_its_delta_and_the_logits_on_it(spec):
    parameters = {**spec.attacks["pgd-cnn"].parameters, "steps": 3}
    attacks = {**spec.attacks, "pgd-cnn": dataclasses.replace(spec.attacks["pgd-cnn"], parameters=parameters)}
    assert changed(spec, attacks=attacks) == {"delta/pgd-cnn", "logits/cnn/pgd-cnn", "logits/vit/pgd-cnn"}


def test_a_new_teacher_or_attack_changes_nothing_that_is_there(spec):
    assert changed(spec, teachers={**spec.teachers, "third": spec.teachers["cnn"]}) == set()
    assert changed(spec, attacks={**spec.attacks, "third": spec.attacks["pgd-cnn"]}) == set()


def test_images_change_everything(spec):
    assert changed(spec, data=dataclasses.replace(spec.data, sha256="0" * 64)) == set(layouts(spec))


def test_precision_changes_what_is_computed(spec):
    precision = dataclasses.replace(spec.precision, amp=True)
    assert changed(spec, precision=precision) == {n for n in layouts(spec) if n.startswith(("delta/", "logits/"))}


def test_chunks_fit_the_codec():
    def array(rows: int) -> ArrayLayout:
        return ArrayLayout("image", "image", (10**9, 3, 32, 32), "uint8", rows, rows, True, "", {})

    most = (2**31 - 1) // 3072
    check_chunks({"image": array(most)})
    with pytest.raises(ConfigError) as caught:
        check_chunks({"image": array(most + 1)})
    assert str(caught.value) == (
        "store.rows_per_chunk is 699051, but chunks must be below 2 GiB and a row of image has 3072 bytes; "
        "write at most 699050"
    )


def test_a_jacobian_that_fits_no_memory_is_refused_with_its_numbers(spec):
    large = dataclasses.replace(
        spec,
        data=dataclasses.replace(spec.data, rows=1_281_167, image_shape=(3, 224, 224)),
        store=dataclasses.replace(spec.store, rows_per_shard=1024, rows_per_chunk=128),
        jacobians={"cnn": JacobianSpec(10)},
    )
    expected = (
        "the Jacobian of teacher 'cnn' takes 1,505,280 bytes a row, 1,928.5 GB in all and 1.5 GB a shard, which is "
        "computed in memory, at most 1.1 GB: leave it out and train with targets: clean, ask for fewer "
        "jacobians.classes, or lower store.rows_per_shard"
    )
    with pytest.raises(ConfigError, match=re.escape(expected)):
        check_chunks(layouts(large))
    check_chunks(layouts(dataclasses.replace(large, jacobians={"cnn": JacobianSpec(2)})))
