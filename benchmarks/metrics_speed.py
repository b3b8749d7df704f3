#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""
Measure the metrics' time and memory beside scikit-learn's, and print one table.

Times are CPU seconds of one thread, which other work on the machine disturbs least; only the
evaluation with --workers is timed by the clock and needs two idle cores.

python benchmarks/metrics_speed.py            full size: about 6 minutes and 5 GB of memory
python benchmarks/metrics_speed.py --quick    a hundredth of it
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
import tempfile
import time
from typing import Any

from anomaly_seg_ros.metrics import components
from anomaly_seg_ros.metrics.pixel import (
    NegativeCounts, PixelCurve, PixelMetrics, PositiveScores, split_scores)
from anomaly_seg_ros.metrics.stored import score_metrics, StoredScores
import numpy as np
import numpy.typing as npt

SHAPE = (1024, 2048)
ANOMALOUS = 0.002
PARTS = ('sklearn', 'components', 'workers', 'linear')
Frame = tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]


def fill(scores: npt.NDArray[np.float32], mask: npt.NDArray[np.uint8], seed: int) -> None:
    """Draw one frame in place: 0.2 % anomalies, a score that separates them in part."""
    random = np.random.default_rng(seed)
    random.standard_normal(out=scores, dtype=np.float32)
    np.less(random.random(mask.shape, np.float32), ANOMALOUS, out=mask.view(np.bool_))
    scores += 1.5 * mask


def pooled_metrics(frames: Callable[[], Iterator[Frame]]) -> tuple[PixelMetrics, float]:
    """Run both passes; return the figures and the CPU seconds spent outside ``frames``."""
    seconds = 0.0
    positives = PositiveScores()
    for scores, mask in frames():
        start = time.process_time()
        positives.update(scores[mask == 1])
        seconds += time.process_time() - start
    negatives = NegativeCounts(positives.result()[0])
    for scores, mask in frames():
        start = time.process_time()
        negatives.update(split_scores(scores, mask, 'frame').negatives)
        seconds += time.process_time() - start
    start = time.process_time()
    figures = PixelMetrics.of(PixelCurve.from_counts(positives, negatives))
    return figures, seconds + time.process_time() - start


def extra_peak_mib(action: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return an action's result, its CPU seconds, and how far memory rose above its start, MiB."""
    def status(key: str) -> int:
        lines = Path('/proc/self/status').read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key))
    Path('/proc/self/clear_refs').write_text('5')  # Linux: forget the peak so far
    before, start = status('VmRSS:'), time.process_time()
    result = action()
    return result, time.process_time() - start, (status('VmHWM:') - before) / 1024


def beside_scikit_learn(pixels: int) -> None:
    """Time both on the same scores, which are in memory."""
    from sklearn.metrics import average_precision_score, roc_curve

    size = SHAPE[0] * SHAPE[1]
    scores, mask = np.empty(pixels, np.float32), np.empty(pixels, np.uint8)
    parts = [slice(start, start + size) for start in range(0, pixels, size)]
    for seed, part in enumerate(parts):
        fill(scores[part], mask[part], seed)
    (ours, _), seconds, memory = extra_peak_mib(
        lambda: pooled_metrics(lambda: ((scores[part], mask[part]) for part in parts)))

    def scikit_learn() -> tuple[float, float]:
        precision = average_precision_score(mask, scores)
        fpr, tpr, _ = roc_curve(mask, scores)
        return float(precision), float(fpr[np.argmax(tpr >= 0.95)])

    (precision, fpr95), their_seconds, their_memory = extra_peak_mib(scikit_learn)
    assert ours.average_precision is not None and ours.fpr95 is not None
    line(f'AP, FPR95, AUROC, F1: {pixels:.0e} pixels', f'{seconds:.2f} s',
         f'{memory:.0f} MiB above the scores')
    line('scikit-learn average_precision_score + roc_curve', f'{their_seconds:.2f} s',
         f'{their_memory:.0f} MiB above the scores')
    line('  ratio (target: time 0.5, memory 0.1)', f'{seconds / their_seconds:.3f}',
         f'{memory / their_memory:.3f}')
    line('  difference in AP (target: 1e-12), FPR95',
         f'{abs(ours.average_precision - precision):.1e}', f'{abs(ours.fpr95 - fpr95):.1e}')


def linearity(sizes: list[int]) -> None:
    """Time the two passes on frames that are made on the fly."""
    scores, mask = np.empty(SHAPE, np.float32), np.empty(SHAPE, np.uint8)
    for pixels in sizes:
        def frames(count: int = max(1, pixels // scores.size)) -> Iterator[Frame]:
            for seed in range(count):
                fill(scores, mask, seed)
                yield scores, mask
        figures, seconds = pooled_metrics(frames)
        line(f'both passes, {figures.pixels:.2e} pixels', f'{seconds:.2f} s',
             f'{seconds / figures.pixels * 1e9:.2f} ns a pixel')


def many_components() -> None:
    """Time the component metrics of a frame with 25,000 predicted components."""
    components.TRACKS['any size'] = components.Track('any size', 1, 1)
    scores, mask = np.zeros(SHAPE, np.float32), np.zeros(SHAPE, np.uint8)
    for row in range(2):
        for column in range(2):
            scores[row::9, column::9] = 1
            mask[1 + row::9, column::9] = 1
    seconds = []
    for _ in range(5):
        counts = components.ComponentCounts('any size', 0.5)
        start = time.perf_counter()
        counts.update(scores, mask)
        seconds.append(time.perf_counter() - start)
    found = counts.result().predicted_components
    line(f'component metrics, {found} components (target: 1 s)',
         f'{np.median(seconds):.3f} s', 'median of 5')


def workers(frames: int) -> None:
    """Time the whole evaluation of stored maps with one and with two processes."""
    with tempfile.TemporaryDirectory() as name:
        scores_dir, masks_dir = Path(name, 'scores'), Path(name, 'masks')
        scores_dir.mkdir()
        masks_dir.mkdir()
        scores, mask = np.empty(SHAPE, np.float32), np.empty(SHAPE, np.uint8)
        for number in range(frames):
            fill(scores, mask, number)
            np.save(scores_dir / f'{number:04d}.npy', scores)
            np.save(masks_dir / f'{number:04d}.npy', mask)
        source = StoredScores(scores_dir, masks_dir)
        seconds, results = [], []
        for count in (1, 2):
            start = time.perf_counter()
            results.append(score_metrics(source, track='obstacle', workers=count))
            seconds.append(time.perf_counter() - start)
            line(f'all metrics of {frames} stored 2048x1024 maps, --workers {count}',
                 f'{seconds[-1]:.2f} s', f'{seconds[-1] / frames * 1e3:.0f} ms a frame')
    same = repr(results[0].as_json()) == repr(results[1].as_json())
    line('  speed-up (target: 1.7)', f'{seconds[0] / seconds[1]:.2f}',
         'equal to the last bit' if same else 'RESULTS DIFFER')


def line(what: str, value: str, note: str) -> None:
    """Print one row of the table."""
    print(f'| {what:<56} | {value:>9} | {note:<27} |', flush=True)


def main() -> None:
    """Run all measurements."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--pixels', type=float, default=1e8, metavar='N',
                        help='pixels beside scikit-learn (default: 1e8)')
    parser.add_argument('--frames', type=int, default=60, metavar='N',
                        help='stored maps for --workers (default: 60, 600 MB in the temporary '
                        'folder)')
    parser.add_argument('--only', nargs='+', metavar='PART', default=PARTS, choices=PARTS,
                        help=f'some of: {", ".join(PARTS)}')
    parser.add_argument('--quick', action='store_true', help='a hundredth of the work')
    options = parser.parse_args()
    scale = 100 if options.quick else 1
    line('what', 'value', 'note')
    line('-' * 56, '-' * 9, '-' * 27)
    if 'sklearn' in options.only:
        beside_scikit_learn(int(options.pixels / scale))
    if 'components' in options.only:
        many_components()
    if 'workers' in options.only:
        workers(options.frames if not options.quick else 6)
    if 'linear' in options.only:
        linearity([int(pixels / scale) for pixels in (1e7, 3e7, 1e8, 4e8)])


if __name__ == '__main__':
    main()
