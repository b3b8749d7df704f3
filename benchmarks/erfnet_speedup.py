#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""
From a 2048x1024 frame to labels, score and mask at its size: this package beside plain PyTorch.

ERFNet with max_logit at 1024x512. "PyTorch" is what one writes first: eager network, logits
upsampled to the frame, argmax and maximum in numpy, threshold. All ways take turns on the same
frames in one process, so that other work on the machine slows all of them alike; the speed-up is
the ratio of the median times.

python benchmarks/erfnet_speedup.py --threads 2 --frames 20
"""

import argparse
from collections.abc import Callable
import os
from pathlib import Path
import sys
import tempfile
import time

from anomaly_seg_ros.backends import open_backend
from anomaly_seg_ros.export import export_model, ExportRequest
from anomaly_seg_ros.model_file import load_model_file
from anomaly_seg_ros.obstacles import ObstacleSettings
from anomaly_seg_ros.pipeline import Pipeline, STAGES
from backends import write_table
import cv2
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
FRAME_HW, INPUT_HW = (1024, 2048), (512, 1024)
TARGETS = {'onnxruntime cpu': 5.0, 'openvino speed': 7.0}
REST_MS = 8.0
Answer = tuple[np.ndarray, np.ndarray, np.ndarray]


def load_frames(data: Path, count: int) -> list[np.ndarray]:
    """Return RGB frames of 2048x1024: Lost & Found's where they are, else synthetic ones."""
    folder = data / 'anomaly/fs_lost_and_found/images'
    if folder.is_dir():
        paths = sorted(folder.iterdir())[:count]
        return [cv2.imread(str(path))[..., ::-1].copy() for path in paths]
    from anomaly_seg_ros.synthetic import SyntheticDrive
    drive = SyntheticDrive(seed=1, frames=count, size_hw=FRAME_HW)
    return [drive[i].image_rgb for i in range(count)]


def plain_pytorch(weights: Path, threshold: float) -> Callable[[np.ndarray], Answer]:
    """Return the way of the script that comes with a paper."""
    from anomaly_seg_ros.networks import load_network
    import torch
    import torch.nn.functional as F

    network = load_network('erfnet', weights).module

    def run(frame: np.ndarray) -> Answer:
        small = cv2.resize(frame, INPUT_HW[::-1], interpolation=cv2.INTER_LINEAR)
        image = torch.from_numpy(small).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            logits = F.interpolate(network(image), FRAME_HW, mode='bilinear')[0].numpy()
        labels, score = logits.argmax(0).astype(np.uint8), -logits.max(0)
        return labels, score, np.where(score >= threshold, 255, 0).astype(np.uint8)
    return run


def random_weights(folder: Path) -> Path:
    """Write an untrained ERFNet, for machines without the real weights: equally slow."""
    from anomaly_seg_ros.networks.erfnet import ERFNet
    import torch

    torch.save(ERFNet(20).state_dict(), folder / 'random.pth')
    return folder / 'random.pth'


def main() -> int:
    """Measure, print the table, and return 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--frames', type=int, default=10)
    parser.add_argument('--write', action='store_true',
                        help='put the table into docs/backends.md')
    parser.add_argument('--data', type=Path, default=Path(os.environ.get(
        'ANOMALY_SEG_DATA', ROOT.parent / 'shared/data')))
    arguments = parser.parse_args()

    import torch
    torch.set_num_threads(arguments.threads)
    cv2.setNumThreads(arguments.threads)
    frames = load_frames(arguments.data, min(arguments.frames, 8))
    with tempfile.TemporaryDirectory() as name:
        weights = arguments.data / 'weights/erfnet_cityscapes_20ch.pth'
        if not weights.exists():
            weights = random_weights(Path(name))
        path = Path(name) / 'erfnet.onnx'
        card = export_model(ExportRequest('erfnet', weights, input_size_hw=INPUT_HW), path,
                            frames[:2])
        model = load_model_file(path)
        with open_backend(model, 'cpu', threads=arguments.threads) as cpu, \
                open_backend(model, 'openvino', threads=arguments.threads,
                             precision='speed') as openvino:
            settings = ObstacleSettings(card.threshold)
            pipelines = {'onnxruntime cpu': Pipeline(cpu, settings),
                         'openvino speed': Pipeline(openvino, settings)}
            return report(frames, arguments, pipelines, plain_pytorch(weights, card.threshold))


def report(frames: list[np.ndarray], arguments: argparse.Namespace,
           pipelines: dict[str, Pipeline], plain: Callable[[np.ndarray], Answer]) -> int:
    """Run everything in turns and print one line a way."""
    times: dict[str, list[float]] = {'PyTorch': []} | {name: [] for name in pipelines}
    rest: dict[str, list[float]] = {name: [] for name in pipelines}
    stages: dict[str, list[list[float]]] = {name: [] for name in pipelines}
    for index in range(-2, arguments.frames):  # the first two rounds warm up
        frame = frames[index % len(frames)]
        started = time.perf_counter()
        _, expected, _ = plain(frame)
        taken = {'PyTorch': time.perf_counter() - started}
        for name, pipeline in pipelines.items():
            started = time.perf_counter()
            detection = pipeline(frame)
            taken[name] = time.perf_counter() - started
            # Maximum, then upsampling, is not upsampling, then maximum: same figure on average.
            drift = abs(float(np.mean(detection.anomaly)) - float(np.mean(expected)))
            if drift > 0.05 * float(np.ptp(expected)):
                raise SystemExit(f'{name} and PyTorch disagree on frame {index}: {drift}')
            if index >= 0:
                stages[name].append([detection.stages_ms[stage] for stage in STAGES])
                rest[name].append(sum(detection.stages_ms.values())
                                  - detection.stages_ms['network'])
        if index >= 0:
            for name, seconds in taken.items():
                times[name].append(seconds * 1e3)
    base = float(np.median(times['PyTorch']))
    missed = 0
    lines = [f'{arguments.threads} threads, {arguments.frames} frames of 2048x1024, ms',
             f'{"":16} {"p50":>8} {"p99":>8} {"speed-up":>9} {"all but run":>12}  stages']
    for name, values in times.items():
        p50, p99 = (float(v) for v in np.percentile(values, (50, 99)))
        line = f'{name:16} {p50:8.1f} {p99:8.1f} {base / p50:9.2f}'
        if name in rest:
            others = float(np.median(rest[name]))
            medians = np.median(stages[name], 0)
            text = ', '.join(f'{stage} {value:.1f}'
                             for stage, value in zip(STAGES, medians, strict=True))
            line += f' {others:12.2f}  {text}'
            reached = base / p50 >= TARGETS[name] and others < REST_MS
            line += '' if reached else f'  MISSED: {TARGETS[name]:g}x, under {REST_MS:g} ms'
            missed += not reached
        lines.append(line)
    print('\n'.join(lines))
    if arguments.write:
        write_table(ROOT / 'docs/backends.md', 'speedup', '\n'.join(['```', *lines, '```']))
    return int(missed > 0)


if __name__ == '__main__':
    sys.exit(main())
