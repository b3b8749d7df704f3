# SPDX-License-Identifier: Apache-2.0
"""Commands that score runs and stored maps, compare them and write submissions."""

from dataclasses import asdict
import json
from pathlib import Path

from anomaly_seg_ros.commands.options import (
    backend_options, DATASET, dataset_source, FILE, FiniteRange, metrics_options,
    obstacle_options, obstacle_settings, OUT, print_metrics, print_path, progress_bar)
from anomaly_seg_ros.extras import require
import click
from rich.table import Table


@click.command('evaluate')
@click.argument('model', type=FILE)
@click.option('--dataset', type=DATASET, required=True,
              help='Name of the data set; "anomaly-seg datasets" lists them.')
@click.option('--root', type=FILE, required=True, help='Its folder.')
@click.option('--output', type=FILE, required=True, help='Folder for the results.')
@click.option('--split', help='Split of the data set. Default: the first that is there.')
@click.option('--option', 'options', multiple=True, metavar='KEY=VALUE',
              help='Further options of the data set, such as weather=fog (acdc).')
@click.option('--track', type=click.Choice(['anomaly', 'obstacle']),
              help='Sizes of the component metrics. Default: those of the data set.')
@click.option('--limit', type=click.IntRange(1), help='Take only the first N frames.')
@click.option('--save-scores', is_flag=True, help='Keep score maps and masks as .npy.')
@click.option('--keep-going', is_flag=True, help='Leave out bad frames and report the rest.')
@metrics_options
@backend_options
@obstacle_options
def evaluate_command(model: Path, dataset: str, root: Path, output: Path, split: str | None,
                     options: tuple[str, ...], track: str | None, limit: int | None,
                     save_scores: bool, keep_going: bool, workers: int, ray: str | None,
                     backend: str, threads: int, threshold: float | None, minimum_area_px: int,
                     region: str) -> None:
    """Run MODEL over a benchmark: metrics.json, per_frame.csv, report.html."""
    from anomaly_seg_ros.evaluate import evaluate
    # What does not pair is listed together with what cannot be read; evaluate stops at either.
    source = dataset_source(dataset, root, split, options, keep_going=True)
    settings = obstacle_settings(model, threshold, minimum_area_px, region)
    with progress_bar() as progress:
        metrics = evaluate(model, source, output, backend=backend, threads=threads,
                           settings=settings, limit=limit, save_scores=save_scores,
                           keep_going=keep_going, track=track, workers=workers, ray=ray,
                           progress=progress)
    print_metrics(metrics)
    print_path(output / 'metrics.json')


@click.command('metrics')
@click.argument('scores', type=FILE)
@click.argument('masks', type=FILE)
@click.option('--output', type=FILE, required=True, help='Folder for the results.')
@click.option('--track', type=click.Choice(['anomaly', 'obstacle']), default='anomaly',
              show_default=True, help='Sizes of the component metrics.')
@metrics_options
@click.option('--keep-going', is_flag=True, help='Leave out bad frames and report the rest.')
def metrics_command(scores: Path, masks: Path, output: Path, track: str, workers: int,
                    ray: str | None, keep_going: bool) -> None:
    """
    Compute the metrics of stored score maps.

    SCORES holds one <name>.npy (float, H x W) a frame, MASKS one <name>.png or .npy with 0
    (in-distribution), 1 (anomaly) and 255 (void).
    """
    from anomaly_seg_ros.evaluate import metrics_of_stored
    with progress_bar() as progress:
        metrics = metrics_of_stored(scores, masks, output, track=track, workers=workers,
                                    keep_going=keep_going, ray=ray, progress=progress)
    print_metrics(metrics)
    print_path(output / 'metrics.json')


@click.command('image-ood')
@click.argument('in_run', type=FILE)
@click.argument('out_run', type=FILE)
@click.option('--output', type=FILE, help='Write the figures to this JSON file, too.')
def image_ood_command(in_run: Path, out_run: Path, output: Path | None) -> None:
    """
    Tell whole images of another domain: AUROC between two runs of one model.

    IN_RUN and OUT_RUN are result folders of evaluate or replay on frames of the known and of the
    other domain; every frame has one score, the mean, maximum or a quantile of its score map.
    """
    from anomaly_seg_ros.files import atomic_write_text
    from anomaly_seg_ros.image_level import image_level
    result = image_level(in_run, out_run)
    if output is not None:
        atomic_write_text(output, json.dumps(asdict(result), indent=1) + '\n')
    table = Table(f'{result.score} of a frame', 'AUROC')
    for name, auroc in result.auroc.items():
        table.add_row(name.replace('_', ' '), 'n/a' if auroc is None else f'{auroc:.4f}')
    OUT.print(table)
    OUT.print(f'{result.in_domain_frames} frames of {in_run}, {result.out_of_domain_frames} of '
              f'{out_run}', highlight=False, soft_wrap=True)


@click.command('datasets')
def datasets_command() -> None:
    """List the data sets, their splits and where they come from."""
    from anomaly_seg_ros.datasets import DATASETS
    # No table: in 80 characters it would cut the addresses off.
    for name, adapter in DATASETS.items():
        splits = f': {", ".join(adapter.splits)}' if adapter.splits else ''
        OUT.print(f'{name}{splits}\n    from {adapter.source or "you"}', highlight=False,
                  soft_wrap=True)


@click.command('compare')
@click.argument('runs', nargs=-1, required=True, type=FILE)
@click.option('--output', type=FILE, required=True, help='Folder for the comparison.')
@click.option('--resamples', type=click.IntRange(100), default=10000, show_default=True,
              help='Resamples of the paired bootstrap over frames.')
@click.option('--level', type=FiniteRange(0, 1, min_open=True, max_open=True), default=0.95,
              show_default=True, help='Level of the confidence intervals.')
@click.option('--seed', type=click.IntRange(0), default=0, show_default=True,
              help='Seed of the bootstrap.')
@click.option('--common-frames', is_flag=True, help='Compare only the frames all runs share.')
def compare_command(runs: tuple[Path, ...], output: Path, resamples: int, level: float,
                    seed: int, common_frames: bool) -> None:
    """
    Compare result folders of the same frames: one table, one plot, confidence intervals.

    The first of RUNS is the baseline.
    """
    if len(runs) < 2:
        raise click.UsageError('give at least two result folders')
    require('report', 'matplotlib', 'jinja2')
    from anomaly_seg_ros.compare import compare_runs, comparison_table, write_comparison
    comparison = compare_runs(list(runs), resamples=resamples, level=level, seed=seed,
                              common_frames=common_frames)
    header, rows = comparison_table(comparison)
    # Short columns, for 80 characters; the last two are in the files only.
    table = Table(header[0], '', box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in header[2:6]:
        table.add_column(name, justify='right', no_wrap=True)
    for row, above in zip(rows, [None, *rows], strict=False):
        new = above is None or row[0] != above[0]
        if new:
            table.add_row()
        table.add_row(row[0] if new else '', str(1 + comparison.runs.index(row[1])), *row[2:6])
    OUT.print(table)
    for number, name in enumerate(comparison.runs, 1):
        OUT.print(f'{number}  {name}{" (baseline)" if number == 1 else ""}', highlight=False,
                  markup=False, soft_wrap=True)
    for path in write_comparison(comparison, output):
        OUT.print(str(path), highlight=False, markup=False, soft_wrap=True)


@click.command('submit')
@click.argument('scores', nargs=-1, required=True, type=FILE)
@click.option('--benchmark', required=True,
              type=click.Choice(['AnomalyTrack-all', 'ObstacleTrack-all', 'LostAndFound-test',
                                 'LostAndFound-train']),
              help='Data set of SegmentMeIfYouCan.')
@click.option('--method', required=True, help='Name of the method.')
@click.option('--output', type=FILE, required=True, help='Folder for the submission.')
def submit_command(scores: tuple[Path, ...], benchmark: str, method: str, output: Path) -> None:
    """Write score maps (folders SCORES of FRAME.npy) in SegmentMeIfYouCan's HDF5 layout."""
    require('submission', 'h5py')
    from anomaly_seg_ros.submission import write_smiyc_submission
    written = write_smiyc_submission(scores, output, method=method, dataset=benchmark)
    OUT.print(f'{len(written)} files in {written[0].parent}', highlight=False, soft_wrap=True)
