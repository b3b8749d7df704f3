# SPDX-License-Identifier: Apache-2.0
"""How long each stage of a model takes on this machine, backend by backend."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
import os
from pathlib import Path
import time
from typing import Any

from anomaly_seg_ros.backends import available_backends, BACKENDS, open_backend
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.evaluate import machine, percentiles, versions
from anomaly_seg_ros.model_file import load_model_file, ModelFile
from anomaly_seg_ros.obstacles import ObstacleSettings
from anomaly_seg_ros.pipeline import Pipeline
import cv2
import numpy as np

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BenchResult:
    """
    One backend's figures.

    Attributes
    ----------
    backend
        Name of the backend.
    describe
        What the backend says of itself.
    stages_ms
        Stage, and ``end_to_end`` -> p50, p95, p99 and max in milliseconds, warm-up excluded.
    frames_per_s
        Frames answered one after the other, per second of wall time.
    resident_mib
        Memory of this process that opening and running the model added, in MiB.
    open_ms
        Time from the model file in memory to the first answer.
    frames
        Frames measured.

    """

    backend: str
    describe: Mapping[str, str]
    stages_ms: Mapping[str, Mapping[str, float]]
    frames_per_s: float
    resident_mib: float
    open_ms: float
    frames: int


@dataclass(frozen=True)
class BenchReport:
    """
    What was measured, and why the other backends were not.

    Attributes
    ----------
    model, frame_size_hw
        Path of the model file, and the size of the frames.
    results
        One for each backend that ran, in the order of measuring.
    unavailable
        Backend -> reason.

    """

    model: str
    frame_size_hw: tuple[int, int]
    results: tuple[BenchResult, ...]
    unavailable: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        """Return everything with versions and machine."""
        return {**asdict(self), 'versions': versions(), 'machine': machine()}


def bench(model: Path | str, *, backends: Sequence[str] = (), frames: int = 100,
          warm_up: int = 10, frame_size_hw: tuple[int, int] | None = None,
          images: Sequence[np.ndarray] = (), threads: int = 0,
          progress: Progress | None = None) -> BenchReport:
    """
    Measure a model on one or more backends.

    Parameters
    ----------
    model
        The model file.
    backends
        Names; empty takes every one that can run the model here.
    frames, warm_up
        Frames measured, and run before without counting.
    frame_size_hw
        Size of the camera's frames; None takes the card's, else 1024 x 2048.
    images
        uint8 (H, W, 3), RGB, resized to the frame size and taken in turn; default: frames of the
        synthetic world, because obstacles cost by what is in the picture.
    threads
        Threads of the network; 0 takes every core allowed.
    progress
        Called with (backend, done, total).

    Raises
    ------
    UserError
        If a backend that was asked for cannot run, or none can.

    """
    if frames < 1 or warm_up < 0:
        raise ValueError(f'frames must be at least 1 and warm_up at least 0, got {frames}, '
                         f'{warm_up}')
    model_file = load_model_file(model)
    size_hw = model_file.card.frame_size_hw or frame_size_hw or (1024, 2048)
    reasons = available_backends(model_file)
    unavailable = {name: reason for name, reason in reasons.items() if reason is not None}
    for name in backends:
        if name not in BACKENDS:
            raise UserError(f'unknown backend {name!r}; choose of {", ".join(BACKENDS)}')
        if name in unavailable:
            raise UserError(f'backend {name} cannot run here: {unavailable[name]}')
    chosen = list(backends) or [name for name in BACKENDS if name not in unavailable]
    if not chosen:
        raise UserError(f'no backend can run {model} here: {unavailable}')
    pictures = [_fit(image, size_hw) for image in images or _synthetic(size_hw)]
    results = tuple(_measure(model_file, name, pictures, frames, warm_up, threads, progress)
                    for name in chosen)
    return BenchReport(str(model), size_hw, results, unavailable)


def bench_table(report: BenchReport) -> tuple[list[str], list[list[str]]]:
    """Return (header, rows) of text: milliseconds p50 of each stage, p50 / p95 / p99 in all."""
    stages = [name for name in report.results[0].stages_ms if name != 'end_to_end']
    header = ['backend', *stages, 'end to end p50 / p95 / p99', 'frames/s', 'MiB']
    rows = []
    for result in report.results:
        whole = result.stages_ms['end_to_end']
        rows.append([
            result.backend, *(f'{result.stages_ms[name]["p50"]:.2f}' for name in stages),
            ' / '.join(f'{whole[key]:.1f}' for key in ('p50', 'p95', 'p99')),
            f'{result.frames_per_s:.1f}', f'{result.resident_mib:.0f}'])
    return header, rows


def _measure(model: ModelFile, name: str, pictures: Sequence[np.ndarray], frames: int,
             warm_up: int, threads: int, progress: Progress | None) -> BenchResult:
    resident = _resident_mib()
    began = time.perf_counter()
    with open_backend(model, name, threads=threads) as backend:
        pipeline = Pipeline(backend, ObstacleSettings(model.card.threshold))
        pipeline(pictures[0])
        open_ms = (time.perf_counter() - began) * 1e3
        for index in range(warm_up):
            pipeline(pictures[index % len(pictures)])
        samples: dict[str, list[float]] = {}
        wall = time.perf_counter()
        for index in range(frames):
            start = time.perf_counter()
            detection = pipeline(pictures[index % len(pictures)])
            whole = (time.perf_counter() - start) * 1e3
            for stage, value in {**detection.stages_ms, 'end_to_end': whole}.items():
                samples.setdefault(stage, []).append(value)
            if progress is not None:
                progress(name, index + 1, frames)
        wall = time.perf_counter() - wall
        return BenchResult(
            name, dict(backend.describe()),
            {stage: percentiles(values) for stage, values in samples.items()},
            frames / wall, _resident_mib() - resident, open_ms, frames)


def _synthetic(size_hw: tuple[int, int]) -> list[np.ndarray]:
    from anomaly_seg_ros.synthetic import SyntheticDrive
    drive = SyntheticDrive(seed=5, frames=60, size_hw=(720, 1280))
    return [drive[index].image_rgb for index in range(0, 60, 12)]


def _fit(image: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    if image.shape[:2] == size_hw:
        return image
    return cv2.resize(image, size_hw[::-1], interpolation=cv2.INTER_LINEAR)


def _resident_mib() -> float:
    """Return the resident memory of this process, from the kernel's own account."""
    statm = Path('/proc/self/statm')
    if not statm.is_file():
        return float('nan')
    return int(statm.read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2**20
