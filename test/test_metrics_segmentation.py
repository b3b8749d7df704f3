# SPDX-License-Identifier: Apache-2.0
"""Confusion matrix figures against scikit-learn and worked examples."""

from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.metrics.segmentation import ConfusionMatrix
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, jaccard_score

NAMES = ('road', 'car', 'sky', 'train')


def test_equals_scikit_learn_over_frames_of_different_sizes():
    random = np.random.default_rng(0)
    parts, labels, predictions = [], [], []
    for shape in ((7, 9), (20, 3), (1, 1), (16, 16)):
        label = random.choice(np.array([0, 1, 2, 255], np.uint8), shape)
        predicted = np.where(random.random(shape) < .6, label % 4, 1).astype(np.uint8)
        part = ConfusionMatrix(NAMES)
        part.update(predicted, label, 'frame')
        parts.append(part)
        labels.append(label[label != 255])
        predictions.append(predicted[label != 255])
    whole = ConfusionMatrix(NAMES)
    for part in reversed(parts):
        whole.merge(part)
    figures = whole.result()
    truth, predicted = np.concatenate(labels), np.concatenate(predictions)
    expected = jaccard_score(truth, predicted, labels=[0, 1, 2], average=None)
    assert [figures.iou_by_class[name] for name in NAMES[:3]] == pytest.approx(expected, abs=1e-12)
    assert figures.iou_by_class['train'] is None
    assert figures.reason == 'neither labelled nor predicted: train'
    assert figures.miou == pytest.approx(expected.mean(), abs=1e-12)
    assert figures.accuracy == pytest.approx(accuracy_score(truth, predicted), abs=1e-12)
    assert figures.pixels == truth.size


def test_prediction_of_no_class_is_wrong_but_no_false_positive():
    matrix = ConfusionMatrix(NAMES)
    matrix.update(np.array([[0, 255, 1, 9]], np.uint8), np.array([[0, 0, 1, 255]], np.uint8), 'f')
    figures = matrix.result()
    assert figures.iou_by_class == {'road': 1 / 2, 'car': 1.0, 'sky': None, 'train': None}
    assert figures.accuracy == 2 / 3 and figures.miou == 0.75


def test_no_labelled_pixel_is_null_with_a_reason():
    matrix = ConfusionMatrix(NAMES)
    matrix.update(np.zeros((2, 2), np.uint8), np.full((2, 2), 255, np.uint8), 'frame')
    figures = matrix.result()
    assert figures.miou is None and figures.accuracy is None
    assert figures.reason == 'no labelled pixel'


def test_labels_that_do_not_fit_are_refused():
    matrix = ConfusionMatrix(NAMES)
    with pytest.raises(UserError, match=r'frame_3: labels \[4, 33\] are none of the 4 classes'):
        matrix.update(np.zeros((1, 3), np.uint8), np.array([[4, 33, 255]], np.uint8), 'frame_3')
    with pytest.raises(UserError, match=r'frame_3: the prediction is .* one size'):
        matrix.update(np.zeros((1, 3), np.uint8), np.zeros((3, 1), np.uint8), 'frame_3')
    with pytest.raises(ValueError, match='same classes'):
        matrix.merge(ConfusionMatrix(NAMES[:2]))
