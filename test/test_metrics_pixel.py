# SPDX-License-Identifier: Apache-2.0
"""Pixel metrics against scikit-learn, and exactness of splits and merges."""

from itertools import pairwise
import pickle
from unittest import mock

from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.metrics import pixel
from anomaly_seg_ros.metrics.compat import (
    caos_fpr_at_recall, interpolated_fpr95, rba_fpr95, trapezoid_aupr)
from anomaly_seg_ros.metrics.pixel import (
    NegativeCounts, pixel_metrics, PixelCurve, PixelMetrics, PositiveScores, split_scores)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
from sklearn.metrics import (
    auc, average_precision_score, precision_recall_curve, roc_auc_score, roc_curve)


@st.composite
def frames(draw: st.DrawFn, maximum: int = 10):
    """1 to 10 score maps of different sizes with masks; many ties or hardly any; any dtype."""
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    levels = draw(st.sampled_from([1, 3, 20, 10_000_000]))
    weights = draw(st.sampled_from([[.8, .1, .1], [.5, .5, 0], [0, .5, .5], [.9, 0, .1],
                                    [0, 0, 1.]]))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    pairs = []
    for _ in range(draw(st.integers(1, maximum))):
        shape = draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
        scores = random.integers(-levels, levels, shape, endpoint=True) / np.float64(levels)
        mask = random.choice(np.array([0, 1, 255], np.uint8), shape, p=weights)
        pairs.append((scores.astype(dtype), mask))
    return pairs


def pooled(pairs):
    """Scores and 0/1 labels of all valid pixels."""
    scores = np.concatenate([scores[mask < 2] for scores, mask in pairs])
    return scores, np.concatenate([mask[mask < 2] for _, mask in pairs])


def curve_of(groups):
    """Run both passes with one accumulator a group, merged in the groups' order."""
    first = PositiveScores()
    for group in groups:
        part = PositiveScores()
        for scores, mask in group:
            part.update(split_scores(scores, mask, 'frame').positives)
        first.merge(pickle.loads(pickle.dumps(part)))
    second = NegativeCounts(first.result()[0])
    for group in groups:
        part = NegativeCounts(first.result()[0])
        for scores, mask in group:
            part.update(split_scores(scores, mask, 'frame').negatives)
        second.merge(pickle.loads(pickle.dumps(part)))
    return PixelCurve.from_counts(first, second)


@given(frames())
@settings(max_examples=150, deadline=None)
def test_equals_scikit_learn(pairs):
    scores, labels = pooled(pairs)
    figures = PixelMetrics.of(curve_of([pairs]))
    assert (figures.pixels, figures.positives) == (labels.size, labels.sum())
    if labels.size == 0 or labels.min() == labels.max():
        assert figures.average_precision is None and figures.fpr95 is None
        assert figures.auroc is None and figures.best_f1 is None and figures.reason
        return
    scores = scores.astype(np.float64)
    assert figures.average_precision == pytest.approx(
        average_precision_score(labels, scores), rel=0, abs=1e-12)
    assert figures.auroc == pytest.approx(roc_auc_score(labels, scores), rel=0, abs=1e-12)
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    assert figures.fpr95 == pytest.approx(fpr[np.argmax(tpr >= 0.95)], rel=0, abs=1e-12)
    for limit, recall in figures.recall_at_fpr.items():
        assert recall == pytest.approx(tpr[fpr <= float(limit)].max(), rel=0, abs=1e-12)
    hits = [(labels[scores >= threshold].sum(), (scores >= threshold).sum(), threshold)
            for threshold in np.unique(scores)]
    f1 = [2 * int(hit) / (int(predicted) + int(labels.sum())) for hit, predicted, _ in hits]
    assert figures.best_f1 == max(f1)
    assert figures.best_f1_threshold == hits[f1.index(max(f1))][2]
    tied = np.isin(scores[labels == 0], scores[labels == 1])
    assert figures.ties == np.count_nonzero(tied)


@given(frames(), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_split_and_merge_in_any_order_give_the_same_bits(pairs, random):
    whole = curve_of([pairs])
    shuffled = random.sample(pairs, len(pairs))
    cuts = sorted(random.choices(range(len(pairs) + 1), k=3))
    parts = curve_of([shuffled[a:b] for a, b in pairwise([0, *cuts, len(pairs)])])
    for name in ('thresholds', 'tp', 'fp', 'fp_above'):
        assert getattr(whole, name).tobytes() == getattr(parts, name).tobytes()
    assert PixelMetrics.of(whole) == PixelMetrics.of(parts)


@given(frames(), st.integers(1, 40), st.sampled_from([np.float16, np.float32, np.float64]))
@settings(max_examples=100, deadline=None)
def test_counts_cut_by_value_are_those_of_numpy(pairs, cached, dtype):
    thresholds = np.unique(np.linspace(-1, 1, 41).astype(dtype))
    counted = NegativeCounts(thresholds)
    with mock.patch.object(pixel, 'CACHED', cached):
        for number, (scores, mask) in enumerate(pairs):
            scores = scores.astype([np.float16, np.float32, np.float64][number % 3])
            counted.update(split_scores(scores, mask, 'frame').negatives)
        at_least, above, total = counted.result()
    scores = np.concatenate([
        scores.astype([np.float16, np.float32, np.float64][number % 3])[mask == 0].astype(float)
        for number, (scores, mask) in enumerate(pairs)])
    assert at_least.tolist() == [np.count_nonzero(scores >= value) for value in thresholds]
    assert above.tolist() == [np.count_nonzero(scores > value) for value in thresholds]
    assert total == scores.size


@given(frames())
@settings(max_examples=150, deadline=None)
def test_script_figures_equal_scikit_learns_curves(pairs):
    scores, labels = pooled(pairs)
    assume(labels.size and labels.min() != labels.max())
    curve = curve_of([pairs])
    scores = scores.astype(np.float64)
    precision, recall, _ = precision_recall_curve(labels, scores)
    assert trapezoid_aupr(curve) == pytest.approx(auc(recall, precision), rel=0, abs=1e-12)
    fpr, tpr, _ = roc_curve(labels, scores)
    assert interpolated_fpr95(curve) == pytest.approx(np.interp(.95, tpr, fpr), rel=0, abs=1e-12)
    assert rba_fpr95(curve) == pytest.approx(fpr[np.argmax(tpr > .95)], rel=0, abs=1e-12)
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    closest = np.abs(tpr - .95).min()
    level = tpr[np.abs(tpr - .95) == closest].max()
    expected = fpr[tpr == level]
    assert caos_fpr_at_recall(curve) == pytest.approx(
        expected.min() if level == 1 else expected.max(), rel=0, abs=1e-12)


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('shape', [(60, 100), (100, 150), (512, 1024)])
def test_repeated_negative_float16_scores(seed, shape):
    """Some such arrays stay unsorted in numpy 2.4 on processors with AVX-512 ICL."""
    random = np.random.default_rng(seed)
    scores = random.choice(np.array([-2.5, -1.5, -.5], np.float16), shape)
    mask = (random.random(shape) < .3).astype(np.uint8)
    metrics = pixel_metrics(scores, mask)
    labels, values = mask.ravel(), scores.astype(np.float64).ravel()
    assert metrics.average_precision == pytest.approx(
        average_precision_score(labels, values), rel=0, abs=1e-12)
    assert metrics.auroc == pytest.approx(roc_auc_score(labels, values), rel=0, abs=1e-12)


def test_worked_by_hand():
    scores = np.array([[.9, .8, .8, .4, .3, .2, .1]], np.float32)
    mask = np.array([[1, 1, 0, 0, 1, 0, 255]], np.uint8)
    figures = pixel_metrics(scores, mask)
    # Thresholds .9: 1/1, .8: 2/3, .3: 3/5 (precision at recall 1/3, 2/3, 1).
    assert figures.average_precision == pytest.approx((1 + 2 / 3 + 3 / 5) / 3, abs=1e-15)
    # Pairs won: .9 beats 3, .8 beats 2 and ties 1, .3 beats 1: 6.5 of 9.
    assert figures.auroc == pytest.approx(6.5 / 9, abs=1e-15)
    assert figures.fpr95 == pytest.approx(2 / 3, abs=1e-15)
    assert figures.best_f1 == pytest.approx(3 / 4, abs=1e-15)
    assert figures.best_f1_threshold == np.float32(.3)
    assert figures.ties == 1 and figures.pixels == 6 and figures.positives == 3


@pytest.mark.parametrize(('mask', 'reason'), [
    ([[0, 0, 255]], 'no anomalous pixel'), ([[1, 1, 255]], 'no in-distribution pixel'),
    ([[255, 255, 255]], 'no evaluated pixel: every pixel is void')])
def test_one_class_only_is_null_with_a_reason(mask, reason):
    figures = pixel_metrics(np.zeros((1, 3), np.float32), np.array(mask, np.uint8))
    assert figures.average_precision is None and figures.reason == reason
    assert set(figures.recall_at_fpr.values()) == {None}


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('void', [0, 255])
def test_scores_that_are_not_finite_are_refused_with_the_frames_name(bad, void):
    with pytest.raises(UserError, match=r'frame_7.*1 of 2 scores are NaN or infinite'):
        pixel_metrics(np.array([[0, bad]], np.float32), np.array([[1, void]], np.uint8), 'frame_7')


@pytest.mark.parametrize(('scores', 'mask', 'message'), [
    (np.zeros((2, 2), np.uint8), np.zeros((2, 2), np.uint8), 'must be float16, float32 or'),
    (np.zeros((2, 2), np.float32), np.zeros((2, 3), np.uint8), 'both must have one size'),
    (np.zeros((2, 2), np.float32), np.full((2, 2), 2, np.uint8), r'codes \[2\]')])
def test_frames_that_do_not_fit_are_refused(scores, mask, message):
    with pytest.raises(UserError, match=f'frame_7.*{message}'):
        split_scores(scores, mask, 'frame_7')


def test_negative_zero_ties_with_zero():
    scores = np.array([[0., -0., -0.]], np.float32)
    bits = {curve_of([[(scores[:, order], np.array([[1, 1, 0]], np.uint8))]]).thresholds.tobytes()
            for order in ([0, 1, 2], [1, 0, 2])}
    assert bits == {np.zeros(1, np.float32).tobytes()}


def test_counts_at_other_thresholds_do_not_merge():
    with pytest.raises(ValueError, match='same thresholds'):
        NegativeCounts(np.array([1.])).merge(NegativeCounts(np.array([2.])))


def test_max_j_is_the_largest_gap_of_the_roc():
    random = np.random.default_rng(3)
    labels, scores = random.integers(0, 2, 500), random.standard_normal(500)
    scores += labels
    fpr, tpr, thresholds = roc_curve(labels, scores)
    best = np.argmax(tpr - fpr)
    value, threshold = PixelCurve.of(scores[labels == 1], scores[labels == 0]).max_j()
    assert value == pytest.approx((tpr - fpr)[best], abs=1e-12)
    assert threshold == thresholds[best]
