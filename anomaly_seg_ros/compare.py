# SPDX-License-Identifier: Apache-2.0
"""
Compare runs over the same frames, with paired bootstrap confidence intervals over frames.

Every run is a folder with the metrics.json and per_frame.csv of ``evaluate``, ``replay`` or
``metrics``. The first run is the baseline. Two kinds of statistic have intervals:

* means over frames of the figures in per_frame.csv (AP, FPR95, AUROC, best F1, latency), over the
  frames for which every run has one;
* the pooled AP, FPR95 and AUROC, where every run kept its score maps (``--save-scores``): the
  estimate is the exact figure, the interval comes from counts in bins of score, whose edges are at
  most 2,048 scores of anomalous pixels; with no more of these than that it is exact too.

Frames are drawn with replacement, the same ones for all runs (paired), and the interval is the
percentile interval (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).
Pooled figures without score maps stand without an interval: per-frame figures do not determine
how they vary.
"""

from collections.abc import Mapping, Sequence
import csv
from dataclasses import astuple, dataclass, fields
import io
import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.files import atomic_write_text
from anomaly_seg_ros.metrics.stored import StoredScores
import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]

SCORE_LEVELS = 2048
FEW_FRAMES = 20
_CHUNK = 250  # resamples at a time: bounds the memory of the pooled counts


@dataclass(frozen=True)
class Statistic:
    """
    One figure to compare.

    Attributes
    ----------
    key
        Column of per_frame.csv, or path in metrics.json with dots.
    label
        In words, with the unit.
    kind
        ``pooled`` or ``frame mean``.
    higher_is_better
        Direction.

    """

    key: str
    label: str
    kind: str
    higher_is_better: bool = True


POOLED = (
    Statistic('pixel.average_precision', 'AP', 'pooled'),
    Statistic('pixel.fpr95', 'FPR95', 'pooled', False),
    Statistic('pixel.auroc', 'AUROC', 'pooled'),
    Statistic('pixel.best_f1', 'best F1', 'pooled'),
    Statistic('components.mean_f1', 'component mean F1', 'pooled'),
    Statistic('segmentation.miou', 'mIoU', 'pooled'),
    Statistic('latency_ms.end_to_end.p50', 'latency p50, ms', 'pooled', False),
    Statistic('latency_ms.end_to_end.p99', 'latency p99, ms', 'pooled', False),
)
FRAME_MEANS = (
    Statistic('average_precision', 'AP', 'frame mean'),
    Statistic('fpr95', 'FPR95', 'frame mean', False),
    Statistic('auroc', 'AUROC', 'frame mean'),
    Statistic('best_f1', 'best F1', 'frame mean'),
    Statistic('end_to_end_ms', 'latency, ms', 'frame mean', False),
)


@dataclass(frozen=True)
class Row:
    """
    One statistic of one run, and its difference from the first run's.

    ``low`` and ``high`` bound the confidence interval; ``better`` is the share of resamples in
    which the run beats the first one (ties count half). None where there is no interval.
    """

    statistic: str
    kind: str
    run: str
    value: float
    low: float | None
    high: float | None
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    better: float | None
    frames: int


@dataclass(frozen=True)
class Comparison:
    """
    What ``compare_runs`` found.

    Attributes
    ----------
    runs
        Names, the baseline first.
    frames
        Number of frames compared.
    rows
        By statistic, then by run.
    level, resamples, seed
        Of the bootstrap.
    notes
        What a reader must know: which figures have intervals and why.

    """

    runs: tuple[str, ...]
    frames: int
    rows: tuple[Row, ...]
    level: float
    resamples: int
    seed: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """
    One folder of results.

    Attributes
    ----------
    name, path
        What it is called in tables, and the folder.
    metrics
        The content of metrics.json.
    rows
        Frame id -> columns of per_frame.csv; None where a figure does not apply.

    """

    name: str
    path: Path
    metrics: Mapping[str, Any]
    rows: Mapping[str, Mapping[str, float | None]]


def compare_runs(run_dirs: Sequence[Path | str], *, resamples: int = 10_000, level: float = 0.95,
                 seed: int = 0, common_frames: bool = False) -> Comparison:
    """
    Compare two or more runs over the same frames; the first is the baseline.

    Parameters
    ----------
    run_dirs
        Folders with metrics.json and per_frame.csv.
    resamples
        Bootstrap resamples.
    level
        Of the confidence intervals, between 0 and 1.
    seed
        Equal seeds give equal intervals.
    common_frames
        Compare the frames that all runs have, where they differ; without it that is an error.

    Raises
    ------
    UserError
        If a file is missing or broken, or the runs are over different frames or masks.
    ValueError
        For fewer than two runs, or resamples or level out of range.

    """
    if len(run_dirs) < 2:
        raise ValueError(f'a comparison needs at least two runs, got {len(run_dirs)}')
    if resamples < 100 or not 0 < level < 1:
        raise ValueError('resamples must be at least 100 and level between 0 and 1, '
                         f'got {resamples} and {level}')
    runs = [read_run(Path(path), name)
            for path, name in zip(run_dirs, _names(run_dirs), strict=True)]
    frame_ids, same = _shared_frames(runs, common_frames)
    tails = ((1 - level) / 2, (1 + level) / 2)

    # A frame without a mask, or with a void one, has no part in the pooled figures of pixels.
    scored = [frame for frame in frame_ids
              if any(run.rows[frame].get('pixels', 1) for run in runs)]
    pooled_notes, rows = [], []
    drawn: dict[str, Float64Array] = {}
    if len(frame_ids) < 2:
        pooled_notes.append('One frame varies in nothing: no figure has an interval.')
    elif same and len(scored) < 2:
        pooled_notes.append('Pooled figures have no interval: fewer than two frames have an '
                            'anomaly mask.')
    elif same:
        stored = [_stored(run, scored) for run in runs]
        without = [run.name for run, scores in zip(runs, stored, strict=True) if scores is None]
        if without:
            pooled_notes.append(
                f'Pooled figures have no interval: {", ".join(without)} kept no score map of '
                'every frame. "evaluate" and "replay" keep them with --save-scores; a folder of '
                '"metrics" has none.')
        else:
            counts = [_bin_counts(*scores) for scores in stored if scores is not None]
            drawn = _resample_pooled(counts, resamples, seed)
    if not same:
        pooled_notes.append('The runs differ in their frames; only the frames of all runs are '
                            'compared, so pooled figures from metrics.json are left out.')
    sections = [run.metrics.get('components') for run in runs]
    tracks = {str(section['track']) for section in sections
              if isinstance(section, Mapping) and section.get('track')}
    if len(tracks) > 1:
        pooled_notes.append(f'The component figures are of different tracks '
                            f'({", ".join(sorted(tracks))}) and left out. Give --track in every '
                            'run.')
    for statistic in POOLED:
        if len(tracks) > 1 and statistic.key.startswith('components.'):
            continue
        values = np.array([_number(run.metrics, statistic.key) for run in runs])
        if not same or np.isnan(values).any():
            continue
        of_pixels = statistic.key.startswith(('pixel.', 'components.'))
        rows += _rows(statistic, runs, values, drawn.get(statistic.key), tails,
                      len(scored if of_pixels else frame_ids))
    fewest = len(scored if drawn else frame_ids)
    for statistic in FRAME_MEANS:
        table = np.array([[_or_nan(run.rows[frame].get(statistic.key)) for run in runs]
                          for frame in frame_ids])
        table = table[~np.isnan(table).any(1)]
        if not len(table):
            continue
        fewest = min(fewest, len(table))
        means = _resample_means(table, resamples, seed) if len(table) > 1 else None
        rows += _rows(statistic, runs, table.mean(0), means, tails, len(table))
    if not rows:
        raise UserError('the runs have no figure in common: ' + ', '.join(
            str(run.path) for run in runs) + '. Evaluate them on data with ground truth.')
    return Comparison(
        tuple(run.name for run in runs), len(frame_ids), tuple(rows), level, resamples, seed,
        (*_notes(level, resamples, seed, fewest), *pooled_notes))


def comparison_table(comparison: Comparison) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the header and the rows of the comparison as text, for a terminal or a page."""
    percent = f'{100 * comparison.level:g} %'
    header = ('statistic', 'run', 'value', f'{percent} interval', 'difference',
              f'{percent} interval', 'better in', 'frames')

    def number(value: float | None, sign: str = '') -> str:
        if value is None:
            return ''
        return f'{value:{sign}.4f}' if abs(value) < 10 else f'{value:{sign}.2f}'

    def interval(low: float | None, high: float | None, sign: str = '') -> str:
        return '' if low is None else f'{number(low, sign)} to {number(high, sign)}'

    return header, [
        (f'{row.statistic}, {row.kind}', row.run, number(row.value), interval(row.low, row.high),
         number(row.difference, '+'), interval(row.difference_low, row.difference_high, '+'),
         '' if row.better is None else f'{100 * row.better:.1f} %', str(row.frames))
        for row in comparison.rows]


def write_comparison(comparison: Comparison, folder: Path | str) -> tuple[Path, Path]:
    """
    Write comparison.csv and comparison.html (table and plot, one self-contained file).

    Returns
    -------
    csv_path, html_path
        The files. The page needs the extra ``report``.

    """
    folder = Path(folder)
    stream = io.StringIO(newline='')
    writer = csv.writer(stream)
    writer.writerow([each.name for each in fields(Row)])
    writer.writerows(['' if v is None else v for v in astuple(row)] for row in comparison.rows)
    atomic_write_text(folder / 'comparison.csv', stream.getvalue())

    from anomaly_seg_ros.report import write_page
    header, table = comparison_table(comparison)
    write_page(folder / 'comparison.html', 'comparison.html.j2',
               title='Comparison of ' + ' and '.join(comparison.runs), frames=comparison.frames,
               header=header, table=table, charts=_charts(comparison), notes=comparison.notes,
               baseline=comparison.runs[0])
    return folder / 'comparison.csv', folder / 'comparison.html'


def _charts(comparison: Comparison) -> list[dict[str, Any]]:
    """Draw value and difference of AP and FPR95, pooled where these have intervals."""
    from anomaly_seg_ros import plots
    from anomaly_seg_ros.report import svg_picture
    charts = []
    baseline, *others = comparison.runs
    for label, direction in (('AP', 'higher is better'), ('FPR95', 'lower is better')):
        rows = [row for row in comparison.rows if row.statistic == label and row.low is not None]
        rows = rows[:len(comparison.runs)]  # pooled ones come first
        if not rows:
            continue
        text = f'{label}, {rows[0].kind}'
        charts += [
            svg_picture(
                plots.intervals(comparison.runs, np.array([(r.value, r.low, r.high)
                                                           for r in rows], np.float64), text),
                f'{text}: estimate and interval of each run.', f'{text}: {direction}.'),
            svg_picture(
                plots.intervals(others, np.array([
                    (r.difference, r.difference_low, r.difference_high)
                    for r in rows[1:]], np.float64), f'difference of {text}', differences=True),
                f'{text}: difference and interval of each run from {baseline}.',
                f'Difference from {baseline}: an interval across zero tells nothing apart.')]
    return charts


def _notes(level: float, resamples: int, seed: int, fewest: int) -> list[str]:
    notes = [
        f'Intervals: paired percentile bootstrap over frames, level {level:g}, {resamples:,} '
        f'resamples, seed {seed}. "Frame mean" is the mean of per-frame figures over the frames '
        'for which every run has one; "pooled" counts all pixels of all frames together.']
    if fewest < FEW_FRAMES:
        notes.append(f'Only {fewest} frames enter some of the figures: intervals from fewer than '
                     f'{FEW_FRAMES} frames are too narrow.')
    return notes


def _names(run_dirs: Sequence[Path | str]) -> list[str]:
    """Name the runs by their folders, with as much of the path as tells them apart."""
    paths = [Path(os.path.abspath(path)) for path in run_dirs]
    longest = max(len(path.parts) for path in paths)
    names = [str(path) for path in paths]
    for depth in range(longest, 0, -1):
        shorter = ['/'.join(path.parts[-depth:]) for path in paths]
        if len(set(shorter)) < len(set(map(str, paths))):
            break
        names = shorter
    if len(set(names)) < len(names):  # one folder given twice
        names = [f'{name} ({i + 1})' for i, name in enumerate(names)]
    return names


def read_run(path: Path, name: str) -> Run:
    """
    Read metrics.json and per_frame.csv of a folder.

    Raises
    ------
    UserError
        If a file is missing or broken; names it and the remedy.

    """
    remedy = 'Give a folder written by "anomaly-seg evaluate", "replay" or "metrics".'
    metrics_path, frames_path = path / 'metrics.json', path / 'per_frame.csv'
    try:
        metrics = json.loads(metrics_path.read_text(encoding='utf-8'))
        with open(frames_path, encoding='utf-8', newline='') as stream:
            lines = list(csv.DictReader(stream, strict=True))
    except OSError as error:
        raise UserError(f'{error.filename}: cannot be read ({error.strerror}). {remedy}'
                        ) from error
    except json.JSONDecodeError as error:
        raise UserError(f'{metrics_path}: not JSON ({error}). {remedy}') from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f'{frames_path}: not CSV ({error}). {remedy}') from error
    if not isinstance(metrics, dict):
        raise UserError(f'{metrics_path}: must hold a JSON object, got '
                        f'{type(metrics).__name__}. {remedy}')
    if not lines or 'frame_id' not in lines[0]:
        raise UserError(f'{frames_path}: must hold a column frame_id and at least one frame. '
                        f'{remedy}')
    rows: dict[str, dict[str, float | None]] = {}
    for number, line in enumerate(lines, 2):
        frame_id = line.pop('frame_id')
        if frame_id in rows:
            raise UserError(f'{frames_path}: line {number}: frame {frame_id!r} is there twice')
        try:
            rows[frame_id] = {key: float(text) if text else None for key, text in line.items()}
        except (TypeError, ValueError) as error:
            raise UserError(f'{frames_path}: line {number}: {error}. {remedy}') from error
    return Run(name, path, metrics, rows)


def _shared_frames(runs: Sequence[Run], common_frames: bool) -> tuple[list[str], bool]:
    """Return the frames to compare and whether all runs have exactly these."""
    first = runs[0]
    shared = [frame for frame in first.rows if all(frame in run.rows for run in runs)]
    same = all(len(run.rows) == len(shared) for run in runs)
    if not same and not common_frames:
        details = []
        for run in runs[1:]:
            for one, other in ((first, run), (run, first)):
                only = [frame for frame in one.rows if frame not in other.rows]
                if only:
                    details.append(f'{len(only)} frames of {one.path} are not in {other.path} '
                                   f'({", ".join(only[:3])}{", ..." if len(only) > 3 else ""})')
        raise UserError('the runs are over different frames: ' + '; '.join(details) + '. Evaluate '
                        'the same data in every run, or compare only the frames they share, with '
                        '--common-frames.')
    if not shared:
        raise UserError('the runs have no frame in common: '
                        + ', '.join(str(run.path) for run in runs))
    for run in runs[1:]:
        for frame in shared:
            for key in ('pixels', 'positives'):
                ours, theirs = first.rows[frame].get(key), run.rows[frame].get(key)
                if ours is not None and theirs is not None and ours != theirs:
                    raise UserError(
                        f'frame {frame!r} has {ours:.0f} {key} in {first.path} and {theirs:.0f} '
                        f'in {run.path}: the masks differ. Evaluate both on the same masks.')
    return shared, same


def _rows(statistic: Statistic, runs: Sequence[Run], values: Float64Array,
          drawn: Float64Array | None, tails: tuple[float, float], frames: int) -> list[Row]:
    """Make one row for each run from the estimates and the resampled ones (resamples, runs)."""
    rows = []
    for i, run in enumerate(runs):
        low = high = difference_low = difference_high = better = None
        if drawn is not None:
            low, high = (float(v) for v in np.quantile(drawn[:, i], tails))
        if drawn is not None and i:
            gaps = drawn[:, i] - drawn[:, 0]
            difference_low, difference_high = (float(v) for v in np.quantile(gaps, tails))
            wins = gaps if statistic.higher_is_better else -gaps
            better = float(np.mean((wins > 0) + 0.5 * (wins == 0)))
        rows.append(Row(statistic.label, statistic.kind, run.name, float(values[i]), low, high,
                        float(values[i] - values[0]) if i else None, difference_low,
                        difference_high, better, frames))
    return rows


def draw_frames(frames: int, resamples: int, seed: int) -> npt.NDArray[np.int64]:
    """Return how often each frame is drawn in each resample, int64 (resamples, frames)."""
    return np.random.default_rng(seed).multinomial(
        frames, np.full(frames, 1 / frames), size=resamples)


def _resample_means(table: Float64Array, resamples: int, seed: int) -> Float64Array:
    """Return the mean of each column of (frames, runs) in each resample: (resamples, runs)."""
    means: Float64Array = draw_frames(len(table), resamples, seed) @ table / len(table)
    return means


def _stored(run: Run, frame_ids: Sequence[str]) -> tuple[StoredScores, list[str]] | None:
    """Open the run's score maps, with the name of each frame's, where it kept them all."""
    folders = run.path / 'scores', run.path / 'masks'
    if not all(folder.is_dir() and any(folder.iterdir()) for folder in folders):
        return None
    scores = StoredScores(*folders)
    names = {unquote(name): name for name in scores.frame_ids}  # as evaluate.file_name quotes
    if not all(frame in names for frame in frame_ids):
        return None
    return scores, [names[frame] for frame in frame_ids]


def _bin_counts(scores: StoredScores, names: Sequence[str]) -> tuple[Float64Array, Float64Array]:
    """
    Count the anomalous and the other pixels of each frame in bins of score, highest first.

    Each quantile of the anomalous pixels' scores has a bin of its own, and so has what lies
    between two of them: pixels there are above the one and below the other, not tied with either.
    Returns two float64 (frames, bins).
    """
    positives = np.concatenate([np.empty(0), *(
        frame.scores[frame.mask == 1] for frame in map(scores.load, names))])
    if not positives.size:
        return (np.zeros((len(names), 1)),) * 2
    levels = np.quantile(positives, np.linspace(0, 1, SCORE_LEVELS + 1)[:-1],
                         method='inverted_cdf')
    edges = np.unique(np.concatenate([levels, np.nextafter(levels, np.inf)]))
    counts = np.zeros((2, len(names), edges.size + 1))
    for row, name in enumerate(names):
        frame = scores.load(name)
        for kind, code in enumerate((1, 0)):
            bins = np.searchsorted(edges, frame.scores[frame.mask == code], 'right')
            counts[kind, row] = np.bincount(bins, minlength=edges.size + 1)[::-1]
    return counts[0], counts[1]


def _resample_pooled(counts: Sequence[tuple[Float64Array, Float64Array]], resamples: int,
                     seed: int) -> dict[str, Float64Array]:
    """Return pooled AP, FPR95 and AUROC of each resample and run, each (resamples, runs)."""
    weights = draw_frames(len(counts[0][0]), resamples, seed).astype(np.float64)
    figures = np.empty((3, resamples, len(counts)))
    for column, (positives, negatives) in enumerate(counts):
        for start in range(0, resamples, _CHUNK):
            part = weights[start:start + _CHUNK]
            figures[:, start:start + len(part), column] = pooled_figures(
                part @ positives, part @ negatives)
    # A resample without both kinds of pixels has no figure; it is the same one in every run.
    figures = figures[:, ~np.isnan(figures).any((0, 2))]
    if figures.shape[1] < resamples / 2:
        return {}
    return dict(zip(('pixel.average_precision', 'pixel.fpr95', 'pixel.auroc'), figures,
                    strict=True))


def pooled_figures(positives: Float64Array, negatives: Float64Array) -> Float64Array:
    """
    Return AP, FPR95 and AUROC of binned scores; pixels of one bin count as tied.

    Parameters
    ----------
    positives, negatives
        Float64 (n, bins): pixels in each bin, the highest scores first.

    Returns
    -------
    figures
        Float64 (3, n); NaN without both kinds of pixels.

    """
    tp, fp = positives.cumsum(1), negatives.cumsum(1)
    with np.errstate(invalid='ignore', divide='ignore'):
        recall, fpr = tp / tp[:, -1:], fp / fp[:, -1:]
        precision = np.where(tp + fp > 0, tp / (tp + fp), 0.0)
        ap = (np.diff(recall, axis=1, prepend=0.0) * precision).sum(1)
        first = np.argmax(recall >= 0.95, axis=1)
        fpr95 = np.take_along_axis(fpr, first[:, None], 1)[:, 0]
        steps = np.diff(fpr, axis=1, prepend=0.0)
        auroc = (steps * (recall - np.diff(recall, axis=1, prepend=0.0) / 2)).sum(1)
    figures = np.stack([ap, fpr95, auroc])
    figures[:, (tp[:, -1] == 0) | (fp[:, -1] == 0)] = np.nan
    return figures


def _number(metrics: Any, key: str) -> float:
    for part in key.split('.'):
        metrics = metrics.get(part) if isinstance(metrics, Mapping) else None
    return _or_nan(metrics)


def _or_nan(value: Any) -> float:
    return float('nan') if value is None else float(value)
