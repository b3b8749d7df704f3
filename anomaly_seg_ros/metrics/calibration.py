# SPDX-License-Identifier: Apache-2.0
"""
Calibration of the network's confidence, detection of its errors, and unknown images and classes.

The sample is a labelled pixel, with the confidence of its predicted class and whether that was
right. de Jorge et al., "Reliability in Semantic Segmentation", CVPR 2023 (ECE, adaptive ECE, KS,
PRR, image-level and local OOD); Blum et al., "The Fishyscapes Benchmark", IJCV 2021, appendix
(max-J and AP of misclassification).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anomaly_seg_ros.classes import UNLABELLED
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.metrics.pixel import FloatArray, MaskArray, PixelCurve, VOID
import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]

BINS = 15
SAMPLES_PER_FRAME = 20_000
IMAGE_QUANTILES = (0.5, 0.9, 0.99)
IMAGE_STATISTICS = ('mean', 'max', *(f'quantile_{quantile}' for quantile in IMAGE_QUANTILES))


@dataclass(frozen=True)
class ReliabilityBin:
    """One bar of a reliability diagram; ``accuracy`` and ``confidence`` None where it is empty."""

    low: float
    high: float
    pixels: int
    accuracy: float | None
    confidence: float | None


@dataclass(frozen=True)
class RejectionCurve:
    """
    Errors that remain when a share of the pixels is rejected, least confident first.

    All float64 in [0, 1] and of one length. ``random`` rejects without looking, ``oracle`` rejects
    the errors first.
    """

    rejected: Float64Array
    error: Float64Array
    random: Float64Array
    oracle: Float64Array


@dataclass(frozen=True)
class CalibrationMetrics:
    """
    The ``calibration`` section of metrics.json; fractions. None where ``reason`` says why.

    ``prr`` is in [-1, 1], 1 for a perfect ranking of errors, 0 for a random one. The
    ``misclassification`` figures take errors as positives and 1 - confidence as the score.
    """

    ece: float | None
    adaptive_ece: float | None
    ks: float | None
    prr: float | None
    misclassification_ap: float | None
    misclassification_max_j: float | None
    misclassification_auroc: float | None
    misclassification_fpr95: float | None
    accuracy: float | None
    mean_confidence: float | None
    pixels: int
    reliability: tuple[ReliabilityBin, ...]
    reason: str | None = None


class Calibration:
    """
    Collects confidences of right and wrong predictions; merges exactly.

    Memory: 4 bytes for each pixel kept.

    Parameters
    ----------
    samples_per_frame
        Pixels drawn at random from each frame before void ones are dropped, as in the reference
        (20,000); None keeps all. The draw depends on ``seed`` and the frame's number only, so it
        is the same however frames are split.
    seed
        Seed of the draw.

    """

    def __init__(self, samples_per_frame: int | None = SAMPLES_PER_FRAME, seed: int = 0) -> None:
        self.samples_per_frame = samples_per_frame
        self.seed = seed
        self._right: list[npt.NDArray[np.float32]] = []
        self._wrong: list[npt.NDArray[np.float32]] = []

    def update(self, frame: int, confidence: FloatArray, predicted: npt.NDArray[np.uint8],
               labels: npt.NDArray[np.uint8], frame_id: str) -> None:
        """
        Add frame number ``frame``.

        Parameters
        ----------
        frame
            Its number in the data set.
        confidence
            (H, W) float in [0, 1]: probability of the predicted class.
        predicted, labels
            (H, W) uint8 class ids; label 255 takes no part.
        frame_id
            The name that errors give.

        Raises
        ------
        UserError
            If shapes differ or a confidence is not in [0, 1].

        """
        if not confidence.shape == predicted.shape == labels.shape:
            raise UserError(f'{frame_id}: confidence {confidence.shape}, prediction '
                            f'{predicted.shape} and labels {labels.shape} must have one size')
        if not ((confidence >= 0) & (confidence <= 1)).all():
            raise UserError(f'{frame_id}: confidences must be probabilities in [0, 1], got '
                            f'{confidence.min()} to {confidence.max()}')
        values = confidence.ravel()
        hits, known = (predicted == labels).ravel(), (labels != UNLABELLED).ravel()
        if self.samples_per_frame is not None and values.size > self.samples_per_frame:
            chosen = np.random.default_rng([self.seed, frame]).choice(
                values.size, self.samples_per_frame, replace=False, shuffle=False)
            values, hits, known = values[chosen], hits[chosen], known[chosen]
        self._right.append(values[hits & known].astype(np.float32))
        self._wrong.append(values[~hits & known].astype(np.float32))

    def merge(self, other: 'Calibration') -> None:
        """Add the frames of ``other``, which must draw alike."""
        if (self.samples_per_frame, self.seed) != (other.samples_per_frame, other.seed):
            raise ValueError('merge needs calibrations with one samples_per_frame and seed')
        self._right += other._right
        self._wrong += other._wrong

    def result(self) -> CalibrationMetrics:
        """Compute the figures over all frames added."""
        right, wrong = self._sorted()
        return calibration_metrics(right, wrong)

    def rejection_curve(self, points: int = 101) -> RejectionCurve | None:
        """Return the curve behind PRR at evenly spaced shares; None without pixels."""
        right, wrong = self._sorted()
        return rejection_curve(right, wrong, points) if right.size + wrong.size else None

    def _sorted(self) -> tuple[FloatArray, FloatArray]:
        empty = np.empty(0, np.float32)
        return (np.sort(np.concatenate([empty, *self._right])),
                np.sort(np.concatenate([empty, *self._wrong])))


def calibration_metrics(right: FloatArray, wrong: FloatArray) -> CalibrationMetrics:
    """Return the figures of the confidences (in [0, 1]) of right and of wrong predictions."""
    pixels = right.size + wrong.size
    if not pixels:
        return CalibrationMetrics(None, None, None, None, None, None, None, None, None, None, 0,
                                  (), 'no labelled pixel')
    confidence, correct = _pooled(right, wrong)
    reliability = _bins(confidence, correct, np.linspace(0, 1, BINS + 1))
    positions = np.linspace(0, pixels, BINS + 1)
    population = _bins(confidence, correct,
                       np.interp(positions, np.arange(pixels), confidence))
    curve = PixelCurve.of(-wrong, -right)
    defined = curve.undefined is None
    return CalibrationMetrics(
        ece=_gap(reliability), adaptive_ece=_gap(population), ks=_ks(confidence, correct),
        prr=2 * curve.auroc() - 1 if defined else None,
        misclassification_ap=curve.average_precision() if defined else None,
        misclassification_max_j=curve.max_j()[0] if defined else None,
        misclassification_auroc=curve.auroc() if defined else None,
        misclassification_fpr95=curve.fpr_at_recall() if defined else None,
        accuracy=right.size / pixels, mean_confidence=float(confidence.mean()), pixels=pixels,
        reliability=reliability, reason=None if defined else (
            'prr, misclassification: every prediction is ' + ('right' if right.size else 'wrong')))


def _pooled(right: FloatArray, wrong: FloatArray) -> tuple[Float64Array, npt.NDArray[np.bool_]]:
    """Join to confidences, ascending, and whether each was right; equal ones wrong first."""
    confidence = np.concatenate([wrong, right]).astype(np.float64)
    correct = np.arange(confidence.size) >= wrong.size
    order = np.argsort(confidence, kind='stable')
    return confidence[order], correct[order]


def _bins(confidence: Float64Array, correct: npt.NDArray[np.bool_],
          edges: Float64Array) -> tuple[ReliabilityBin, ...]:
    """Group sorted confidences into (edge, next edge]; the lowest edge belongs to the first."""
    ends = np.searchsorted(confidence, edges[1:], 'right')
    starts = np.append(0, ends[:-1])
    bins = []
    for low, high, start, end in zip(edges[:-1], edges[1:], starts, ends, strict=True):
        inside = slice(start, end)
        bins.append(ReliabilityBin(
            float(low), float(high), int(end - start),
            float(correct[inside].mean()) if end > start else None,
            float(confidence[inside].mean()) if end > start else None))
    return tuple(bins)


def _gap(bins: Sequence[ReliabilityBin]) -> float:
    """Mean over pixels of |accuracy - confidence| of their bin."""
    gaps = [each.pixels * abs(each.accuracy - each.confidence) for each in bins
            if each.accuracy is not None and each.confidence is not None]
    return sum(gaps) / sum(each.pixels for each in bins)


def _ks(confidence: Float64Array, correct: npt.NDArray[np.bool_]) -> float:
    """Largest gap of the cumulated confidence and accuracy, over distinct confidences."""
    gap = np.abs(np.cumsum(confidence) - np.cumsum(correct))
    last = np.append(confidence[1:] != confidence[:-1], True)
    return float(gap[last].max() / confidence.size)


def rejection_curve(right: FloatArray, wrong: FloatArray, points: int = 101) -> RejectionCurve:
    """
    Return the errors left when the least confident pixels are rejected, as shares of all pixels.

    PRR = (area under random - area under error) / (area under random - area under oracle), which
    equals 2 AUROC - 1 of detecting the errors by low confidence.
    """
    confidence, correct = _pooled(right, wrong)
    pixels, share = confidence.size, wrong.size / confidence.size
    left = np.append(wrong.size - np.append(0, np.cumsum(~correct)), 0)
    # Within equal confidences the pixels are rejected evenly.
    ends = np.append(0, np.flatnonzero(np.append(confidence[1:] != confidence[:-1], True)) + 1)
    rejected = np.linspace(0, 1, points)
    return RejectionCurve(rejected, np.interp(rejected * pixels, ends, left[ends]) / pixels,
                          share * (1 - rejected), np.maximum(share - rejected, 0))


def image_statistics(scores: FloatArray) -> dict[str, float]:
    """
    Return one score for a whole image: mean, max and quantiles of its (H, W) anomaly map.

    The keys are ``IMAGE_STATISTICS``. With the MSP score (1 - confidence) ``mean`` is one minus
    the reference's mean confidence.
    """
    flat = scores.ravel()
    values = (flat.mean(dtype=np.float64), flat.max(), *np.quantile(flat, IMAGE_QUANTILES))
    return {name: float(value) for name, value in zip(IMAGE_STATISTICS, values, strict=True)}


def image_level_auroc(in_domain: npt.ArrayLike, out_of_domain: npt.ArrayLike) -> float | None:
    """
    Return the AUROC of telling out-of-domain images from in-domain ones by one statistic.

    Parameters
    ----------
    in_domain, out_of_domain
        The statistic of each image of the two sets, higher is more anomalous.

    Returns
    -------
    auroc
        In [0, 1]; None where one of the sets is empty.

    """
    curve = PixelCurve.of(np.asarray(out_of_domain, np.float64).ravel(),
                          np.asarray(in_domain, np.float64).ravel())
    return None if curve.undefined else curve.auroc()


def local_ood_mask(labels: npt.NDArray[Any], known: Sequence[int],
                   unknown: Sequence[int]) -> MaskArray:
    """
    Return the anomaly mask of classes the network does not know, for the pixel metrics.

    Parameters
    ----------
    labels
        (H, W) integer label codes of the data set.
    known
        Codes of the classes that the network was trained on: 0 in the mask.
    unknown
        Codes of the classes to detect: 1. Every other code is void, 255.

    Raises
    ------
    ValueError
        If a code is in both.

    """
    both = sorted(set(known) & set(unknown))
    if both:
        raise ValueError(f'label codes {both} are both known and unknown; list each once')
    mask = np.full(labels.shape, VOID, np.uint8)
    mask[np.isin(labels, known)] = 0
    mask[np.isin(labels, unknown)] = 1
    return mask
