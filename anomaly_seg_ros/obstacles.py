# SPDX-License-Identifier: Apache-2.0
"""From an anomaly score map to obstacles: threshold, components, size and place."""

from collections.abc import Sequence
from dataclasses import dataclass
import math

import cv2
import numpy as np

REGIONS = ('everywhere', 'drivable')


@dataclass(frozen=True)
class ObstacleSettings:
    """How a score map becomes obstacles.

    Attributes
    ----------
    threshold
        A pixel is anomalous when score >= threshold, in the score's own units.
    minimum_area_px
        Components of fewer pixels of the camera image are dropped.
    region
        ``everywhere``, or ``drivable``: only components that touch or lie inside the convex hull
        of the pixels of drivable classes.

    """

    threshold: float
    minimum_area_px: int = 50
    region: str = 'everywhere'

    def __post_init__(self) -> None:
        """Check the values."""
        if not math.isfinite(self.threshold):
            raise ValueError(f'threshold must be finite, got {self.threshold}')
        if self.minimum_area_px < 1:
            raise ValueError(f'minimum_area_px must be at least 1, got {self.minimum_area_px}')
        if self.region not in REGIONS:
            raise ValueError(f'region must be one of {REGIONS}, got {self.region!r}')


@dataclass(frozen=True)
class Obstacle:
    """One connected component of anomalous pixels.

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
    """Threshold a score map and keep the components that are obstacles.

    Parameters
    ----------
    anomaly
        float32 (H, W), higher is more anomalous. NaN is never an obstacle; callers that must not
        miss it check beforehand.
    settings
        Threshold, minimum area and region.
    labels
        uint8 (h, w), class ids of any size that covers the same view; needed for ``drivable``.
    drivable
        Class ids a vehicle may drive on; needed for ``drivable``.
    out
        uint8 (H, W) to write the mask into.

    Returns
    -------
    mask, obstacles
        uint8 (H, W) of 0 and 255, and the components in it by falling area. Components are
        8-connected.

    """
    mask = cv2.compare(anomaly, (settings.threshold, 0.0, 0.0, 0.0), cv2.CMP_GE, dst=out)
    x0, y0, width, height = cv2.boundingRect(mask)
    if width == 0:
        return mask, ()
    view = (slice(y0, y0 + height), slice(x0, x0 + width))
    band = mask[view]
    found = _components(band)

    keep = found.area_px >= settings.minimum_area_px
    if settings.region == 'drivable' and keep.any():
        hull = drivable_hull(labels, drivable, (anomaly.shape[1], anomaly.shape[0]))
        inside = np.zeros(len(keep) + 1, bool)
        inside[found.index[hull[view] != 0]] = True
        keep &= inside[1:]
    if not keep.all():
        _erase(band, found, np.flatnonzero(~keep))

    scores = anomaly[view]
    obstacles = []
    kept = np.flatnonzero(keep)
    for i in kept[np.argsort(-found.area_px[kept], kind='stable')]:
        box, (x, y, w, h) = found.box(i), (int(v) for v in found.boxes_xywh[i])
        peak = cv2.minMaxLoc(scores[box], (found.index[box] == i + 1).view(np.uint8))[1]
        cx, cy = (float(v) for v in found.centroids_xy[i])
        obstacles.append(Obstacle(x + x0, y + y0, w, h, int(found.area_px[i]),
                                  (cx + x0, cy + y0), float(peak)))
    return mask, tuple(obstacles)


@dataclass(frozen=True)
class _Components:
    """Connected components 1..n of a mask; row i of each array describes component i + 1."""

    index: np.ndarray         # int32 (H, W), 0 background
    area_px: np.ndarray       # (n,)
    boxes_xywh: np.ndarray    # (n, 4)
    centroids_xy: np.ndarray  # (n, 2)

    def box(self, i: int) -> tuple[slice, slice]:
        """Return rows and columns of component i + 1."""
        x, y, width, height = self.boxes_xywh[i]
        return slice(y, y + height), slice(x, x + width)


def _components(mask: np.ndarray) -> _Components:
    """Label the 8-connected components of a mask of 0 and 255.

    OpenCV's statistics cost 4 ms on a 2048x1024 mask however empty it is; where few pixels are
    set, they are gathered and counted instead, in a quarter of the time.
    """
    if cv2.countNonZero(mask) * 16 > mask.size:
        _, index, stats, centroids = cv2.connectedComponentsWithStats(
            mask, connectivity=8, ltype=cv2.CV_32S)
        return _Components(index, stats[1:, cv2.CC_STAT_AREA], stats[1:, :4], centroids[1:])
    count, index = cv2.connectedComponents(mask, connectivity=8, ltype=cv2.CV_32S)
    # One dtype and contiguous rows: ufunc.at is ten times slower when it has to cast.
    x, y = np.ascontiguousarray(cv2.findNonZero(mask).reshape(-1, 2).T)
    component = np.take(index, y * mask.shape[1] + x) - 1
    n = count - 1
    area = np.bincount(component, minlength=n)
    low = np.full((2, n), np.iinfo(np.int32).max, np.int32)
    high = np.zeros((2, n), np.int32)
    for axis, values in enumerate((x, y)):
        np.minimum.at(low[axis], component, values)
        np.maximum.at(high[axis], component, values)
    centroids = np.stack([np.bincount(component, values, n) for values in (x, y)], 1)
    return _Components(index, area, np.vstack([low, high - low + 1]).T,
                       centroids / area[:, None])


def _erase(mask: np.ndarray, found: _Components, dropped: np.ndarray) -> None:
    """Set the pixels of the components ``dropped`` in ``mask`` to 0."""
    if dropped.size <= 1024:  # few: only their boxes
        for i in dropped:
            box = found.box(i)
            mask[box][found.index[box] == i + 1] = 0
    else:
        value = np.full(len(found.area_px) + 1, 255, np.uint8)
        value[0] = 0
        value[dropped + 1] = 0
        mask[:] = value[found.index]


def drivable_hull(labels: np.ndarray | None, drivable: Sequence[int],
                  size_wh: tuple[int, int]) -> np.ndarray:
    """Return the convex hull of the drivable pixels as uint8 (H, W), 1 inside, 2 px wider.

    The two pixels make a component that only touches the hull count as inside.
    """
    if labels is None or not drivable:
        raise ValueError("region 'drivable' needs labels and at least one drivable class")
    width, height = size_wh
    hull = np.zeros((height, width), np.uint8)
    points = cv2.findNonZero(np.isin(labels, drivable).view(np.uint8))
    if points is None:
        return hull
    corners = cv2.convexHull(points).astype(np.float64)
    scale = np.array([width / labels.shape[1], height / labels.shape[0]])
    corners = np.rint((corners + 0.5) * scale - 0.5).astype(np.int32)
    cv2.fillConvexPoly(hull, corners, 1)
    cv2.polylines(hull, [corners], True, 1, thickness=5)
    return hull
