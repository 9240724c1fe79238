"""Resized crops: the same bits in numpy and torch, beside Pillow's and torch's own, and boxes that stay inside."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from darht.cache.format.boxes import draw_boxes, ratio_table
from darht.cache.format.resample import centred, filter_taps, resample, resample_batch, resample_by_gathers
from darht.cache.format.spec import ViewSpec

VIEWS = ViewSpec("resized-crop", 0, True, 10, 24, (0.25, 1.0), (0.75, 1.333))


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@settings(max_examples=60)
@given(st.integers(1, 300), st.integers(1, 64))
def test_weights_sum_to_one_and_lie_inside(length: int, size: int):
    position, weights = filter_taps(length, size)
    assert (weights.sum(1) == 1 << 22).all() and (weights >= 0).all()
    assert position.min() >= 0 and position.max() < length
    if length == size:
        assert (position[weights > 0] == np.arange(size)).all()


def test_golden_taps_and_pixels():
    position, weights = filter_taps(5, 3)  # the triangle has 5/3 pixels to each side: 4/7 and 3/7, then 2/9, 5/9, 2/9
    assert (position * (weights > 0)).tolist() == [[0, 1, 0, 0], [1, 2, 3, 0], [3, 4, 0, 0]]
    assert weights.tolist() == [[2396745, 1797559, 0, 0], [932068, 2330168, 932068, 0], [1797559, 2396745, 0, 0]]
    image = np.arange(75, dtype=np.uint8).reshape(3, 5, 5)
    assert resample(image, np.array([0, 0, 5, 5, 0]), 3)[0].tolist() == [[2, 4, 6], [10, 12, 14], [18, 20, 22]]
    mirrored = [[34, 33, 31, 30], [37, 36, 34, 33], [41, 40, 38, 37], [44, 43, 41, 40]]
    assert resample(image, np.array([1, 0, 3, 5, 1]), 4)[1].tolist() == mirrored


@pytest.mark.parametrize("size", [24, 40, 61])
def test_numpy_and_both_ways_of_torch_give_the_same_bits(size: int):
    images, boxes = pixels(12, 3, 41, 53), draw_boxes(np.tile((41, 53), (12, 1)), np.arange(12), VIEWS, 3)
    for view in range(4):
        own = torch.from_numpy(boxes[:, view])
        expected = np.stack([resample(image, box, size) for image, box in zip(images, boxes[:, view], strict=True)])
        for way in (resample_batch, resample_by_gathers):
            np.testing.assert_array_equal(way(torch.from_numpy(images), own, size).numpy(), expected)


def test_beside_pillow_and_torch():
    """Pillow's bits where it resizes rows first, as it does unless the other order is cheaper; one level from them
    otherwise, and two from torch's (which torchvision calls): its weights have 16 bits.
    """
    images, boxes = pixels(20, 3, 41, 53), draw_boxes(np.tile((41, 53), (20, 1)), np.arange(20), VIEWS, 1)
    same = 0
    for image, own in zip(images, boxes[:, 1:].reshape(-1, 9, 5)[:, 0], strict=True):
        top, left, height, width, flip = own.tolist()
        cut = np.ascontiguousarray(image[:, top : top + height, left : left + width])
        found = resample(image, own, 24)[:, :, :: -1 if flip else 1].astype(int)
        resized = Image.fromarray(cut.transpose(1, 2, 0)).resize((24, 24), Image.Resampling.BILINEAR)
        apart = np.abs(np.asarray(resized).transpose(2, 0, 1) - found)
        assert apart.max() <= 1
        same += not apart.any()
        options = {"size": (24, 24), "mode": "bilinear", "antialias": True}
        theirs = torch.nn.functional.interpolate(torch.from_numpy(cut)[None], **options)[0].numpy()
        assert np.abs(theirs - found).max() <= 2
    assert same >= 10


def test_a_box_of_the_whole_image_at_its_own_size_is_the_image():
    image = pixels(3, 7, 7)
    np.testing.assert_array_equal(resample(image, np.array([0, 0, 7, 7, 0]), 7), image)
    np.testing.assert_array_equal(resample(image, np.array([0, 0, 7, 7, 1]), 7), image[:, :, ::-1])


def test_view_0_is_the_centred_square():
    images = pixels(2, 3, 6, 11)
    np.testing.assert_array_equal(centred(images, 6), images[..., 2:8])
    assert centred(images[:0], 6).shape == (0, 3, 6, 6)


@settings(max_examples=40)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 10**7), st.integers(0, 9))
def test_boxes_lie_inside_and_depend_on_seed_row_and_view_alone(height: int, width: int, row: int, seed: int):
    boxes = draw_boxes(np.array([[height, width]]), np.array([row]), VIEWS, seed)[0]
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:4] >= 1).all()
    assert (boxes[:, 0] + boxes[:, 2] <= height).all() and (boxes[:, 1] + boxes[:, 3] <= width).all()
    few = ViewSpec(**{**vars(VIEWS), "count": 3})
    rows = np.array([row + 1, row])
    np.testing.assert_array_equal(draw_boxes(np.tile((height, width), (2, 1)), rows, few, seed)[1], boxes[:3])


def test_golden_boxes():
    boxes = draw_boxes(np.array([[64, 64]]), np.array([0]), ViewSpec(**{**vars(VIEWS), "count": 4}), 0)
    assert boxes[0].tolist() == [[0, 0, 64, 64, 0], [14, 4, 36, 41, 1], [0, 0, 61, 62, 1], [8, 18, 42, 39, 0]]
    assert ratio_table(0.75, 1.333)[[0, 100, 255]].tolist() == [49152, 61587, 87359]


def test_boxes_have_the_shares_and_ratios_that_are_asked_for():
    boxes = draw_boxes(np.tile((200, 200), (400, 1)), np.arange(400), VIEWS, 0)[:, 1:].reshape(-1, 5).astype(float)
    share, ratio = boxes[:, 2] * boxes[:, 3] / 200**2, boxes[:, 3] / boxes[:, 2]
    assert 0.24 < share.min() < 0.26 and 0.97 < share.max() <= 1 and 0.55 < share.mean() < 0.65
    assert 0.74 < ratio.min() < 0.77 and 1.3 < ratio.max() < 1.35
    assert 0.45 < boxes[:, 4].mean() < 0.55
