#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""
What the bundled model reaches on drives of the synthetic world, one column a seed: a table.

python benchmarks/bundled_model.py              the table of docs/synthetic.md
python benchmarks/bundled_model.py --seeds 23 301 302

Each drive is measured on 15 frames spread over 6 seconds, as 60 frames at 10 Hz show them.
"""

import argparse
from pathlib import Path
import tempfile

from anomaly_seg_ros.evaluate import evaluate
from anomaly_seg_ros.resources import resource
from anomaly_seg_ros.synthetic import SyntheticDrive
import numpy as np

SEEDS = tuple(range(521, 533))  # drawn once, after everything had been chosen


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument('--seeds', type=int, nargs='+', default=SEEDS)
    parser.add_argument('--model', type=Path, default=None, help='default: the bundled one')
    arguments = parser.parse_args()
    rows: dict[str, list[float]] = {'mIoU': [], 'AP': [], 'FPR95': []}
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            metrics = evaluate(arguments.model or resource('models/demo.onnx'),
                               SyntheticDrive(seed, frames=15, rate_hz=2.5), folder)
        for name, value in zip(rows, (metrics['segmentation']['miou'],
                                      metrics['pixel']['average_precision'],
                                      metrics['pixel']['fpr95']), strict=True):
            rows[name].append(value)
    heads = [*map(str, arguments.seeds), 'mean', 'worst']
    print(f'| seed | {" | ".join(heads)} |\n' + '|---' * (len(heads) + 1) + '|')
    for name, values in rows.items():
        worst = max(values) if name == 'FPR95' else min(values)
        figures = [*values, float(np.mean(values)), worst]
        print(f'| {name} | ' + ' | '.join(f'{value:.3f}' for value in figures) + ' |')


if __name__ == '__main__':
    main()
