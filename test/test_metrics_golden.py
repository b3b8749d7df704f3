# SPDX-License-Identifier: Apache-2.0
"""Every figure that the reference codes print for the golden score maps, from the JSON files."""

import json
import os
from pathlib import Path
from typing import Any

from anomaly_seg_ros.metrics import compat
from anomaly_seg_ros.metrics.components import ComponentCounts
from anomaly_seg_ros.metrics.pixel import pixel_metrics, PixelCurve, split_scores, SplitScores
import numpy as np
import pytest

# Figures of the JSON files that are not reproduced: 'name': 'reason'. Empty.
NOT_REPRODUCED: dict[str, str] = {}
# These are equal by definition; the others follow a script's approximations.
EXACT = {'n', 'AuPRC_sklearn_AP', 'AUROC_sklearn', 'best_F1_sklearn', 'AuPRC_fishyscapes',
         'FPR95_fishyscapes', 'AUROC_fishyscapes', 'FPR95_RbA', 'AUROC_RbA', 'FPR95_CAOS_pooled',
         'FPR95_ood_metrics', 'AuPRC_trapezoid_ood_metrics', 'CAOS_per_image_mean',
         'CAOS_per_image_mean_void_as_ID'}
# Said about the figures, not a figure.
REMARKS = {'note', 'n_thresholds'}


def smiyc(splits: list[SplitScores], uniform: bool = False) -> dict[str, Any]:
    bins = compat.SmiycPixel(uniform=uniform)
    for frame, split in enumerate(splits):
        bins.update(frame, split)
    figures = bins.result()
    return {'AuPRC': figures.average_precision, 'FPR95': figures.fpr95, 'AUROC': figures.auroc,
            'best_F1': figures.best_f1, 'best_F1_thresh': figures.best_f1_threshold,
            'tpr95_thresh': figures.tpr95_threshold}


def smiyc_components(scores, masks, threshold: float, track: str) -> dict[str, Any]:
    counts = ComponentCounts(track, threshold, smiyc=True)
    for frame, mask in zip(scores, masks, strict=True):
        counts.update(frame, mask)
    figures = counts.result()
    f1 = figures.f1_by_tau
    return {'thresh': figures.threshold, 'sIoU_gt': figures.siou_gt, 'PPV': figures.ppv,
            'sIoU_pred': figures.siou_pred, 'mean_F1': figures.mean_f1, 'F1_25': f1['0.25'],
            'F1_50': f1['0.5'], 'F1_75': f1['0.75'], 'TP_mean': figures.tp_mean,
            'FP_mean': figures.fp_mean, 'FN_mean': figures.fn_mean,
            'n_gt': figures.ground_truth_components, 'n_pred': figures.predicted_components}


def pytorch_ood(figures: compat.PytorchOodMetrics | None) -> dict[str, Any] | None:
    return figures and {
        'AUROC': figures.auroc, 'AUTC': figures.autc, 'AUPR-IN': figures.aupr_in,
        'AUPR-OUT': figures.aupr_out, 'FPR95TPR': figures.fpr95}


def s2m(figures: compat.S2mFigures | None) -> dict[str, Any] | None:
    return figures and {'IoU': figures.iou, 'best_thresh': figures.best_threshold,
                        'AuIoU': figures.auiou, 'mean_F1': figures.mean_f1}


def caos_figures(figures: compat.CaosFigures | None) -> dict[str, Any]:
    return {name: figures and getattr(figures, ours) for name, ours in (
        ('AUROC', 'auroc'), ('AUPR', 'average_precision'), ('FPR95', 'fpr95'))}


def all_figures(scores, masks, probs, labels) -> dict[str, Any]:
    """Compute everything under the names of the JSON files."""
    pool = split_scores(scores, masks, 'golden')
    splits = [split_scores(frame, mask, str(number))
              for number, (frame, mask) in enumerate(zip(scores, masks, strict=True))]
    halves = [split_scores(frame.astype(np.float16), mask, str(number))
              for number, (frame, mask) in enumerate(zip(scores, masks, strict=True))]
    curve = PixelCurve.of(pool.positives, pool.negatives)
    exact = pixel_metrics(scores, masks)
    caos = compat.CaosPerImage()
    iou = compat.S2mCounts(scores.min(), scores.max())
    for frame, split in enumerate(splits):
        caos.update(split)
        iou.update(frame, split)
    caos_means, s2m_means = caos.result(), iou.result()
    torchmetrics = compat.torchmetrics_curve(pool)
    smiyc_pixel = smiyc(splits)
    threshold = smiyc_pixel['best_F1_thresh']
    calibration = compat.relis(probs, labels)
    return {
        'n': {'images': len(splits), 'pixels': masks.size, 'evaluated': exact.pixels,
              'positives': exact.positives,
              'images_without_anomaly': sum(not split.positives.size for split in splits)},
        'AuPRC_sklearn_AP': exact.average_precision, 'AUROC_sklearn': exact.auroc,
        'best_F1_sklearn': {'f1': exact.best_f1, 'thresh_ge': exact.best_f1_threshold},
        'AuPRC_trapezoid_ood_metrics': compat.trapezoid_aupr(curve),
        'FPR95_ood_metrics': compat.interpolated_fpr95(curve),
        'AuPRC_fishyscapes': exact.average_precision, 'FPR95_fishyscapes': exact.fpr95,
        'AUROC_fishyscapes': exact.auroc, 'FPR95_RbA': compat.rba_fpr95(curve),
        'AUROC_RbA': exact.auroc, 'FPR95_CAOS_pooled': compat.caos_fpr_at_recall(curve),
        'pytorch_ood_pooled': pytorch_ood(compat.pytorch_ood(pool)),
        'pytorch_ood_per_image': pytorch_ood(compat.pytorch_ood_per_image(splits)),
        'torchmetrics_exact': {'AP': torchmetrics.average_precision(),
                               'AUROC': torchmetrics.auroc()},
        'SMIYC_pixel': smiyc_pixel, 'SMIYC_pixel_float16': smiyc(halves),
        'SMIYC_pixel_uniThr4096': smiyc(splits, uniform=True),
        'SMIYC_components_anomaly': smiyc_components(scores, masks, threshold, 'anomaly'),
        'SMIYC_components_obstacle': smiyc_components(scores, masks, threshold, 'obstacle'),
        'S2M_void_as_negative': s2m(s2m_means.void_as_negative),
        'S2M_void_masked': s2m(s2m_means.void_masked), 'S2M_raw_scores': s2m(s2m_means.raw),
        'CAOS_per_image_mean': {'images_used': caos_means.images_used} | caos_figures(
            caos_means.void_dropped),
        'CAOS_per_image_mean_void_as_ID': caos_figures(caos_means.void_as_id),
        'calibration': {'ECE15': calibration.ece, 'adaECE15': calibration.adaptive_ece,
                        'KS': calibration.ks, 'PRR_percent': calibration.prr_percent,
                        'PRR_entropy_percent': calibration.prr_entropy_percent},
    }


def differences(name: str, expected: Any, got: Any) -> list[str]:
    """List what differs between a figure of the JSON file and ours."""
    if isinstance(expected, dict):
        return [line for key, value in expected.items() if key not in REMARKS
                for line in differences(f'{name}.{key}', value,
                                        got.get(key, 'missing') if got else 'missing')]
    if expected != expected:  # NaN: the script's way to say that there is no figure
        expected = None
    if expected is None or got is None or isinstance(got, str):
        return [] if expected is got else [f'{name}: expected {expected}, got {got}']
    tolerance = 1e-9 if name.split('.')[0] in EXACT else 1e-6
    if abs(expected - got) <= tolerance:
        return []
    return [f'{name}: expected {expected}, got {got}, off by {got - expected:.3g}']


def golden_sets() -> list[Path]:
    """List the JSON files; the folder is the fixture ``real_data``'s, known before any fixture."""
    beside = Path(__file__).resolve().parent.parent.parent / 'shared' / 'data'
    return sorted(Path(os.environ.get('ANOMALY_SEG_DATA', beside)).glob('golden/*.json'))


@pytest.mark.parametrize('path', golden_sets() or [None], ids=lambda path: path and path.stem)
def test_every_figure_of_the_golden_set(path: Path | None, real_data: Path):
    if path is None:
        pytest.skip(f'no golden sets: {real_data / "golden"} holds no JSON file')
    expected = {name: entry['value'] for name, entry in json.loads(path.read_text()).items()
                if name not in NOT_REPRODUCED}
    with np.load(path.with_suffix('.npz')) as maps, \
            np.load(path.with_name('calibration.npz')) as calibration:
        got = all_figures(maps['scores'], maps['masks'], calibration['probs'],
                          calibration['labels'])
    assert len(expected) > 20
    assert set(expected) <= set(got), 'figures without a counterpart here'
    wrong = [line for name, value in expected.items()
             for line in differences(name, value, got[name])]
    assert not wrong, '\n'.join(wrong)


def test_the_comparison_notices_each_kind_of_difference():
    expected = {'a': 0.5, 'b': None, 'c': 0.25, 'note': 'words'}
    assert differences('x', expected, {'a': 0.5 + 9e-7, 'b': None, 'c': .25}) == []
    assert len(differences('x', expected, {'a': 0.5 + 2e-6, 'b': 0.0})) == 3
    assert differences('AUROC_sklearn', 0.5, 0.5 + 2e-9)
