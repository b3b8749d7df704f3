# SPDX-License-Identifier: Apache-2.0
"""Component metrics against a set-based reference and worked examples."""

import time

from anomaly_seg_ros.metrics import components
from anomaly_seg_ros.metrics.components import ComponentCounts, TAUS, Track
import numpy as np
import pytest
from scipy.ndimage import label


@pytest.fixture
def tiny(monkeypatch) -> str:
    """Add a track whose sizes suit small images."""
    monkeypatch.setitem(components.TRACKS, 'tiny', Track('tiny', 4, 3))
    return 'tiny'


def reference(scores, mask, threshold, minimum_predicted, minimum_truth):
    """Return sIoU, PPV lists of one frame from sets of pixels, as the paper defines them."""
    def parts(binary):
        ids, count = label(binary, np.ones((3, 3)))
        return [frozenset(map(tuple, np.argwhere(ids == i + 1))) for i in range(count)]
    predicted = [part for part in parts((scores >= threshold) & (mask != 255))
                 if len(part) >= minimum_predicted]
    truth = parts(mask == 1)
    small = frozenset().union(*(part for part in truth if len(part) < minimum_truth))
    truth = [part for part in truth if len(part) >= minimum_truth]
    predicted = [part - small for part in predicted if part - small]
    siou = []
    for part in truth:
        touching = frozenset().union(*(other for other in predicted if other & part))
        others = frozenset().union(*(other for other in truth if other != part))
        siou.append(len(part & touching) / len((part | touching) - (touching & others)))
    everything = frozenset().union(*truth)
    return siou, [len(part & everything) / len(part) for part in predicted]


def test_equals_the_set_based_reference(tiny):
    random = np.random.default_rng(1)
    counts = ComponentCounts(tiny, 0.55)
    siou, ppv = [], []
    for _ in range(150):
        shape = random.integers(5, 24, 2)
        scores = random.random(shape).astype(np.float32)
        coarse = random.choice(np.array([0, 1, 255], np.uint8), (3, 4), p=[.5, .35, .15])
        mask = np.kron(coarse, np.ones((8, 6), np.uint8))[:shape[0], :shape[1]]
        mask[random.random(shape) < .15] = 0
        scores[mask == 1] += .2
        counts.update(scores, mask)
        frame_siou, frame_ppv = reference(scores, mask, 0.55, 4, 3)
        siou += frame_siou
        ppv += frame_ppv
    figures = counts.result()
    assert figures.ground_truth_components == len(siou) > 100
    assert figures.predicted_components == len(ppv) > 50
    assert figures.siou_gt == pytest.approx(np.mean(siou), abs=1e-12)
    assert figures.ppv == pytest.approx(np.mean(ppv), abs=1e-12)
    expected = []
    for tau in TAUS:
        hits, false = sum(s >= tau for s in siou), sum(p < tau for p in ppv)
        expected.append(2 * hits / (len(siou) + hits + false))
        assert figures.f1_by_tau[str(tau)] == pytest.approx(expected[-1], abs=1e-12)
    assert figures.mean_f1 == pytest.approx(np.mean(expected), abs=1e-12)


def test_one_prediction_over_two_objects_is_not_punished_for_the_other(tiny):
    mask = np.zeros((10, 20), np.uint8)
    mask[2:6, 2:6] = mask[2:6, 10:14] = 1  # two objects of 16 pixels
    scores = np.zeros(mask.shape, np.float32)
    scores[2:6, 2:14] = 1  # one prediction of 48 pixels over both: 16 outside all truth
    counts = ComponentCounts(tiny, 1.0)
    counts.update(scores, mask)
    figures = counts.result()
    assert figures.siou_gt == 16 / 32 and figures.ppv == 32 / 48 and figures.siou_pred == 32 / 48
    assert figures.f1_by_tau['0.5'] == 1.0 and figures.f1_by_tau['0.55'] == 0.0
    assert figures.f1_by_tau['0.7'] == 0.0


def test_threshold_is_at_least_here_and_above_in_smiyc(tiny):
    mask = np.ones((4, 4), np.uint8)
    mask[3] = 0
    scores = np.where(mask == 1, np.float32(.7), np.float32(0))
    for smiyc, predicted in (False, 1), (True, 0):
        counts = ComponentCounts(tiny, float(np.float32(.7)), smiyc=smiyc)
        counts.update(scores, mask)
        assert counts.result().predicted_components == predicted


def test_threshold_is_not_rounded_to_the_scores_precision(tiny):
    mask = np.ones((4, 4), np.uint8)
    scores = np.full((4, 4), .9, np.float32)  # 0.89999998
    counts = ComponentCounts(tiny, 0.9)
    counts.update(scores, mask)
    assert counts.result().predicted_components == 0


def test_smiycs_tau_of_0_6_lies_above_it(tiny):
    mask = np.zeros((6, 10), np.uint8)
    mask[1, :5] = 1
    scores = np.zeros(mask.shape, np.float32)
    scores[1, :3] = 1
    for smiyc, f1 in (False, 1.0), (True, 0.0):
        counts = ComponentCounts('tiny', 0.5, smiyc=smiyc)
        counts.track = Track('tiny', 1, 1)
        counts.update(scores, mask)
        assert counts.result().siou_gt == 0.6
        assert counts.result().f1_by_tau['0.6'] == f1


def test_void_and_small_truth_take_no_part(tiny):
    mask = np.zeros((8, 12), np.uint8)
    mask[0, 0:2] = 1  # 2 pixels: becomes void
    mask[4:6, 4:6] = 1
    mask[:, 9:] = 255
    scores = np.zeros(mask.shape, np.float32)
    scores[0, 0:5] = 1  # 5 pixels, of which 2 on small truth
    scores[4:6, 4:6] = 1
    scores[:, 9:] = 1
    counts = ComponentCounts(tiny, 0.5)
    counts.update(scores, mask)
    figures = counts.result()
    assert figures.ground_truth_components == 1 and figures.siou_gt == 1.0
    assert figures.predicted_components == 2 and figures.ppv == 0.5


def test_nothing_to_find_is_null_with_a_reason(tiny):
    counts = ComponentCounts(tiny, 0.5)
    counts.update(np.zeros((5, 5), np.float32), np.zeros((5, 5), np.uint8))
    figures = counts.result()
    assert figures.siou_gt is None and figures.ppv is None and figures.mean_f1 is None
    assert figures.reason == 'no ground-truth component of the minimum size'
    counts.update(np.ones((5, 5), np.float32), np.zeros((5, 5), np.uint8))
    assert counts.result().mean_f1 == 0.0  # a false alarm: F1 is defined, sIoU is not
    assert counts.result().siou_gt is None


def test_merge_in_any_order_gives_the_same_bits(tiny):
    random = np.random.default_rng(5)
    parts = []
    for _ in range(6):
        part = ComponentCounts(tiny, 0.6)
        part.update(random.random((30, 30)).astype(np.float32),
                    (random.random((30, 30)) > .6).astype(np.uint8))
        parts.append(part)
    results = []
    for order in (range(6), (5, 3, 1, 0, 2, 4)):
        whole = ComponentCounts(tiny, 0.6)
        for index in order:
            whole.merge(parts[index])
        results.append(whole.result())
    assert results[0] == results[1] and results[0].predicted_components > 10
    with pytest.raises(ValueError, match='one track and one threshold'):
        ComponentCounts(tiny, 0.6).merge(ComponentCounts(tiny, 0.5))


def test_unknown_track_lists_the_names():
    with pytest.raises(ValueError, match="unknown track 'street'; choose one of anomaly, obstac"):
        ComponentCounts('street', 0.5)


def test_25000_components_take_less_than_a_second(monkeypatch):
    monkeypatch.setitem(components.TRACKS, 'all', Track('all', 1, 1))
    scores, mask = np.zeros((1024, 2048), np.float32), np.zeros((1024, 2048), np.uint8)
    for row in range(2):
        for column in range(2):
            scores[row::9, column::9] = 1
            mask[1 + row::9, column::9] = 1
    best = 10.0
    for _ in range(3):  # the best of three: other processes may hold the cores
        counts = ComponentCounts('all', 0.5)
        start = time.perf_counter()
        counts.update(scores, mask)
        best = min(best, time.perf_counter() - start)
    assert counts.result().predicted_components > 25_000
    assert counts.result().siou_gt == pytest.approx(1 / 3, abs=5e-3)
    assert best < 1
