# SPDX-License-Identifier: Apache-2.0
"""Pictures, compared with plain numpy versions of what they should show."""

from anomaly_seg_ros.classes import CITYSCAPES_CLASSES, CITYSCAPES_PALETTE
from anomaly_seg_ros.visualize import (
    anomaly_u8, colour_bar, colour_labels, draw_outlines, heat_map, legend, overlay, panel)
import cv2
import numpy as np
import pytest

RANGE = (-4.0, 6.0)
SIZES = ((1, 1), (4, 1), (3, 70001), (200, 333), (512, 1024))


def detection(size_hw, seed=0):
    """Return image, labels, anomaly and mask of random content."""
    rng = np.random.default_rng(seed)
    return (rng.integers(0, 256, (*size_hw, 3), np.uint8),
            rng.integers(0, 19, size_hw, np.uint8),
            rng.normal(1, 4, size_hw).astype(np.float32),
            np.where(rng.random(size_hw) > 0.9, 255, 0).astype(np.uint8))


@pytest.mark.parametrize('size_hw', SIZES)
def test_labels_take_their_palette_colour_and_unlabelled_is_black(size_hw):
    labels = np.random.default_rng(1).choice(
        np.array([*range(19), 19, 254, 255], np.uint8), size_hw)
    table = np.zeros((256, 3), np.uint8)
    table[:19] = CITYSCAPES_PALETTE
    out = np.empty((*size_hw, 3), np.uint8)
    assert colour_labels(labels, CITYSCAPES_PALETTE, out) is out
    np.testing.assert_array_equal(out, table[labels])


@pytest.mark.parametrize('size_hw', SIZES)
def test_score_is_scaled_like_float64_and_saturates(size_hw):
    anomaly = detection(size_hw)[2]
    exact = (anomaly.astype(np.float64) - RANGE[0]) / (RANGE[1] - RANGE[0]) * 255
    out = np.empty(size_hw, np.uint8)
    assert anomaly_u8(anomaly, RANGE, out) is out
    # Half a step for the rounding, and float32 arithmetic on top.
    assert np.abs(out - np.clip(exact, 0, 255)).max() <= 0.5 + 1e-4


@pytest.mark.parametrize(('score', 'expected'), [
    (-np.inf, 0), (-3e38, 0), (-4.0001, 0), (-4.0, 0), (6.0, 255), (6.0001, 255), (1e12, 255),
    (3e38, 255), (np.inf, 255), (np.nan, 0), (1.0, 128)])
def test_extreme_scores_saturate_and_nan_is_zero(score, expected):
    anomaly = np.full((5, 33), score, np.float32)
    if score == 1.0:  # 127.5 exactly: either neighbour is right
        assert set(np.unique(anomaly_u8(anomaly, RANGE))) <= {127, 128}
    else:
        np.testing.assert_array_equal(anomaly_u8(anomaly, RANGE), expected)


def test_negative_scores_keep_their_order():
    ramp = np.linspace(-30, -10, 256, dtype=np.float32)[None]
    scaled = anomaly_u8(ramp, (-30.0, -10.0))
    np.testing.assert_array_equal(scaled[0], np.arange(256))


def test_heat_is_inferno_in_rgb_and_grows_lighter():
    matplotlib = pytest.importorskip('matplotlib', reason='the reference colours')
    steps = np.arange(256, dtype=np.uint8)[None]
    heat = heat_map(steps)
    expected = matplotlib.colormaps['inferno'](steps)[..., :3] * 255
    assert np.abs(heat - expected).max() <= 2
    lightness = cv2.cvtColor(heat, cv2.COLOR_RGB2LAB)[0, :, 0].astype(int)
    assert (np.diff(lightness) >= -1).all()
    assert lightness[-1] - lightness[0] > 230


@pytest.mark.parametrize('size_hw', [(1, 1), (200, 333), (513, 1024)])
@pytest.mark.parametrize('opacity', [0.0, 0.3, 1.0])
def test_overlay_blends_labels_and_paints_heat_inside_the_outlines(size_hw, opacity):
    image, labels, anomaly, _ = detection(size_hw)
    mask = np.zeros(size_hw, np.uint8)
    mask[size_hw[0] // 4:size_hw[0] // 2, size_hw[1] // 3:size_hw[1] // 2] = 255
    out = np.empty_like(image)
    picture = overlay(image, labels, anomaly, mask, CITYSCAPES_PALETTE, RANGE, opacity, out)
    assert picture is out
    colours = np.array(CITYSCAPES_PALETTE, np.float64)[labels]
    expected = opacity * colours + (1 - opacity) * image
    heat = 0.8 * heat_map(anomaly_u8(anomaly, RANGE)) + 0.2 * image
    expected[mask > 0] = heat[mask > 0]
    near = np.ones((5, 5), np.uint8)
    border = cv2.dilate(mask, near) != cv2.erode(mask, near)
    assert np.abs(picture - expected)[~border].max() <= 1
    if mask.any():
        assert (picture[border] == 255).all(1).any()
        assert (picture[border] == 0).all(1).any()


def test_overlay_takes_reversed_channels_without_a_copy_by_the_caller():
    image, labels, anomaly, mask = detection((120, 160))
    straight = overlay(image, labels, anomaly, mask, CITYSCAPES_PALETTE, RANGE)
    view = image[..., ::-1].copy()[..., ::-1]
    np.testing.assert_array_equal(
        overlay(view, labels, anomaly, mask, CITYSCAPES_PALETTE, RANGE), straight)


def test_inputs_are_left_alone():
    arrays = detection((150, 90))
    before = [array.copy() for array in arrays]
    overlay(*arrays, CITYSCAPES_PALETTE, RANGE)
    for array, copy in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize('size_hw', [(64, 64), (700, 1200)])
@pytest.mark.parametrize('value', [1, 255])
def test_outline_is_coloured_inside_and_black_outside_across_row_blocks(size_hw, value):
    mask = np.zeros(size_hw, np.uint8)
    mask[10:-10, 10:-10] = value
    picture = np.full((*size_hw, 3), 90, np.uint8)
    draw_outlines(picture, mask, (0, 200, 255))
    width = max(1, round(size_hw[0] / 512))
    expected = np.full((*size_hw, 3), 90, np.uint8)
    expected[10 - width:width - 10, 10 - width:width - 10] = 0
    expected[10:-10, 10:-10] = (0, 200, 255)
    expected[10 + width:-10 - width, 10 + width:-10 - width] = 90
    np.testing.assert_array_equal(picture, expected)


def test_panel_keeps_shapes_order_and_colours():
    red = np.zeros((100, 200, 3), np.uint8)
    red[..., 0] = 250
    blue = np.full((300, 300, 3), (0, 0, 90), np.uint8)  # no colour of the titles
    picture = panel([red, blue, red], ['one', 'two', 'three'], columns=2, cell_width=100)
    assert picture.shape[1] == 100 + 100 + 4
    reds = (picture == (250, 0, 0)).all(2)
    blues = (picture == (0, 0, 90)).all(2)
    assert reds[:, :100].sum() == 2 * 100 * 50
    assert blues[:, 104:].sum() == 100 * 100
    assert not reds[:, 104:].any() and not blues[:, :100].any()
    assert (picture[:20, :100] < 100).any(), 'title is missing'
    grey = panel([np.full((50, 50), 200, np.uint8)], ['grey'], columns=1, cell_width=50)
    assert (grey[-50:] == 200).all()


def test_legend_shows_each_colour_beside_its_name():
    picture = legend(CITYSCAPES_CLASSES, CITYSCAPES_PALETTE, columns=3, width=600)
    for i, colour in enumerate(CITYSCAPES_PALETTE):
        x, y = i % 3 * 200, i // 3 * 26
        np.testing.assert_array_equal(picture[y + 12, x + 15], colour)
        assert (picture[y:y + 26, x + 34:x + 200] < 128).any()


@pytest.mark.parametrize('threshold', [None, -3.9, 2.0, 6.0, 99.0])
def test_colour_bar_runs_over_the_range_and_marks_the_threshold(threshold):
    bar = colour_bar(RANGE, threshold, width=401)
    plain = colour_bar(RANGE, None, width=401)
    for x, step in ((0, 0), (200, 127), (400, 255)):
        assert np.abs(plain[0, x] - heat_map(np.full((1, 1), step, np.uint8))[0, 0].astype(int)
                      ).max() <= 3
    changed = np.flatnonzero((bar[:20] != plain[:20]).any((0, 2)))
    if threshold is None or threshold > RANGE[1]:
        assert changed.size == 0
    else:
        assert abs(changed - (threshold + 4) * 40).max() <= 2.01


@pytest.mark.parametrize('call', [
    lambda: colour_labels(np.zeros((4, 4), np.int64), CITYSCAPES_PALETTE),
    lambda: colour_labels(np.zeros((0, 4), np.uint8), CITYSCAPES_PALETTE),
    lambda: colour_labels(np.zeros((4, 4), np.uint8), [(0, 0, 300)]),
    lambda: colour_labels(np.zeros((4, 4), np.uint8), []),
    lambda: colour_labels(np.zeros((4, 4), np.uint8), CITYSCAPES_PALETTE,
                          np.zeros((4, 5, 3), np.uint8)),
    lambda: colour_labels(np.zeros((4, 4), np.uint8), CITYSCAPES_PALETTE,
                          np.zeros((4, 8, 3), np.uint8)[:, ::2]),
    lambda: anomaly_u8(np.zeros((4, 4)), RANGE),
    lambda: anomaly_u8(np.zeros((4, 4), np.float32), (1.0, 1.0)),
    lambda: anomaly_u8(np.zeros((4, 4), np.float32), (0.0, np.inf)),
    lambda: heat_map(np.zeros((4, 4), np.float32)),
    lambda: overlay(*detection((4, 4)), CITYSCAPES_PALETTE, RANGE, opacity=1.5),
    lambda: overlay(detection((4, 5))[0], *detection((4, 4))[1:], CITYSCAPES_PALETTE, RANGE),
    lambda: panel([], []),
    lambda: panel([np.zeros((4, 4), np.uint8)], ['a', 'b']),
    lambda: legend(['a'], []),
])
def test_wrong_arguments_are_named(call):
    with pytest.raises(ValueError, match=r'got|must'):
        call()
