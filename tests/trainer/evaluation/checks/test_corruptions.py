"""The 15 corruptions: every one at every severity, seeded by row, worse with severity."""

import numpy as np
import pytest

from darht.core.errors import ConfigError
from darht.trainer.evaluation.checks import corruptions
from darht.trainer.evaluation.checks.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from darht.trainer.evaluation.checks.weather import Draw, clipped_zoom, clouds, streak


def pictures(count=3, side=16):
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 256, (count, 3, side // 4, side // 4))
    return np.kron(smooth, np.ones((4, 4))).astype(np.uint8)


def test_there_are_fifteen():
    assert len(CORRUPTIONS) == 15


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_shape_range_and_seed(name):
    images = pictures()
    made = [corrupt(images, name, severity, rows=[4, 5, 6], seed=1) for severity in SEVERITIES]
    for one in made:
        assert one.shape == images.shape and one.dtype == np.uint8
    assert any((one != images).any() for one in made)
    alone = corrupt(images[1:2], name, 3, rows=[5], seed=1)
    assert (alone == made[2][1:2]).all()  # an image draws the same in any batch
    if name in ("gaussian noise", "snow", "elastic", "fog", "motion blur", "glass blur"):
        assert (corrupt(images, name, 3, rows=[4, 5, 6], seed=2) != made[2]).any()


@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - {"elastic", "frost", "glass blur"}))
def test_the_fifth_severity_changes_more_than_the_first(name):
    images = pictures(4, 32)
    first, fifth = (np.abs(corrupt(images, name, s, rows=range(4), seed=0).astype(int) - images).mean() for s in (1, 5))
    assert fifth > first


def test_noise_has_its_published_size():
    grey = np.full((1, 3, 64, 64), 128, dtype=np.uint8)
    assert corrupt(grey, "gaussian noise", 1, rows=[0], seed=0).std() / 255 == pytest.approx(0.04, rel=0.05)
    assert corrupt(grey, "shot noise", 3, rows=[0], seed=0).std() / 255 == pytest.approx((0.502 / 100) ** 0.5, rel=0.05)
    salted = corrupt(grey, "impulse noise", 5, rows=[0], seed=0)
    assert np.isin(salted, (0, 255)).mean() == pytest.approx(0.07, rel=0.15)


def test_brightness_and_contrast_by_hand():
    grey = np.full((1, 3, 8, 8), 100, dtype=np.uint8)
    assert (corrupt(grey, "brightness", 5, rows=[0], seed=0) == int(100 + 0.3 * 255)).all()
    two = grey.copy()
    two[..., 4:] = 200
    assert set(np.unique(corrupt(two, "contrast", 2, rows=[0], seed=0))) == {125, 175}


def test_zoom_and_streak_keep_a_plain_image():
    plain = np.full((2, 9, 9, 3), 0.25)
    assert clipped_zoom(plain, 1.13).shape == plain.shape
    assert clipped_zoom(plain, 1.13) == pytest.approx(plain)
    assert streak(plain, np.array([10.0, -60.0]), radius=4, sigma=2) == pytest.approx(plain)


def test_a_streak_is_half_a_gaussian_at_whole_pixels():
    point = np.zeros((3, 9, 9, 1))
    point[:, 4, 4] = 1.0
    made = streak(point, np.array([0.0, 90.0, 45.0]), radius=1, sigma=1.0)[..., 0]
    weights = np.exp(-(np.arange(3) ** 2) / 2)
    weights /= weights.sum()
    np.testing.assert_allclose(made[0, 4, [4, 3, 2]], weights)
    np.testing.assert_allclose(made[1, [4, 3, 2], 4], weights)
    np.testing.assert_allclose([made[2, 4, 4], made[2, 3, 3]], [weights[0], weights[1:].sum() - made[2, 2, 2]])
    assert made.reshape(3, -1).sum(1) == pytest.approx(1.0)


def test_elastic_moves_an_image_and_then_what_came_of_it(monkeypatch):
    """Severity 1 is the affine map alone; the others displace its result, so flat regions stay flat in both."""
    plain = np.full((1, 3, 16, 16), 90, dtype=np.uint8)
    assert all((corrupt(plain, "elastic", severity, rows=[0], seed=0) == 90).all() for severity in SEVERITIES)
    asked = []

    def looked_up(image, places, mode):
        asked.append((image.copy(), mode))
        return image / 2

    monkeypatch.setattr(corruptions, "_looked_up", looked_up)
    for severity, modes in ((1, ["mirror"]), (2, ["mirror", "reflect"])):
        asked.clear()
        corrupt(pictures(1), "elastic", severity, rows=[0], seed=0)
        assert [mode for _, mode in asked] == modes
        assert severity == 1 or (asked[1][0] == asked[0][0] / 2).all()


def test_clouds_fill_the_range():
    made = clouds(Draw([np.random.default_rng(seed) for seed in range(2)]), 10, 2.0)
    assert made.shape == (2, 10, 10)
    assert made.min() >= 0 and made.max() <= 1 and made.std() > 0.05


@pytest.mark.parametrize(("name", "severity"), [("rain", 1), ("fog", 0), ("fog", 6)])
def test_what_is_refused(name, severity):
    with pytest.raises(ConfigError, match="severity 1 to 5"):
        corrupt(pictures(), name, severity, rows=[0, 1, 2], seed=0)
