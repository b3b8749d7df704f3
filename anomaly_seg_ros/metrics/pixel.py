# SPDX-License-Identifier: Apache-2.0
"""
Pixel metrics, pooled over a data set: exact, with ties grouped, in bounded memory.

Only the thresholds at which recall changes matter, and these are the scores of the anomalous
pixels, which are few. So two passes over the frames are enough: ``PositiveScores`` collects the
distinct scores of the anomalous pixels, then ``NegativeCounts`` counts the in-distribution pixels
above and at each of them, and ``PixelCurve`` has every figure. Both accumulators hold integers and
sorted scores only: merging them in any order gives the same bits.

Convention: a higher score is more anomalous; a pixel is called anomalous when
``score >= threshold``; void pixels (255) take no part.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
import time
from typing import Any

from anomaly_seg_ros.errors import UserError
import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.int64]
MaskArray = npt.NDArray[np.uint8]

VOID = 255
RISK_FPRS = (1e-4, 1e-3, 1e-2, 5e-2)
MAXIMUM_WAITING = 1 << 24  # pixels held until they are counted: 64 MB of float32
MOST_SORTED = 8  # pixels that are sorted in the time of one look-up, where sorting is fast
CACHED = 1 << 16  # pixels that are sorted and searched at a time


@dataclass(frozen=True)
class SplitScores:
    """One frame's scores by ground truth, each a sorted float array (ascending)."""

    positives: FloatArray
    negatives: FloatArray
    void: FloatArray


def split_scores(scores: npt.NDArray[Any], mask: npt.NDArray[Any], frame_id: str) -> SplitScores:
    """
    Check one frame and sort its scores by ground truth.

    Parameters
    ----------
    scores
        Anomaly score, float16, float32 or float64, any shape; higher is more anomalous.
    mask
        Same shape: 0 in-distribution, 1 anomaly, 255 void.
    frame_id
        The name that errors give.

    Raises
    ------
    UserError
        If shapes differ, the mask has other codes, or a score is NaN or infinite (void pixels
        included: a score map with a hole is broken).

    """
    check_frame(scores, mask, frame_id)
    return split_checked(scores, mask)


def split_checked(scores: npt.NDArray[Any], mask: npt.NDArray[Any]) -> SplitScores:
    """Sort by ground truth the scores of a frame that ``check_frame`` has passed."""
    positive, negative = mask == 1, mask == 0
    return SplitScores(_sort(scores[positive]), _sort(scores[negative]),
                       _sort(scores[~(positive | negative)]))


def check_frame(scores: npt.NDArray[Any], mask: npt.NDArray[Any], frame_id: str) -> None:
    """Raise UserError unless ``scores`` and ``mask`` are what ``split_scores`` asks for."""
    if scores.dtype.kind != 'f' or scores.dtype.itemsize > 8:
        raise UserError(f'{frame_id}: scores must be float16, float32 or float64, got '
                        f'{scores.dtype}. Store the raw anomaly score, not a colour image.')
    if scores.shape != mask.shape:
        raise UserError(f'{frame_id}: scores are {scores.shape} and the mask is {mask.shape}; '
                        'both must have one size. Resize the scores to the mask.')
    if not scores.size:
        raise UserError(f'{frame_id}: a score map must have at least one pixel, got '
                        f'{scores.shape}. Write it again.')
    if not np.isfinite(scores).all():
        bad = int(np.count_nonzero(~np.isfinite(scores)))
        raise UserError(f'{frame_id}: {bad} of {scores.size} scores are NaN or infinite; every '
                        'score must be finite. Check the score function and FP16 overflow.')
    known = sum(np.count_nonzero(mask == code) for code in (0, 1, VOID))
    if known != mask.size:
        codes = sorted(set(np.unique(mask).tolist()) - {0, 1, VOID})
        raise UserError(f'{frame_id}: the mask holds codes {codes[:8]}; only 0 (in-distribution), '
                        '1 (anomaly) and 255 (void) are allowed. Map the codes first.')


def _sort(values: npt.NDArray[Any]) -> FloatArray:
    """Sort a 1-d array in place, ascending, and return it."""
    if values.dtype == np.float16:
        # Not as float16: numpy 2.4 leaves repeated negative numbers unsorted with AVX-512 ICL.
        values[:] = np.sort(values.astype(np.float32))
    else:
        values.sort()
    values += values.dtype.type(0)  # -0.0 becomes 0.0: equal scores, equal bits
    return values


def count_sorted(ordered: FloatArray, edges: npt.NDArray[np.float64]) -> IntArray:
    """Count sorted scores in [edge, next edge), the last bin closed, as np.histogram does."""
    below = np.append(np.searchsorted(ordered, edges[:-1], 'left'),
                      np.searchsorted(ordered, edges[-1], 'right'))
    return np.diff(below)


class PositiveScores:
    """
    Pass 1: the distinct scores of all anomalous pixels and how many pixels have each.

    Memory: one float and one int64 for each distinct score.
    """

    def __init__(self) -> None:
        self._values: FloatArray = np.empty(0, np.float16)
        self._counts: IntArray = np.empty(0, np.int64)
        self._pending: list[tuple[FloatArray, IntArray]] = []

    def update(self, positives: FloatArray) -> None:
        """Add the scores of one frame's anomalous pixels (float, any order)."""
        ordered = _sort(positives.ravel().copy())
        first = _first_of_each(ordered)
        self._add(ordered[first], np.diff(first, append=ordered.size))

    def merge(self, other: 'PositiveScores') -> None:
        """Add what ``other`` collected."""
        self._add(*other.result())

    def result(self) -> tuple[FloatArray, IntArray]:
        """Return the distinct scores, ascending, and their pixel counts (int64)."""
        if self._pending:
            self._values, self._counts = _union([(self._values, self._counts), *self._pending])
            self._pending = []
        return self._values, self._counts

    def __getstate__(self) -> tuple[FloatArray, IntArray]:
        return self.result()

    def __setstate__(self, state: tuple[FloatArray, IntArray]) -> None:
        self._values, self._counts = state
        self._pending = []

    def _add(self, values: FloatArray, counts: IntArray) -> None:
        if values.size:
            self._pending.append((values, counts))
        # Fold when as much waits as is held, so that n frames cost n log n.
        if sum(waiting.size for waiting, _ in self._pending) > max(self._values.size, 1 << 16):
            self.result()


def _first_of_each(ordered: FloatArray) -> IntArray:
    """Return where in a sorted array each distinct value begins."""
    return np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])[:ordered.size])


def _union(parts: Iterable[tuple[FloatArray, IntArray]]) -> tuple[FloatArray, IntArray]:
    values = np.concatenate([values for values, _ in parts])
    counts = np.concatenate([counts for _, counts in parts])
    order = np.argsort(values, kind='stable')
    values = values[order]
    first = _first_of_each(values)
    return values[first], np.add.reduceat(counts[order], first)


class NegativeCounts:
    """
    Pass 2: for each threshold, how many in-distribution pixels score above it, and at it.

    Parameters
    ----------
    thresholds
        Distinct scores, ascending: the result of pass 1.

    """

    def __init__(self, thresholds: FloatArray) -> None:
        self.thresholds = thresholds
        self._below: IntArray = np.zeros(thresholds.size, np.int64)
        self._equal: IntArray = np.zeros(thresholds.size, np.int64)
        self._total = 0
        self._pending: list[FloatArray] = []

    def update(self, negatives: FloatArray) -> None:
        """Add the sorted scores (ascending) of one frame's in-distribution pixels."""
        self._pending.append(negatives)
        # Counting costs one look-up per threshold. Where a frame does not pay for them, wait for
        # more, so that the cost stays linear in pixels however many thresholds there are.
        waiting = sum(scores.size for scores in self._pending)
        if waiting >= min(32 * self.thresholds.size, MAXIMUM_WAITING) or (
                len(self._pending) == 1 and _is_worth_counting(waiting, self.thresholds.size)):
            self._flush()

    def merge(self, other: 'NegativeCounts') -> None:
        """Add the counts of ``other``, which must have the same thresholds."""
        if not np.array_equal(self.thresholds, other.thresholds):
            raise ValueError('merge needs counts at the same thresholds; make both NegativeCounts '
                             'from one result of pass 1')
        self._flush()
        other._flush()
        self._below = self._below + other._below
        self._equal = self._equal + other._equal
        self._total += other._total

    def result(self) -> tuple[IntArray, IntArray, int]:
        """Return counts ``>= threshold`` and ``> threshold`` (int64), and the pixel count."""
        self._flush()
        at_least = self._total - self._below
        return at_least, at_least - self._equal, self._total

    def __getstate__(self) -> dict[str, Any]:
        self._flush()
        return self.__dict__

    def _flush(self) -> None:
        if not self._pending:
            return
        # What came from another process may be read-only.
        self._below, self._equal = (np.require(counts, requirements='W')
                                    for counts in (self._below, self._equal))
        total = 0
        for piece, scores in _by_value(self._pending, self.thresholds):
            below, tied, equal = _count_below(scores, self.thresholds[piece])
            below += total
            self._below[piece] += below
            self._equal[piece][tied] += equal
            total += scores.size
        self._pending = []
        self._total += total


def _is_worth_counting(pixels: int, thresholds: int) -> bool:
    """Tell whether looking up all thresholds in one frame costs less than sorting it again."""
    return pixels >= MOST_SORTED * thresholds or pixels >= _sorted_in_a_lookup() * thresholds


@cache
def _sorted_in_a_lookup() -> float:
    """
    Measure how many pixels are sorted while one threshold is looked up, at most ``MOST_SORTED``.

    It decides about time only. Some 8 on most processors, 1 on those of the Zen 4 kind, where
    the AVX-512 code of numpy's sort is slow.
    """
    scores = np.random.default_rng(0).random(1 << 18, np.float32)
    start = time.perf_counter()
    scores.sort()
    sorting = (time.perf_counter() - start) / scores.size
    keys = scores[::4].copy()
    start = time.perf_counter()
    np.searchsorted(scores, keys)
    looking_up = (time.perf_counter() - start) / keys.size
    return min(MOST_SORTED, looking_up / sorting)


def _by_value(parts: list[FloatArray],
              thresholds: FloatArray) -> Iterator[tuple[slice, FloatArray]]:
    """
    Cut sorted scores at common values; yield pieces of the thresholds, and all scores there.

    Sorting and searching pieces that fit a processor's cache takes half as long as the whole.
    """
    if len(parts) == 1:
        yield slice(None), parts[0]
        return
    longest = max(parts, key=len)
    edges = longest[::max(1, CACHED // len(parts))][1:]
    cuts = [[0, *np.searchsorted(part, edges).tolist(), part.size]
            for part in [*parts, thresholds]]
    for starts, ends in pairwise(zip(*cuts, strict=True)):
        scores = np.concatenate([part[start:end] for part, start, end in
                                 zip(parts, starts[:-1], ends[:-1], strict=True)])
        _sort(scores)
        yield slice(starts[-1], ends[-1]), scores


def _count_below(scores: FloatArray,
                 thresholds: FloatArray) -> tuple[IntArray, IntArray, IntArray]:
    """
    Count sorted scores below each threshold, and equal to it.

    Returns the number below each; the places of the few thresholds that are a score too; and how
    many scores each of these equals.
    """
    below = np.searchsorted(scores, thresholds, 'left')
    if not scores.size:
        return below, np.empty(0, np.int64), np.empty(0, np.int64)
    tied = np.flatnonzero(scores[np.minimum(below, scores.size - 1)] == thresholds)
    return below, tied, np.searchsorted(scores, thresholds[tied], 'right') - below[tied]


@dataclass(frozen=True)
class PixelCurve:
    """
    The operating points of a score, from the strictest threshold to the loosest.

    All arrays have one entry for each distinct score of an anomalous pixel, descending.
    Thresholds between two of them add false positives and no recall, so every vertex of the
    ROC and PR curves is here: at ``thresholds[k]`` and just above it.

    Attributes
    ----------
    thresholds
        Float, descending.
    tp
        int64, anomalous pixels with score >= threshold.
    fp
        int64, in-distribution pixels with score >= threshold.
    fp_above
        int64, in-distribution pixels with score > threshold.
    positives
        Number of anomalous pixels.
    negatives
        Number of in-distribution pixels.

    """

    thresholds: FloatArray
    tp: IntArray
    fp: IntArray
    fp_above: IntArray
    positives: int
    negatives: int

    @classmethod
    def from_counts(cls, positives: PositiveScores, negatives: NegativeCounts) -> 'PixelCurve':
        """Join the two passes."""
        values, counts = positives.result()
        at_least, above, total = negatives.result()
        return cls(values[::-1], np.cumsum(counts[::-1]), at_least[::-1], above[::-1],
                   int(counts.sum()), total)

    @classmethod
    def of(cls, positives: FloatArray, negatives: FloatArray) -> 'PixelCurve':
        """Make the curve of scores that are in memory, in any order."""
        return cls.of_sorted(positives, _sort(negatives.ravel().copy()))

    @classmethod
    def of_sorted(cls, positives: FloatArray, negatives: FloatArray) -> 'PixelCurve':
        """Make the curve of scores that are in memory, the in-distribution ones ascending."""
        collected = PositiveScores()
        collected.update(positives)
        counted = NegativeCounts(collected.result()[0])
        counted.update(negatives)
        return cls.from_counts(collected, counted)

    @property
    def undefined(self) -> str | None:
        """Why no figure can be given, or None where all can."""
        if self.positives and self.negatives:
            return None
        if not self.positives and not self.negatives:
            return 'no evaluated pixel: every pixel is void'
        return 'no anomalous pixel' if self.negatives else 'no in-distribution pixel'

    @property
    def recall(self) -> npt.NDArray[np.float64]:
        """Recall (true-positive rate) at each threshold, float64 in (0, 1]."""
        return self.tp / self.positives

    @property
    def precision(self) -> npt.NDArray[np.float64]:
        """Precision at each threshold, float64 in (0, 1]."""
        return self.tp / (self.tp + self.fp)

    @property
    def fpr(self) -> npt.NDArray[np.float64]:
        """False-positive rate at each threshold, float64 in [0, 1]."""
        return self.fp / self.negatives

    @property
    def ties(self) -> int:
        """In-distribution pixels whose score is also the score of an anomalous pixel."""
        return int((self.fp - self.fp_above).sum())

    def average_precision(self) -> float:
        """Return the step sum of (recall_k - recall_k-1) * precision_k (scikit-learn's AP)."""
        steps = np.diff(self.tp, prepend=0)
        return float(np.sum(steps * self.precision) / self.positives)

    def fpr_at_recall(self, recall: float = 0.95) -> float:
        """Return the false-positive rate at the first threshold with at least this recall."""
        return float(self.fpr[np.searchsorted(self.recall, recall, 'left')])

    def auroc(self) -> float:
        """Return P(anomalous > in-distribution) + P(equal) / 2 over pairs of pixels."""
        steps = np.diff(self.tp, prepend=0).astype(np.float64)
        half_above = (self.fp.astype(np.float64) + self.fp_above) / 2
        return float(1 - np.sum(steps * half_above) / self.positives / self.negatives)

    def best_f1(self) -> tuple[float, float]:
        """Return the highest F1 and its threshold, the lowest such threshold where several tie."""
        f1 = 2 * self.tp / (self.tp + self.fp + self.positives)
        k = f1.size - 1 - int(np.argmax(f1[::-1]))
        return float(f1[k]), float(self.thresholds[k])

    def max_j(self) -> tuple[float, float]:
        """Return Youden's J, max of recall - FPR, and its threshold."""
        k = int(np.argmax(self.recall - self.fpr))
        return float(self.recall[k] - self.fpr[k]), float(self.thresholds[k])

    def recall_at_fpr(self, fpr: float) -> float:
        """Return the highest recall whose false-positive rate is at most ``fpr``."""
        k = int(np.searchsorted(self.fpr, fpr, 'right'))
        return float(self.recall[k - 1]) if k else 0.0


@dataclass(frozen=True)
class PixelMetrics:
    """
    The ``pixel`` section of metrics.json; fractions. None where ``reason`` says why.

    ``ties`` counts the in-distribution pixels whose score an anomalous pixel has too.
    ``recall_at_fpr`` maps a false-positive rate to the recall reachable within it.
    """

    average_precision: float | None
    fpr95: float | None
    auroc: float | None
    best_f1: float | None
    best_f1_threshold: float | None
    recall_at_fpr: dict[str, float | None]
    pixels: int
    positives: int
    ties: int
    reason: str | None = None

    @classmethod
    def of(cls, curve: PixelCurve) -> 'PixelMetrics':
        """Compute all figures of a curve."""
        pixels = curve.positives + curve.negatives
        if curve.undefined:
            return cls(None, None, None, None, None, dict.fromkeys(map(str, RISK_FPRS)), pixels,
                       curve.positives, 0, curve.undefined)
        best_f1, threshold = curve.best_f1()
        return cls(curve.average_precision(), curve.fpr_at_recall(), curve.auroc(), best_f1,
                   threshold, {str(fpr): curve.recall_at_fpr(fpr) for fpr in RISK_FPRS}, pixels,
                   curve.positives, curve.ties)


def pixel_metrics(scores: npt.NDArray[Any], mask: npt.NDArray[Any],
                  frame_id: str = 'scores') -> PixelMetrics:
    """Return the pixel metrics of score maps in memory; arguments as ``split_scores``."""
    split = split_scores(scores, mask, frame_id)
    return PixelMetrics.of(PixelCurve.of_sorted(split.positives, split.negatives))
