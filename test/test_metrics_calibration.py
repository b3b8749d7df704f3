# SPDX-License-Identifier: Apache-2.0
"""Calibration and misclassification figures against direct float64 definitions."""

from itertools import pairwise

from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.metrics.calibration import (
    Calibration, calibration_metrics, image_level_auroc, IMAGE_STATISTICS, image_statistics,
    local_ood_mask, rejection_curve)
from anomaly_seg_ros.metrics.compat import relis
from anomaly_seg_ros.metrics.pixel import pixel_metrics
import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score


def sample(size: int, levels: int, seed: int = 0):
    """Confidences in (0, 1] with ties, and whether each prediction is right."""
    random = np.random.default_rng(seed)
    confidence = random.integers(1, levels, size, endpoint=True) / levels
    return confidence.astype(np.float32), random.random(size) < confidence ** 2


@pytest.mark.parametrize('levels', [7, 15, 1_000_000])
def test_figures_equal_their_definitions(levels):
    confidence, correct = sample(3000, levels)
    figures = calibration_metrics(confidence[correct], confidence[~correct])
    wide = confidence.astype(np.float64)
    ece = 0.0
    for low, high in ((i / 15, (i + 1) / 15) for i in range(15)):
        inside = (wide > low) & (wide <= high)
        if inside.any():
            ece += inside.mean() * abs(wide[inside].mean() - correct[inside].mean())
    assert figures.ece == pytest.approx(ece, abs=1e-12)
    gaps = [abs(np.sum((wide - correct)[wide <= value])) / wide.size for value in np.unique(wide)]
    assert figures.ks == pytest.approx(max(gaps), abs=1e-12)
    auroc = roc_auc_score(~correct, -wide)
    assert figures.misclassification_auroc == pytest.approx(auroc, abs=1e-12)
    assert figures.prr == pytest.approx(2 * auroc - 1, abs=1e-12)
    assert figures.misclassification_ap == pytest.approx(
        average_precision_score(~correct, -wide), abs=1e-12)
    assert figures.accuracy == correct.mean() and figures.pixels == 3000
    assert sum(bar.pixels for bar in figures.reliability) == 3000


def test_adaptive_ece_with_distinct_confidences_has_bins_of_one_size():
    random = np.random.default_rng(1)
    confidence = np.sort(random.random(1500))
    correct = random.random(1500) < confidence
    figures = calibration_metrics(confidence[correct], confidence[~correct])
    # The edge of bin b is the b * 100-th confidence, which belongs to the bin below it.
    edges = [0, *range(101, 1501, 100), 1500]
    expected = sum(abs(np.sum((confidence - correct)[a:b]))
                   for a, b in pairwise(edges)) / 1500
    assert figures.adaptive_ece == pytest.approx(expected, abs=1e-12)


def test_prr_is_the_ratio_of_areas_under_the_rejection_curves():
    confidence, correct = sample(500, 40)
    right, wrong = confidence[correct], confidence[~correct]
    curve = rejection_curve(right, wrong, 200_001)
    area = {name: np.trapezoid(getattr(curve, name), curve.rejected)
            for name in ('error', 'random', 'oracle')}
    ratio = (area['random'] - area['error']) / (area['random'] - area['oracle'])
    assert calibration_metrics(right, wrong).prr == pytest.approx(ratio, abs=1e-6)


def test_a_perfect_ranking_gives_prr_1_and_the_reference_does_not():
    right, wrong = np.linspace(.6, .9, 70), np.linspace(.2, .5, 30)
    assert calibration_metrics(right, wrong).prr == 1.0
    assert calibration_metrics(wrong, right).prr == -1.0
    assert calibration_metrics(right, wrong).misclassification_max_j == 1.0
    confidence = np.concatenate([wrong, right])
    probabilities = np.stack([confidence, *[(1 - confidence) / 9] * 9], axis=1)
    labels = np.append(np.ones(30), np.zeros(70)).astype(np.uint8)
    assert 60 < relis(probabilities, labels).prr_percent < 75


def test_perfect_calibration_has_no_gap():
    confidence = np.full(10, .8)
    figures = calibration_metrics(confidence[:8], confidence[8:])
    assert figures.ece == pytest.approx(0, abs=1e-15)
    assert figures.ks == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize(('right', 'wrong', 'reason'), [
    ([], [], 'no labelled pixel'), ([.5], [], 'every prediction is right'),
    ([], [.5], 'every prediction is wrong')])
def test_undefined_figures_are_null_with_a_reason(right, wrong, reason):
    figures = calibration_metrics(np.array(right), np.array(wrong))
    assert figures.prr is None and reason in figures.reason
    assert (figures.ece is None) == (not right and not wrong)


def frame(number: int, size: int = 40):
    random = np.random.default_rng([7, number])
    confidence = random.random((size, size)).astype(np.float32)
    predicted, labels = random.integers(0, 3, (2, size, size), dtype=np.uint8)
    labels[random.random((size, size)) < .1] = 255
    return confidence, predicted, labels


@pytest.mark.parametrize('samples', [None, 300])
def test_split_and_merge_in_any_order_give_the_same_bits(samples):
    whole = Calibration(samples)
    parts = []
    for number in range(5):
        whole.update(number, *frame(number), 'frame')
        part = Calibration(samples)
        part.update(number, *frame(number), 'frame')
        parts.append(part)
    merged = Calibration(samples)
    for number in (3, 0, 4, 2, 1):
        merged.merge(parts[number])
    assert merged.result() == whole.result()
    kept = whole.result().pixels
    assert 1200 < kept < 1500 if samples else kept > 7000
    with pytest.raises(ValueError, match='one samples_per_frame'):
        merged.merge(Calibration(99))


def test_bad_frames_are_refused():
    confidence, predicted, labels = frame(0)
    with pytest.raises(UserError, match='frame_2: confidences must be probabilities'):
        Calibration().update(0, confidence * 2, predicted, labels, 'frame_2')
    with pytest.raises(UserError, match=r'frame_2: .* must have one size'):
        Calibration().update(0, confidence, predicted[:3], labels, 'frame_2')


def test_image_level_auroc_compares_image_statistics():
    random = np.random.default_rng(2)
    known = [random.random((8, 9)) for _ in range(12)]
    unknown = [random.random((8, 9)) + .3 * random.random() for _ in range(12)]
    references = {'mean': np.mean, 'max': np.max, 'quantile_0.5': np.median,
                  'quantile_0.9': lambda image: np.quantile(image, .9),
                  'quantile_0.99': lambda image: np.quantile(image, .99)}
    for name in IMAGE_STATISTICS:
        ours = [[image_statistics(image)[name] for image in images] for images in (known, unknown)]
        values = [references[name](image) for image in known + unknown]
        assert ours[0] + ours[1] == pytest.approx(values, abs=1e-15)
        assert image_level_auroc(*ours) == pytest.approx(
            roc_auc_score([0] * 12 + [1] * 12, values), abs=1e-12)
    assert image_level_auroc([.1, .2], []) is None


def test_local_ood_scores_unknown_classes_against_known_ones():
    labels = np.array([[3, 3, 5, 9, 200]])
    mask = local_ood_mask(labels, known=[3, 5], unknown=[9])
    assert mask.tolist() == [[0, 0, 0, 1, 255]]
    figures = pixel_metrics(np.array([[.1, .2, .9, .5, 1.]]), mask)
    assert figures.auroc == pytest.approx(2 / 3, abs=1e-15)
    with pytest.raises(ValueError, match=r'\[5\] are both'):
        local_ood_mask(labels, [3, 5], [5])
