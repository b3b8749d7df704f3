# SPDX-License-Identifier: Apache-2.0
"""
What resizing the camera image does to ERFNet's figures, with intervals over frames: one table.

    python benchmarks/input_resize.py --data FOLDER [--sets NAME ...] [--scores NAME ...]

Four ways to the network's 1024x512: the package's two (bilinear, and antialiased as it is
exported by default), OpenCV's area average, and Pillow's bilinear, which antialiases. Besides, the
package's antialiasing after JPEG (quality 90) decoded whole and at reduced size, as the node does
where the frame is at least twice as large as the network. Intervals: percentile bootstrap over
frames, level 0.95; pixels share 20,000 bins of score, which changes no figure by 1e-4.
"""

import argparse
import os
from pathlib import Path
import statistics
import tempfile
import time

from anomaly_seg_ros.backends import open_backend
from anomaly_seg_ros.compare import draw_frames, pooled_figures
from anomaly_seg_ros.datasets import open_dataset
from anomaly_seg_ros.export import export_model, ExportRequest
from anomaly_seg_ros.images import decode_compressed
from anomaly_seg_ros.model_file import load_model_file
from anomaly_seg_ros.pipeline import Pipeline
from anomaly_seg_ros.resize import Resizer
import cv2
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SETS = ('road_anomaly_21', 'road_obstacle_21', 'fs_lost_and_found', 'fs_static', 'road_anomaly')
SIZE_WH = (1024, 512)
BINS = 20_000
RESAMPLES = 1000

RESIZE = {
    'bilinear': Resizer(SIZE_WH[::-1], 'bilinear'),
    'area': lambda image: cv2.resize(image, SIZE_WH, interpolation=cv2.INTER_AREA),
    'antialiased': Resizer(SIZE_WH[::-1], 'antialiased'),
    'Pillow': lambda image: np.asarray(
        Image.fromarray(image).resize(SIZE_WH, Image.Resampling.BILINEAR)),
}
# What a node sees of frames that come as JPEG, decoded whole or (``reduced_decode``) smaller.
JPEG = {'JPEG, whole': False, 'JPEG, reduced': True}
JPEG_QUALITY = 90


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument('--data', type=Path, default=Path(os.environ.get(
        'ANOMALY_SEG_DATA', ROOT.parent / 'shared/data')))
    parser.add_argument('--sets', nargs='+', choices=SETS, default=SETS)
    parser.add_argument('--scores', nargs='+', default=('msp', 'max_logit', 'entropy'))
    arguments = parser.parse_args()
    weights = next((arguments.data / 'weights').glob('erfnet*.pth'), None)
    if weights is None:
        parser.exit(message=f'skipped: no weights/erfnet*.pth in {arguments.data}\n')
    print('| set | score | resizing | AP [95 %] | FPR95 [95 %] | frames |\n' + '|---' * 6 + '|')
    with tempfile.TemporaryDirectory() as scratch:
        for score in arguments.scores:
            model = Path(scratch) / f'{score}.onnx'
            export_model(ExportRequest('erfnet', weights, score), model)
            with open_backend(load_model_file(model)) as backend:
                for name in arguments.sets:
                    measure(Pipeline(backend), name, arguments.data / 'anomaly' / name, score)
    for height, width in ((1080, 1920), (1024, 2048), (720, 1280)):
        print_speed(height, width)


def measure(pipeline: Pipeline, name: str, root: Path, score: str) -> None:
    """Print one row for each way of resizing."""
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {way: [] for way in (*RESIZE, *JPEG)}
    for frame in open_dataset(name, root):
        mask = frame.anomaly_mask
        if mask is None:
            continue
        inputs = {way: resize(frame.image_rgb) for way, resize in RESIZE.items()}
        inputs |= {way: after_jpeg(frame.image_rgb, reduced) for way, reduced in JPEG.items()}
        for way, image in inputs.items():
            scores = cv2.resize(pipeline(image).anomaly, mask.shape[::-1],
                                interpolation=cv2.INTER_LINEAR)
            found[way].append((scores[mask == 1], scores[mask == 0]))
    for way, frames in found.items():
        ap, ap_low, ap_high, fpr95, fpr95_low, fpr95_high = with_intervals(frames)
        print(f'| {name} | {score} | {way} | {ap:.1f} [{ap_low:.1f}, {ap_high:.1f}] '
              f'| {fpr95:.1f} [{fpr95_low:.1f}, {fpr95_high:.1f}] | {len(frames)} |', flush=True)


def after_jpeg(image_rgb: np.ndarray, reduced: bool) -> np.ndarray:
    """Encode a frame, decode it as the node does, and scale it."""
    encoded = cv2.imencode('.jpg', image_rgb[..., ::-1],
                           [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
    decoded = decode_compressed(encoded, 'jpeg', SIZE_WH[::-1] if reduced else None)
    return Resizer(SIZE_WH[::-1], 'antialiased')(
        decoded.rgb(), reduced=decoded.array.shape[:2] != decoded.full_size_hw)


def with_intervals(frames: list[tuple[np.ndarray, np.ndarray]]) -> list[float]:
    """Return AP, its low and high, FPR95, its low and high, in percent."""
    positives = np.concatenate([positive for positive, _ in frames])
    edges = np.unique(np.quantile(positives, np.linspace(0, 1, BINS + 1)[:-1],
                                  method='inverted_cdf'))
    counts = np.array([[np.bincount(np.searchsorted(edges, scores, 'right'),
                                    minlength=edges.size + 1)[::-1] for scores in frame]
                       for frame in frames], np.float64)
    pooled = pooled_figures(*counts.sum(0)[:, None])[:2, 0]
    draws = draw_frames(len(frames), RESAMPLES, seed=0).astype(np.float64)
    drawn = np.concatenate([pooled_figures(part @ counts[:, 0], part @ counts[:, 1])[:2]
                            for part in np.array_split(draws, 20)], axis=1)
    low, high = np.nanquantile(drawn, (0.025, 0.975), axis=1)
    return [100 * float(values[i]) for i in (0, 1) for values in (pooled, low, high)]


def print_speed(height: int, width: int) -> None:
    """Print the median milliseconds of each way for one camera size."""
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    medians = []
    for way, resize in RESIZE.items():
        times = []
        for _ in range(30):
            start = time.perf_counter()
            resize(image)
            times.append(1e3 * (time.perf_counter() - start))
        medians.append(f'{way} {statistics.median(times):.1f} ms')
    print(f'{width}x{height}: {", ".join(medians)}')


if __name__ == '__main__':
    main()
