# SPDX-License-Identifier: Apache-2.0
"""
From answers and ground truth to metrics.json, per_frame.csv and report.html.

``Recorder`` takes one answer after another, wherever it comes from (the pipeline on a data set or
a bag, or the live node), stores scores and masks as files, and computes the metrics from those
files at the end; the same frames give the same figures whichever way they came.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
import csv
from dataclasses import asdict, dataclass, field
import json
import logging
import os
from pathlib import Path
import platform
import shlex
import shutil
import sys
import time
from typing import Any

from anomaly_seg_ros import __version__
from anomaly_seg_ros.backends import open_backend
from anomaly_seg_ros.classes import label_ids
from anomaly_seg_ros.datasets.frame import Frame
from anomaly_seg_ros.datasets.source import FrameSource
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.extras import how_to_install
from anomaly_seg_ros.files import atomic_write, atomic_write_text
from anomaly_seg_ros.metrics.calibration import (
    Calibration, CalibrationMetrics, IMAGE_STATISTICS, image_statistics)
from anomaly_seg_ros.metrics.segmentation import ConfusionMatrix
from anomaly_seg_ros.metrics.stored import (
    FrameRow, null_sections, score_metrics, ScoreCurves, StoredScores)
from anomaly_seg_ros.model_file import load_model_file, ModelCard, ModelFile
from anomaly_seg_ros.obstacles import ObstacleSettings, settings_for
from anomaly_seg_ros.pipeline import BadOutput, Pipeline, STAGES
import cv2
import numpy as np

LOG = logging.getLogger(__name__)

PER_FRAME_COLUMNS = (
    'frame_id', 'width', 'height', 'pixels', 'positives', 'average_precision', 'fpr95', 'auroc',
    'best_f1', *(f'score_{name}' for name in IMAGE_STATISTICS), 'obstacles',
    *(f'{stage}_ms' for stage in STAGES), 'end_to_end_ms')

NO_LABELS = 'no frame has ground-truth labels'

# The bag of replay's answers, in a folder of results.
RESULT_BAG = 'result_bag'

_RESULTS = ('metrics.json', 'per_frame.csv', 'report.html')

# In a folder of results: what lies there for the time of a run, or to be kept.
_FOLDERS = ('scores', 'masks', 'scores_unlabelled', '.thumbnails')
_RESULT_BAGS = (RESULT_BAG, f'{RESULT_BAG}.incomplete')
_MARK = '.anomaly_seg_run'
#: Mark -> sub-folders that are this program's where the mark lies: a new run may clear them.
RUN_FOLDERS = {_MARK: (*_FOLDERS, *_RESULT_BAGS)}

_PICTURE_WIDTH = 640

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Answer:
    """
    What one frame gave, at the camera's resolution.

    Attributes
    ----------
    labels, anomaly, mask
        As in ``Detection``.
    obstacles
        Number of obstacles in ``mask``.
    latency_ms
        Milliseconds by stage; the key ``end_to_end`` holds the whole.

    """

    labels: np.ndarray
    anomaly: np.ndarray
    mask: np.ndarray
    obstacles: int
    latency_ms: Mapping[str, float]


@dataclass
class RunInfo:
    """
    What was run, for the ``run`` part of metrics.json.

    Attributes
    ----------
    model
        The model file.
    data
        Name and place of the frames.
    backend
        What the backend says of itself.
    settings
        Threshold, minimum area, region.
    extra
        Anything else worth keeping.

    """

    model: ModelFile
    data: str
    backend: Mapping[str, str]
    settings: ObstacleSettings
    extra: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return model, card, data, command, versions and machine."""
        return {
            'model': str(self.model.path), 'model_sha256': self.model.sha256,
            'card': json.loads(self.model.card.to_json()), 'data': self.data,
            'backend': dict(self.backend), 'settings': asdict(self.settings),
            'command': [Path(sys.argv[0]).name, *sys.argv[1:]],
            'versions': versions(), 'machine': machine(),
            'finished': time.strftime('%Y-%m-%dT%H:%M:%S%z'), **self.extra}


class Recorder:
    """
    Keeps what each frame gave and turns it into result files.

    Scores (float32 ``.npy``), masks and thumbnails go to disk as they come, so memory does not
    grow with the number of frames and a run that breaks off loses nothing: the scores stay under
    the output folder, and ``anomaly-seg metrics`` computes their metrics. An older run's results
    are removed when the first frame is recorded, so a run that never gets that far costs nothing.
    """

    def __init__(self, output: Path | str, card: ModelCard, *, save_scores: bool = False,
                 track: str = 'anomaly', class_set: str | None = None) -> None:
        """
        Make sure that ``output`` can take the results.

        Parameters
        ----------
        output, card
            Where the results go, and the card of the model that answers.
        save_scores
            Keep score maps and masks as files.
        track
            Component metrics of the ``anomaly`` or ``obstacle`` track.
        class_set
            Whose ids the frames' labels are, as ``FrameSource.class_set``.

        Raises
        ------
        UserError
            If the folder cannot be written, or has sub-folders that no run of this program made.

        """
        self.output = Path(output)
        self._card = card
        self._save_scores = save_scores
        self._track = track
        self._folders = tuple(self.output / name for name in _FOLDERS)
        self._scores, self._masks, self._unlabelled, self._thumbnails = self._folders
        self._result_bags = tuple(self.output / name for name in _RESULT_BAGS)
        self._rows: list[dict[str, Any]] = []
        self._latency: dict[str, list[float]] = {}
        self._confusion = ConfusionMatrix(card.classes)
        self._calibration = Calibration()
        # Why a section stays empty.
        self._no_segmentation = self._no_calibration = ''
        if card.score != 'msp':  # 1 - MSP is the confidence; no other score is a probability
            self._no_calibration = (f'needs the confidence of the labels, which {card.score} does '
                                    'not give; export the model with --score msp')
        try:
            self._label_ids = label_ids(card.classes, class_set)
        except UserError as error:
            self._no_segmentation = self._no_calibration = str(error)
        self._labelled = 0
        self._scored: list[str] = []
        claim(self.output, RUN_FOLDERS)

    @property
    def frames(self) -> int:
        """Number of frames recorded."""
        return len(self._rows)

    def add(self, frame: Frame, answer: Answer) -> None:
        """
        Record the answer to one frame.

        Raises
        ------
        UserError
            If answer and frame do not fit or a file cannot be written; nothing of the frame is
            recorded then.

        """
        height, width = frame.image_rgb.shape[:2]
        for what, array in (('score', answer.anomaly), ('label image', answer.labels)):
            if array.shape != (height, width):
                raise UserError(f'frame {frame.frame_id}: {what} of {array.shape}, image of '
                                f'{(height, width)}; the answer does not belong to this frame')
        if frame.anomaly_mask is not None and frame.anomaly_mask.shape != (height, width):
            raise UserError(f'frame {frame.frame_id}: mask of {frame.anomaly_mask.shape}, '
                            f'image of {(height, width)}')
        labels = confusion = None
        if frame.labels is not None and not self._no_segmentation:
            labels = self._label_ids[frame.labels]
            confusion = ConfusionMatrix(self._card.classes)
            confusion.update(answer.labels, labels, frame.frame_id)
        if not self._rows:
            self._clear()
        name = file_name(frame.frame_id)
        self._save(name, frame, answer)
        if frame.anomaly_mask is not None:
            self._scored.append(name)
        if labels is not None and confusion is not None:
            self._confusion.merge(confusion)
            self._add_confidence(frame, answer, labels)
        self._labelled += frame.labels is not None
        self._rows.append({
            'frame_id': frame.frame_id, 'width': width, 'height': height,
            **{f'score_{key}': value for key, value in image_statistics(answer.anomaly).items()},
            'obstacles': answer.obstacles,
            **{f'{stage}_ms': value for stage, value in answer.latency_ms.items()
               if f'{stage}_ms' in PER_FRAME_COLUMNS}})
        for stage, value in answer.latency_ms.items():
            self._latency.setdefault(stage, []).append(float(value))

    def finish(self, run: RunInfo, *, dropped: int = 0, title: str = '', workers: int = 1,
               ray: str | None = None, progress: Progress | None = None) -> dict[str, Any]:
        """
        Compute the metrics, write the result files and return metrics.json's content.

        Raises
        ------
        UserError
            If no frame was recorded or a file cannot be written; the scores are kept then.

        """
        if not self._rows:
            reasons = ''.join(f'\n  {problem}' for problem in run.extra.get('problems', ()))
            raise UserError(f'{run.data}: no frame was answered, so there is nothing to report'
                            f'{reasons}')
        with self.keeping():
            return self._finish(run, dropped, title or run.data, workers, ray, progress)

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Add to whatever ends the block, Ctrl-C too, where the scores so far are."""
        try:
            yield
        except UserError as error:
            raise UserError(f'{error}{self.kept()}') from error
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(self.kept()) from error

    def kept(self) -> str:
        """Return a sentence for error messages on where the scores so far are, or nothing."""
        if not self._scored:
            return ''
        return (f'\nThe scores of the {len(self._scored)} frames so far are kept; their metrics: '
                f'anomaly-seg metrics {shlex.quote(str(self._scores))} '
                f'{shlex.quote(str(self._masks))} --track {self._track} --output FOLDER')

    def _add_confidence(self, frame: Frame, answer: Answer, labels: np.ndarray) -> None:
        if self._no_calibration:
            return
        confidence = 1.0 - answer.anomaly
        low, high = float(confidence.min()), float(confidence.max())
        if not 0 <= low <= high <= 1:
            # The MSP of a mask network sums masks, which overlap (docs/scores.md).
            self._no_calibration = (f'needs probabilities; 1 - score is {low:.3g} to {high:.3g} '
                                    f'in frame {frame.frame_id}')
            return
        self._calibration.update(self._labelled, confidence, answer.labels, labels,
                                 frame.frame_id)

    def _save(self, name: str, frame: Frame, answer: Answer) -> None:
        """Write the frame's files, all or none."""
        try:
            if frame.anomaly_mask is not None:
                _save_array(self._scores / f'{name}.npy', answer.anomaly)
                _save_array(self._masks / f'{name}.npy', frame.anomaly_mask)
            elif self._save_scores:
                _save_array(self._unlabelled / f'{name}.npy', answer.anomaly)
            self._keep_thumbnail(name, frame, answer)
        except BaseException:
            for folder in self._folders:
                for path in (folder / f'{name}.npy', folder / f'{name}.npz'):
                    with suppress(OSError):
                        path.unlink()
            raise

    def _clear(self) -> None:
        """Remove an older run's results."""
        try:
            for name in _RESULTS:
                (self.output / name).unlink(missing_ok=True)
            for folder in (*self._folders, *self._result_bags):
                if folder.exists():
                    shutil.rmtree(folder)
            for folder in self._folders:
                folder.mkdir()
        except OSError as error:
            raise _not_writable(self.output, error) from error

    def _finish(self, run: RunInfo, dropped: int, title: str, workers: int, ray: str | None,
                progress: Progress | None) -> dict[str, Any]:
        metrics, curves = self._score_metrics(workers, ray, progress)
        metrics['segmentation'] = self._segmentation()
        metrics['calibration'], reliability = self._calibrate()
        metrics['latency_ms'] = {
            **{stage: percentiles(values) for stage, values in self._latency.items()},
            'frames': len(self._rows), 'dropped': dropped}
        metrics['run'] = {
            **run.as_json(), 'frames': len(self._rows), 'frames_with_mask': len(self._scored),
            'frames_with_labels': self._labelled}
        write_per_frame(self.output / 'per_frame.csv', self._rows)
        atomic_write_text(self.output / 'metrics.json', json.dumps(metrics, indent=1) + '\n')
        if can_report():
            self._write_report(metrics, curves, title, reliability)
        if not self._save_scores:
            shutil.rmtree(self._scores)
            shutil.rmtree(self._masks)
        shutil.rmtree(self._thumbnails)
        for folder in (self._scores, self._masks, self._unlabelled):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        return metrics

    def _score_metrics(self, workers: int, ray: str | None, progress: Progress | None
                       ) -> tuple[dict[str, Any], ScoreCurves | None]:
        if not self._scored:
            return null_sections('no frame has an anomaly mask'), None
        result = score_metrics(
            StoredScores(self._scores, self._masks), track=self._track, workers=workers, ray=ray,
            progress=None if progress is None else
            (lambda done, total: progress('metrics', done, total)))
        own = {row.frame_id: _frame_columns(row) for row in result.per_frame}
        for row in self._rows:
            row.update(own.get(file_name(row['frame_id']), {}))
        return result.as_json(), result.curves

    def _segmentation(self) -> dict[str, Any]:
        reason = self._no_segmentation if self._labelled else NO_LABELS
        if reason:
            return {'miou': None, 'accuracy': None, 'iou_by_class': None, 'reason': reason}
        return asdict(self._confusion.result())

    def _calibrate(self) -> tuple[dict[str, Any], CalibrationMetrics | None]:
        reason = self._no_calibration if self._labelled else NO_LABELS
        if reason:
            return {'ece': None, 'adaptive_ece': None, 'ks': None, 'prr': None,
                    'reason': reason}, None
        result = self._calibration.result()
        return asdict(result), result

    def _keep_thumbnail(self, name: str, frame: Frame, answer: Answer) -> None:
        height, width = frame.image_rgb.shape[:2]
        size = (min(width, _PICTURE_WIDTH), max(1, height * min(width, _PICTURE_WIDTH) // width))

        def small(image: np.ndarray, interpolation: int) -> np.ndarray:
            return cv2.resize(image, size, interpolation=interpolation)

        arrays = {'image': small(frame.image_rgb, cv2.INTER_AREA),
                  'labels': small(answer.labels, cv2.INTER_NEAREST),
                  'anomaly': small(answer.anomaly, cv2.INTER_AREA),
                  'mask': small(answer.mask, cv2.INTER_NEAREST)}
        if frame.anomaly_mask is not None:
            truth = small(frame.anomaly_mask, cv2.INTER_NEAREST)
            # However small, an anomaly shows in the picture.
            truth[small((frame.anomaly_mask == 1).view(np.uint8) * 255, cv2.INTER_AREA) > 0] = 1
            arrays['truth'] = truth
        with atomic_write(self._thumbnails / f'{name}.npz') as path, open(path, 'wb') as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]

    def _write_report(self, metrics: dict[str, Any], curves: ScoreCurves | None, title: str,
                      calibration: CalibrationMetrics | None) -> None:
        from anomaly_seg_ros.report import (
            choose_frames, frame_caption, FramePicture, Reliability, ReportData, write_report)
        from anomaly_seg_ros.visualize import anomaly_u8, heat_map, overlay

        pictures = []
        for kind, row in choose_frames(self._rows):
            with np.load(self._thumbnails / f'{file_name(row["frame_id"])}.npz') as data:
                kept = dict(data)
            pictures.append(FramePicture(
                frame_id=row['frame_id'], kind=kind, caption=frame_caption(row),
                image_rgb=kept['image'],
                overlay_rgb=overlay(kept['image'], kept['labels'], kept['anomaly'], kept['mask'],
                                    self._card.palette, self._card.score_range),
                heat_rgb=heat_map(anomaly_u8(kept['anomaly'], self._card.score_range)),
                mask=kept['mask'], ground_truth=kept.get('truth')))
        reliability = None
        if calibration is not None:
            bins = [each for each in calibration.reliability if each.accuracy is not None]
            reliability = Reliability(
                [each.confidence or 0.0 for each in bins], [each.accuracy or 0.0 for each in bins],
                [each.pixels / calibration.pixels for each in bins])
        write_report(self.output / 'report.html', ReportData(
            title=title, metrics=metrics, curves=curves, frames=pictures,
            latency_ms=self._latency, reliability=reliability))


def claim(folder: Path, owned: Mapping[str, Sequence[str]]) -> None:
    """
    Make sure that a run may write to ``folder`` and clear its sub-folders; leave the marks.

    Parameters
    ----------
    folder
        Folder for the results; made where it is missing.
    owned
        Mark -> sub-folders that only a run which leaves the mark writes.

    Raises
    ------
    UserError
        If there is such a sub-folder without its mark, and nothing is changed then; or if the
        folder cannot be written.

    """
    for mark, names in owned.items():
        strange = [] if (folder / mark).exists() else [
            folder / name for name in names if (folder / name).exists()]
        if strange:
            raise UserError(f'{strange[0]}: is there already and not from a run of this program, '
                            'or of an older version. Choose another output folder; this one '
                            'would be overwritten.')
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for mark in owned:
            (folder / mark).touch()
    except OSError as error:
        raise _not_writable(folder, error) from error


def _is_of_a_model(metrics: Path) -> bool:
    """Tell whether these are the results of a run of a model, not of stored scores."""
    try:
        return 'model' in json.loads(metrics.read_text(encoding='utf-8'))['run']
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _not_writable(folder: Path, error: OSError) -> UserError:
    return UserError(f'{error.filename or folder}: cannot be written ({error.strerror}). '
                     'Choose another output folder.')


def evaluate(model: Path | str, source: FrameSource, output: Path | str, *,
             backend: str = 'cpu', threads: int = 0, settings: ObstacleSettings | None = None,
             limit: int | None = None, save_scores: bool = False, keep_going: bool = False,
             track: str | None = None, workers: int = 1, ray: str | None = None,
             progress: Progress | None = None) -> dict[str, Any]:
    """
    Run a model over a data set and write metrics.json, per_frame.csv and report.html.

    Parameters
    ----------
    model
        Path of the model file.
    source
        A data set of ``anomaly_seg_ros.datasets``.
    output
        Folder for the results.
    backend, threads
        Which backend, and its threads (0: as many as there are cores).
    settings
        Threshold, minimum area and region; default: the card's threshold.
    limit
        Take only this many frames, from the first.
    save_scores
        Keep the score maps and masks in ``scores`` and ``masks``, and the score maps of frames
        without a mask in ``scores_unlabelled``.
    keep_going
        Leave out frames that cannot be read or answered, and report the rest; without it the
        first problem ends the run.
    track
        Component metrics of the ``anomaly`` or ``obstacle`` track; default: the data set's own.
    workers, ray
        Processes that compute the metrics, or the address of a Ray cluster that does; its machines
        must see ``output`` under the same path.
    progress
        Called with (what, done, total).

    Returns
    -------
    dict
        The content of metrics.json.

    Raises
    ------
    UserError
        If the model or the data cannot be read, the settings do not fit the model, or, without
        ``keep_going``, a frame cannot be answered.

    """
    model_file = load_model_file(model)
    settings = settings_for(model_file.card, settings)
    # Under keep_going each bad frame is met, and named, when its turn comes.
    problems = list(source.problems) if keep_going else source.check(limit)
    if problems and not keep_going:
        lines = ''.join(f'\n  {problem}' for problem in problems)
        raise UserError(f'{source.root}: {len(problems)} of the files of {source.name} cannot be '
                        f'scored:{lines}\nMend them, or leave those frames out with '
                        '--keep-going.')
    there = source.shortfall()
    frame_ids = list(source.frame_ids)[:limit]
    recorder = Recorder(output, model_file.card, save_scores=save_scores,
                        track=track or source.track, class_set=source.class_set)
    with open_backend(model_file, backend, threads=threads) as device, recorder.keeping():
        pipeline = Pipeline(device, settings)
        warm = False
        for index, frame_id in enumerate(frame_ids):
            try:
                frame = source[index]
                if not warm:
                    pipeline.warm_up(frame.image_rgb.shape[:2])
                    warm = True
                recorder.add(frame, answer_offline(pipeline, frame.image_rgb))
            except (UserError, BadOutput) as error:
                if not keep_going:
                    raise UserError(f'frame {frame_id}: {error}') from error
                problems.append(f'frame {frame_id}: {error}')
            if progress is not None:
                progress('frames', index + 1, len(frame_ids))
        run = RunInfo(model_file, f'{source.name} in {source.root}',
                      device.describe(), pipeline.settings,
                      {'split': source.split,
                       **({'incomplete': f'{there} frames'} if there else {}),
                       **({'problems': problems} if problems else {})})
    return recorder.finish(run, workers=workers, ray=ray, title=source.name, progress=progress)


def answer_offline(pipeline: Pipeline, image: np.ndarray, channel_order: str = 'rgb',
                   size_hw: tuple[int, int] | None = None) -> Answer:
    """Run the pipeline on an image; arguments as there."""
    detection = pipeline(image, channel_order, size_hw=size_hw)
    return Answer(detection.labels, detection.anomaly, detection.mask, len(detection.obstacles),
                  {**detection.stages_ms, 'end_to_end': sum(detection.stages_ms.values())})


def metrics_of_stored(scores: Path | str, masks: Path | str, output: Path | str, *,
                      track: str | None = 'anomaly', workers: int = 1, keep_going: bool = False,
                      ray: str | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """
    Compute the metrics of stored score maps and write them as ``evaluate`` does.

    Parameters
    ----------
    scores, masks
        Folders of ``<name>.npy`` and ``<name>.png`` or ``.npy``, see ``StoredScores``.
    output
        Folder for metrics.json, per_frame.csv and report.html.
    track, workers, keep_going, ray
        As in ``score_metrics``.
    progress
        Called with (what, done, total).

    Returns
    -------
    dict
        The content of metrics.json.

    Raises
    ------
    UserError
        If ``output`` holds the results of a run of a model, which know more, or as
        ``score_metrics``.

    """
    output = Path(output)
    if _is_of_a_model(output / 'metrics.json'):
        raise UserError(f'{output / "metrics.json"}: is of a run that knows labels and latencies '
                        'too, and would be overwritten. Choose another output folder.')
    result = score_metrics(StoredScores(scores, masks), track=track, workers=workers,
                           keep_going=keep_going, ray=ray,
                           progress=None if progress is None else
                           (lambda done, total: progress('metrics', done, total)))
    metrics = result.as_json()
    metrics['segmentation'] = {'miou': None, 'accuracy': None, 'iou_by_class': None,
                               'reason': 'score maps hold no labels'}
    metrics['calibration'] = {'ece': None, 'adaptive_ece': None, 'ks': None, 'prr': None,
                              'reason': 'score maps hold no labels'}
    metrics['latency_ms'] = {'end_to_end': None, 'frames': None, 'dropped': None,
                             'reason': 'score maps hold no times'}
    metrics['run'] = {
        'data': f'{scores} with {masks}', 'frames': len(result.per_frame),
        'frames_with_mask': len(result.per_frame), 'frames_with_labels': 0,
        'command': [Path(sys.argv[0]).name, *sys.argv[1:]],
        'versions': versions(), 'machine': machine(), 'problems': list(result.skipped),
        'finished': time.strftime('%Y-%m-%dT%H:%M:%S%z')}
    write_per_frame(output / 'per_frame.csv', [
        {'frame_id': row.frame_id, **_frame_columns(row)} for row in result.per_frame])
    atomic_write_text(output / 'metrics.json', json.dumps(metrics, indent=1) + '\n')
    if can_report():
        from anomaly_seg_ros.report import ReportData, write_report
        write_report(output / 'report.html', ReportData(
            title='Stored score maps', metrics=metrics, curves=result.curves))
    return metrics


def can_report() -> bool:
    """Return whether the extra ``report`` is installed; warn how to get it where it is not."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        LOG.warning('no report.html: %s is not installed; %s. metrics.json and per_frame.csv are '
                    'complete.', error.name, how_to_install('report'))
        return False
    return True


def percentiles(values_ms: Sequence[float]) -> dict[str, float]:
    """Return p50, p95, p99 and max of latencies in milliseconds."""
    p50, p95, p99 = (float(v) for v in np.percentile(values_ms, (50, 95, 99)))
    return {'p50': p50, 'p95': p95, 'p99': p99, 'max': float(max(values_ms))}


def write_per_frame(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """
    Write per_frame.csv; a figure that does not apply is empty.

    Bytes of a frame's name that are no text are escaped, as in the other results.
    """
    with atomic_write(path) as temporary, open(
            temporary, 'w', newline='', encoding='utf-8', errors='backslashreplace') as stream:
        writer = csv.DictWriter(stream, PER_FRAME_COLUMNS, restval='', extrasaction='raise')
        writer.writeheader()
        writer.writerows({k: '' if v is None else v for k, v in row.items()} for row in rows)


def _frame_columns(row: FrameRow) -> dict[str, Any]:
    return {'pixels': row.pixels, 'positives': row.positives,
            'average_precision': row.average_precision, 'fpr95': row.fpr95, 'auroc': row.auroc,
            'best_f1': row.best_f1}


def file_name(frame_id: str) -> str:
    """Return a file name for a frame id: it may hold slashes, or begin as hidden files do."""
    name = frame_id.replace('%', '%25').replace('/', '%2F')
    return f'%2E{name[1:]}' if name.startswith('.') else name


def versions() -> dict[str, str]:
    """Return the versions of the libraries that decide the figures."""
    import onnxruntime
    return {'anomaly_seg_ros': __version__, 'python': platform.python_version(),
            'numpy': np.__version__, 'opencv': cv2.__version__,
            'onnxruntime': onnxruntime.__version__}


def machine() -> dict[str, Any]:
    """Return processor, cores and system."""
    name = platform.processor()
    cpuinfo = Path('/proc/cpuinfo')
    if cpuinfo.is_file():
        names = [line.split(':', 1)[1].strip() for line in cpuinfo.read_text().splitlines()
                 if line.startswith('model name')]
        name = names[0] if names else name
    return {'processor': name, 'cores': len(os.sched_getaffinity(0)),
            'system': platform.platform()}


def _save_array(path: Path, array: np.ndarray) -> None:
    with atomic_write(path) as temporary, open(temporary, 'wb') as stream:
        np.save(stream, array, allow_pickle=False)
