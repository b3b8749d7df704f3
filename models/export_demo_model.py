#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""
Export the bundled model from its weights, with the threshold of best F1 on a calibration drive.

    python models/export_demo_model.py [--output models/demo.onnx]

Needs the extra ``export``. The calibration drive has a seed of its own, neither of training nor
of the demo.
"""

import argparse
import json
from pathlib import Path
import tempfile

from anomaly_seg_ros.calibration import calibrate, CalibrationRequest
from anomaly_seg_ros.export import export_model, ExportRequest
from anomaly_seg_ros.synthetic import SyntheticDrive

HERE = Path(__file__).resolve().parent
CALIBRATION_SEED = 900


def main() -> None:
    """Export, calibrate, write."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument('--output', type=Path, default=HERE / 'demo.onnx')
    arguments = parser.parse_args()
    made = json.loads((HERE / 'demo_model.json').read_text(encoding='utf-8'))
    drive = SyntheticDrive(CALIBRATION_SEED, frames=12, rate_hz=2.0)
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / 'demo.onnx'
        export_model(
            ExportRequest('roadnet', HERE / made['weights'], made['score'],
                          input_size_hw=(made['input_size_hw'][0], made['input_size_hw'][1]),
                          name='synthetic road demo'),
            raw, frames=[drive[index].image_rgb for index in range(0, 12, 4)])
        card = calibrate(raw, drive, arguments.output,
                         CalibrationRequest(temperature='keep', criterion='best-f1'))
    print(f'{arguments.output}: threshold {card.threshold:.4f}, {card.threshold_source}')


if __name__ == '__main__':
    main()
