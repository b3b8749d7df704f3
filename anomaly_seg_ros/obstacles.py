# SPDX-License-Identifier: Apache-2.0
"""From an anomaly score map to obstacles: threshold, components, size and place."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
import math

from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.model_card import ModelCard
import cv2
import numpy as np

REGIONS = ('everywhere', 'drivable')
FEW_RUNS = 10_000  # up to here finding components in Python is faster than in OpenCV


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


def settings_for(card: ModelCard, settings: ObstacleSettings | None = None) -> ObstacleSettings:
    """
    Return ``settings``, or where there are none those with the threshold of the model's card.

    Raises
    ------
    UserError
        If the region needs drivable classes and the model has none.

    """
    settings = settings or ObstacleSettings(card.threshold)
    if settings.region == 'drivable' and not card.drivable:
        raise UserError(f'region is drivable, but model {card.name!r} has no drivable classes. '
                        'Set region to everywhere.')
    return settings


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
                   out: np.ndarray | None = None, rows: slice = slice(None)
                   ) -> tuple[np.ndarray, tuple[Obstacle, ...]]:
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
    rows
        The rows that are looked at, see ``rows_to_search``; no score in the others may reach the
        threshold.

    Returns
    -------
    mask, obstacles
        uint8 (H, W) of 0 and 255, and the largest components in it by falling area. Components
        are 8-connected.

    """
    mask = np.empty(anomaly.shape, np.uint8) if out is None else out
    first, stop, _ = rows.indices(len(mask))
    mask[:first] = 0
    mask[stop:] = 0
    searched = mask[first:stop]
    np.greater_equal(anomaly[rows], np.float32(settings.threshold), out=searched.view(bool))
    np.negative(searched, out=searched)  # 1 becomes 255
    runs = _find_runs(mask, first, stop)
    if not runs.length.size:
        return mask, ()
    count = int(runs.component.max()) + 1

    area_px = np.bincount(runs.component, runs.length, count)
    keep = area_px >= settings.minimum_area_px
    if settings.region == 'drivable' and keep.any():
        left, right = _row_extents(
            drivable_hull(labels, drivable, (anomaly.shape[1], anomaly.shape[0])))
        touches = (runs.x < right[runs.y]) & (runs.x + runs.length > left[runs.y])
        inside = np.zeros(count, bool)
        inside[runs.component[touches]] = True
        keep &= inside
    kept = np.flatnonzero(keep)
    if len(kept) < count:
        np.put(mask, _pixels(runs.only(~keep), mask.shape[1]), 0)
    listed = kept[np.argsort(-area_px[kept], kind='stable')][:settings.maximum_count]
    return mask, tuple(_describe(listed, runs, anomaly))


def rows_to_search(anomaly: np.ndarray, threshold: float, height: int) -> slice:
    """
    Return the rows in which a score can reach ``threshold`` after it was enlarged.

    In most frames that is a part of the picture, which is found in the small map in no time.

    Parameters
    ----------
    anomaly
        float32 (h, w), finite, before it was resized bilinearly with half-pixel centres.
    threshold
        As in ``ObstacleSettings``.
    height
        Number of rows of the resized score.

    """
    # An interpolated score is at most the largest of those it lies between, but for rounding.
    highest = anomaly.max(axis=1)
    rounding = 1e-6 * max(float(highest.max()), -float(anomaly.min()))
    rows = np.flatnonzero(highest >= threshold - rounding)
    if not len(rows):
        return slice(0, 0)
    # Row y lies at (y + 1/2) / scale - 1/2, between the row before and the row after that place.
    scale = height / len(anomaly)
    first = math.floor((rows[0] - 0.5) * scale - 0.5)
    last = math.ceil((rows[-1] + 1.5) * scale - 0.5)
    return slice(max(0, first), min(height, last + 1))


@dataclass(frozen=True)
class _Runs:
    """Horizontal runs of set pixels in scan order: each array has one entry a run."""

    component: np.ndarray  # int64, 0..n-1
    x: np.ndarray          # int64, first column
    y: np.ndarray          # int64, row
    length: np.ndarray     # int64, pixels

    def only(self, chosen: np.ndarray) -> '_Runs':
        """Return the runs of the components for which ``chosen`` (n,) is true."""
        rows = np.flatnonzero(chosen[self.component])
        return _Runs(self.component[rows], self.x[rows], self.y[rows], self.length[rows])


def _find_runs(mask: np.ndarray, first: int, stop: int) -> _Runs:
    """
    Split a mask (H, W) of 0 and 255 into runs and find which belong together, 8-connected.

    Outside the rows from ``first`` to before ``stop`` it must be 0.

    There are far fewer runs than pixels: finding components, areas, boxes and centroids from them
    costs a fraction of OpenCV's functions, which visit every pixel and write an index image.
    Where there are many (a noisy score), OpenCV finds the components faster.
    """
    width = mask.shape[1]
    begin, end = _flat_runs(mask[first:stop].reshape(-1))
    begin, end = begin + first * width, end + first * width
    y, last = begin // width, (end - 1) // width
    if (last > y).any():  # a run went on in the next row
        rows = last - y + 1
        y = np.repeat(y - np.cumsum(rows) + rows, rows) + np.arange(rows.sum())
        begin = np.maximum(np.repeat(begin, rows), y * width)
        end = np.minimum(np.repeat(end, rows), (y + 1) * width)
    x, length = begin - y * width, end - begin
    if len(x) <= FEW_RUNS:
        # With an empty column after the last, no run touches one of the next row's beginning.
        component = _connect(begin + y, end + y, width + 1)
    else:
        band = slice(y[0], y[-1] + 1)
        index = cv2.connectedComponents(mask[band], connectivity=8, ltype=cv2.CV_32S)[1]
        component = np.take(index, begin - y[0] * width).astype(np.int64) - 1
    return _Runs(component, x, y, length)


def _flat_runs(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where the runs of set pixels in (n,) begin, and end (exclusive)."""
    whole = len(mask) // 8
    eights = mask[:8 * whole].view(np.uint64)
    words = np.flatnonzero(eights != 0)
    pixels = eights[words].view(np.uint8).reshape(-1, 8)
    if mask[8 * whole:].any():
        rest = np.zeros((1, 8), np.uint8)
        rest[0, :len(mask) - 8 * whole] = mask[8 * whole:]
        words, pixels = np.append(words, whole), np.concatenate([pixels, rest])
    # Beside each pixel its neighbours: a word's first has one in the word before, if that is here.
    neighbours = np.zeros((len(words), 10), np.uint8)
    neighbours[:, 1:9] = pixels
    adjacent = np.flatnonzero(np.diff(words) == 1)
    neighbours[adjacent + 1, 0] = pixels[adjacent, 7]
    neighbours[adjacent, 9] = pixels[adjacent + 1, 0]
    begins = np.flatnonzero(neighbours[:, 1:9] > neighbours[:, :8])
    ends = np.flatnonzero(neighbours[:, 1:9] > neighbours[:, 2:])
    return words[begins >> 3] * 8 + (begins & 7), words[ends >> 3] * 8 + (ends & 7) + 1


def _connect(begin: np.ndarray, end: np.ndarray, stride: int) -> np.ndarray:
    """
    Return the component of each run: int64, 0..n-1.

    ``begin`` and ``end`` (exclusive) are places in an image of ``stride`` columns, the last of
    which is empty.
    """
    # Runs of the row above touch, corners included, from one column before to one after.
    first = np.searchsorted(end, begin - stride, 'left')
    last = np.searchsorted(begin, end - stride, 'right')
    touching = np.maximum(last - first, 0)
    below = np.repeat(np.arange(len(begin)), touching)
    above = np.arange(len(below)) + np.repeat(first - np.cumsum(touching) + touching, touching)
    # Every run points to one before it, or to itself; pairs hook their roots, then paths shorten.
    root = np.arange(len(begin))
    while len(below):
        low, high = np.minimum(root[below], root[above]), np.maximum(root[below], root[above])
        apart = low != high
        if not apart.any():
            break
        below, above = below[apart], above[apart]
        np.minimum.at(root, high[apart], low[apart])
        while True:
            shorter = root[root]
            if np.array_equal(shorter, root):
                break
            root = shorter
    return np.unique(root, return_inverse=True)[1]


def _describe(components: np.ndarray, runs: _Runs, anomaly: np.ndarray) -> Iterator[Obstacle]:
    """Yield an obstacle for each of ``components``."""
    n = len(components)
    if not n:
        return
    position = np.full(int(runs.component.max()) + 1, -1)
    position[components] = np.arange(n)
    runs = runs.only(position >= 0)
    of = position[runs.component]
    # One dtype each: ufunc.at is ten times slower when it has to cast.
    left = np.full(n, anomaly.shape[1])
    right = np.zeros(n, np.int64)
    np.minimum.at(left, of, runs.x)
    np.maximum.at(right, of, runs.x + runs.length)
    # Runs come in scan order, and of several values assigned to one place the last one stays.
    top, bottom = np.zeros((2, n), np.int64)
    top[of[::-1]] = runs.y[::-1]
    bottom[of] = runs.y + 1
    length = runs.length.astype(np.float64)
    area = np.bincount(of, length, n)
    centre_x = np.bincount(of, (runs.x + (length - 1) / 2) * length, n) / area
    centre_y = np.bincount(of, runs.y * length, n) / area
    places = _pixels(runs, anomaly.shape[1])
    highest = np.maximum.reduceat(np.take(anomaly, places), np.cumsum(runs.length) - runs.length)
    peak = np.full(n, -np.inf, np.float32)
    np.maximum.at(peak, of, highest)
    for i in range(n):
        yield Obstacle(int(left[i]), int(top[i]), int(right[i] - left[i]),
                       int(bottom[i] - top[i]), int(area[i]),
                       (float(centre_x[i]), float(centre_y[i])), float(peak[i]))


def _pixels(runs: _Runs, width: int) -> np.ndarray:
    """Return the places of all pixels of ``runs`` in an image of ``width``, run after run."""
    begin = runs.y * width + runs.x
    before = np.cumsum(runs.length) - runs.length
    return np.arange(int(runs.length.sum())) + np.repeat(begin - before, runs.length)


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
