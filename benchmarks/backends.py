#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""
Every backend and precision that this machine can run, beside float32 PyTorch, as one table.

For each: largest and mean score error and label mismatch on 20 frames, average precision and
FPR95, and the time of the network. Writes the table into docs/backends.md, between its markers.

python benchmarks/backends.py                       ERFNet; real data (ANOMALY_SEG_DATA)
python benchmarks/backends.py --network roadnet     the bundled model's network; synthetic drives
python benchmarks/backends.py --models DIR          keeps the exported files and uses them again
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
import json
import os
from pathlib import Path
import platform
import sys
import tempfile
import time
from typing import Any

from anomaly_seg_ros.backends import BACKENDS, open_backend
from anomaly_seg_ros.datasets import open_dataset
from anomaly_seg_ros.datasets.frame import Frame
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.export import export_model, ExportRequest
from anomaly_seg_ros.files import atomic_write_text
from anomaly_seg_ros.metrics.pixel import PixelCurve, split_scores
from anomaly_seg_ros.model_file import load_model_file, ModelFile
from anomaly_seg_ros.networks import load_network
from anomaly_seg_ros.parity import compare
from anomaly_seg_ros.pipeline import resize_output
from anomaly_seg_ros.ports import NetworkOutput
from anomaly_seg_ros.preprocess import Preprocessor
from anomaly_seg_ros.reference import build_module, run_torch
from anomaly_seg_ros.synthetic import SyntheticDrive
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = '<!-- table: begin {} -->', '<!-- table: end {} -->'
PRECISIONS = ('fp32', 'fp16', 'int8 for onnxruntime', 'int8 for openvino')
# Row name, backend, options.
WAYS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ('onnxruntime cpu', 'cpu', {}),
    ('openvino f32', 'openvino', {'precision': 'f32'}),
    ('openvino speed', 'openvino', {'precision': 'speed'}),
    ('onnxruntime cuda', 'cuda', {}),
    ('onnxruntime tensorrt', 'onnxruntime-tensorrt', {}),
    ('tensorrt', 'tensorrt', {}),
    ('torch cpu', 'torch', {}),
    ('torch cuda', 'torch', {'device': 'cuda'}),
)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    precision: str
    way: str
    max_error: float
    mean_error: float
    mismatch: float
    average_precision: float
    fpr95: float
    network_ms: float


@dataclass(frozen=True)
class Subject:
    """A network and the frames that it is judged by."""

    weights: Path
    input_size_hw: tuple[int, int]
    scored: list[Frame]
    others: list[np.ndarray]  # compared with PyTorch besides the scored ones
    calibration: list[np.ndarray]  # for int8; in no data set that it is scored on
    gate: Sequence[Frame]  # for int8


def erfnet(data: Path) -> Subject:
    """Return ERFNet: road_anomaly_21 and, besides its 10, 10 images of road_anomaly."""
    scored = open_dataset('road_anomaly_21', data / 'anomaly/road_anomaly_21')
    others = open_dataset('road_anomaly', data / 'anomaly/road_anomaly')
    step = max(1, len(others) // 10)
    calibration = []
    for name, count in (('fs_lost_and_found', 12), ('road_obstacle_21', 12)):
        source = open_dataset(name, data / 'anomaly' / name)
        calibration += [source[i].image_rgb for i in range(min(count, len(source)))]
    return Subject(data / 'weights/erfnet_cityscapes_20ch.pth', (512, 1024),
                   [scored[i] for i in range(len(scored))],
                   [others[i].image_rgb for i in range(0, len(others), step)][:10],
                   calibration, Gate(data))


def roadnet(data: Path) -> Subject:
    """Return the bundled model's network on three synthetic drives, none of its training."""
    del data  # needs none
    scored, calibration, gate = (SyntheticDrive(seed, frames=20, rate_hz=2.5)
                                 for seed in (301, 401, 402))
    made = json.loads((ROOT / 'models/demo_model.json').read_text(encoding='utf-8'))
    height, width = made['input_size_hw']
    return Subject(ROOT / 'models' / made['weights'], (height, width),
                   [scored[i] for i in range(len(scored))], [],
                   [calibration[i].image_rgb for i in range(len(calibration))], gate)


SUBJECTS = {'erfnet': erfnet, 'roadnet': roadnet}


class Gate(Sequence[Frame]):
    """road_anomaly_21 for average precision, then the Cityscapes pairs for mean IoU."""

    name = 'road_anomaly_21 + cityscapes'

    def __init__(self, data: Path) -> None:
        """Open both."""
        self._sources = (open_dataset('road_anomaly_21', data / 'anomaly/road_anomaly_21'),
                         open_dataset('cityscapes', data / 'cityscapes'))

    def __len__(self) -> int:
        """Return the number of frames of both."""
        return sum(map(len, self._sources))

    def __getitem__(self, index: Any) -> Any:
        """Return a frame of the first, or of the second."""
        first, second = self._sources
        return first[index] if index < len(first) else second[index - len(first)]


def export_all(network: str, subject: Subject, folder: Path, precisions: Sequence[str],
               maximum_drop: float) -> Iterator[tuple[str, ModelFile]]:
    """Yield the model file of each precision; those already in the folder are used again."""
    for precision in precisions:
        path = folder / f'{network}_max_logit_{precision.replace(" ", "_")}.onnx'
        if not path.exists():
            kind, _, target = precision.partition(' for ')
            request = ExportRequest(
                network, subject.weights, input_size_hw=subject.input_size_hw, precision=kind,
                maximum_drop=maximum_drop, int8_for=target or 'onnxruntime')
            try:
                if target:
                    export_model(request, path, subject.calibration, subject.gate)
                else:
                    export_model(request, path, [frame.image_rgb for frame in subject.scored[:4]])
            except UserError as error:
                print(f'{precision}: {error}', file=sys.stderr)
                continue
        yield precision, load_model_file(path)


def score(answers: Sequence[NetworkOutput], frames: Sequence[Frame]) -> tuple[float, float]:
    """Return average precision and FPR95 of answers, resized to the masks' size."""
    positives, negatives = [], []
    for answer, frame in zip(answers, frames, strict=True):
        _, anomaly = resize_output(answer.labels, answer.anomaly, frame.image_rgb.shape[:2])
        split = split_scores(anomaly, frame.anomaly_mask, frame.frame_id)
        positives.append(split.positives)
        negatives.append(split.negatives)
    curve = PixelCurve.of(np.concatenate(positives), np.concatenate(negatives))
    return curve.average_precision(), curve.fpr_at_recall(0.95)


def run_way(model: ModelFile, backend: str, options: dict[str, Any], inputs: list[np.ndarray],
            threads: int, weights: Path) -> tuple[list[NetworkOutput], float]:
    """Return the answers and the median time of the network in ms, warm-up left out."""
    if backend == 'torch':
        options = {**options, 'weights': weights}
    with open_backend(model, backend, threads=threads, **options) as device:
        device.run(inputs[0])
        answers, times = [], []
        for network_input in inputs:
            started = time.perf_counter()
            answer = device.run(network_input)
            times.append((time.perf_counter() - started) * 1e3)
            answers.append(NetworkOutput(answer.labels.copy(), answer.anomaly.copy()))
    return answers, float(np.median(times))


def main() -> int:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument('--network', default='erfnet', choices=SUBJECTS)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--models', type=Path, help='folder to keep the exported files in')
    parser.add_argument('--precisions', nargs='+', default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument('--ways', nargs='+', default=[way for way, *_ in WAYS],
                        choices=[way for way, *_ in WAYS], help='rows to measure')
    parser.add_argument('--maximum-drop', type=float, default=0.02,
                        help='of AP and mIoU, for int8 to be kept')
    parser.add_argument('--no-write', action='store_true', help='print only')
    parser.add_argument('--data', type=Path, default=Path(os.environ.get(
        'ANOMALY_SEG_DATA', ROOT.parent / 'shared/data')))
    arguments = parser.parse_args()
    if arguments.network == 'erfnet' and not (arguments.data / 'weights').is_dir():
        print(f'no real data in {arguments.data}: set ANOMALY_SEG_DATA')
        return 0

    subject = SUBJECTS[arguments.network](arguments.data)
    frames = subject.scored
    images = [frame.image_rgb for frame in frames] + subject.others
    rows: list[Row] = []
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.models or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        inputs: list[np.ndarray] = []
        for precision, model in export_all(arguments.network, subject, folder,
                                           arguments.precisions, arguments.maximum_drop):
            if not inputs:
                preprocess = Preprocessor(model.card)
                inputs = [preprocess(image).copy() for image in images]
                network = load_network(arguments.network, subject.weights, subject.input_size_hw)
                reference = run_torch(build_module(network, load_model_file(
                    folder / f'{arguments.network}_max_logit_fp32.onnx').card, plain=True), inputs)
                ap, fpr95 = score(reference[:len(frames)], frames)
                rows.append(Row('fp32', 'PyTorch eager (reference)', 0, 0, 0, ap, fpr95,
                                float('nan')))
            if model.card.precision == 'int8':
                notes.append(f'{precision}: {json.dumps(model.card.parity["drop"])}')
            for way, backend, options in WAYS:
                if way not in arguments.ways \
                        or (backend == 'torch' and model.card.precision == 'int8'):
                    continue
                reason = None if backend == 'torch' else BACKENDS[backend].unavailable(model)
                try:
                    if reason is None:
                        answers, milliseconds = run_way(model, backend, options, inputs,
                                                        arguments.threads, subject.weights)
                except UserError as error:
                    reason = str(error)
                if reason is not None:
                    note = f'{way}: not run here ({reason})'
                    notes += [note] if note not in notes else []
                    continue
                difference = compare(answers, reference)
                rows.append(Row(precision, way, difference.max_score_error,
                                difference.mean_score_error, difference.label_mismatch,
                                *score(answers[:len(frames)], frames), milliseconds))
                print(rows[-1], flush=True)
    text = markdown(rows, notes, arguments.threads)
    print(text)
    if not arguments.no_write:
        write_table(ROOT / 'docs/backends.md', arguments.network, text)
    return 0


def markdown(rows: Sequence[Row], notes: Sequence[str], threads: int) -> str:
    """Return the table, and under it what could not be run."""
    lines = ['| precision | backend | max score error | mean score error | labels that differ '
             '| AP | FPR95 | network ms, p50 |', '|---|---|---|---|---|---|---|---|']
    for row in rows:
        milliseconds = '' if np.isnan(row.network_ms) else f'{row.network_ms:.0f}'
        lines.append(f'| {row.precision} | {row.way} | {row.max_error:.1e} | {row.mean_error:.1e} '
                     f'| {100 * row.mismatch:.4f} % | {row.average_precision:.4f} '
                     f'| {row.fpr95:.4f} | {milliseconds} |')
    machine = f'{platform.machine()}, {threads} threads, {time.strftime("%Y-%m-%d")}'
    return '\n'.join([*lines, '', f'Measured on: {machine}.', '',
                      *(f'- {note}' for note in notes)])


def write_table(path: Path, name: str, text: str) -> None:
    """Replace what stands between the markers in a file."""
    old = path.read_text(encoding='utf-8')
    begin, end = BEGIN.format(name), END.format(name)
    if begin not in old or end not in old:
        raise SystemExit(f'{path}: the markers {begin} and {end} are missing')
    before, after = old.split(begin)[0], old.split(end)[1]
    atomic_write_text(path, f'{before}{begin}\n{text}\n{end}{after}')


if __name__ == '__main__':
    sys.exit(main())
