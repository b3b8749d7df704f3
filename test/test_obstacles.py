# SPDX-License-Identifier: Apache-2.0
"""Obstacles against a plain reference made with scipy.ndimage."""

from collections.abc import Sequence
from unittest import mock

from anomaly_seg_ros import obstacles
from anomaly_seg_ros.obstacles import (
    drivable_hull, find_obstacles, Obstacle, ObstacleSettings, rows_to_search)
import cv2
from hypothesis import given, settings, strategies as st
import numpy as np
import pytest
from scipy import ndimage, spatial


def reference(anomaly: np.ndarray, threshold: float, minimum: int
              ) -> tuple[np.ndarray, list[Obstacle]]:
    """Do pixel by pixel what ``find_obstacles`` does; components in scan order."""
    index, count = ndimage.label(anomaly >= threshold, structure=np.ones((3, 3)))
    mask = np.zeros(anomaly.shape, np.uint8)
    obstacles = []
    for i in range(1, count + 1):
        ys, xs = np.nonzero(index == i)
        if len(xs) < minimum:
            continue
        mask[ys, xs] = 255
        obstacles.append(Obstacle(
            int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1, len(xs),
            (float(xs.mean()), float(ys.mean())), float(anomaly[ys, xs].max())))
    return mask, obstacles


def assert_same(got: Sequence[Obstacle], expected: Sequence[Obstacle]) -> None:
    """Compare as sets, centroids to 1e-9 px, and check that areas fall."""
    assert [o.area_px for o in got] == sorted((o.area_px for o in expected), reverse=True)

    def key(o: Obstacle) -> tuple[int, ...]:
        return (o.area_px, o.x, o.y, o.width, o.height)
    for a, b in zip(sorted(got, key=key), sorted(expected, key=key), strict=True):
        assert key(a) == key(b)
        assert a.peak_score == b.peak_score
        assert a.centroid_xy == pytest.approx(b.centroid_xy, abs=1e-9)


def blobs(seed: int, size_hw: tuple[int, int], sigma: float, fraction: float) -> np.ndarray:
    """Return a smooth random score map of which ``fraction`` is >= 0."""
    noise = np.random.default_rng(seed).standard_normal(size_hw).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), sigma) if sigma else noise
    return (smooth - np.quantile(smooth, 1 - fraction)).astype(np.float32)


@pytest.mark.parametrize('few_runs', [0, 10**6])
@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 40),
       st.sampled_from([0.0, 0.6, 1.5, 4.0]), st.sampled_from([0.003, 0.03, 0.3, 0.6, 0.97]),
       st.sampled_from([1, 2, 5, 30]))
def test_equals_the_reference(few_runs: int, seed: int, height: int, width: int, sigma: float,
                              fraction: float, minimum: int) -> None:
    """Mask, areas, boxes, centroids and peaks are those of the pixel-by-pixel reference."""
    anomaly = blobs(seed, (height, width), sigma, fraction)
    with mock.patch.object(obstacles, 'FEW_RUNS', few_runs):
        mask, got = find_obstacles(anomaly, ObstacleSettings(0.0, minimum, maximum_count=10**6))
    expected_mask, expected = reference(anomaly, 0.0, minimum)
    np.testing.assert_array_equal(mask, expected_mask)
    assert_same(got, expected)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 24), st.integers(1, 12), st.integers(1, 70),
       st.sampled_from([0.0, 1.0, 3.0]), st.sampled_from([1.0, -1e4]),
       st.sampled_from([0.5, 0.9, 0.99, 1.0, 2.0]))
def test_rows_to_search(seed: int, small: int, width: int, height: int, sigma: float,
                        outlier: float, quantile: float) -> None:
    """The rows that are not searched hold nothing; the others are found in the small map."""
    score = blobs(seed, (small, width), sigma, 0.5)
    score[seed % small, seed % width] *= outlier
    resized = cv2.resize(score, (3 * width, height))
    # Up to the highest score itself, and above it.
    threshold = float(np.quantile(score, quantile) if quantile <= 1 else score.max() + 1)
    rows = rows_to_search(score, threshold, height)
    reached = np.flatnonzero((resized >= threshold).any(axis=1))
    assert np.isin(reached, np.arange(height)[rows]).all()
    # No more than what a tap that reaches it can influence, on either side.
    near = np.flatnonzero(score.max(axis=1) >= threshold - 1e-6 * np.abs(score).max())
    if not len(near):
        assert rows == slice(0, 0)
    elif height >= small:
        assert rows.stop - rows.start <= (np.ptp(near) + 2) * height / small + 3
    mask, got = find_obstacles(resized, ObstacleSettings(threshold, 2), rows=rows,
                               out=np.full(resized.shape, 7, np.uint8))
    expected_mask, expected = find_obstacles(resized, ObstacleSettings(threshold, 2))
    np.testing.assert_array_equal(mask, expected_mask)
    assert got == expected


@pytest.mark.parametrize('fraction', [0.01, 0.5, 1.0])
def test_a_whole_frame(fraction: float) -> None:
    """At camera size, where the mask is a strided view of a larger frame, nothing changes."""
    anomaly = blobs(3, (540, 960), 6.0, fraction)
    mask, got = find_obstacles(anomaly, ObstacleSettings(0.0, 40, maximum_count=10**6))
    expected_mask, expected = reference(anomaly, 0.0, 40)
    np.testing.assert_array_equal(mask, expected_mask)
    assert_same(got, expected)


def test_a_pixel_at_the_threshold_is_anomalous() -> None:
    """The convention is score >= threshold, in float32."""
    anomaly = np.full((3, 3), 0.1, np.float32)
    threshold = float(np.float32(0.1))
    assert find_obstacles(anomaly, ObstacleSettings(threshold, 1))[0].all()
    above = float(np.nextafter(np.float32(0.1), np.float32(1)))
    assert not find_obstacles(anomaly, ObstacleSettings(above, 1))[0].any()


def test_diagonal_neighbours_are_one_component() -> None:
    """Components are 8-connected."""
    anomaly = np.eye(6, dtype=np.float32)
    _, obstacles = find_obstacles(anomaly, ObstacleSettings(0.5, 1))
    assert [o.area_px for o in obstacles] == [6]


def test_a_component_does_not_wrap_around_the_image_edge() -> None:
    """The last pixel of a row and the first of the next are not neighbours."""
    anomaly = np.zeros((4, 5), np.float32)
    anomaly[0, 4] = anomaly[2, 0] = 1
    _, obstacles = find_obstacles(anomaly, ObstacleSettings(0.5, 1))
    assert sorted((o.x, o.y, o.area_px) for o in obstacles) == [(0, 2, 1), (4, 0, 1)]


def test_writes_into_the_given_mask_and_clears_it() -> None:
    """``out`` is the mask returned, without anything of the frame before."""
    out = np.full((20, 30), 255, np.uint8)
    anomaly = np.zeros((20, 30), np.float32)
    mask, obstacles = find_obstacles(anomaly, ObstacleSettings(1.0), out=out)
    assert mask is out
    assert not out.any()
    assert obstacles == ()


def test_nan_is_never_an_obstacle() -> None:
    """Not a number compares false with everything."""
    anomaly = np.full((8, 8), np.nan, np.float32)
    anomaly[2:5, 2:5] = 1
    mask, obstacles = find_obstacles(anomaly, ObstacleSettings(0.5, 1))
    assert mask.sum() == 9 * 255
    assert len(obstacles) == 1


def test_only_the_largest_are_described_but_the_mask_holds_all() -> None:
    """``maximum_count`` bounds the list, not the mask."""
    anomaly = np.zeros((40, 400), np.float32)
    for i in range(1, 20):
        anomaly[0:i, i * 20:i * 20 + 10] = 1
    mask, obstacles = find_obstacles(anomaly, ObstacleSettings(0.5, 1, maximum_count=4))
    assert [o.height for o in obstacles] == [19, 18, 17, 16]
    np.testing.assert_array_equal(mask, (anomaly * 255).astype(np.uint8))


@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize('size_hw', [(120, 160), (240, 320), (300, 500)])
def test_region_keeps_what_touches_the_drivable_hull(seed: int, size_hw: tuple[int, int]) -> None:
    """
    Components that reach inside the hull stay, those over 4 px away from it go.

    The reference tests pixels against the half-planes of scipy's hull in float64. In between, up
    to the 2 px by which the hull is widened and the rounding of its corners, both are right.
    """
    rng = np.random.default_rng(seed)
    labels = np.full((120, 160), 2, np.uint8)
    points = rng.integers([30, 20], [110, 130], (12, 2))
    labels[points[:, 0], points[:, 1]] = rng.choice([0, 9], 12)
    labels[60, 60:64] = 0
    anomaly = blobs(seed, size_hw, 2.0, 0.08)

    scale = np.array([size_hw[1] / 160, size_hw[0] / 120])
    yx = np.argwhere(np.isin(labels, (0, 9)))
    hull = spatial.ConvexHull((yx[:, ::-1] + 0.5) * scale - 0.5)
    grid = np.stack(np.meshgrid(np.arange(size_hw[1]), np.arange(size_hw[0])), -1)
    outside_by = (grid @ hull.equations[:, :2].T + hull.equations[:, 2]).max(-1)

    mask, obstacles = find_obstacles(
        anomaly, ObstacleSettings(0.0, 1, 'drivable', maximum_count=10**6), labels, (0, 9))
    index, count = ndimage.label(anomaly >= 0, structure=np.ones((3, 3)))
    nearest = ndimage.minimum(outside_by, index, np.arange(1, count + 1))
    kept = ndimage.maximum(mask, index, np.arange(1, count + 1)) == 255
    assert kept[nearest <= 0].all()
    assert not kept[nearest > 5].any()
    assert 0 < kept.sum() < count
    assert len(obstacles) == kept.sum()


def test_region_without_drivable_pixels_keeps_nothing() -> None:
    """No road in sight: nothing lies on it."""
    anomaly = np.ones((20, 20), np.float32)
    mask, obstacles = find_obstacles(anomaly, ObstacleSettings(0.5, 1, 'drivable'),
                                     np.full((20, 20), 2, np.uint8), (0,))
    assert not mask.any()
    assert obstacles == ()


def test_hull_of_one_row_is_that_row() -> None:
    """A degenerate hull is still a region, two pixels wider."""
    labels = np.full((50, 50), 3, np.uint8)
    labels[30, 10:20] = 0
    hull = drivable_hull(labels, (0,), (50, 50))
    ys, xs = np.nonzero(hull)
    assert (ys.min(), ys.max(), xs.min(), xs.max()) == (28, 32, 8, 21)


def test_region_needs_labels() -> None:
    """Without labels or drivable classes the request makes no sense."""
    anomaly = np.ones((4, 4), np.float32)
    with pytest.raises(ValueError, match='needs labels'):
        find_obstacles(anomaly, ObstacleSettings(0.5, 1, 'drivable'))


@pytest.mark.parametrize(('values', 'word'), [
    ({'threshold': float('nan')}, 'threshold'),
    ({'threshold': float('inf')}, 'threshold'),
    ({'threshold': 0.0, 'minimum_area_px': 0}, 'minimum_area_px'),
    ({'threshold': 0.0, 'region': 'road'}, 'region'),
    ({'threshold': 0.0, 'maximum_count': 0}, 'maximum_count')])
def test_settings_refuse_nonsense(values: dict, word: str) -> None:
    """Each value is checked where it is set."""
    with pytest.raises(ValueError, match=word):
        ObstacleSettings(**values)
