# SPDX-License-Identifier: Apache-2.0
"""
ERFNet under four scores on five benchmark sets: one table, in Markdown.

    python benchmarks/erfnet_table.py --data FOLDER --output DIR

FOLDER holds ``weights/erfnet_*.pth`` and ``anomaly/NAME`` for each data set. The images of a set
go through the network once a score; frames and pixels counted are part of the table.
"""

import argparse
import json
import os
from pathlib import Path
import tempfile

from anomaly_seg_ros.datasets import open_dataset
from anomaly_seg_ros.evaluate import evaluate, machine, versions
from anomaly_seg_ros.export import export_model, ExportRequest

ROOT = Path(__file__).resolve().parent.parent
SETS = ('road_anomaly_21', 'road_obstacle_21', 'fs_lost_and_found', 'fs_static', 'road_anomaly')
SCORES = ('msp', 'max_logit', 'entropy', 'energy')

# AP / FPR95 in percent of the original fp32 ERFNet on the full validation sets (docs/results.md).
PUBLISHED = {
    'msp': ((29.2, 62.4), (2.8, 64.6), (1.7, 50.3), (5.0, 40.9), (12.4, 82.5)),
    'max_logit': ((38.4, 59.3), (4.7, 48.3), (3.3, 45.1), (6.2, 39.7), (15.6, 73.3)),
    'entropy': ((31.1, 62.5), (3.2, 65.3), (2.5, 50.0), (5.8, 40.6), (12.7, 82.6)),
}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument('--data', type=Path, default=Path(os.environ.get(
        'ANOMALY_SEG_DATA', ROOT.parent / 'shared/data')))
    parser.add_argument('--output', type=Path, help='keep the result folders here')
    parser.add_argument('--backend', default='cpu')
    parser.add_argument('--limit', type=int, help='frames a set, for a quick look')
    arguments = parser.parse_args()
    weights = next((arguments.data / 'weights').glob('erfnet*.pth'), None)
    if weights is None:
        parser.exit(message=f'skipped: no weights/erfnet*.pth in {arguments.data}\n')
    with tempfile.TemporaryDirectory() as scratch:
        output = arguments.output or Path(scratch)
        table = measure(arguments.data, weights, output, arguments.backend, arguments.limit)
    print_table(table)
    print(f'\n{json.dumps(machine())} {json.dumps(versions())}')


def measure(data: Path, weights: Path, output: Path, backend: str, limit: int | None
            ) -> dict[str, list[dict[str, float]]]:
    """Return for each score the pixel and component figures of each set."""
    table: dict[str, list[dict[str, float]]] = {}
    for score in SCORES:
        model = output / f'erfnet_{score}.onnx'
        first = open_dataset(SETS[0], data / 'anomaly' / SETS[0])[0].image_rgb
        export_model(ExportRequest('erfnet', weights, score), model, frames=[first])
        for name in SETS:
            metrics = evaluate(model, open_dataset(name, data / 'anomaly' / name),
                               output / f'{name}_{score}', backend=backend, limit=limit)
            table.setdefault(score, []).append({
                'ap': metrics['pixel']['average_precision'], 'fpr95': metrics['pixel']['fpr95'],
                'mean_f1': metrics['components']['mean_f1'],
                'frames': metrics['latency_ms']['frames']})
    return table


def print_table(table: dict[str, list[dict[str, float]]]) -> None:
    """Print AP / FPR95 / component mean F1 in percent, and the published AP / FPR95 below."""
    frames = [figures['frames'] for figures in next(iter(table.values()))]
    print('| score | ' + ' | '.join(f'{name} ({n} frames)'
                                    for name, n in zip(SETS, frames, strict=True)) + ' |')
    print('|---' * (len(SETS) + 1) + '|')
    for score, row in table.items():
        print(f'| {score} | ' + ' | '.join(
            f'{100 * f["ap"]:.1f} / {100 * f["fpr95"]:.1f} / {100 * f["mean_f1"]:.1f}'
            for f in row) + ' |')
        if score in PUBLISHED:
            print(f'| {score}, published | ' + ' | '.join(
                f'{ap:.1f} / {fpr:.1f}' for ap, fpr in PUBLISHED[score]) + ' |')


if __name__ == '__main__':
    main()
