# SPDX-License-Identifier: Apache-2.0
"""
Stage-by-stage latency, throughput and memory of a model on every backend that this machine has.

Each backend runs in a process of its own: its memory is its own, and one that dies takes no other
with it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
import multiprocessing
from pathlib import Path
import time
from typing import Any

from anomaly_seg_ros.backends import BACKENDS, open_backend
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.export import check_frames
from anomaly_seg_ros.model_file import load_model_file
from anomaly_seg_ros.pipeline import Pipeline, STAGES
import cv2
import numpy as np

# What is measured by default: name of the row, backend, options.
CONFIGURATIONS: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
    ('cpu', 'cpu', {}),
    ('openvino', 'openvino', {}),
    ('openvino, speed', 'openvino', {'precision': 'speed'}),
    ('cuda', 'cuda', {}),
    ('onnxruntime-tensorrt', 'onnxruntime-tensorrt', {}),
    ('tensorrt', 'tensorrt', {}),
    ('torch', 'torch', {}),
)
_FRAME_SIZE_HW = (1024, 2048)  # Cityscapes, and this package's other figures
_MAX_IMAGES = 8

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Distribution:
    """Percentiles of a time in milliseconds."""

    p50: float
    p95: float
    p99: float
    maximum: float
    mean: float

    @classmethod
    def of(cls, values_ms: Sequence[float]) -> 'Distribution':
        """Compute them; percentiles are interpolated linearly."""
        p50, p95, p99 = (float(v) for v in np.percentile(values_ms, (50, 95, 99)))
        return cls(p50, p95, p99, float(max(values_ms)), float(np.mean(values_ms)))


@dataclass(frozen=True)
class Measurement:
    """
    One configuration.

    Attributes
    ----------
    name
        Of the configuration.
    reason
        Why it was not measured; None where it was, and the other entries hold.
    runs_on
        What ``Backend.describe`` says.
    frames, frame_size_hw
        How many frames, of which size; warm-up not counted.
    end_to_end_ms, stages_ms
        From the camera's frame to obstacles at its size, and each stage of the pipeline.
    frames_per_second
        One frame after the other.
    memory_mib, growth_mib
        Peak resident memory of the process itself, without its caller's, and by how much that
        grew while frames were measured.

    """

    name: str
    reason: str | None = None
    runs_on: Mapping[str, str] | None = None
    frames: int = 0
    frame_size_hw: tuple[int, int] = (0, 0)
    end_to_end_ms: Distribution | None = None
    stages_ms: Mapping[str, Distribution] | None = None
    frames_per_second: float = 0.0
    memory_mib: float = 0.0
    growth_mib: float = 0.0


def bench(model: Path | str, *, names: Sequence[str] | None = None, frames: int = 100,
          warm_up: int = 5, frame_size_hw: tuple[int, int] | None = None, threads: int = 0,
          images: Iterable[np.ndarray] | None = None, progress: Progress | None = None
          ) -> list[Measurement]:
    """
    Measure a model file on the backends of this machine.

    Parameters
    ----------
    model
        The model file.
    names
        Names of ``CONFIGURATIONS`` to measure, or of backends; default: all.
    frames, warm_up
        How many frames to measure, after how many that are not.
    frame_size_hw
        Size of the camera's frames; default: what a ``device`` model is made for, else 1024x2048.
    threads
        CPU threads; 0 takes as many as this process may use cores.
    images
        Frames uint8 (H, W, 3), RGB, of which the first 8 are taken in turns, resized where
        necessary; default: the synthetic world.
    progress
        Called with (configuration, number done, number in all).

    """
    if frames < 1 or warm_up < 0:
        raise ValueError(f'frames must be at least 1 and warm_up at least 0, got {frames} and '
                         f'{warm_up}')
    made_for = load_model_file(model).card.frame_size_hw
    size_hw = frame_size_hw or made_for or _FRAME_SIZE_HW
    if made_for not in (None, size_hw):
        raise UserError(f'{model}: made for frames of {made_for[0]}x{made_for[1]}, not '
                        f'{size_hw[0]}x{size_hw[1]}. Leave --frame-size out.')
    source = check_frames() if images is None else images
    pictures = [image if image.shape[:2] == size_hw else cv2.resize(image, size_hw[::-1])
                for image in islice(source, _MAX_IMAGES)]
    if not pictures:
        raise UserError('no images to measure with; give at least one')
    chosen = choose(names)
    results = []
    for index, (name, backend, options) in enumerate(chosen):
        if progress is not None:
            progress(name, index, len(chosen))
        results.append(_in_own_process(
            name, Path(model), backend, {**options, 'threads': threads}, pictures, frames,
            warm_up))
    if progress is not None:
        progress('done', len(chosen), len(chosen))
    return results


def choose(names: Sequence[str] | None) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Return the configurations called so; an unknown name lists the choices."""
    if names is None:
        return list(CONFIGURATIONS)
    known = {entry[0]: entry for entry in CONFIGURATIONS}
    unknown = [name for name in names if name not in known and name not in BACKENDS]
    if unknown:
        raise UserError(f'unknown backend {unknown[0]!r}; choose from {"; ".join(known)}')
    return [known.get(name, (name, name, {})) for name in names]


def measure(name: str, model: Path, backend: str, options: Mapping[str, Any],
            images: Sequence[np.ndarray], frames: int, warm_up: int) -> Measurement:
    """Measure one configuration in this process."""
    model_file = load_model_file(model)
    reason = BACKENDS[backend].unavailable(model_file)
    if reason is not None:
        return Measurement(name, reason)
    # OpenCV's threads are the frame's other stages; they take the cores that the network has.
    if options.get('threads'):
        cv2.setNumThreads(int(options['threads']))
    total_ms: list[float] = []
    stages_ms: dict[str, list[float]] = {stage: [] for stage in STAGES}
    try:
        with open_backend(model_file, backend, **options) as device:
            pipeline = Pipeline(device)
            pipeline.warm_up(images[0].shape[:2], runs=max(1, warm_up))
            before_mib = _peak_mib()
            for index in range(frames):
                started = time.perf_counter()
                detection = pipeline(images[index % len(images)])
                total_ms.append((time.perf_counter() - started) * 1e3)
                for stage, value in detection.stages_ms.items():
                    stages_ms[stage].append(value)
            runs_on = dict(device.describe())
    except UserError as error:
        return Measurement(name, str(error))
    peak_mib = _peak_mib()
    height, width = images[0].shape[:2]
    return Measurement(
        name, None, runs_on, frames, (height, width), Distribution.of(total_ms),
        {stage: Distribution.of(values) for stage, values in stages_ms.items()},
        1e3 * frames / sum(total_ms), peak_mib, peak_mib - before_mib)


def table(results: Sequence[Measurement]) -> list[list[str]]:
    """Return the results as rows of text, the first one the heading; times in ms, p50."""
    rows = [['backend', 'fps', 'p50', 'p95', 'p99', 'max', *STAGES, 'peak MiB']]
    for result in results:
        if result.end_to_end_ms is None or result.stages_ms is None:
            rows.append([result.name, f'not measured: {result.reason}'])
            continue
        times = result.end_to_end_ms
        rows.append([
            result.name, f'{result.frames_per_second:.1f}',
            *(f'{value:.1f}' for value in (times.p50, times.p95, times.p99, times.maximum)),
            *(f'{result.stages_ms[stage].p50:.1f}' for stage in STAGES),
            f'{result.memory_mib:.0f}'])
    return rows


def _peak_mib() -> float:
    """Return the peak resident memory of this process in MiB."""
    # Not getrusage's ru_maxrss: on Linux that of a new process begins at its parent's.
    status = Path('/proc/self/status').read_bytes()
    return int(status.partition(b'VmHWM:')[2].split()[0]) / 1024


def _in_own_process(name: str, *arguments: Any) -> Measurement:
    context = multiprocessing.get_context('spawn')
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, name, *arguments))
    process.start()
    sender.close()
    try:
        answer: Measurement = receiver.recv()
    except EOFError:
        process.join()
        return Measurement(name, f'its process ended with code {process.exitcode}')
    process.join()
    return answer


def _answer(sender: Any, name: str, *arguments: Any) -> None:
    try:
        sender.send(measure(name, *arguments))
    except Exception as error:
        sender.send(Measurement(name, f'{type(error).__name__}: {error}'))
        raise
