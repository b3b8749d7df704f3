# SPDX-License-Identifier: Apache-2.0
"""
All metrics of a set of score maps, in passes over the frames, on one or many processes.

Pass 1 checks every frame and collects the anomalous pixels' scores; pass 2 counts the
in-distribution pixels between them and does everything that needs one frame only; pass 3, where a
track is given, finds the components at the threshold that pass 2 gave. Each pass is an
accumulator that merges, so frames can be split over processes or a Ray cluster: the bits of the
result are the same however they are split.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
import logging
import multiprocessing
import os
from pathlib import Path
import signal
import socket
from typing import Any, Protocol, TypeVar

from anomaly_seg_ros.datasets.reading import read_codes
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.extras import how_to_install
from anomaly_seg_ros.files import array_error
from anomaly_seg_ros.metrics.compat import (
    CaosMetrics, CaosPerImage, S2mCounts, S2mMetrics, SmiycPixel, SmiycPixelMetrics)
from anomaly_seg_ros.metrics.components import ComponentCounts, ComponentMetrics, find_track
from anomaly_seg_ros.metrics.pixel import (
    check_frame, count_sorted, FloatArray, IntArray, MaskArray, NegativeCounts, PixelCurve,
    PixelMetrics, PositiveScores, split_checked)
import cv2
import numpy as np
import numpy.typing as npt

HISTOGRAM_BINS = 100
CURVE_POINTS = 2000
_SHOWN = 8
NO_TRACK = 'no track: give anomaly or obstacle to set the component sizes'
_NO_RELIS = {'ece': None, 'adaptive_ece': None, 'ks': None, 'prr': None,
             'reason': 'needs class probabilities and labels, not score maps'}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ScoredFrame:
    """
    One frame to score.

    Attributes
    ----------
    frame_id
        Its name, unique in the source.
    scores
        (H, W) float16, float32 or float64; higher is more anomalous; finite.
    mask
        (H, W) uint8: 0 in-distribution, 1 anomaly, 255 void.

    """

    frame_id: str
    scores: FloatArray
    mask: MaskArray


class ScoreSource(Protocol):
    """Frames that can be read again and again; picklable where there are several workers."""

    @property
    def frame_ids(self) -> Sequence[str]:
        """Names of all frames, in order."""

    def load(self, frame_id: str) -> ScoredFrame:
        """Read a frame; UserError where it is not usable."""


class StoredScores:
    """
    Score maps ``SCORES_DIR/<name>.npy`` with masks ``MASKS_DIR/<name>.png`` or ``.npy``.

    ``problems`` lists the names that do not pair; ``frame_ids`` those that do.

    Raises
    ------
    UserError
        If a folder is missing or no name pairs; says what was looked for and found, or which
        masks there are twice.

    """

    def __init__(self, scores_dir: Path | str, masks_dir: Path | str) -> None:
        scores = _by_name(Path(scores_dir), ('.npy',), 'score maps')
        masks = _by_name(Path(masks_dir), ('.png', '.npy'), 'masks')
        problems: list[str] = []
        doubles: list[str] = []
        for name in sorted(scores.keys() | masks.keys()):
            if name not in masks:
                problems.append(f'{scores[name][0]}: has no mask; expected {name}.png or '
                                f'{name}.npy in {masks_dir}')
            elif name not in scores:
                problems.append(f'{masks[name][0]}: has no score map; expected {name}.npy in '
                                f'{scores_dir}')
            elif len(masks[name]) > 1:
                doubles.append(f'{masks[name][0]}: there is a second mask {masks[name][1].name}; '
                               'remove one of them')
                problems.append(doubles[-1])
        self.problems = tuple(problems)
        self._paths = {name: (scores[name][0], masks[name][0]) for name in sorted(scores)
                       if len(masks.get(name, ())) == 1}
        if not self._paths and doubles:
            more = f'\n  and {len(doubles) - _SHOWN} more' if len(doubles) > _SHOWN else ''
            raise UserError(f'{scores_dir} and {masks_dir}: no score map has one mask only:\n  '
                            + '\n  '.join(doubles[:_SHOWN]) + more)
        if not self._paths:
            raise UserError(
                f'{scores_dir} and {masks_dir} have no name in common: {len(scores)} score maps '
                f'({_examples(scores)}), {len(masks)} masks ({_examples(masks)}). Give each '
                '<name>.npy score map a <name>.png or <name>.npy mask.')

    @property
    def frame_ids(self) -> list[str]:
        """Names that have a score map and a mask, sorted."""
        return list(self._paths)

    def load(self, frame_id: str) -> ScoredFrame:
        """Read and check one pair; UserError names the file."""
        scores_path, mask_path = self._paths[frame_id]
        scores, mask = read_npy(scores_path), _read_mask(mask_path)
        for path, array in (scores_path, scores), (mask_path, mask):
            if array.ndim != 2:
                raise UserError(f'{path}: must have shape (H, W), got {array.shape}. Store one '
                                'frame a file, without batch or channel axes.')
        check_frame(scores, mask, f'{scores_path} with {mask_path}')
        return ScoredFrame(frame_id, scores, mask.astype(np.uint8, copy=False))


def _by_name(folder: Path, suffixes: tuple[str, ...], what: str) -> dict[str, list[Path]]:
    if not folder.is_dir():
        raise UserError(f'{folder}: not a folder; expected the folder of the {what} '
                        f'(<name>{" or <name>".join(suffixes)})')
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in suffixes and not path.name.startswith('.'):
            found.setdefault(path.stem, []).append(path)
    return found


def _examples(names: dict[str, list[Path]]) -> str:
    return ', '.join(paths[0].name for paths in list(names.values())[:3]) or 'none'


def read_npy(path: Path) -> npt.NDArray[Any]:
    """Read an array in native byte order; UserError where it is none. Pickles are not read."""
    try:
        array = np.load(path, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError('an .npz archive')
    except (OSError, ValueError, EOFError, MemoryError) as error:
        raise UserError(f'{path}: not a readable .npy array ({array_error(error)}). Write it '
                        'again with numpy.save; pickled objects are not read.') from error
    return array.astype(array.dtype.newbyteorder('='), copy=False)


def _read_mask(path: Path) -> npt.NDArray[Any]:
    mask = read_npy(path) if path.suffix.lower() == '.npy' else read_codes(path)
    if mask.dtype.kind not in 'bui':
        raise UserError(f'{path}: a mask must hold integers, got {mask.dtype}. Store 0 '
                        '(in-distribution), 1 (anomaly), 255 (void) as uint8.')
    return mask


@dataclass(frozen=True)
class FrameRow:
    """One frame's own figures, for per_frame.csv; None where a class is missing."""

    frame_id: str
    average_precision: float | None
    fpr95: float | None
    auroc: float | None
    best_f1: float | None
    best_f1_threshold: float | None
    pixels: int
    positives: int


@dataclass(frozen=True)
class ScoreCurves:
    """
    What a report plots.

    ``thresholds`` (descending), ``recall``, ``precision`` and ``fpr`` have one entry for each of
    at most 2000 vertices of the exact curves, thinned evenly along both; empty without both
    classes. The histograms count pixels of each class in the bins between ``histogram_edges``.
    """

    thresholds: npt.NDArray[np.float64]
    recall: npt.NDArray[np.float64]
    precision: npt.NDArray[np.float64]
    fpr: npt.NDArray[np.float64]
    histogram_edges: npt.NDArray[np.float64]
    histogram_positives: IntArray
    histogram_negatives: IntArray


@dataclass(frozen=True)
class CompatMetrics:
    """The figures as the reference codes give them; see ``metrics.compat``."""

    smiyc_pixel: SmiycPixelMetrics
    smiyc_components: ComponentMetrics
    caos_per_image: CaosMetrics
    s2m: S2mMetrics


@dataclass(frozen=True)
class ScoreMetrics:
    """
    All metrics of a set of score maps.

    ``skipped`` lists, under ``keep_going``, what was wrong with the frames left out. ``compat`` is
    None where it was not asked for.
    """

    pixel: PixelMetrics
    components: ComponentMetrics
    compat: CompatMetrics | None
    per_frame: tuple[FrameRow, ...]
    curves: ScoreCurves
    skipped: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the ``pixel``, ``components`` and ``compat`` sections of metrics.json."""
        sections: dict[str, Any] = {'pixel': asdict(self.pixel),
                                    'components': asdict(self.components), 'compat': None}
        if self.compat is not None:
            sections['compat'] = {
                'smiyc': {'pixel': asdict(self.compat.smiyc_pixel),
                          'components': asdict(self.compat.smiyc_components)},
                'caos_per_image': asdict(self.compat.caos_per_image),
                's2m': asdict(self.compat.s2m),
                'relis': dict(_NO_RELIS),
            }
        return sections


def null_sections(reason: str) -> dict[str, Any]:
    """Return the sections of ``ScoreMetrics.as_json`` where there is nothing to score."""
    def nulls(kind: type[PixelMetrics | SmiycPixelMetrics | CaosMetrics | S2mMetrics]
              ) -> dict[str, Any]:
        return {each.name: None for each in fields(kind)} | {'reason': reason}

    components = asdict(ComponentMetrics.not_applicable(reason))
    return {
        'pixel': nulls(PixelMetrics), 'components': components,
        'compat': {'smiyc': {'pixel': nulls(SmiycPixelMetrics), 'components': components},
                   'caos_per_image': nulls(CaosMetrics), 's2m': nulls(S2mMetrics),
                   'relis': dict(_NO_RELIS)}}


def score_metrics(source: ScoreSource, *, track: str | None, workers: int = 1,
                  threshold: float | None = None, compat: bool = True,
                  progress: Progress | None = None, keep_going: bool = False,
                  ray: str | None = None) -> ScoreMetrics:
    """
    Compute all metrics of a source of score maps.

    Parameters
    ----------
    source
        The frames; read two or three times. With several workers it is pickled.
    track
        ``'anomaly'`` or ``'obstacle'``: the component sizes. None: no component metrics.
    workers
        Processes, this one among them; no more than there are frames. The others are spawned: a
        script that calls this with more than one needs the usual ``if __name__ == '__main__'``.
    threshold
        Score threshold of the component metrics; None takes the data set's best-F1 threshold.
    compat
        Compute the figures of the reference codes too.
    progress
        Called with frame readings done and to do.
    keep_going
        Leave out frames that are not usable and list them in ``skipped``, instead of failing.
    ray
        Address of a Ray cluster (``'auto'``, ``'ray://HOST:10001'``, ``'local'`` for one on this
        machine) that runs the passes in place of ``workers``; the source must be readable there.

    Raises
    ------
    UserError
        Listing every unusable frame with its remedy, unless ``keep_going`` and one is usable.
    ValueError
        For an unknown track or a number of workers below 1.

    """
    if track is not None:
        find_track(track)
    if workers < 1:
        raise ValueError(f'workers must be at least 1, got {workers}')
    names = list(source.frame_ids)
    counter = _Counter(progress, len(names) * (2 + (track is not None)))
    with _start(min(workers, max(1, len(names))), ray) as run:
        scan = run(_Scan(), source, list(enumerate(names)), counter)
        problems = [*getattr(source, 'problems', ()),
                    *(scan.problems[index] for index in sorted(scan.problems))]
        frames = [(index, name) for index, name in enumerate(names)
                  if index not in scan.problems]
        _report(problems, len(frames), keep_going)
        count = run(_Count(scan, compat), source, frames, counter)
        curve = PixelCurve.from_counts(scan.positives, count.negatives)
        pixel = PixelMetrics.of(curve)
        smiyc = count.smiyc.result()
        find = _Find(track, pixel.best_f1_threshold if threshold is None else threshold,
                     smiyc.best_f1_threshold if compat else None)
        if track is not None:
            find = run(find, source, frames, counter)
    canonical, smiyc_components = find.result(pixel.reason)
    return ScoreMetrics(
        pixel, canonical,
        CompatMetrics(smiyc, smiyc_components, count.caos.result(), count.s2m.result())
        if compat else None,
        tuple(count.rows[index] for index in sorted(count.rows)), _curves(curve, count),
        tuple(problems))


def _report(problems: list[str], usable: int, keep_going: bool) -> None:
    if usable and (keep_going or not problems):
        return
    if not problems:
        raise UserError('there is no frame to score; give at least one score map and mask')
    lines = ''.join(f'\n  {problem}' for problem in problems)
    remedy = '' if keep_going else '\nCorrect them, or use --keep-going to score the others.'
    raise UserError(f'{len(problems)} problems, {usable} usable frames:{lines}{remedy}')


class _Scan:
    """Pass 1: problems, the anomalous pixels' scores, the range of the scores."""

    def __init__(self) -> None:
        self.problems: dict[int, str] = {}
        self.positives = PositiveScores()
        self.full_range = (np.inf, -np.inf)  # of all pixels, void included
        self.valid_range = (np.inf, -np.inf)

    def update(self, index: int, frame: ScoredFrame) -> None:
        check_frame(frame.scores, frame.mask, frame.frame_id)
        self.positives.update(frame.scores[frame.mask == 1])
        self.full_range = _widen(self.full_range, frame.scores)
        self.valid_range = _widen(self.valid_range, frame.scores[frame.mask < 2])

    def merge(self, other: '_Scan') -> None:
        self.problems |= other.problems
        self.positives.merge(other.positives)
        self.full_range = _join_ranges(self.full_range, other.full_range)
        self.valid_range = _join_ranges(self.valid_range, other.valid_range)


def _widen(low_high: tuple[float, float], scores: npt.NDArray[Any]) -> tuple[float, float]:
    if not scores.size:
        return low_high
    return _join_ranges(low_high, (float(scores.min()), float(scores.max())))


def _join_ranges(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    return min(first[0], second[0]), max(first[1], second[1])


class _Count:
    """Pass 2: everything that one frame at a time gives."""

    def __init__(self, scan: _Scan, compat: bool) -> None:
        self.compat = compat
        self.negatives = NegativeCounts(scan.positives.result()[0])
        low, high = scan.valid_range if scan.valid_range[0] < np.inf else (0.0, 1.0)
        if low == high:
            low, high = low - 0.5, high + 0.5
        self.edges = np.linspace(low, high, HISTOGRAM_BINS + 1)
        self.histogram_positives = np.zeros(self.edges.size - 1, np.int64)
        self.histogram_negatives = np.zeros(self.edges.size - 1, np.int64)
        self.smiyc = SmiycPixel()
        self.caos = CaosPerImage()
        self.s2m = S2mCounts(*scan.full_range)
        self.rows: dict[int, FrameRow] = {}

    def update(self, index: int, frame: ScoredFrame) -> None:
        split = split_checked(frame.scores, frame.mask)
        self.negatives.update(split.negatives)
        curve = PixelCurve.of_sorted(split.positives, split.negatives)
        own = PixelMetrics.of(curve)
        self.rows[index] = FrameRow(
            frame.frame_id, own.average_precision, own.fpr95, own.auroc, own.best_f1,
            own.best_f1_threshold, own.pixels, own.positives)
        self.histogram_positives = (
            self.histogram_positives + count_sorted(split.positives, self.edges))
        self.histogram_negatives = (
            self.histogram_negatives + count_sorted(split.negatives, self.edges))
        if self.compat:
            self.smiyc.update(index, split)
            self.caos.update(split, curve)
            self.s2m.update(index, split)

    def merge(self, other: '_Count') -> None:
        self.negatives.merge(other.negatives)
        self.histogram_positives = self.histogram_positives + other.histogram_positives
        self.histogram_negatives = self.histogram_negatives + other.histogram_negatives
        self.smiyc.merge(other.smiyc)
        self.caos.merge(other.caos)
        self.s2m.merge(other.s2m)
        self.rows |= other.rows


class _Find:
    """Pass 3: components at the canonical and at SMIYC's threshold."""

    def __init__(self, track: str | None, threshold: float | None,
                 smiyc_threshold: float | None) -> None:
        self.track = track
        self.canonical = self.smiyc = None
        if track is not None and threshold is not None:
            self.canonical = ComponentCounts(track, threshold)
        if track is not None and smiyc_threshold is not None:
            self.smiyc = ComponentCounts(track, smiyc_threshold, smiyc=True)

    def update(self, index: int, frame: ScoredFrame) -> None:
        for counts in (self.canonical, self.smiyc):
            if counts is not None:
                counts.update(frame.scores, frame.mask)

    def merge(self, other: '_Find') -> None:
        for mine, theirs in (self.canonical, other.canonical), (self.smiyc, other.smiyc):
            if mine is not None and theirs is not None:
                mine.merge(theirs)

    def result(self, reason: str | None) -> tuple[ComponentMetrics, ComponentMetrics]:
        why = NO_TRACK if self.track is None else f'no threshold: {reason}'
        canonical, smiyc = (
            counts.result() if counts is not None else ComponentMetrics.not_applicable(why)
            for counts in (self.canonical, self.smiyc))
        return canonical, smiyc


def _curves(curve: PixelCurve, count: _Count) -> ScoreCurves:
    keep = np.empty(0, np.int64)
    if not curve.undefined:
        recall, fpr = curve.recall, curve.fpr
        even, small = np.linspace(0, 1, CURVE_POINTS // 2 - 1), np.logspace(-6, 0, 500)
        keep = np.unique(np.concatenate([
            [0, recall.size - 1], np.searchsorted(recall, even),
            np.searchsorted(fpr, even[::2]), np.searchsorted(fpr, small)]))
        keep = keep[keep < recall.size]
    thin = PixelCurve(curve.thresholds[keep], curve.tp[keep], curve.fp[keep],
                      curve.fp_above[keep], curve.positives, curve.negatives)
    empty = np.empty(0)
    return ScoreCurves(
        thin.thresholds.astype(np.float64), thin.recall if keep.size else empty,
        thin.precision if keep.size else empty, thin.fpr if keep.size else empty,
        count.edges, count.histogram_positives, count.histogram_negatives)


# Running a pass: here, on processes, or on Ray.

_Pass = TypeVar('_Pass', _Scan, _Count, _Find)
_Frames = list[tuple[int, str]]


class _Counter:
    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.done, self.total = progress, 0, total

    def add(self, frames: int) -> None:
        self.done += frames
        if self.progress is not None:
            self.progress(self.done, self.total)


class _Run(Protocol):
    def __call__(self, task: _Pass, source: ScoreSource, frames: _Frames,
                 counter: _Counter) -> _Pass: ...


def _accumulate(task: _Pass, source: ScoreSource, frames: Iterable[tuple[int, str]],
                counter: _Counter | None = None) -> _Pass:
    """Feed frames to an accumulator; pass 1 notes problems, the others raise them."""
    for index, name in frames:
        try:
            task.update(index, source.load(name))
        except UserError as error:
            if not isinstance(task, _Scan):
                raise
            task.problems[index] = str(error)
        if counter is not None:
            counter.add(1)
    return task


def _join(merged: _Pass | None, part: _Pass) -> _Pass:
    """Merge into the first part, never into the task: others may still be sent it."""
    if merged is None:
        return part
    merged.merge(part)
    return merged


def _chunks(frames: _Frames, workers: int) -> list[_Frames]:
    """Split into runs of frames, eight for each worker, so that slow ones even out."""
    size = max(1, -(-len(frames) // (8 * workers)))
    return [frames[start:start + size] for start in range(0, len(frames), size)]


@contextmanager
def _start(workers: int, ray: str | None) -> Iterator[_Run]:
    """Give a function that runs a pass over frames and returns the merged accumulator."""
    if ray is not None:
        with _ray(ray) as run:
            yield run
    elif workers == 1:
        yield _accumulate
    else:
        threads = cv2.getNumThreads()
        cv2.setNumThreads(1)
        try:
            with _processes(workers) as run:
                yield run
        finally:
            cv2.setNumThreads(threads)


@contextmanager
def _processes(workers: int) -> Iterator[_Run]:
    """
    Run on this process and ``workers - 1`` spawned ones, so that it works while they start.

    Each takes the next frame that none has begun, and sends its accumulator once a pass.
    """
    context = multiprocessing.get_context('spawn')
    begun = context.Value('q', 0)  # frames of this pass that somebody has begun
    with ProcessPoolExecutor(workers - 1, context, _start_process, (begun,)) as pool:
        def run(task: _Pass, source: ScoreSource, frames: _Frames, counter: _Counter) -> _Pass:
            begun.value = counted = 0
            try:
                with _interrupts_held():
                    others = [pool.submit(_accumulate_next, task, source, frames)
                              for _ in range(workers - 1)]
                merged = deepcopy(task)
                for frame in _next_frames(frames, begun):
                    _accumulate(merged, source, [frame])
                    now = min(begun.value, len(frames))
                    counter.add(now - counted)
                    counted = now
                for other in others:
                    merged.merge(other.result())
            except BrokenProcessPool as error:
                raise UserError('a worker process died, most often for lack of memory; run again '
                                'with fewer --workers') from error
            finally:
                begun.value = len(frames)  # after an error: let the others end
            counter.add(len(frames) - counted)
            return merged
        yield run


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """
    Hold Ctrl-C back from this thread until the block ends.

    Processes that are started in the block never get it: a terminal sends it to them too, and
    each would print a traceback, even out of its imports.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_begun: Any = None  # of a spawned process


def _start_process(begun: Any) -> None:
    global _begun
    _begun = begun
    cv2.setNumThreads(1)


def _accumulate_next(task: _Pass, source: ScoreSource, frames: _Frames) -> _Pass:
    """Feed an accumulator the frames that no other process has begun."""
    return _accumulate(task, source, _next_frames(frames, _begun))


def _next_frames(frames: _Frames, begun: Any) -> Iterator[tuple[int, str]]:
    while True:
        with begun.get_lock():
            place = begun.value
            begun.value = place + 1
        if place >= len(frames):
            return
        yield frames[place]


def _reach(address: str) -> None:
    """Knock at HOST:PORT of a Ray address: Ray itself would try for many minutes."""
    host, _, port = address.removeprefix('ray://').rpartition(':')
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise UserError(f'no Ray cluster at {address}: {error}. Start one with ray start --head '
                        'and give its address, or leave --ray out.') from error


@contextmanager
def _ray(address: str) -> Iterator[_Run]:
    try:
        import ray
    except ImportError as error:
        raise UserError(f'ray is not installed: {how_to_install("ray")}') from error
    own = not ray.is_initialized()
    if own:
        os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')
        _reach(address)
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(f'no Ray cluster at {address}: {error}') from error
    remote = ray.remote(_accumulate)

    def on_ray(task: _Pass, source: ScoreSource, frames: _Frames, counter: _Counter) -> _Pass:
        workers = max(1, int(ray.cluster_resources().get('CPU', 1)))
        shared_task, shared_source = ray.put(task), ray.put(source)
        waiting = {remote.remote(shared_task, shared_source, chunk): len(chunk)
                   for chunk in _chunks(frames, workers)}
        merged = None
        while waiting:
            for done in ray.wait(list(waiting))[0]:
                try:
                    merged = _join(merged, ray.get(done))
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from error
                except ray.exceptions.RayError as error:
                    raise UserError(f'Ray lost a task: {error}. Look at the log of the cluster, '
                                    'then run again.') from error
                counter.add(waiting.pop(done))
        return merged or task

    try:
        yield on_ray
    finally:
        if own:
            ray.shutdown()
