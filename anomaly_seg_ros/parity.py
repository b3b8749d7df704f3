# SPDX-License-Identifier: Apache-2.0
"""The gate of every export: what a graph may differ from float32 PyTorch, and by what it does."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.ports import NetworkOutput
import numpy as np


@dataclass(frozen=True)
class Limits:
    """
    The largest difference from the reference with which a graph is kept.

    Attributes
    ----------
    score, mean_score
        Largest and mean absolute error of the score, relative to the larger of 1 and the score's
        range over the check frames.
    labels
        Fraction of pixels whose label differs; two classes may tie to rounding.

    """

    score: float
    mean_score: float
    labels: float


# float16 has 11 bits: 5e-4 at each rounding, through some hundred layers. ERFNet reaches 1e-2 at
# single pixels and 8e-4 on average, and other labels at 1 of 1000 pixels of 512x1024, at 2 of
# 256x512; twice that is allowed. int8 has no limits here: where float is quantised, what counts is
# the drop of the metrics, see ``quantize``. A graph that came in int8 has the limits of fp32 for
# what is put behind its logits: four kinds of quantised ERFNet reach 3e-7, 4e-8 and no label.
LIMITS = {'fp32': Limits(1e-4, 1e-5, 1e-4), 'fp16': Limits(3e-2, 2e-3, 4e-3)}


@dataclass(frozen=True)
class Difference:
    """
    How far answers are from the reference.

    Attributes
    ----------
    max_score_error, mean_score_error
        Absolute, in the score's units.
    label_mismatch
        Fraction of the pixels.
    score_range
        Range of the reference's score over all frames.
    frames
        Number of frames.

    """

    max_score_error: float
    mean_score_error: float
    label_mismatch: float
    score_range: float
    frames: int

    def as_card(self) -> dict[str, Any]:
        """Return the entries for the card's ``parity``."""
        return {'max_score_error': self.max_score_error,
                'mean_score_error': self.mean_score_error,
                'label_mismatch': self.label_mismatch, 'score_range': self.score_range,
                'frames': self.frames}

    def check(self, limits: Limits, what: str, against: str) -> None:
        """Raise UserError, which says ``what`` differs from what, unless it is within limits."""
        span = max(1.0, self.score_range)
        found = (self.max_score_error / span, self.mean_score_error / span, self.label_mismatch)
        allowed = (limits.score, limits.mean_score, limits.labels)
        names = ('largest score error', 'mean score error', 'labels that differ')
        if any(value > limit for value, limit in zip(found, allowed, strict=True)):
            figures = ', '.join(f'{name} {value:.2e} (limit {limit:.0e})' for name, value, limit
                                in zip(names, found, allowed, strict=True))
            raise UserError(f'{what} does not agree with {against}: {figures}; score errors as '
                            f'fractions of the score range {span:.3g}. No file was written.')


def compare(answers: Iterable[NetworkOutput], reference: Sequence[NetworkOutput]) -> Difference:
    """
    Compare answers with the reference's for the same frames.

    Raises
    ------
    UserError
        If a score is NaN or infinite, in either.

    """
    largest, means, mismatches = 0.0, [], []
    low, high = np.inf, -np.inf
    for index, (answer, expected) in enumerate(zip(answers, reference, strict=True)):
        for who, score in (('the reference', expected.anomaly), ('the graph', answer.anomaly)):
            if not np.isfinite(score).all():
                raise UserError(f'{who} gives a score that is not finite on check frame {index}; '
                                'these weights cannot be exported with this score. No file was '
                                'written.')
        error = np.abs(expected.anomaly.astype(np.float64) - answer.anomaly)
        largest = max(largest, float(error.max()))
        means.append(float(error.mean()))
        mismatches.append(float((expected.labels != answer.labels).mean()))
        low = min(low, float(expected.anomaly.min()))
        high = max(high, float(expected.anomaly.max()))
    return Difference(largest, float(np.mean(means)), float(np.mean(mismatches)), high - low,
                      len(means))
