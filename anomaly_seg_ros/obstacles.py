# SPDX-License-Identifier: Apache-2.0
"""From an anomaly score map to obstacles: threshold, components, size and place."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
import math

import cv2
import numpy as np

REGIONS = ('everywhere', 'drivable')


@dataclass(frozen=True)
class ObstacleSettings:
    """
    How a score map becomes obstacles.

    Attributes
    ----------
    threshold
        A pixel is anomalous when score >= threshold, in the score's own units.
    minimum_area_px
        Components of fewer pixels of the camera image are dropped.
    region
        ``everywhere``, or ``drivable``: only components that touch or lie inside the convex hull
        of the pixels of drivable classes.
    maximum_count
        At most this many components, the largest, are described one by one; the mask holds all.
        It bounds the time that a frame full of noise takes.

    """

    threshold: float
    minimum_area_px: int = 50
    region: str = 'everywhere'
    maximum_count: int = 256

    def __post_init__(self) -> None:
        """Check the values."""
        if not math.isfinite(self.threshold):
            raise ValueError(f'threshold must be finite, got {self.threshold}')
        if self.minimum_area_px < 1:
            raise ValueError(f'minimum_area_px must be at least 1, got {self.minimum_area_px}')
        if self.maximum_count < 1:
            raise ValueError(f'maximum_count must be at least 1, got {self.maximum_count}')
        if self.region not in REGIONS:
            raise ValueError(f'region must be one of {REGIONS}, got {self.region!r}')


@dataclass(frozen=True)
class Obstacle:
    """
    One connected component of anomalous pixels.

    Attributes
    ----------
    x, y, width, height
        Bounding box in pixels of the camera image.
    area_px
        Number of pixels.
    centroid_xy
        Mean pixel position.
    peak_score
        Highest score inside.

    """

    x: int
    y: int
    width: int
    height: int
    area_px: int
    centroid_xy: tuple[float, float]
    peak_score: float


def find_obstacles(anomaly: np.ndarray, settings: ObstacleSettings,
                   labels: np.ndarray | None = None, drivable: Sequence[int] = (),
                   out: np.ndarray | None = None) -> tuple[np.ndarray, tuple[Obstacle, ...]]:
    """
    Threshold a score map and keep the components that are obstacles.

    Parameters
    ----------
    anomaly
        float32 (H, W), higher is more anomalous. NaN is never an obstacle; callers that must not
        miss it check beforehand.
    settings
        Threshold, minimum area, region and number.
    labels
        uint8 (h, w), class ids of any size that covers the same view; needed for ``drivable``.
    drivable
        Class ids a vehicle may drive on; needed for ``drivable``.
    out
        uint8 (H, W) to write the mask into.

    Returns
    -------
    mask, obstacles
        uint8 (H, W) of 0 and 255, and the largest components in it by falling area. Components
        are 8-connected.

    """
    mask = cv2.inRange(anomaly, settings.threshold, math.inf, dst=out)
    x0, y0, width, height = cv2.boundingRect(mask)
    if width == 0:
        return mask, ()
    view = (slice(y0, y0 + height), slice(x0, x0 + width))
    band, scores = mask[view], anomaly[view]
    count, index = cv2.connectedComponents(band, connectivity=8, ltype=cv2.CV_32S)
    runs = _find_runs(band, index)

    area_px = np.bincount(runs.component, runs.length, count)
    keep = area_px >= settings.minimum_area_px
    if settings.region == 'drivable' and keep.any():
        left, right = _row_extents(
            drivable_hull(labels, drivable, (anomaly.shape[1], anomaly.shape[0]))[view])
        touches = (runs.x < right[runs.y]) & (runs.x + runs.length > left[runs.y])
        inside = np.zeros(count, bool)
        inside[runs.component[touches]] = True
        keep &= inside
    keep[0] = False
    kept = np.flatnonzero(keep)
    if len(kept) < count - 1:
        _erase(band, runs.only(~keep))
    listed = kept[np.argsort(-area_px[kept], kind='stable')][:settings.maximum_count]
    return mask, tuple(_describe(listed, runs, index, scores, (x0, y0)))


@dataclass(frozen=True)
class _Runs:
    """Horizontal runs of set pixels in scan order: each array has one entry a run."""

    component: np.ndarray  # int32, 1..n
    x: np.ndarray          # int32, first column
    y: np.ndarray          # int32, row
    length: np.ndarray     # int32, pixels

    def only(self, chosen: np.ndarray) -> '_Runs':
        """Return the runs of the components for which ``chosen`` (n + 1,) is true."""
        rows = np.flatnonzero(chosen[self.component])
        return _Runs(self.component[rows], self.x[rows], self.y[rows], self.length[rows])


def _find_runs(mask: np.ndarray, index: np.ndarray) -> _Runs:
    """
    Split a mask (H, W) into runs; ``index`` int32 (H, W) tells their components.

    There are far fewer runs than pixels, so that areas, boxes and centroids from runs cost a
    fraction of OpenCV's statistics, which visit every pixel.
    """
    height, width = mask.shape
    # A zero before the first pixel and after every row: no run crosses an edge.
    padded = np.zeros(height * (width + 1) + 1, np.uint8)
    padded[1:].reshape(height, width + 1)[:, :width] = mask
    edges = np.flatnonzero(padded[1:] != padded[:-1]).astype(np.int32)
    begin, end = edges[::2], edges[1::2]
    y, x = np.divmod(begin, np.int32(width + 1))
    return _Runs(np.take(index, begin - y), x, y, end - begin)


def _describe(components: np.ndarray, runs: _Runs, index: np.ndarray, scores: np.ndarray,
              origin_xy: tuple[int, int]) -> Iterator[Obstacle]:
    """Yield an obstacle for each of ``components``, which are ids in ``index`` (H, W)."""
    n = len(components)
    position = np.full(int(runs.component.max()) + 1, -1, np.int32)
    position[components] = np.arange(n, dtype=np.int32)
    runs = runs.only(position >= 0)
    of = position[runs.component]
    # One dtype each: ufunc.at is ten times slower when it has to cast.
    left = np.full(n, np.iinfo(np.int32).max, np.int32)
    right = np.zeros(n, np.int32)
    np.minimum.at(left, of, runs.x)
    np.maximum.at(right, of, runs.x + runs.length)
    # Runs come in scan order, and of several values assigned to one place the last one stays.
    top, bottom = np.zeros((2, n), np.int32)
    top[of[::-1]] = runs.y[::-1]
    bottom[of] = runs.y + 1
    length = runs.length.astype(np.float64)
    area = np.bincount(of, length, n)
    centre_x = np.bincount(of, (runs.x + (length - 1) / 2) * length, n) / area
    centre_y = np.bincount(of, runs.y * length, n) / area
    for i, component in enumerate(components):
        box = (slice(top[i], bottom[i]), slice(left[i], right[i]))
        peak = cv2.minMaxLoc(scores[box], (index[box] == component).view(np.uint8))[1]
        yield Obstacle(int(left[i]) + origin_xy[0], int(top[i]) + origin_xy[1],
                       int(right[i] - left[i]), int(bottom[i] - top[i]), int(area[i]),
                       (float(centre_x[i]) + origin_xy[0], float(centre_y[i]) + origin_xy[1]),
                       float(peak))


def _erase(mask: np.ndarray, runs: _Runs) -> None:
    """Set the pixels of ``runs`` in ``mask`` (H, W) to 0."""
    before = np.cumsum(runs.length) - runs.length
    within = np.arange(int(runs.length.sum())) - np.repeat(before, runs.length)
    mask[np.repeat(runs.y, runs.length), np.repeat(runs.x, runs.length) + within] = 0


def drivable_hull(labels: np.ndarray | None, drivable: Sequence[int],
                  size_wh: tuple[int, int]) -> np.ndarray:
    """
    Return the convex hull of the drivable pixels as uint8 (H, W), 1 inside, 2 px wider.

    The two pixels make a component that only touches the hull count as inside.
    """
    if labels is None or not drivable:
        raise ValueError("region 'drivable' needs labels and at least one drivable class")
    width, height = size_wh
    hull = np.zeros((height, width), np.uint8)
    is_drivable = np.zeros(256, np.uint8)
    is_drivable[list(drivable)] = 1
    left, right = _row_extents(cv2.LUT(labels, is_drivable))
    rows = np.flatnonzero(right > left)
    if not len(rows):
        return hull
    # The hull of a region is the hull of the ends of its rows.
    ends = np.stack([np.concatenate([left[rows], right[rows] - 1]), np.tile(rows, 2)], 1)
    corners = cv2.convexHull(ends.astype(np.int32)).astype(np.float64)
    scale = np.array([width / labels.shape[1], height / labels.shape[0]])
    corners = np.rint((corners + 0.5) * scale - 0.5)
    wider = np.concatenate([corners + step for step in ((-2, -2), (-2, 2), (2, -2), (2, 2))])
    cv2.fillConvexPoly(hull, cv2.convexHull(wider.astype(np.int32)), 1)
    return hull


def _row_extents(region: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Return the first set column of each row of a mask (H, W), and the one after the last.

    Both are 0 in empty rows.
    """
    inside = region.view(bool)
    left = inside.argmax(1)
    # argmax is fast on contiguous rows only, and OpenCV's flip makes such.
    right = region.shape[1] - cv2.flip(region, 1).view(bool).argmax(1)
    return left, np.where(inside[np.arange(len(inside)), left], right, left)
