# SPDX-License-Identifier: Apache-2.0
"""The reference codes' figures against direct, slow readings of what those codes do."""

from anomaly_seg_ros.metrics.calibration import calibration_metrics
from anomaly_seg_ros.metrics.compat import (
    _quantiles, CaosPerImage, pytorch_ood, pytorch_ood_per_image, relis, S2mCounts, SmiycPixel,
    torchmetrics_curve)
from anomaly_seg_ros.metrics.pixel import split_scores
import numpy as np
import pytest
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score


@pytest.fixture
def images():
    """Five score maps in [0, 1] with ties, void, and one without anomaly."""
    random = np.random.default_rng(8)
    pairs = []
    for number in range(5):
        shape = (30 + number, 41)
        mask = random.choice(np.array([0, 1, 255], np.uint8), shape, p=[.8, .1, .1])
        if number == 3:
            mask[mask == 1] = 0
        scores = np.clip(random.normal(.35, .15, shape) + .25 * (mask == 1), 0, .99)
        scores[0, number] = .995 + number / 1000  # no two images share their highest score
        pairs.append((np.round(scores, 3).astype(np.float32), mask))
    return pairs


def splits(images):
    return [split_scores(scores, mask, 'image') for scores, mask in images]


def test_smiyc_bins_every_image_by_its_own_quantiles(images):
    bins = SmiycPixel()
    for number, split in enumerate(splits(images)):
        bins.update(number, split)
    figures = bins.result()
    rows = []  # lower edge, positives and negatives of each bin
    for scores, mask in images:
        positives, negatives = scores[mask == 1], scores[mask == 0]
        low, high = scores[mask < 2].min(), scores[mask < 2].max()
        edges = [low - .01, high + .01]
        for values in (positives, negatives):
            if values.size:
                edges += list(np.quantile(values, np.linspace(0, 1, min(384, values.size))))
        edges = np.unique(edges)
        for index in range(edges.size - 1):
            inside = [np.count_nonzero((values >= edges[index]) & (values < edges[index + 1]))
                      for values in (positives, negatives)]
            rows.append((edges[index], *inside))
    total = np.sum(rows, axis=0)[1:]
    area, best, fpr95, roc, before = 0.0, (0.0, 0.0), None, 0.0, (0.0, 0.0)
    for edge in sorted({row[0] for row in rows}, reverse=True):
        tp, fp = np.sum([row[1:] for row in rows if row[0] >= edge], axis=0)
        recall, fpr = tp / total[0], fp / total[1]
        area += (recall - before[0]) * (tp / (tp + fp) if tp + fp else 1)
        roc += (fpr - before[1]) * (recall + before[0]) / 2
        best = max(best, (2 * tp / (tp + fp + total[0]), edge))
        fpr95 = fpr if fpr95 is None and recall >= .95 else fpr95
        before = recall, fpr
    assert figures.average_precision == pytest.approx(area, abs=1e-12)
    assert figures.auroc == pytest.approx(roc, abs=1e-12)
    assert figures.fpr95 == pytest.approx(fpr95, abs=1e-12)
    assert (figures.best_f1, figures.best_f1_threshold) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize('dtype', [np.float16, np.float32, np.float64])
def test_quantiles_of_sorted_scores_are_numpys_to_the_last_bit(dtype):
    random = np.random.default_rng(6)
    for size in (1, 2, 3, 383, 384, 385, 4000):
        ordered = np.sort(random.standard_normal(size)).astype(dtype)
        shares = np.linspace(0, 1, min(384, size))
        assert _quantiles(ordered, shares).tobytes() == np.quantile(
            ordered, shares).astype(np.float64).tobytes()


def test_smiyc_uniform_bins_are_close_to_exact_and_merge(images):
    parts = []
    for number, split in enumerate(splits(images)):
        part = SmiycPixel(uniform=True)
        part.update(number, split)
        parts.append(part)
    merged = SmiycPixel(uniform=True)
    for part in reversed(parts):
        merged.merge(part)
    scores = np.concatenate([scores[mask < 2] for scores, mask in images])
    labels = np.concatenate([mask[mask < 2] for _, mask in images])
    # The scores are multiples of 0.001, the bins are narrower: nothing is lost.
    assert merged.result().average_precision == pytest.approx(
        average_precision_score(labels, scores), abs=1e-9)
    assert merged.result().auroc == pytest.approx(roc_auc_score(labels, scores), abs=1e-9)


def test_smiyc_without_anomaly_is_null_with_a_reason(images):
    bins = SmiycPixel()
    bins.update(0, splits(images)[3])
    assert bins.result().auroc is None
    assert bins.result().reason == 'needs anomalous and in-distribution pixels'


def test_smiyc_uniform_bins_never_find_scores_outside_their_range():
    bins = SmiycPixel(uniform=True)
    bins.update(0, split_scores(np.array([[.9, .5, 3., .2, -4.]]),
                                np.array([[1, 0, 1, 0, 0]], np.uint8), 'image'))
    figures = bins.result()
    # Points (tp, fp): (1, 0), (1, 1), (1, 2), then at once all 5 pixels: (2, 3).
    assert figures.average_precision == pytest.approx(1 / 2 + 1 / 2 * 2 / 5, abs=1e-12)
    assert figures.fpr95 == 1.0 and figures.best_f1 == pytest.approx(2 / 3, abs=1e-12)


def test_s2m_counts_images_and_thresholds_one_by_one(images):
    low = min(scores.min() for scores, _ in images)
    high = max(scores.max() for scores, _ in images)
    counts = S2mCounts(float(low), float(high))
    for number, split in reversed(list(enumerate(splits(images)))):
        counts.update(number, split)
    result = counts.result()
    for name, scale, drop in (('void_as_negative', True, False), ('void_masked', True, True),
                              ('raw', False, False)):
        iou, f1 = np.zeros(101), np.zeros(101)
        for scores, mask in images:
            used = (scores - low) / (high - low) if scale else scores.copy()
            if drop:
                used[mask == 255] = 0
            for index, threshold in enumerate(np.arange(0, 1.01, .01)):
                predicted = used > np.float32(threshold)
                both = np.count_nonzero(predicted & (mask == 1))
                either = np.count_nonzero(predicted | (mask == 1))
                iou[index] += both / either / 5 if either else 0
                f1[index] += 2 * both / (both + either) / 5 if either else 0
        figures = getattr(result, name)
        assert figures.iou == pytest.approx(iou.max(), abs=1e-12)
        assert figures.best_threshold == np.arange(0, 1.01, .01)[iou.argmax()]
        assert figures.auiou == pytest.approx(auc(np.arange(0, 1.01, .01), iou), abs=1e-12)
        assert figures.mean_f1 == pytest.approx(f1.mean(), abs=1e-12)


def test_s2m_says_why_a_figure_is_null(images):
    counts = S2mCounts(-1, 1)
    assert counts.result().reason == 'no frame'
    counts.update(0, splits(images)[0])
    assert counts.result().raw is None and 'outside [0, 1]' in counts.result().reason
    counts = S2mCounts(.5, .5)
    counts.update(0, split_scores(np.full((1, 2), .5), np.array([[0, 1]], np.uint8), 'flat'))
    assert counts.result().void_masked is None and 'equal' in counts.result().reason


def test_caos_means_over_images_with_both_classes(images):
    whole = CaosPerImage()
    for split in splits(images):
        part = CaosPerImage()
        part.update(split)
        whole.merge(part)
    result = whole.result()
    assert result.images_used == 4
    for figures, as_id in (result.void_dropped, False), (result.void_as_id, True):
        auroc, precision = [], []
        for scores, mask in images:
            valid = mask >= 0 if as_id else mask < 2
            if (mask == 1).any():
                auroc.append(roc_auc_score(mask[valid] == 1, scores[valid]))
                precision.append(average_precision_score(mask[valid] == 1, scores[valid]))
        assert figures.auroc == pytest.approx(np.mean(auroc), abs=1e-12)
        assert figures.average_precision == pytest.approx(np.mean(precision), abs=1e-12)


def test_pytorch_ood_areas(images):
    expected = []
    for (scores, mask), split in zip(images, splits(images), strict=True):
        if not (mask == 1).any():
            assert pytorch_ood(split) is None
            continue
        values, labels = scores[mask < 2].astype(np.float64), mask[mask < 2]
        figures = pytorch_ood(split)
        precision, recall, _ = precision_recall_curve(1 - labels, -values)
        assert figures.aupr_in == pytest.approx(auc(recall, precision), abs=1e-12)
        scaled = (values - values.min()) / np.ptp(values)
        grid = (np.arange(20_000) + .5) / 20_000
        errors = [np.mean(scaled[labels == 0] >= level) + np.mean(scaled[labels == 1] < level)
                  for level in grid[::20]]
        assert figures.autc == pytest.approx(np.mean(errors) / 2, abs=2e-3)
        expected.append(figures)
    mean = pytorch_ood_per_image(splits(images))
    assert mean.aupr_in == pytest.approx(np.mean([row.aupr_in for row in expected]), abs=1e-12)


def test_torchmetrics_takes_scores_outside_the_unit_interval_for_logits():
    mask = np.array([[1, 0, 1, 0]], np.uint8)
    inside = torchmetrics_curve(split_scores(np.array([[.9, .8, .7, .6]]), mask, 'x'))
    assert inside.thresholds.tolist() == [np.float32(.9), np.float32(.7)]
    # 30 and 25 are both 1 after a float32 sigmoid: a tie that was none.
    outside = torchmetrics_curve(split_scores(np.array([[30., 25., .7, .6]]), mask, 'x'))
    assert outside.ties == 1 and outside.thresholds[1] == pytest.approx(1 / (1 + np.exp(-.7)))


def test_relis_leaves_the_least_confident_pixel_out_of_its_adaptive_bins():
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.ones(5), 4000)
    labels = probabilities.argmax(axis=1)
    labels[random.random(4000) < .4] = 3
    labels[:100] = 255
    figures = relis(probabilities, labels)
    confidence, right = probabilities.max(axis=1), labels == probabilities.argmax(axis=1)
    right, wrong = confidence[right], confidence[~right & (labels != 255)]
    canonical = calibration_metrics(right, wrong)
    assert figures.ece == pytest.approx(canonical.ece, abs=1e-12)
    assert figures.ks == pytest.approx(canonical.ks, abs=1e-12)
    assert 0 < abs(figures.adaptive_ece - canonical.adaptive_ece) < 1 / 3900
