# SPDX-License-Identifier: Apache-2.0
"""
Component metrics of SegmentMeIfYouCan: sIoU, PPV and F1 over connected components.

Chan et al., "SegmentMeIfYouCan: A Benchmark for Anomaly Segmentation", NeurIPS 2021, section 4.2.
With K_i the predicted components that touch ground-truth component i, and A the pixels of K_i
that belong to other ground-truth components::

    sIoU_i = |i & K_i| / |(i | K_i) - A|        one value for each ground-truth component
    PPV_j  = |j & ground truth| / |j|           one value for each predicted component
    TP, FN = ground-truth components with sIoU >= tau, < tau;  FP = predicted ones with PPV < tau
    F1     = 2 TP / (2 TP + FN + FP), pooled over the data set; mean over tau 0.25, 0.30 .. 0.75
"""

from dataclasses import dataclass
import math
from typing import Any

from anomaly_seg_ros.metrics.pixel import VOID
import cv2
import numpy as np
import numpy.typing as npt

TAUS = tuple(round(0.25 + 0.05 * step, 2) for step in range(11))


@dataclass(frozen=True)
class Track:
    """
    Size limits of a SegmentMeIfYouCan track, in pixels.

    Predicted components with fewer than ``minimum_predicted`` pixels are dropped; ground-truth
    components with fewer than ``minimum_truth`` become void.
    """

    name: str
    minimum_predicted: int
    minimum_truth: int


TRACKS = {
    'anomaly': Track('anomaly', 500, 100),
    'obstacle': Track('obstacle', 50, 10),
}


def find_track(name: str) -> Track:
    """Return the settings of a track; ValueError lists the names."""
    if name not in TRACKS:
        raise ValueError(f'unknown track {name!r}; choose one of {", ".join(TRACKS)}')
    return TRACKS[name]


@dataclass(frozen=True)
class ComponentMetrics:
    """
    The ``components`` section of metrics.json; fractions. None where ``reason`` says why.

    ``f1_by_tau`` has one entry for each tau, ``'0.25'`` to ``'0.75'``.
    """

    track: str | None
    threshold: float | None
    siou_gt: float | None
    siou_pred: float | None
    ppv: float | None
    mean_f1: float | None
    f1_by_tau: dict[str, float | None]
    tp_mean: float | None
    fp_mean: float | None
    fn_mean: float | None
    ground_truth_components: int | None
    predicted_components: int | None
    reason: str | None = None

    @classmethod
    def not_applicable(cls, reason: str) -> 'ComponentMetrics':
        """Return a section of nulls with the reason."""
        return cls(None, None, None, None, None, None, dict.fromkeys(map(str, TAUS)), None, None,
                   None, None, None, reason)


class ComponentCounts:
    """
    Accumulates component metrics frame by frame.

    Parameters
    ----------
    track
        ``'anomaly'`` or ``'obstacle'``.
    threshold
        Pixels with score >= threshold are predicted anomalous.
    smiyc
        Follow road-anomaly-benchmark to the last bit: score > threshold, and tau from
        ``np.linspace``, whose eighth value lies just above 0.6.

    """

    def __init__(self, track: str, threshold: float, *, smiyc: bool = False) -> None:
        self.track = find_track(track)
        self.threshold = threshold
        self.smiyc = smiyc
        self._siou_truth: list[npt.NDArray[np.float64]] = []
        self._siou_predicted: list[npt.NDArray[np.float64]] = []
        self._ppv: list[npt.NDArray[np.float64]] = []

    def update(self, scores: npt.NDArray[Any], mask: npt.NDArray[np.uint8]) -> None:
        """
        Add one frame.

        Parameters
        ----------
        scores
            (H, W) float; higher is more anomalous.
        mask
            (H, W) uint8: 0 in-distribution, 1 anomaly, 255 void.

        """
        # Compare in float64, on every numpy: rounded to float32 a threshold may meet a score.
        threshold = np.array([self.threshold], np.float64)
        predicted = scores > threshold if self.smiyc else scores >= threshold
        predicted &= mask != VOID
        truth = mask == 1
        either = predicted | truth  # the other pixels have no part in any figure
        truth_ids, predicted_ids = _label(truth)[either], _label(predicted)[either]
        predicted_ids = _drop_small(predicted_ids, self.track.minimum_predicted)
        kept_truth_ids = _drop_small(truth_ids, self.track.minimum_truth)
        # Small ground truth becomes void, for the predictions on it too.
        valid = (truth_ids == 0) | (kept_truth_ids > 0)
        if self.smiyc and truth.size - np.count_nonzero(truth) < self.track.minimum_truth:
            valid = kept_truth_ids > 0  # it takes the background for a component, too small
        self._add(kept_truth_ids[valid], predicted_ids[valid])

    def merge(self, other: 'ComponentCounts') -> None:
        """Add the frames of ``other``, which must have the same settings."""
        if (self.track, self.threshold, self.smiyc) != (
                other.track, other.threshold, other.smiyc):
            raise ValueError('merge needs component counts of one track and one threshold')
        self._siou_truth += other._siou_truth
        self._siou_predicted += other._siou_predicted
        self._ppv += other._ppv

    def result(self) -> ComponentMetrics:
        """Compute the figures over all frames added."""
        siou, siou_predicted, ppv = (
            np.concatenate([np.empty(0), *parts])
            for parts in (self._siou_truth, self._siou_predicted, self._ppv))
        taus = np.linspace(0.25, 0.75, 11) if self.smiyc else TAUS
        tp = [int(np.count_nonzero(siou >= tau)) for tau in taus]
        fp = [int(np.count_nonzero(ppv < tau)) for tau in taus]
        f1 = [2 * hits / (hits + siou.size + wrong) if siou.size + wrong else None
              for hits, wrong in zip(tp, fp, strict=True)]
        defined = [value for value in f1 if value is not None]
        reason = None
        if not siou.size:
            reason = 'no ground-truth component of the minimum size'
        elif not ppv.size:
            reason = 'ppv: no predicted component of the minimum size'
        return ComponentMetrics(
            track=self.track.name, threshold=float(self.threshold), siou_gt=_mean(siou),
            siou_pred=_mean(siou_predicted), ppv=_mean(ppv),
            mean_f1=math.fsum(defined) / len(f1) if len(defined) == len(f1) else None,
            f1_by_tau=dict(zip(map(str, TAUS), f1, strict=True)),
            tp_mean=sum(tp) / len(TAUS), fp_mean=sum(fp) / len(TAUS),
            fn_mean=sum(siou.size - hits for hits in tp) / len(TAUS),
            ground_truth_components=siou.size, predicted_components=ppv.size, reason=reason)

    def _add(self, truth: npt.NDArray[np.int32], predicted: npt.NDArray[np.int32]) -> None:
        """Add the component ids of a frame's valid pixels (1-d, 0 = no component)."""
        truth_size = np.bincount(truth, minlength=1)
        predicted_size = np.bincount(predicted, minlength=1)
        width = predicted_size.size
        both = (truth > 0) & (predicted > 0)
        pairs, shared = np.unique(truth[both].astype(np.int64) * width + predicted[both],
                                  return_counts=True)
        truth_of, predicted_of = pairs // width, pairs % width
        # Pixels of each component that are covered by the other side.
        covered_truth = np.bincount(truth_of, shared, truth_size.size)
        covered_predicted = np.bincount(predicted_of, shared, width)
        # |(i | K_i) - A| = |i| + sum over K_i of the pixels outside all ground truth.
        outside = np.bincount(truth_of, (predicted_size - covered_predicted)[predicted_of],
                              truth_size.size)
        missed = np.bincount(predicted_of, (truth_size - covered_truth)[truth_of], width)
        here = np.flatnonzero(truth_size[1:]) + 1
        self._siou_truth.append(covered_truth[here] / (truth_size + outside)[here])
        here = np.flatnonzero(predicted_size[1:]) + 1
        self._siou_predicted.append(covered_predicted[here] / (predicted_size + missed)[here])
        self._ppv.append(covered_predicted[here] / predicted_size[here])


def _label(binary: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """Give each 8-connected component a number from 1; int32, 0 = background."""
    ids: npt.NDArray[Any] = cv2.connectedComponents(binary.view(np.uint8), connectivity=8)[1]
    return ids


def _drop_small(ids: npt.NDArray[np.int32], minimum: int) -> npt.NDArray[np.int32]:
    """Return ``ids`` (1-d) with the components of fewer than ``minimum`` pixels set to 0."""
    sizes = np.bincount(ids, minlength=1)
    keep = np.arange(sizes.size, dtype=np.int32)
    keep[sizes < minimum] = 0
    kept: npt.NDArray[np.int32] = keep[ids]
    return kept


def _mean(values: npt.NDArray[np.float64]) -> float | None:
    """Mean with an exactly rounded sum, so that the order of frames does not matter."""
    return math.fsum(values) / values.size if values.size else None
