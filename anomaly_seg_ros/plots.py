# SPDX-License-Identifier: Apache-2.0
"""
Charts of the report as SVG, made with matplotlib and without a display.

Every function returns the SVG file's bytes; equal data give equal bytes. Charts are drawn small
(400 px wide) so that their text stays readable on a phone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
import io
from typing import Any

from anomaly_seg_ros.metrics.stored import ScoreCurves
import numpy as np

# Okabe and Ito's colours, told apart by colour-blind readers and in grey print.
BLUE, ORANGE, GREY, GREEN = '#0072B2', '#D55E00', '#5f6b76', '#009E73'
SERIES = (BLUE, ORANGE, GREEN, '#CC79A7', '#56B4E9', '#E69F00', '#000000')

_STYLE: dict[str, Any] = {
    'font.family': 'DejaVu Sans', 'font.size': 9, 'axes.titlesize': 10,
    'axes.spines.top': False, 'axes.spines.right': False, 'axes.edgecolor': '#5f6b76',
    'axes.grid': True, 'grid.color': '#e3e7eb', 'grid.linewidth': 0.7, 'axes.axisbelow': True,
    'legend.frameon': False, 'lines.linewidth': 1.8, 'svg.fonttype': 'path',
    'svg.hashsalt': 'anomaly_seg_ros', 'path.simplify_threshold': 0.3,
}


@contextmanager
def chart(width_inch: float = 4.2, height_inch: float = 3.1
          ) -> Iterator[tuple[Any, Callable[[], bytes]]]:
    """Give axes and a function that returns the SVG of what was drawn into them."""
    import matplotlib
    from matplotlib.figure import Figure
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width_inch, height_inch), layout='constrained')
        axes = figure.subplots()

        def svg() -> bytes:
            stream = io.BytesIO()
            figure.savefig(stream, format='svg', metadata={'Date': None})
            return stream.getvalue()

        yield axes, svg


def precision_recall(curves: ScoreCurves, prevalence: float) -> bytes:
    """
    Draw precision over recall, as the steps that average precision sums.

    Parameters
    ----------
    curves
        With at least one point.
    prevalence
        Fraction of anomalous pixels: the precision of guessing.

    """
    with chart() as (axes, svg):
        axes.step(np.append(0.0, curves.recall), np.append(curves.precision[0], curves.precision),
                  where='pre', color=BLUE)
        axes.axhline(prevalence, color=GREY, linestyle=':', linewidth=1.3)
        below = prevalence > 0.08
        axes.annotate(f'guessing: {prevalence:.2g}', (0.02, prevalence), (0, -3 if below else 3),
                      textcoords='offset points', va='top' if below else 'bottom', color=GREY,
                      fontsize=8)
        _unit_square(axes)
        axes.set(xlabel='recall', ylabel='precision')
        return svg()


def roc(curves: ScoreCurves, fpr95: float | None) -> bytes:
    """Draw recall over false-positive rate, with the point of 95 % recall."""
    with chart() as (axes, svg):
        axes.plot([0, 1], [0, 1], color=GREY, linestyle=':', linewidth=1.3)
        fpr, recall = (np.concatenate([[0], v, [1]]) for v in (curves.fpr, curves.recall))
        axes.plot(fpr, recall, color=BLUE)
        if fpr95 is not None:
            axes.plot([fpr95], [0.95], 'o', color=ORANGE, markersize=6)
            # Under the curve there is always room to the left of the diagonal's end.
            axes.annotate(f'95 % recall at\n{fpr95:.3g}', (fpr95, 0.95), (0.62, 0.42),
                          color=ORANGE, fontsize=8, ha='left', va='top',
                          arrowprops={'arrowstyle': '-', 'color': ORANGE, 'linewidth': 0.8})
        _unit_square(axes)
        axes.set(xlabel='false-positive rate', ylabel='recall (true-positive rate)')
        return svg()


def score_histogram(curves: ScoreCurves, threshold: float | None) -> bytes:
    """Draw the distribution of the scores of both kinds of pixels, each with area one."""
    edges = curves.histogram_edges
    with chart() as (axes, svg):
        for name, counts, colour in (
                ('in-distribution', curves.histogram_negatives, BLUE),
                ('anomaly', curves.histogram_positives, ORANGE)):
            if counts.sum():
                density = counts / counts.sum() / np.diff(edges)
                axes.stairs(density, edges, fill=True, color=colour, alpha=0.25)
                axes.stairs(density, edges, color=colour, linewidth=1.5, label=name)
        if threshold is not None and edges[0] <= threshold <= edges[-1]:
            axes.axvline(threshold, color='#1b1f24', linestyle='--', linewidth=1.2,
                         label='threshold')
        axes.set(xlabel='anomaly score', ylabel='density', ylim=(0, None))
        axes.margins(x=0)
        _legend_above(axes)
        return svg()


def latency_histogram(samples_ms: Sequence[float]) -> bytes:
    """Draw how many frames took how long, with p50, p95 and p99."""
    values = np.asarray(samples_ms, np.float64)
    p50, p95, p99 = np.percentile(values, (50, 95, 99))
    with chart() as (axes, svg):
        bins = int(np.clip(np.sqrt(values.size) * 2, 8, 60))
        axes.hist(values, bins=bins, color=BLUE, alpha=0.75)
        for name, value, style in (('p50', p50, '-'), ('p95', p95, '--'), ('p99', p99, ':')):
            axes.axvline(value, color=ORANGE, linestyle=style, linewidth=1.5,
                         label=f'{name} {value:.4g} ms')
        axes.set(xlabel='end to end, ms', ylabel='frames')
        axes.yaxis.get_major_locator().set_params(integer=True)
        _legend_above(axes)
        return svg()


def latency_stages(p50_ms: Mapping[str, float], p99_ms: Mapping[str, float]) -> bytes:
    """Draw the median and the 99th percentile of each stage as horizontal bars."""
    names = list(p50_ms)
    place = np.arange(len(names))[::-1]
    with chart(height_inch=0.9 + 0.4 * len(names)) as (axes, svg):
        axes.barh(place, [p99_ms[name] for name in names], 0.62, color=BLUE, alpha=0.3,
                  label='p99')
        axes.barh(place, [p50_ms[name] for name in names], 0.62, color=BLUE, label='p50')
        axes.set_yticks(place, [name.replace('_', ' ') for name in names])
        axes.grid(visible=False, axis='y')
        axes.set(xlabel='ms')
        _legend_above(axes)
        return svg()


def reliability(confidence: Sequence[float], accuracy: Sequence[float],
                weight: Sequence[float]) -> bytes:
    """
    Draw accuracy over confidence; the diagonal is perfect calibration.

    Parameters
    ----------
    confidence, accuracy
        Mean of each bin that holds pixels, 0 to 1.
    weight
        Fraction of the pixels in each bin.

    """
    with chart() as (axes, svg):
        axes.plot([0, 1], [0, 1], color=GREY, linestyle=':', linewidth=1.3)
        axes.plot(confidence, accuracy, color=BLUE)
        axes.scatter(confidence, accuracy, 12 + 160 * np.asarray(weight), color=BLUE, zorder=3,
                     linewidths=0)
        _unit_square(axes)
        axes.set(xlabel='confidence', ylabel='accuracy')
        return svg()


def intervals(names: Sequence[str], values: np.ndarray, label: str,
              differences: bool = False) -> bytes:
    """
    Draw estimates with their confidence intervals, one below the other.

    Parameters
    ----------
    names
        One for each row, first on top.
    values
        Float (rows, 3): estimate, low, high; NaN leaves out the estimate or the interval.
    label
        What is drawn, with its unit.
    differences
        They are differences from a baseline: draw a line at zero, and leave the first colour to
        the baseline.

    """
    place = np.arange(len(names))[::-1]
    with chart(height_inch=0.9 + 0.36 * len(names)) as (axes, svg):
        if differences:
            axes.axvline(0, color=GREY, linewidth=1.2)
        for k, (y, (estimate, low, high)) in enumerate(zip(place, values, strict=True)):
            colour = SERIES[(k + differences) % len(SERIES)]
            axes.plot([low, high], [y, y], color=colour, linewidth=2.4, solid_capstyle='butt')
            axes.plot([estimate], [y], 'o', color=colour, markersize=6)
        axes.set_yticks(place, [_shorten(name) for name in names])
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.locator_params(axis='x', nbins=5)
        axes.grid(visible=False, axis='y')
        axes.set(xlabel=label)
        return svg()


def _shorten(name: str, length: int = 24) -> str:
    """Cut the middle out of a long name."""
    half = (length - 3) // 2
    return name if len(name) <= length else f'{name[:half]}...{name[-half:]}'


def _legend_above(axes: Any) -> None:
    axes.legend(loc='lower left', bbox_to_anchor=(-0.02, 1.0), ncols=3, fontsize=8,
                columnspacing=1.2, handlelength=1.6, borderaxespad=0.2)


def _unit_square(axes: Any) -> None:
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02))
