# SPDX-License-Identifier: Apache-2.0
"""The bundled model on drives whose seeds neither training nor calibration used."""

from anomaly_seg_ros.evaluate import evaluate
from anomaly_seg_ros.resources import resource
from anomaly_seg_ros.synthetic import SyntheticDrive
import pytest


def figures(seed, folder):
    # Two frames a second: as much of the world as 60 frames show, at a third of the time.
    drive = SyntheticDrive(seed, frames=15, rate_hz=2.5)
    metrics = evaluate(resource('models/demo.onnx'), drive, folder)
    return metrics['segmentation']['miou'], metrics['pixel']['average_precision']


@pytest.mark.parametrize('seed', [23, 302])
def test_known_classes_and_unknown_things(seed, tmp_path):
    miou, average_precision = figures(seed, tmp_path)
    assert miou >= 0.80
    assert average_precision >= 0.5


@pytest.mark.slow
def test_ten_more_seeds(tmp_path):
    found = {seed: figures(seed, tmp_path / str(seed)) for seed in range(301, 311)}
    print(found)
    assert all(miou >= 0.80 for miou, _ in found.values()), found
    assert all(precision >= 0.5 for _, precision in found.values()), found
