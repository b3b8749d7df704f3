#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""
From a 2048x1024 frame to labels, score and mask at its size: this package beside plain PyTorch.

ERFNet with max_logit at 1024x512, in float32 and, where the real data are, in int8. "PyTorch" is
what the networks' own scripts do: Pillow scales the frame (as torchvision's Resize does), eager
network, logits upsampled to the frame, argmax and maximum in numpy, threshold. All ways take turns
on the same frames in one process, so that other work on the machine slows all of them alike; the
speed-up is the ratio of the median times.

python benchmarks/erfnet_speedup.py --threads 2 --frames 20
"""

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
import os
from pathlib import Path
import sys
import tempfile
import time
from typing import Any

from anomaly_seg_ros.backends import open_backend
from anomaly_seg_ros.export import export_model, ExportRequest
from anomaly_seg_ros.model_file import load_model_file
from anomaly_seg_ros.obstacles import ObstacleSettings
from anomaly_seg_ros.pipeline import Pipeline, STAGES
from backends import erfnet, write_table
import cv2
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
FRAME_HW, INPUT_HW = (1024, 2048), (512, 1024)
TARGETS = {'onnxruntime cpu': 5.0, 'openvino speed': 7.0}  # of the fastest precision
WAYS: dict[str, dict[str, Any]] = {
    'onnxruntime cpu': {'name': 'cpu'},
    'openvino speed': {'name': 'openvino', 'precision': 'speed'}}
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
        small = Image.fromarray(frame).resize(INPUT_HW[::-1], Image.Resampling.BILINEAR)
        image = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None].float() / 255
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
        request = ExportRequest('erfnet', weights, input_size_hw=INPUT_HW)
        int8 = (arguments.data / 'anomaly').is_dir()
        with ExitStack() as stack:
            pipelines = {}
            for precision, way in product(['fp32', 'int8'] if int8 else ['fp32'], WAYS):
                path = Path(name) / f'{precision}_{way}.onnx'
                if precision == 'int8':
                    subject = erfnet(arguments.data)
                    export_model(replace(request, precision='int8', int8_for=way.split()[0]), path,
                                 subject.calibration, subject.gate)
                else:
                    export_model(request, path, frames[:2])
                model = load_model_file(path)
                threshold = model.card.threshold
                backend = stack.enter_context(open_backend(
                    model, threads=arguments.threads, **WAYS[way]))
                pipelines[f'{precision} {way}'] = Pipeline(backend, ObstacleSettings(threshold))
            return report(frames, arguments, pipelines, plain_pytorch(weights, threshold))


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
    lines = [f'{arguments.threads} threads, {arguments.frames} frames of 2048x1024, ms',
             f'{"":21} {"p50":>8} {"p99":>8} {"speed-up":>9} {"all but run":>12}  stages']
    best = dict.fromkeys(TARGETS, 0.0)
    rest_ms = 0.0
    for name, values in times.items():
        p50, p99 = (float(v) for v in np.percentile(values, (50, 99)))
        line = f'{name:21} {p50:8.1f} {p99:8.1f} {base / p50:9.2f}'
        if name in rest:
            others = float(np.median(rest[name]))
            medians = np.median(stages[name], 0)
            text = ', '.join(f'{stage} {value:.1f}'
                             for stage, value in zip(STAGES, medians, strict=True))
            line += f' {others:12.2f}  {text}'
            way = name.split(' ', 1)[1]
            best[way] = max(best[way], base / p50)
            rest_ms = max(rest_ms, others)
        lines.append(line)
    verdicts = [(f'{way} at least {target:g} times faster', best[way] >= target)
                for way, target in TARGETS.items()]
    verdicts.append((f'all but run under {REST_MS:g} ms', rest_ms < REST_MS))
    lines += [f'{text}: {"yes" if reached else "NO"}' for text, reached in verdicts]
    print('\n'.join(lines))
    if arguments.write:
        write_table(ROOT / 'docs/backends.md', 'speedup', '\n'.join(['```', *lines, '```']))
    return int(not all(reached for _, reached in verdicts))


if __name__ == '__main__':
    sys.exit(main())
