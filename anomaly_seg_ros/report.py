# SPDX-License-Identifier: Apache-2.0
"""
The HTML report of a run: one file that needs no network, no script and no other file.

Pictures and charts are inside as data; text from outside (frame ids, paths) is escaped, and a
content-security policy in the file forbids scripts and requests. Needs the extra ``report``
(matplotlib, jinja2); ``summary_table``, ``choose_frames`` and ``frame_caption`` do not.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
import shlex
from typing import Any

from anomaly_seg_ros.files import atomic_write_bytes
from anomaly_seg_ros.metrics.stored import ScoreCurves
from anomaly_seg_ros.visualize import draw_outlines
import cv2
import numpy as np

TRUTH_RGB = (0, 224, 255)
PICTURE_WIDTH = 640
KINDS = {
    'best': 'Best frames by average precision',
    'worst': 'Worst frames by average precision',
    'highest': 'Frames with the highest mean score',
    'lowest': 'Frames with the lowest mean score',
    'random': 'Frames taken at random',
}

_NONE = 'n/a'
_LABELS = {
    'average_precision': 'average precision (AP)', 'fpr95': 'false-positive rate at 95 % recall',
    'auroc': 'area under ROC (AUROC)', 'best_f1': 'best F1', 'recall_at_fpr': 'recall at FPR',
    'positives': 'anomalous pixels', 'pixels': 'scored pixels',
    'ties': 'pixels tied with an anomalous one', 'siou_gt': 'sIoU, true components',
    'siou_pred': 'sIoU, predicted components', 'ppv': 'PPV, predicted components',
    'mean_f1': 'mean F1 over tau', 'f1_by_tau': 'F1 at tau',
    'tp_mean': 'true positives, mean over tau', 'fp_mean': 'false positives, mean over tau',
    'fn_mean': 'false negatives, mean over tau', 'best_f1_threshold': 'threshold of best F1',
    'tpr95_threshold': 'threshold of 95 % recall', 'miou': 'mean IoU (mIoU)',
    'ece': 'expected calibration error (ECE)', 'adaptive_ece': 'adaptive ECE',
    'ks': 'Kolmogorov-Smirnov', 'prr': 'prediction rejection ratio (PRR)',
    'misclassification_ap': 'finding wrong labels, AP',
    'misclassification_max_j': 'finding wrong labels, max J',
    'misclassification_auroc': 'finding wrong labels, AUROC',
    'misclassification_fpr95': 'finding wrong labels, FPR at 95 % recall',
    'model_sha256': 'model sha256', 'input_size_hw': 'input size, height x width',
}
_COMPAT = {
    'smiyc': 'SegmentMeIfYouCan', 'caos_per_image': 'CAOS, mean over images', 's2m': 'S2M',
    'relis': 'relis'}
_S2M_LABELS = {'mean_f1': 'mean F1 over score thresholds'}
# Every tau is in metrics.json; these are the ones that papers quote.
_SHOWN_TAUS = ('0.25', '0.5', '0.75')
_CARD = ('name', 'network', 'score', 'score_parameters', 'temperature', 'threshold',
         'threshold_source', 'input_size_hw', 'precision', 'weights_source', 'weights_sha256',
         'licence')


@dataclass(frozen=True)
class FramePicture:
    """
    One frame to show.

    Attributes
    ----------
    frame_id, caption
        Its name, and a line of text (see ``frame_caption``).
    kind
        One of ``KINDS``: why it is shown.
    image_rgb, overlay_rgb, heat_rgb
        uint8 (H, W, 3).
    mask
        uint8 (H, W), not 0 where an obstacle was found; None leaves it out.
    ground_truth
        uint8 (H, W): 0 in-distribution, 1 anomaly, 255 void; None where unknown.

    """

    frame_id: str
    caption: str
    kind: str
    image_rgb: np.ndarray
    overlay_rgb: np.ndarray
    heat_rgb: np.ndarray
    mask: np.ndarray | None = None
    ground_truth: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Check the kind."""
        if self.kind not in KINDS:
            raise ValueError(f'kind must be one of {tuple(KINDS)}, got {self.kind!r}')


@dataclass(frozen=True)
class Reliability:
    """
    A reliability diagram: one entry for each bin of confidence that holds pixels.

    Attributes
    ----------
    confidence, accuracy
        Mean of the bin, 0 to 1.
    weight
        Fraction of the pixels in it.

    """

    confidence: Sequence[float]
    accuracy: Sequence[float]
    weight: Sequence[float]


@dataclass(frozen=True)
class ReportData:
    """
    What a report shows; a part with nothing in it says why or is left out.

    Attributes
    ----------
    title
        Heading.
    metrics
        The content of metrics.json.
    curves
        Curves and histograms of the score, or None.
    frames
        Pictures.
    latency_ms
        Milliseconds of every frame by stage; the key ``end_to_end`` gives the histogram.
    reliability
        Reliability diagram, or None.

    """

    title: str
    metrics: Mapping[str, Any]
    curves: ScoreCurves | None = None
    frames: Sequence[FramePicture] = ()
    latency_ms: Mapping[str, Sequence[float]] = field(default_factory=dict)
    reliability: Reliability | None = None


def write_report(path: Path | str, report: ReportData) -> None:
    """
    Write the report to ``path``, whole or not at all.

    Raises
    ------
    UserError
        If the file cannot be written.

    """
    metrics = report.metrics
    run = metrics.get('run') or {}
    card = run.get('card') or {}
    pixel, reason = metrics.get('pixel') or {}, _reason(metrics, 'pixel')
    write_page(
        path, 'report.html.j2', title=report.title, subtitle=_subtitle(metrics),
        tiles=_tiles(metrics), pixel=_section(pixel),
        components=_section(metrics.get('components')),
        scored=_pooled(metrics, 'frames_with_mask'),
        labelled=_pooled(metrics, 'frames_with_labels'),
        curves=_curve_charts(report.curves, metrics),
        no_curves=reason or 'not computed in this run', frames=_frame_groups(report.frames),
        truth_colour=_css(TRUTH_RGB),
        has_truth=any(frame.ground_truth is not None for frame in report.frames),
        score_range=' to '.join(f'{v:.3g}' for v in card.get('score_range', ())),
        segmentation=_section({key: value for key, value in
                               (metrics.get('segmentation') or {}).items()
                               if key != 'iou_by_class'}),
        classes=_classes(metrics), calibration=_section(metrics.get('calibration')),
        reliability=_reliability_chart(report.reliability),
        latency=_latency(metrics.get('latency_ms'), report.latency_ms),
        compat=_compat(metrics.get('compat')), command=_command(run.get('command')),
        problems=run.get('problems') or (), run=_run_rows(run),
        version=(run.get('versions') or {}).get('anomaly_seg_ros', ''))


def summary_table(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """
    Return the headline figures as (name, value) in words, for a terminal.

    A figure that does not apply is left out, or stands with its reason where it is one of the
    two that every benchmark ranks by.
    """
    rows = [('split', _value(_get(metrics, 'run', 'split'))),
            ('frames', ', '.join([_value(_get(metrics, 'latency_ms', 'frames')),
                                  *_partly(metrics)]))]
    for section, key in (('pixel', 'average_precision'), ('pixel', 'fpr95'), ('pixel', 'auroc'),
                         ('pixel', 'best_f1'), ('components', 'mean_f1'),
                         ('segmentation', 'miou'), ('segmentation', 'accuracy')):
        value = _get(metrics, section, key)
        if value is not None:
            label = 'component mean F1' if key == 'mean_f1' else _label(key)
            rows.append((label, _value(value)))
        elif key == 'average_precision':
            rows.append((_label(key), f'{_NONE} ({_reason(metrics, section) or "not computed"})'))
    latency = metrics.get('latency_ms') or {}
    for stage, figures in latency.items():
        if isinstance(figures, Mapping):
            rows.append((f'{_label(stage)}, p50 / p95 / p99 ms', ' / '.join(
                f'{figures[name]:.1f}' for name in ('p50', 'p95', 'p99'))))
    if latency.get('dropped'):
        rows.append(('frames dropped', _value(latency['dropped'])))
    return [row for row in rows if row[1] != _NONE]


def _partly(metrics: Mapping[str, Any]) -> list[str]:
    """Return '3 with an anomaly mask' where that many of more frames have one; labels too."""
    run = metrics.get('run') or {}
    return [f'{_value(run[key])} with {what}' for key, what in (
        ('frames_with_mask', 'an anomaly mask'), ('frames_with_labels', 'labels'))
        if 0 < run.get(key, 0) < run.get('frames', 0)]


def _pooled(metrics: Mapping[str, Any], key: str) -> str:
    """Say over how many frames figures are pooled, from the counts of the run."""
    frames = _get(metrics, 'run', key)
    return 'all frames' if frames is None else (
        f'{_value(frames)} frame{"" if frames == 1 else "s"}')


def choose_frames(rows: Sequence[Mapping[str, Any]], count: int = 3, seed: int = 0
                  ) -> list[tuple[str, Mapping[str, Any]]]:
    """
    Choose the frames worth looking at.

    Parameters
    ----------
    rows
        Rows of per_frame.csv; ``average_precision`` may be None or missing.
    count
        Frames of each kind, fewer where there are not enough; no frame is chosen twice.
    seed
        Of the random choice.

    Returns
    -------
    chosen
        (kind, row): best and worst by average precision where frames have one, else those of the
        highest and lowest mean score; then random ones of the others.

    """
    if count < 0:
        raise ValueError(f'count must be at least 0, got {count}')
    key, kinds = 'average_precision', ('best', 'worst')
    ranked = [i for i, row in enumerate(rows) if row.get(key) is not None]
    if not ranked:
        key, kinds = 'score_mean', ('highest', 'lowest')
        ranked = [i for i, row in enumerate(rows) if row.get(key) is not None]
    ranked.sort(key=lambda i: -float(rows[i][key]))
    top = ranked[:min(count, -(-len(ranked) // 2))]
    bottom = ranked[len(top):][::-1][:count]
    others = sorted(set(range(len(rows))) - set(top) - set(bottom))
    drawn = np.random.default_rng(seed).permutation(others)[:count].astype(int)
    return [(kind, rows[i]) for kind, chosen in (*zip(kinds, (top, bottom), strict=True),
                                                 ('random', sorted(drawn.tolist())))
            for i in chosen]


def frame_caption(row: Mapping[str, Any]) -> str:
    """Return one line about a row of per_frame.csv, with what it holds."""
    parts = [f'{name} {float(row[key]):.3f}' for key, name in (
        ('average_precision', 'AP'), ('fpr95', 'FPR95'), ('auroc', 'AUROC')) if
        row.get(key) is not None]
    if row.get('positives') is not None and row.get('pixels'):
        parts.append(f'{100 * row["positives"] / row["pixels"]:.3g} % of the pixels anomalous')
    if row.get('obstacles') is not None:
        parts.append(f'{row["obstacles"]} obstacle{"" if row["obstacles"] == 1 else "s"} found')
    if row.get('score_max') is not None:
        parts.append(f'highest score {float(row["score_max"]):.3g}')
    return ', '.join(parts)


def write_page(path: Path | str, template: str, **values: Any) -> None:
    """Fill a template of this package (autoescaped) and write it, whole or not at all."""
    import jinja2
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name('templates')), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = environment.get_template(template).render(values)
    # File names may hold bytes that are no text; they must not cost the report.
    atomic_write_bytes(path, text.encode('utf-8', 'backslashreplace'))


def svg_picture(svg: bytes, alt: str, caption: str) -> dict[str, Any]:
    """Return a chart for a template."""
    return {'src': 'data:image/svg+xml;base64,' + base64.b64encode(svg).decode('ascii'),
            'alt': alt, 'caption': caption}


def _picture(picture: np.ndarray, alt: str, caption: str) -> dict[str, Any]:
    done, data = cv2.imencode('.webp', picture[..., ::-1], (cv2.IMWRITE_WEBP_QUALITY, 82))
    if not done:
        raise RuntimeError('OpenCV could not encode a WebP picture; install an OpenCV with WebP')
    return {'src': 'data:image/webp;base64,' + base64.b64encode(data.tobytes()).decode('ascii'),
            'alt': alt, 'caption': caption, 'width': picture.shape[1],
            'height': picture.shape[0]}


def _frame_groups(frames: Sequence[FramePicture]) -> list[dict[str, Any]]:
    return [{'title': title, 'frames': [_frame(frame) for frame in frames if frame.kind == kind]}
            for kind, title in KINDS.items() if any(frame.kind == kind for frame in frames)]


def _frame(frame: FramePicture) -> dict[str, Any]:
    height, width = frame.image_rgb.shape[:2]
    size_wh = (min(width, PICTURE_WIDTH), max(1, round(height * min(1.0, PICTURE_WIDTH / width))))

    def fit(picture: np.ndarray) -> np.ndarray:
        return np.array(cv2.resize(picture, size_wh, interpolation=cv2.INTER_AREA))

    camera, heat = fit(frame.image_rgb), fit(frame.heat_rgb)
    shown = [(camera, 'camera image', 'Camera'),
             (fit(frame.overlay_rgb), 'class colours with the obstacles found',
              'Labels and obstacles'),
             (heat, 'anomaly score as a heat map', 'Anomaly score')]
    if frame.mask is not None:
        mask = cv2.cvtColor(fit((frame.mask != 0).astype(np.uint8) * 255), cv2.COLOR_GRAY2RGB)
        shown.append((mask, 'mask of the obstacles found', 'Obstacle mask'))
    if frame.ground_truth is not None:
        void = fit((frame.ground_truth == 255).astype(np.uint8) * 255) > 127
        camera[void] = camera[void] // 5 * 2
        # A pixel of the small picture is anomalous if one under it is: small ones stay visible.
        truth = (fit((frame.ground_truth == 1).astype(np.float32)) > 0).astype(np.uint8)
        for picture in (camera, heat, *(p[0] for p in shown[3:])):
            draw_outlines(picture, truth, TRUTH_RGB, width_px=2)
    return {'frame_id': frame.frame_id, 'caption': frame.caption,
            'pictures': [_picture(picture, f'Frame {frame.frame_id}: {alt}', caption)
                         for picture, alt, caption in shown]}


def _curve_charts(curves: ScoreCurves | None, metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    from anomaly_seg_ros import plots
    if curves is None:
        return []
    pixel = metrics.get('pixel') or {}
    charts = []
    if len(curves.recall):
        ap, fpr95, auroc = (pixel.get(k) for k in ('average_precision', 'fpr95', 'auroc'))
        prevalence = pixel['positives'] / pixel['pixels']
        charts += [
            svg_picture(plots.precision_recall(curves, prevalence),
                        f'Precision over recall; average precision {_value(ap)}.',
                        f'Precision and recall at every threshold; AP {_value(ap)}.'),
            svg_picture(plots.roc(curves, fpr95),
                        f'ROC curve; area {_value(auroc)}, false-positive rate {_value(fpr95)} at '
                        '95 % recall.',
                        f'Receiver operating characteristic; AUROC {_value(auroc)}.')]
    if curves.histogram_positives.sum() + curves.histogram_negatives.sum():
        threshold = _get(metrics, 'run', 'settings', 'threshold')
        if threshold is None:
            threshold = _get(metrics, 'run', 'card', 'threshold')
        charts.append(svg_picture(
            plots.score_histogram(curves, threshold),
            'Histogram of the scores of in-distribution and of anomalous pixels.',
            'Scores of both kinds of pixels, each with area 1: the less they overlap, the '
            'better.'))
    return charts


def _reliability_chart(reliability: Reliability | None) -> dict[str, Any] | None:
    from anomaly_seg_ros import plots
    if reliability is None or not len(reliability.confidence):
        return None
    return svg_picture(
        plots.reliability(reliability.confidence, reliability.accuracy, reliability.weight),
        'Reliability diagram: accuracy over confidence, with the diagonal of perfect calibration.',
        'Reliability: below the diagonal the network is too sure of itself. Dots grow with the '
        'number of pixels.')


def _latency(section: Mapping[str, Any] | None, samples_ms: Mapping[str, Sequence[float]]
             ) -> dict[str, Any]:
    from anomaly_seg_ros import plots
    section = section or {}
    stages = {name: figures for name, figures in section.items() if isinstance(figures, Mapping)}
    columns = ('p50', 'p95', 'p99', 'max')
    pictures = []
    end_to_end = samples_ms.get('end_to_end', ())
    if len(end_to_end) > 1:
        pictures.append(svg_picture(
            plots.latency_histogram(end_to_end), 'Histogram of the end-to-end latency.',
            f'End-to-end latency of {len(end_to_end)} frames.'))
    parts = {name: figures for name, figures in stages.items() if name != 'end_to_end'}
    if parts:
        pictures.append(svg_picture(
            plots.latency_stages({name: figures['p50'] for name, figures in parts.items()},
                                 {name: figures['p99'] for name, figures in parts.items()}),
            'Bars of the median and 99th percentile of each stage.',
            'Median (dark) and 99th percentile (light) of each stage.'))
    return {'rows': [(_label(name), [_milliseconds(figures.get(c)) for c in columns])
                     for name, figures in stages.items()],
            'columns': columns, 'frames': _value(section.get('frames')),
            'dropped': section.get('dropped'), 'reason': section.get('reason'),
            'pictures': pictures}


def _tiles(metrics: Mapping[str, Any]) -> list[dict[str, str]]:
    tiles = []
    for section, key, name, note in (
            ('pixel', 'average_precision', 'Average precision', 'higher is better'),
            ('pixel', 'fpr95', 'FPR at 95 % recall', 'lower is better'),
            ('pixel', 'auroc', 'AUROC', 'higher is better'),
            ('components', 'mean_f1', 'Component mean F1', 'higher is better'),
            ('segmentation', 'miou', 'Mean IoU', 'higher is better'),
            ('calibration', 'ece', 'Calibration error', 'lower is better')):
        value = _get(metrics, section, key)
        if value is not None:
            tiles.append({'name': name, 'value': f'{value:.3f}', 'note': note})
    total = _get(metrics, 'latency_ms', 'end_to_end')
    if isinstance(total, Mapping):
        tiles.append({'name': 'Latency, median', 'value': f'{_milliseconds(total["p50"])} ms',
                      'note': f'p99 {_milliseconds(total["p99"])} ms'})
    frames = _get(metrics, 'latency_ms', 'frames')
    if frames is not None:
        dropped = _get(metrics, 'latency_ms', 'dropped')
        tiles.append({'name': 'Frames', 'value': _value(frames),
                      'note': ', '.join([*([] if dropped is None else
                                           [f'{_value(dropped)} dropped']), *_partly(metrics)])})
    return tiles


def _classes(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    card = _get(metrics, 'run', 'card') or {}
    colours = dict(zip(card.get('classes', ()), card.get('palette', ()), strict=False))
    by_class = _get(metrics, 'segmentation', 'iou_by_class') or {}
    return [{'name': name, 'value': _value(value), 'percent': round(100 * (value or 0.0), 1),
             'colour': _css(colours[name]) if name in colours else ''}
            for name, value in by_class.items()]


def _compat(section: Mapping[str, Any] | None) -> list[tuple[str, dict[str, Any]]]:
    result = []
    for name, part in (section or {}).items():
        if not isinstance(part, Mapping):
            continue
        title = _COMPAT.get(name, _label(name))
        inner = {k: v for k, v in part.items() if isinstance(v, Mapping) and k in (
            'pixel', 'components')}
        outer = {k: v for k, v in part.items() if k not in inner}
        sections = [(f'{title}, {k}', _section(v)) for k, v in inner.items()]
        if outer:
            labels = _S2M_LABELS if name == 's2m' else {}
            sections.insert(0, (title, _section(outer, labels)))
        result += [s for s in sections if s[1]['rows'] or s[1]['reason']]
    return result if any(section['rows'] for _, section in result) else []


def _section(values: Mapping[str, Any] | None, labels: Mapping[str, str] | None = None
             ) -> dict[str, Any]:
    """
    Return the rows (label, text) of a part of metrics.json, empty if all of it is null.

    ``labels`` are those of inner figures that are not as in ``_LABELS``.
    """
    values, labels = values or {}, labels or {}
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if key == 'reason':
            continue
        label = _label(key)
        if isinstance(value, Mapping):
            rows += [(f'{label} {labels.get(name, _label(str(name)))}', _value(inner))
                     for name, inner in value.items()
                     if not isinstance(inner, Mapping | list | tuple)
                     and (key != 'f1_by_tau' or name in _SHOWN_TAUS)]
        elif not isinstance(value, list | tuple):
            rows.append((label, _value(value)))
    if all(text == _NONE for _, text in rows):
        rows = []
    return {'rows': rows, 'reason': values.get('reason')}


def _subtitle(metrics: Mapping[str, Any]) -> str:
    run = metrics.get('run') or {}
    card = run.get('card') or {}
    parts = [f'{card["name"]}: {card.get("network", "")}, score {card.get("score", "")}'
             if card.get('name') else '', run.get('data', ''), run.get('finished', '')]
    return ' · '.join(str(part) for part in parts if part)


def _run_rows(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for key, value in run.items():
        if key == 'card':
            rows += [(_label(name), _plain(value[name])) for name in _CARD
                     if isinstance(value, Mapping) and value.get(name) not in (None, '', {})]
        elif key not in ('command', 'problems') and value not in (None, '', {}, []):
            rows.append((_label(key), _plain(value)))
    return rows


def _command(command: Any) -> str:
    if not command:
        return ''
    return command if isinstance(command, str) else shlex.join(str(part) for part in command)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ', '.join(f'{_label(str(k))} {_plain(v)}' for k, v in value.items())
    if isinstance(value, list | tuple):
        return ' x '.join(map(str, value)) if all(isinstance(v, int) for v in value) else (
            ', '.join(_plain(v) for v in value))
    return f'{value:.6g}' if isinstance(value, float) else str(value)


def _get(metrics: Any, *keys: str) -> Any:
    for key in keys:
        if not isinstance(metrics, Mapping):
            return None
        metrics = metrics.get(key)
    return metrics


def _reason(metrics: Mapping[str, Any], section: str) -> str | None:
    reason = _get(metrics, section, 'reason')
    return None if reason is None else str(reason)


def _label(key: str) -> str:
    return _LABELS.get(key, key.replace('_', ' '))


def _value(value: Any) -> str:
    if value is None:
        return _NONE
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f'{value:,}'
    if value == 0 or 1e-3 <= abs(value) < 10:
        return f'{value:.4f}'
    return f'{value:.4g}'


def _milliseconds(value: float | None) -> str:
    if value is None:
        return _NONE
    return f'{value:.2f}' if value < 10 else f'{value:.1f}' if value < 1000 else f'{value:.0f}'


def _css(colour: Sequence[int]) -> str:
    return '#' + ''.join(f'{int(v):02x}' for v in colour)
