"""Views against a slow reference: pad, slice, mirror."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from darht.cache.format.apply_views import apply_views
from darht.cache.format.views import crop_flip, crop_flip_offsets
from darht.core.errors import ConfigError


def reference(image: np.ndarray, padding: int, dy: int, dx: int, flip: int) -> np.ndarray:
    """RandomCrop and RandomHorizontalFlip as a data loader does them: zeros around, a window, columns reversed."""
    height, width = image.shape[1:]
    padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
    window = padded[:, padding + dy : padding + dy + height, padding + dx : padding + dx + width]
    return window[:, :, ::-1] if flip else window


@settings(max_examples=40)
@given(
    channels=st.integers(1, 3),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    padding=st.integers(0, 4),
    dtype=st.sampled_from([np.uint8, np.int8, np.float32]),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_view_is_pad_slice_and_mirror(channels, height, width, padding, dtype, seed):
    generator = np.random.default_rng(seed)
    image = generator.integers(-128, 128, (channels, height, width)).astype(dtype)
    offsets = crop_flip_offsets(padding)
    views = apply_views(torch.from_numpy(image).expand(len(offsets), -1, -1, -1), torch.from_numpy(offsets)).numpy()
    assert views.dtype == dtype
    expected = np.stack([reference(image, padding, *map(int, offset)) for offset in offsets])
    np.testing.assert_array_equal(views, expected)
    np.testing.assert_array_equal(views[0], image)
    for offset, view in zip(offsets, views, strict=True):
        alone = crop_flip(image[None], offset)
        assert alone.dtype == dtype
        np.testing.assert_array_equal(alone[0], view)


def test_each_image_gets_its_own_view():
    images = torch.randint(0, 256, (5, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    offsets = torch.tensor([[0, 0, 0], [1, 0, 0], [0, -1, 1], [2, 2, 1], [-2, 1, 0]], dtype=torch.int8)
    expected = [reference(image.numpy(), 2, *offset.tolist()) for image, offset in zip(images, offsets, strict=True)]
    np.testing.assert_array_equal(apply_views(images, offsets).numpy(), np.stack(expected))


def test_views_of_the_view_of_a_perturbed_image_add_up():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 248, (9, 3, 5, 5), generator=generator)
    deltas = torch.randint(0, 8, (9, 3, 5, 5), generator=generator)
    offsets = torch.from_numpy(crop_flip_offsets(1, flip=False))
    assert torch.equal(
        apply_views(images + deltas, offsets), apply_views(images, offsets) + apply_views(deltas, offsets)
    )


@pytest.mark.parametrize(("padding", "flip", "count"), [(4, True, 162), (4, False, 81), (1, False, 9), (0, False, 1)])
def test_how_many_views_there_are(padding, flip, count):
    offsets = crop_flip_offsets(padding, flip=flip)
    assert offsets.shape == (count, 3) and offsets.dtype == np.int8
    assert len(np.unique(offsets, axis=0)) == count
    assert offsets[0].tolist() == [0, 0, 0]
    assert np.abs(offsets[:, :2]).max(initial=0) == padding and set(offsets[:, 2]) == ({0, 1} if flip else {0})


def test_the_order_of_all_views_is_pinned():
    assert crop_flip_offsets(1, flip=False)[:4].tolist() == [[0, 0, 0], [-1, -1, 0], [-1, 0, 0], [-1, 1, 0]]
    assert crop_flip_offsets(0).tolist() == [[0, 0, 0], [0, 0, 1]]
    digest = hashlib.sha256(crop_flip_offsets(4).tobytes()).hexdigest()
    assert digest == "e33f8790506a2714f564190ffbbe2cb6f83698b19ef42557d7437de9590e901c"
    digest = hashlib.sha256(crop_flip_offsets(4, count=20, seed=1).tobytes()).hexdigest()
    assert digest == "b33478525a75a8271a7d6cc7f58b658d435676fd14e9e4fc18af1decf57b119f"


@given(count=st.integers(1, 162), seed=st.integers(0, 99))
def test_a_subset_is_seeded_and_begins_with_the_identity(count, seed):
    subset = crop_flip_offsets(4, count=count, seed=seed)
    assert subset.shape == (count, 3) and subset[0].tolist() == [0, 0, 0]
    assert len(np.unique(subset, axis=0)) == count
    np.testing.assert_array_equal(subset, crop_flip_offsets(4, count=count, seed=seed))
    np.testing.assert_array_equal(subset, crop_flip_offsets(4, count=162, seed=seed)[:count])


def test_another_seed_gives_another_subset():
    assert crop_flip_offsets(4, count=20, seed=0).tolist() != crop_flip_offsets(4, count=20, seed=1).tolist()


@pytest.mark.parametrize("count", [0, -1, 10])
def test_more_views_than_there_are(count):
    with pytest.raises(ConfigError) as caught:
        crop_flip_offsets(1, flip=False, count=count)
    assert str(caught.value) == f"views.count must lie in 1..9 for padding 1; got {count}"
