#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""
Export the bundled model from its weights, with the threshold of best F1 on calibration drives.

    python models/export_demo_model.py [--output models/demo.onnx]

Needs the extra ``export``. The calibration drives have seeds of their own, neither of training nor
of the demo.
"""

import argparse
import json
from pathlib import Path
import tempfile

from anomaly_seg_ros.calibration import calibrate, CalibrationRequest
from anomaly_seg_ros.datasets.frame import Frame
from anomaly_seg_ros.datasets.source import FrameSource
from anomaly_seg_ros.export import export_model, ExportRequest
from anomaly_seg_ros.synthetic import SyntheticDrive

HERE = Path(__file__).resolve().parent
CALIBRATION_SEEDS = range(900, 906)
FRAMES = 12  # of each drive


class Drives(FrameSource):
    """Several drives as one; a threshold for one alone is wrong for most others."""

    name = f'synthetic drives {CALIBRATION_SEEDS[0]} to {CALIBRATION_SEEDS[-1]}'
    root = Path(name)

    def __init__(self) -> None:
        """Take two frames a second."""
        self._drives = [SyntheticDrive(seed, frames=FRAMES, rate_hz=2.0)
                        for seed in CALIBRATION_SEEDS]

    @property
    def frame_ids(self) -> list[str]:
        """Names of all frames."""
        return [f'{drive.name}_{name}' for drive in self._drives for name in drive.frame_ids]

    def __getitem__(self, index: int) -> Frame:
        """Return a frame of one of the drives."""
        return self._drives[index // FRAMES][index % FRAMES]


def main() -> None:
    """Export, calibrate, write."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument('--output', type=Path, default=HERE / 'demo.onnx')
    arguments = parser.parse_args()
    made = json.loads((HERE / 'demo_model.json').read_text(encoding='utf-8'))
    drives = Drives()
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / 'demo.onnx'
        export_model(
            ExportRequest('roadnet', HERE / made['weights'], made['score'],
                          input_size_hw=(made['input_size_hw'][0], made['input_size_hw'][1]),
                          name='synthetic road demo'),
            raw, frames=[drives[index].image_rgb for index in range(0, FRAMES, 4)])
        card = calibrate(raw, drives, arguments.output,
                         CalibrationRequest(temperature='keep', criterion='best-f1'))
    print(f'{arguments.output}: threshold {card.threshold:.4f}, {card.threshold_source}')


if __name__ == '__main__':
    main()
