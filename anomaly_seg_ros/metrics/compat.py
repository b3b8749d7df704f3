# SPDX-License-Identifier: Apache-2.0
"""
What the field's own scripts print, where that differs from the canonical figures.

Each function or class is named for the code it follows and says how that code differs; the
definitions were read from the public sources and written anew. Use these to compare with a
published table; use ``pixel`` and ``components`` to judge a detector.
"""

from dataclasses import dataclass
from itertools import pairwise
import math
from typing import Any

from anomaly_seg_ros.metrics.pixel import (
    count_sorted, FloatArray, IntArray, PixelCurve, SplitScores)
import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]

SMIYC_BINS = 768
S2M_THRESHOLDS: Float64Array = np.arange(0, 1.01, 0.01)  # 101, with S2M's float rounding


# SegmentMeIfYouCan, github.com/SegmentMeIfYouCan/road-anomaly-benchmark

@dataclass(frozen=True)
class SmiycPixelMetrics:
    """road-anomaly-benchmark's pixel figures; fractions. None where ``reason`` says why."""

    average_precision: float | None
    fpr95: float | None
    auroc: float | None
    best_f1: float | None
    best_f1_threshold: float | None
    tpr95_threshold: float | None
    reason: str | None = None


@dataclass(frozen=True)
class _Bins:
    """Histograms of one frame, from the highest bin to the lowest, and its pixels."""

    lower_edges: Float64Array
    positives: IntArray
    negatives: IntArray
    total: tuple[int, int]


class SmiycPixel:
    """
    Pixel metrics over bins: ``PixBinaryClass``, as on the leaderboard, or ``-uniThr``.

    Differs from the canonical figures: scores count only by bin. By default the edges of a frame
    are 384 quantiles of its anomalous and 384 of its in-distribution pixels; with ``uniform``,
    4096 equal bins over [-0.01, 1.01]; pixels outside count as found last of all. The bins of all
    frames are sorted by lower edge and accumulated, as if every pixel scored its bin's lower edge.

    Parameters
    ----------
    uniform
        Follow ``PixBinaryClass-uniThr``.

    """

    def __init__(self, *, uniform: bool = False) -> None:
        self.uniform = uniform
        self._frames: dict[int, _Bins] = {}

    def update(self, frame: int, split: SplitScores) -> None:
        """Add frame number ``frame``; cast the scores to float16 for a submission's figures."""
        positives, negatives = split.positives, split.negatives
        if not positives.size and not negatives.size:
            return
        if self.uniform:
            counts, edges = np.histogram(positives, 4096, (-0.01, 1.01))
            negative_counts = np.histogram(negatives, 4096, (-0.01, 1.01))[0]
        else:
            edges = _quantile_edges(positives, negatives)
            counts = count_sorted(positives, edges)
            negative_counts = count_sorted(negatives, edges)
        self._frames[frame] = _Bins(edges[-2::-1], counts[::-1], negative_counts[::-1],
                                    (positives.size, negatives.size))

    def merge(self, other: 'SmiycPixel') -> None:
        """Add the frames of ``other``."""
        self._frames.update(other._frames)

    def result(self) -> SmiycPixelMetrics:
        """Compute the figures over all frames added."""
        frames = [self._frames[key] for key in sorted(self._frames)]
        if not frames or not all(np.sum([bins.total for bins in frames], axis=0)):
            return SmiycPixelMetrics(None, None, None, None, None, None,
                                     'needs anomalous and in-distribution pixels')
        positives, negatives = np.sum([bins.total for bins in frames], axis=0).tolist()
        if self.uniform:  # equal bins: the histograms add up
            return _smiyc_figures(
                frames[0].lower_edges,
                np.cumsum(np.sum([bins.positives for bins in frames], axis=0)),
                np.cumsum(np.sum([bins.negatives for bins in frames], axis=0)),
                positives, negatives)
        thresholds = np.concatenate([bins.lower_edges for bins in frames])
        if not thresholds.size:
            return SmiycPixelMetrics(None, None, None, None, None, None,
                                     'the scores are too large for their type to make bins')
        # The default sort on purpose: where frames share their highest score, the reference's
        # figures depend on how this very call orders equal edges.
        order = np.argsort(thresholds)[::-1]
        return _smiyc_figures(
            thresholds[order],
            np.cumsum(np.concatenate([bins.positives for bins in frames])[order]),
            np.cumsum(np.concatenate([bins.negatives for bins in frames])[order]),
            positives, negatives)


def _quantile_edges(positives: FloatArray, negatives: FloatArray) -> Float64Array:
    """Bin edges of one frame (sorted scores), ascending and distinct."""
    present = [scores for scores in (positives, negatives) if scores.size]
    low, high = min(scores[0] for scores in present), max(scores[-1] for scores in present)
    margin = np.maximum((high - low) * 1e-2, 1e-2)
    edges = [np.array([low - margin, high + margin], np.float64)]
    edges += [_quantiles(scores, np.linspace(0, 1, min(SMIYC_BINS // 2, scores.size)))
              for scores in present]
    return np.unique(np.concatenate(edges))


def _quantiles(ordered: FloatArray, shares: Float64Array) -> Float64Array:
    """Return np.quantile of a sorted array, to the last bit, without looking for the places."""
    place = shares * (ordered.size - 1)
    below = np.floor(place).astype(np.int64)
    above = np.minimum(below + 1, ordered.size - 1)
    share, step = place - below, ordered[above] - ordered[below]
    return np.where(share < 0.5, ordered[below] + step * share,
                    ordered[above] - step * (1 - share))


def _smiyc_figures(thresholds: Float64Array, tp: IntArray, fp: IntArray, positives: int,
                   negatives: int) -> SmiycPixelMetrics:
    """Figures from cumulative counts at descending lower bin edges, and all pixels' counts."""
    # Of equal edges only the last counts, but the first entry stays in any case.
    last = np.flatnonzero(thresholds[:-1] != thresholds[1:])
    keep = np.concatenate([[0], last, [thresholds.size - 1]])
    thresholds, tp, fp = thresholds[keep], tp[keep], fp[keep]
    if tp[0] or fp[0]:
        tp, fp = np.append(0, tp), np.append(0, fp)
        thresholds = np.append(thresholds[0] + 1, thresholds)
    if (tp[-1], fp[-1]) != (positives, negatives):
        tp, fp = np.append(tp, positives), np.append(fp, negatives)
        thresholds = np.append(thresholds, thresholds.max() - 1)
    recall, fpr = tp / positives, fp / negatives
    predicted = tp + fp
    precision = np.divide(tp, predicted, out=np.ones(tp.size), where=predicted > 0)
    f1 = 2 * tp / (predicted + positives)
    k95, best = int(np.searchsorted(recall, 0.95)), int(np.argmax(f1))
    return SmiycPixelMetrics(
        average_precision=float(np.sum(np.diff(recall) * precision[1:])),
        fpr95=float(fpr[k95]), auroc=_trapezoid(recall, fpr), best_f1=float(f1[best]),
        best_f1_threshold=float(thresholds[best]), tpr95_threshold=float(thresholds[k95]))


# CAOS, github.com/hendrycks/anomaly-seg

@dataclass(frozen=True)
class CaosFigures:
    """Means over images; fractions."""

    auroc: float
    average_precision: float
    fpr95: float


@dataclass(frozen=True)
class CaosMetrics:
    """
    CAOS figures with void left out, and with void as in-distribution.

    The original code knows no void and does the latter. None where ``reason`` says why.
    """

    void_dropped: CaosFigures | None
    void_as_id: CaosFigures | None
    images_used: int
    reason: str | None = None


class CaosPerImage:
    """
    AUROC, AP and FPR95 of each image, averaged over images (Hendrycks et al., ICML 2022).

    Differs from the canonical figures: every image weighs the same however few anomalous pixels
    it has; images without anomaly, where false alarms happen, do not count; FPR95 is taken at
    the recall closest to 0.95, which may be below it.
    """

    def __init__(self) -> None:
        self._dropped: list[CaosFigures] = []
        self._as_id: list[CaosFigures] = []

    def update(self, split: SplitScores, curve: PixelCurve | None = None) -> None:
        """Add one frame; ``curve`` is the frame's own, where it is known already."""
        curve = curve or PixelCurve.of_sorted(split.positives, split.negatives)
        if not curve.undefined:
            self._dropped.append(_caos_figures(curve))
        if split.void.size:
            curve = PixelCurve.of(split.positives, np.concatenate([split.negatives, split.void]))
        if not curve.undefined:
            self._as_id.append(_caos_figures(curve))

    def merge(self, other: 'CaosPerImage') -> None:
        """Add the frames of ``other``."""
        self._dropped += other._dropped
        self._as_id += other._as_id

    def result(self) -> CaosMetrics:
        """Compute the means over all frames added."""
        return CaosMetrics(_caos_means(self._dropped), _caos_means(self._as_id),
                           len(self._dropped),
                           None if self._dropped else 'no image holds both classes')


def _caos_figures(curve: PixelCurve) -> CaosFigures:
    return CaosFigures(curve.auroc(), curve.average_precision(), caos_fpr_at_recall(curve))


def _caos_means(rows: list[CaosFigures]) -> CaosFigures | None:
    if not rows:
        return None
    return CaosFigures(_mean([row.auroc for row in rows]),
                       _mean([row.average_precision for row in rows]),
                       _mean([row.fpr95 for row in rows]))


def caos_fpr_at_recall(curve: PixelCurve, recall: float = 0.95) -> float:
    """
    Return anomaly-seg's false-positive rate at the recall closest to ``recall``.

    The closest recall may be below the one asked for; of the thresholds with that recall it takes
    the lowest, which has the most false positives, except at full recall.
    """
    distance = np.abs(curve.recall - recall)
    k = distance.size - 1 - int(np.argmin(distance[::-1]))
    fp = curve.fp[k] if k == distance.size - 1 else curve.fp_above[k + 1]
    return float(fp / curve.negatives)


# ood-metrics (PyPI; used by the PoliTo evalAnomaly.py) and RbA (github.com/NazirNayal8/RbA)

def trapezoid_aupr(curve: PixelCurve) -> float:
    """
    Return the trapezoidal area under the precision-recall curve (ood-metrics, pytorch-ood).

    Differs from AP: it interpolates precision linearly in recall, which no threshold reaches; too
    high by a lot where scores tie.
    """
    tp_before = np.append(0, curve.tp[:-1])
    predicted_before = tp_before + curve.fp_above
    before = np.divide(tp_before, predicted_before, out=np.ones(tp_before.size),
                       where=predicted_before > 0)
    steps = np.diff(curve.tp, prepend=0)
    return float(np.sum(steps * (before + curve.precision)) / 2 / curve.positives)


def interpolated_fpr95(curve: PixelCurve) -> float:
    """Return ood-metrics' FPR at recall 0.95, linear between the ROC's vertices around it."""
    recall = curve.recall
    k = int(np.searchsorted(recall, 0.95, 'right'))
    recall_before = recall[k - 1] if k else 0.0
    fpr_before = curve.fp_above[k] / curve.negatives
    share = (0.95 - recall_before) / (recall[k] - recall_before)
    return float(fpr_before + share * (curve.fpr[k] - fpr_before))


def rba_fpr95(curve: PixelCurve) -> float:
    """
    Return RbA's FPR at the first vertex of scikit-learn's thinned ROC with recall above 0.95.

    Differs from FPR95: above, not at least; and a point in line with its neighbours (equal counts
    of both classes at two scores in a row) is not a vertex of ``roc_curve``.
    """
    k = int(np.searchsorted(curve.recall, 0.95, 'right'))
    steps, tied = np.diff(curve.tp, prepend=0), curve.fp - curve.fp_above
    first = k == 0 and curve.fp_above[0] == 0
    while not first and k + 1 < steps.size and (
            curve.fp_above[k + 1] == curve.fp[k] and steps[k + 1] == steps[k]
            and tied[k + 1] == tied[k]):
        k += 1
    return float(curve.fpr[k])


# pytorch-ood (PyPI) and torchmetrics (PyPI)

@dataclass(frozen=True)
class PytorchOodMetrics:
    """pytorch-ood's figures; fractions. ``autc`` is null where all scores are equal."""

    auroc: float
    autc: float | None
    aupr_in: float
    aupr_out: float
    fpr95: float


def pytorch_ood(split: SplitScores) -> PytorchOodMetrics | None:
    """
    Return pytorch-ood's figures over pooled pixels, or None without both classes.

    AUPR is the trapezoid, also with in-distribution as the positive class (AUPR-IN). AUTC
    (Humblot-Renaux et al., CVPR 2023) is the mean of FPR and FNR over all thresholds after scaling
    the scores to [0, 1] by their range. Needs all scores in memory.
    """
    curve = PixelCurve.of_sorted(split.positives, split.negatives)
    if curve.undefined:
        return None
    inverse = PixelCurve.of(-split.negatives, -split.positives)
    positives = split.positives.astype(np.float64)
    negatives = split.negatives.astype(np.float64)
    low, high = min(positives[0], negatives[0]), max(positives[-1], negatives[-1])
    autc = None
    if high > low:
        autc = float((negatives.mean() - positives.mean()) / (high - low) + 1) / 2
    return PytorchOodMetrics(curve.auroc(), autc, trapezoid_aupr(inverse), trapezoid_aupr(curve),
                             curve.fpr_at_recall())


def pytorch_ood_per_image(splits: list[SplitScores]) -> PytorchOodMetrics | None:
    """Return the means of ``pytorch_ood`` over the images that hold both classes."""
    rows = [row for row in map(pytorch_ood, splits) if row is not None]
    if not rows:
        return None
    autc = [row.autc for row in rows if row.autc is not None]
    return PytorchOodMetrics(
        _mean([row.auroc for row in rows]), _mean(autc) if len(autc) == len(rows) else None,
        _mean([row.aupr_in for row in rows]), _mean([row.aupr_out for row in rows]),
        _mean([row.fpr95 for row in rows]))


def torchmetrics_curve(split: SplitScores) -> PixelCurve:
    """
    Return the curve that torchmetrics sees.

    Where any score lies outside [0, 1], torchmetrics takes all for logits and applies a float32
    sigmoid, which makes large scores tie. (It then sums in float32; this does not.)
    """
    positives, negatives = (values.astype(np.float32)
                            for values in (split.positives, split.negatives))
    if any(values.size and (values[0] < 0 or values[-1] > 1) for values in (positives, negatives)):
        positives, negatives = _sigmoid(positives), _sigmoid(negatives)
    return PixelCurve.of(positives, negatives)


def _sigmoid(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    with np.errstate(over='ignore'):
        # numpy's float32 exp is up to 3 ulp off, torch's 1: which scores tie depends on it.
        exponential = np.exp(-values.astype(np.float64)).astype(np.float32)
        return np.reciprocal(1 + exponential)


# S2M, github.com/WenjieZhao1/S2M

@dataclass(frozen=True)
class S2mFigures:
    """
    S2M's figures: means over images of IoU and F1 at 101 thresholds; fractions.

    ``iou`` is the best mean over the thresholds, at ``best_threshold``; ``auiou`` the area under
    it; ``mean_f1`` its F1's mean over thresholds.
    """

    iou: float
    best_threshold: float
    auiou: float
    mean_f1: float


@dataclass(frozen=True)
class S2mMetrics:
    """
    S2M's figures with void as in-distribution (its code), with void left out, and on raw scores.

    The first two scale the scores by the data set's range; ``raw`` leaves them as they are, which
    is how S2M's own boxes are scored, and is null for scores outside [0, 1].
    """

    void_as_negative: S2mFigures | None
    void_masked: S2mFigures | None
    raw: S2mFigures | None
    reason: str | None = None


class S2mCounts:
    """
    IoU and F1 of each image at 101 thresholds 0, 0.01 .. 1 (Zhao et al., CVPR 2024).

    Differs from the canonical F1: a mean over images, an image without anomaly giving 0 whatever
    is predicted; ``score > threshold``, compared in float32; void pixels count as
    in-distribution.

    Parameters
    ----------
    low, high
        Range of all scores of the data set, void pixels included.

    """

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = np.float32(low), np.float32(high)
        # frame -> (3 variants, 2 figures, 101 thresholds)
        self._frames: dict[int, Float64Array] = {}

    def update(self, frame: int, split: SplitScores) -> None:
        """Add frame number ``frame``."""
        positives, negatives, void = (
            values.astype(np.float32)
            for values in (split.positives, split.negatives, split.void))
        scaled = [self._scale(values) for values in (positives, negatives, void)]
        self._frames[frame] = np.stack([
            _s2m_figures(scaled[0], scaled[1:]), _s2m_figures(scaled[0], scaled[1:2]),
            _s2m_figures(positives, [negatives, void])])

    def merge(self, other: 'S2mCounts') -> None:
        """Add the frames of ``other``."""
        self._frames.update(other._frames)

    def result(self) -> S2mMetrics:
        """Compute the figures over all frames added."""
        if not self._frames:
            return S2mMetrics(None, None, None, 'no frame')
        if self.low == self.high:
            return S2mMetrics(None, None, None, 'all scores are equal: no range to scale by')
        means = np.mean([self._frames[key] for key in sorted(self._frames)], axis=0)
        void_as_negative, void_masked, raw = (_s2m_summary(iou, f1) for iou, f1 in means)
        if self.low >= 0 and self.high <= 1:
            return S2mMetrics(void_as_negative, void_masked, raw)
        return S2mMetrics(void_as_negative, void_masked, None, 'raw: scores outside [0, 1]')

    def _scale(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        scaled: npt.NDArray[np.float32] = (values - self.low) / (
            self.high - self.low or np.float32(1))
        return scaled


def _s2m_figures(positives: npt.NDArray[np.float32],
                 others: list[npt.NDArray[np.float32]]) -> Float64Array:
    """Return IoU and F1 (2, 101) of one image from sorted scores."""
    thresholds = S2M_THRESHOLDS.astype(np.float32)
    hits, *wrong = (values.size - np.searchsorted(values, thresholds, 'right')
                    for values in (positives, *others))
    union = positives.size + np.sum(wrong, axis=0)
    filled = np.maximum(union, 1)
    return np.stack([hits / filled, 2 * hits / np.maximum(hits + union, 1)])


def _s2m_summary(iou: Float64Array, f1: Float64Array) -> S2mFigures:
    best = int(np.argmax(iou))
    return S2mFigures(float(iou[best]), float(S2M_THRESHOLDS[best]) if iou[best] > 0 else 0.0,
                      _trapezoid(iou, S2M_THRESHOLDS), float(f1.mean()))


# relis, github.com/naver/relis

@dataclass(frozen=True)
class RelisMetrics:
    """relis' figures; ECE, adaptive ECE and KS as fractions, PRR in percent as it prints them."""

    ece: float
    adaptive_ece: float
    ks: float
    prr_percent: float | None
    prr_entropy_percent: float | None


def relis(probabilities: FloatArray, labels: npt.NDArray[Any]) -> RelisMetrics:
    """
    Return the figures of relis' ``UncertaintyOps`` (de Jorge et al., CVPR 2023).

    Differs from the canonical figures: the least confident pixel of the adaptive bins is in no
    bin; PRR misses a factor of 100 in its oracle, so that a perfect ranking does not give 100
    percent, and sums in float32 (noise of about 1e-5 percent).

    Parameters
    ----------
    probabilities
        (N, C) float, each row's sum 1. relis draws 20,000 pixels of each image, void included.
    labels
        (N,) class ids; 255 is dropped.

    """
    rows = probabilities[labels != 255].astype(np.float64)
    known = labels[labels != 255]
    confidence, predicted = rows.max(axis=1), rows.argmax(axis=1)
    correct = predicted == known
    order = np.argsort(confidence)
    ordered = confidence[order]
    edges = np.interp(np.linspace(0, known.size, 16), np.arange(known.size), ordered)
    gap = np.cumsum(ordered) / known.size - np.cumsum(correct[order]) / known.size
    rows += 1e-16
    negative_entropy = np.sum(np.log(rows) * rows, axis=1)
    return RelisMetrics(
        _relis_ece(confidence, correct, np.linspace(0, 1, 16)),
        _relis_ece(confidence, correct, edges), float(np.abs(gap).max()),
        _relis_prr(confidence, correct), _relis_prr(negative_entropy, correct))


def _relis_ece(confidence: Float64Array, correct: npt.NDArray[np.bool_],
               edges: Float64Array) -> float:
    gaps = 0.0
    for low, high in pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            gaps += inside.mean() * abs(confidence[inside].mean() - correct[inside].mean())
    return float(gaps)


def _relis_prr(confidence: Float64Array, correct: npt.NDArray[np.bool_]) -> float | None:
    """Follow the reference's steps in its float32, which its result depends on."""
    samples = confidence.size
    errors = ~correct[np.argsort(-confidence, kind='stable')]
    cumulated = np.cumsum(errors.astype(np.float32)) / np.float32(samples)
    base = cumulated[-1]
    # The lost factor: the base error is taken for a percentage.
    reach = float(base / np.float32(100) * np.float32(samples))
    shares = np.arange(samples) / samples
    oracle = np.zeros_like(cumulated)
    rejected = np.arange(int(reach))
    oracle[:rejected.size] = base * (1 - rejected / reach).astype(np.float32) if reach else 0
    areas = [_float32_area(curve) for curve in (
        cumulated[::-1], base * (1 - shares).astype(np.float32), oracle)]
    uncertainty, random, perfect = (1 - area for area in areas)
    return (uncertainty - random) / (perfect - random) * 100 if perfect != random else None


def _float32_area(curve: npt.NDArray[np.float32]) -> float:
    """Trapezoid over the shares 1/n .. 1 of a curve in percent, summed in float32."""
    x = np.arange(1, curve.size + 1) / curve.size * 100 / 100
    y = curve / np.float32(100)
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2, dtype=np.float32))


def _trapezoid(y: npt.NDArray[Any], x: npt.NDArray[Any]) -> float:
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1])) / 2)


def _mean(values: list[float]) -> float:
    """Mean with an exactly rounded sum, so that the order of frames does not matter."""
    return math.fsum(values) / len(values)
