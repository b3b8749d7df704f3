# SPDX-License-Identifier: Apache-2.0
"""The command line ``anomaly-seg``: one small function a command, each a call into the core."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
import inspect as signatures
import json
import logging
import math
import os
from pathlib import Path
import sys
from typing import Any

from anomaly_seg_ros import __version__
from anomaly_seg_ros.errors import UserError
import click
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

CONSOLE = Console(stderr=True)
OUT = Console()

_FILE = click.Path(path_type=Path)
_Command = Callable[..., Any]


class SizeType(click.ParamType):
    """An image size such as 512x1024: height x width in pixels."""

    name = 'HxW'

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return (height, width)."""
        if isinstance(value, tuple):
            return value
        try:
            height, width = (int(part) for part in str(value).lower().split('x'))
        except ValueError:
            self.fail(f'{value!r} is not a size such as 512x1024 (height x width)', param, ctx)
        if height < 1 or width < 1:
            self.fail(f'{value!r} is not a size: both must be positive', param, ctx)
        return height, width


class ThreeFloats(click.ParamType):
    """Three numbers such as 0.485,0.456,0.406: one a channel."""

    name = 'A,B,C'

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return a tuple of three floats."""
        if isinstance(value, tuple):
            return value
        try:
            first, second, third = (float(part) for part in str(value).split(','))
        except ValueError:
            self.fail(f'{value!r} is not three numbers such as 0.485,0.456,0.406', param, ctx)
        return first, second, third


class FiniteFloat(click.ParamType):
    """A number; not NaN, not infinite."""

    name = 'NUMBER'

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return a float."""
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            self.fail(f'{value!r} is not a finite number', param, ctx)
        return number


class DatasetName(click.ParamType):
    """A key of ``DATASETS``, imported only when one is given."""

    name = 'NAME'

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the name; wrong usage lists the choices."""
        from anomaly_seg_ros.datasets import DATASETS
        if value not in DATASETS:
            self.fail(f'no data set {value!r}; choose one of {", ".join(DATASETS)}', param, ctx)
        return value


def obstacle_options(function: _Command) -> _Command:
    """Add the options that turn scores into obstacles."""
    for option in (
            click.option('--region', type=click.Choice(['everywhere', 'drivable']),
                         default='everywhere', show_default=True,
                         help='Keep obstacles everywhere, or only those that touch the hull of '
                              'the drivable classes.'),
            click.option('--minimum-area', 'minimum_area_px', type=click.IntRange(1), default=50,
                         show_default=True, metavar='PIXELS',
                         help='Drop components of fewer camera pixels.'),
            click.option('--threshold', type=FiniteFloat(),
                         help='Anomalous when score >= this. Default: that of the card.')):
        function = option(function)
    return function


def backend_options(function: _Command) -> _Command:
    """Add the options that choose a device."""
    for option in (
            click.option('--threads', type=click.IntRange(0), default=0, show_default=True,
                         help='Threads of the network; 0 takes every core allowed.'),
            click.option('--backend', default='cpu', show_default=True,
                         help='cpu, cuda, tensorrt, openvino, ... or auto.')):
        function = option(function)
    return function


def metrics_options(function: _Command) -> _Command:
    """Add the options that say where the metrics are computed."""
    for option in (
            click.option('--ray', metavar='ADDRESS',
                         help='Compute the metrics on this Ray cluster instead: auto, local, '
                              'ray://HOST:10001. Its machines must see the same folders.'),
            click.option('--workers', type=click.IntRange(1), default=1, show_default=True,
                         help='Processes that compute the metrics.')):
        function = option(function)
    return function


@click.group(context_settings={'help_option_names': ['-h', '--help'], 'max_content_width': 99})
@click.version_option(__version__, prog_name='anomaly-seg')
@click.option('-v', '--verbose', is_flag=True, help='Say more.')
def cli(verbose: bool) -> None:
    """Anomaly segmentation for ROS 2: what in this image the network does not know."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format='%(message)s',
        handlers=[RichHandler(console=CONSOLE, show_path=False, show_time=False)])


@cli.command()
@click.option('--output', type=_FILE, default=Path('demo_output'), show_default=True,
              help='Folder for bag, results, pictures and report.')
@click.option('--frames', type=click.IntRange(2), default=60, show_default=True,
              help='Length of the drive.')
@click.option('--seed', type=int, default=23, show_default=True, help='Seed of the drive.')
@click.option('--model', type=_FILE, help='Model file. Default: the bundled one.')
def demo(output: Path, frames: int, seed: int, model: Path | None) -> None:
    """Synthetic drive -> bag -> the real node over DDS -> metrics, latency, report."""
    from anomaly_seg_ros.demo import run_demo
    with progress_bar() as progress:
        result = run_demo(output, frames=frames, seed=seed, model=model, progress=progress)
    print_metrics(result.metrics)
    OUT.print(f'\nreport    {output / "report.html"}\npictures  {output / "pictures"}\n'
              f'bag       {result.bag}\nresults   {output / "result_bag"}', highlight=False)


@cli.command('export')
@click.argument('network')
@click.option('--weights', type=_FILE, required=True, multiple=True,
              help='State dict, folder or model id of the network, or an .onnx for NETWORK onnx; '
                   'several make an ensemble.')
@click.option('--score', default='max_logit', show_default=True,
              help='Anomaly score fused in: msp, max_logit, entropy, energy, rba, ...')
@click.option('--input-size', 'input_size_hw', type=SizeType(),
              help='Height x width in pixels at which the network runs. Default: 512x1024, or '
                   'what the .onnx is made for.')
@click.option('--precision', type=click.Choice(['fp32', 'fp16', 'int8']), default='fp32',
              show_default=True, help='Arithmetic inside the network.')
@click.option('--input-variant', type=click.Choice(['host', 'device']), default='host',
              show_default=True,
              help='host: normalised outside, for CPUs. device: camera frame in, for GPUs.')
@click.option('--frame-size', 'frame_size_hw', type=SizeType(),
              help='Height x width of the camera frames, for --input-variant device.')
@click.option('--temperature', type=click.FloatRange(0, min_open=True), default=1.0,
              show_default=True, help='Divides the logits before the score.')
@click.option('--threshold', type=FiniteFloat(),
              help='Decision threshold for the card. Default: provisional, from the frames.')
@click.option('--frames', type=click.Path(exists=True, file_okay=False, path_type=Path),
              help='Folder of images to check the export on, and to calibrate int8 on. Default: '
                   'synthetic frames.')
@click.option('--gate-dataset', help='int8: data set whose metrics may not fall too far.')
@click.option('--gate-root', type=_FILE, help='int8: its folder.')
@click.option('--maximum-drop', type=click.FloatRange(0, 1), default=0.02, show_default=True,
              help='int8: by how much AP and mIoU may fall, as a fraction.')
@click.option('--logits', help='NETWORK onnx: name of the tensor with the logits.')
@click.option('--mean', type=ThreeFloats(), default='0,0,0', show_default=True,
              help='NETWORK onnx: mean of each channel, of values in [0, 1].')
@click.option('--std', type=ThreeFloats(), default='1,1,1', show_default=True,
              help='NETWORK onnx: standard deviation of each channel.')
@click.option('--channel-order', type=click.Choice(['rgb', 'bgr']), default='rgb',
              show_default=True, help='NETWORK onnx: order of the channels.')
@click.option('--classes', default='cityscapes', show_default=True,
              help='NETWORK onnx: cityscapes, or a text file with one class name a line.')
@click.option('--void-index', type=click.IntRange(0),
              help='NETWORK onnx: channel that means void.')
@click.option('--upsample', is_flag=True,
              help='NETWORK onnx: interpolate the logits to the size of the input first.')
@click.option('--name', help='Name for the card. Default: NETWORK_SCORE.')
@click.option('--output', type=_FILE, required=True, help='The .onnx file to write.')
def export_command(network: str, weights: tuple[Path, ...], output: Path,
                   frames: Path | None, input_size_hw: tuple[int, int] | None,
                   gate_dataset: str | None, gate_root: Path | None,
                   **options: Any) -> None:
    """
    Export NETWORK with its score to one model file, kept only if it agrees with PyTorch.

    NETWORK is erfnet, segformer, mask2former, eomt, ...; "onnx" takes any ONNX graph that gives
    logits.
    """
    require('export', 'torch', 'onnx', 'onnxscript')
    from anomaly_seg_ros.datasets.media import ImageFolder

    images = None if frames is None else (frame.image_rgb for frame in ImageFolder(frames))
    one = weights[0] if len(weights) == 1 else weights
    of_onnx = {name: options.pop(name) for name in (
        'logits', 'mean', 'std', 'channel_order', 'classes', 'void_index', 'upsample')}
    with CONSOLE.status('exporting and comparing with the reference'):
        if network == 'onnx':
            card = _export_onnx(one, input_size_hw, options, of_onnx, output, images)
        else:
            from anomaly_seg_ros.export import export_model, ExportRequest
            gate = None if gate_dataset is None or gate_root is None else dataset_source(
                gate_dataset, gate_root, None, ())
            card = export_model(
                ExportRequest(network=network, weights=one,
                              input_size_hw=input_size_hw or (512, 1024), **options),
                output, frames=images, gate=gate)
    parity = card.parity
    OUT.print(f'{output}: {card.network}, {card.score}, {card.precision}, input '
              f'{card.input_size_hw[0]}x{card.input_size_hw[1]}', highlight=False)
    OUT.print(f'against {parity["reference"]} on {parity["frames"]} frames: score error at most '
              f'{parity["max_score_error"]:.1e}, labels differ on {parity["label_mismatch"]:.1e} '
              'of the pixels', highlight=False)
    OUT.print(f'threshold {card.threshold:.6g} ({card.threshold_source})', highlight=False)


def _export_onnx(weights: Any, input_size_hw: tuple[int, int] | None, options: dict[str, Any],
                 of_onnx: dict[str, Any], output: Path, images: Any) -> Any:
    from anomaly_seg_ros.classes import CITYSCAPES_CLASSES
    from anomaly_seg_ros.export_onnx import export_onnx, OnnxExportRequest
    if not isinstance(weights, Path):
        raise click.UsageError('NETWORK onnx takes one --weights file')
    if options['precision'] != 'fp32' or options['input_variant'] != 'host':
        raise UserError('an .onnx keeps the precision that it has; leave --precision and '
                        '--input-variant out')
    classes = CITYSCAPES_CLASSES
    if of_onnx['classes'] != 'cityscapes':
        try:
            text = Path(of_onnx['classes']).read_text(encoding='utf-8')
        except OSError as error:
            raise UserError(f'{of_onnx["classes"]}: neither "cityscapes" nor a readable file with '
                            f'one class name a line ({error.strerror})') from error
        classes = tuple(line.strip() for line in text.splitlines() if line.strip())
    return export_onnx(OnnxExportRequest(
        weights=weights, input_size_hw=input_size_hw, score=options['score'],
        temperature=options['temperature'], threshold=options['threshold'],
        name=options['name'], **{**of_onnx, 'classes': classes}), output, frames=images)


@cli.command('build-engine')
@click.argument('model', type=_FILE)
@click.option('--output', type=_FILE, help='The .engine to write. Default: beside the model.')
@click.option('--workspace', 'workspace_mib', type=click.IntRange(1), metavar='MIB',
              help='GPU memory a layer may use, in MiB.')
@click.option('--timing-cache', type=_FILE, help='File of kernel timings to read and extend.')
@click.option('--hardware-compatibility', default='none', show_default=True,
              type=click.Choice(['none', 'ampere+', 'same-compute-capability']),
              help='GPUs that the engine runs on.')
@click.option('--optimization-level', type=click.IntRange(0, 5),
              help='How long TensorRT searches.')
def build_engine_command(model: Path, output: Path | None, workspace_mib: int | None,
                         timing_cache: Path | None, hardware_compatibility: str,
                         optimization_level: int | None) -> None:
    """Build the TensorRT engine of MODEL on this machine's GPU."""
    from anomaly_seg_ros.engine import build_engine, engine_path, EngineSettings
    from anomaly_seg_ros.model_file import load_model_file
    model_file = load_model_file(model)
    with progress_bar() as progress:
        engine = build_engine(
            model_file, output or engine_path(model_file),
            EngineSettings(workspace_mib=workspace_mib, timing_cache=timing_cache,
                           hardware_compatibility=hardware_compatibility,
                           optimization_level=optimization_level), progress=progress)
    OUT.print(f'{engine.path}', highlight=False)


@cli.command('calibrate')
@click.argument('model', type=_FILE)
@click.option('--dataset', required=True, help='Name of the data set.')
@click.option('--root', type=_FILE, required=True, help='Its folder.')
@click.option('--split', help='Split of the data set. Default: the first that is there.')
@click.option('--option', 'options', multiple=True, metavar='KEY=VALUE',
              help='Further options of the data set.')
@click.option('--temperature', metavar='fit|keep|NUMBER',
              help='Default: fit where there are labels and the score depends on it, else keep.')
@click.option('--criterion', type=click.Choice(['fpr', 'tpr', 'best-f1']), default='fpr',
              show_default=True, help='What the threshold is chosen by.')
@click.option('--rate', type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.01,
              show_default=True, help='Fraction of pixels, for fpr and tpr.')
@click.option('--limit', type=click.IntRange(1), help='Take only the first N frames.')
@click.option('--output', type=_FILE, required=True, help='The model file to write.')
@backend_options
def calibrate_command(model: Path, dataset: str, root: Path, split: str | None,
                      options: tuple[str, ...], temperature: str | None, criterion: str,
                      rate: float, limit: int | None, output: Path, backend: str,
                      threads: int) -> None:
    """Write MODEL with temperature and threshold set on a data set."""
    from anomaly_seg_ros.calibration import calibrate, CalibrationRequest
    if temperature is not None and temperature not in ('fit', 'keep'):
        try:
            value: str | float | None = float(temperature)
        except ValueError as error:
            raise click.UsageError('--temperature takes fit, keep or a number') from error
    else:
        value = temperature
    try:
        request = CalibrationRequest(value, criterion, rate)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if value != 'keep':
        require('export', 'onnx')
    source = dataset_source(dataset, root, split, options)
    with progress_bar() as progress:
        card = calibrate(model, source, output, request, backend=backend, threads=threads,
                         limit=limit, progress=progress)
    OUT.print(f'{output}: temperature {card.temperature:.4g}, threshold {card.threshold:.6g}\n'
              f'{card.threshold_source}', highlight=False)


@cli.command('bench')
@click.argument('model', type=_FILE)
@click.option('--backend', 'backends', multiple=True,
              help='Measure this one; may be given several times. Default: all there are.')
@click.option('--frames', type=click.IntRange(1), default=100, show_default=True,
              help='Frames measured a backend.')
@click.option('--warm-up', type=click.IntRange(0), default=5, show_default=True,
              help='Frames before that are not counted.')
@click.option('--frame-size', 'frame_size_hw', type=SizeType(), default='1024x2048',
              show_default=True, help='Height x width of the camera frames.')
@click.option('--threads', type=click.IntRange(0), default=0, show_default=True,
              help='Threads of the network; 0 takes every core allowed.')
@click.option('--json', 'json_path', type=_FILE, help='Write everything measured here, too.')
def bench_command(model: Path, backends: tuple[str, ...], frames: int, warm_up: int,
                  frame_size_hw: tuple[int, int], threads: int, json_path: Path | None) -> None:
    """Measure MODEL stage by stage on this machine; milliseconds, stages as p50."""
    from dataclasses import asdict

    from anomaly_seg_ros import bench
    from anomaly_seg_ros.evaluate import machine, versions
    from anomaly_seg_ros.files import atomic_write_text
    with progress_bar() as progress:
        results = bench.bench(model, names=backends or None, frames=frames, warm_up=warm_up,
                              frame_size_hw=frame_size_hw, threads=threads, progress=progress)
    header, *rows = bench.table(results)
    table = Table(*header, title=f'{model}, frames of {frame_size_hw[1]}x{frame_size_hw[0]}')
    for row in rows:
        table.add_row(*row)
    OUT.print(table)
    if json_path is not None:
        atomic_write_text(json_path, json.dumps(
            {'model': str(model), 'results': [asdict(result) for result in results],
             'versions': versions(), 'machine': machine()}, indent=1) + '\n')


@cli.command('fetch')
@click.argument('name')
@click.option('--output', 'folder', type=_FILE, default=Path(), help='Folder for the files.')
def fetch_command(name: str, folder: Path) -> None:
    """Download the public checkpoint NAME of models/catalogue.yaml and verify it."""
    from anomaly_seg_ros.fetch import fetch
    with progress_bar() as progress:
        entry = fetch(name, folder,
                      progress=lambda what, done, total: progress(what, done, total or done))
    OUT.print(f'{entry.name} in {folder}', highlight=False)


@cli.command('doctor')
@click.option('--image', 'image_topic', default='/camera/image_raw', show_default=True,
              help='Topic of the camera.')
@click.option('--image-transport', type=click.Choice(['raw', 'compressed']), default='raw',
              show_default=True, help='As the parameter of the node.')
@click.option('--model', type=_FILE, help='Model file. Default: the bundled one.')
@click.option('--input-reliability', type=click.Choice(['best_effort', 'reliable']),
              default='best_effort', show_default=True, help='As the parameter of the node.')
@click.option('--use-sim-time', is_flag=True, help='As the parameter of the node.')
@click.option('--listen', 'listen_s', type=click.FloatRange(0.1), default=3.0,
              show_default=True, metavar='SECONDS', help='How long to wait for frames.')
@backend_options
def doctor_command(image_topic: str, image_transport: str, model: Path | None,
                   input_reliability: str, use_sim_time: bool, listen_s: float, backend: str,
                   threads: int) -> None:
    """Check what usually goes wrong between camera and node, and say what to do."""
    require('ros', 'rclpy')
    from anomaly_seg_ros.ros.doctor import format_checks, run_doctor
    checks = run_doctor(image_topic, image_transport=image_transport, model=model or '',
                        backend=backend, threads=threads, input_reliability=input_reliability,
                        use_sim_time=use_sim_time, listen_s=listen_s)
    click.echo(format_checks(checks))
    if any(check.level == 'ERROR' for check in checks):
        sys.exit(1)


@cli.command()
@click.argument('model', type=_FILE)
@click.option('--json', 'as_json', is_flag=True, help='Print the card as JSON.')
def inspect(model: Path, as_json: bool) -> None:
    """Show the card of MODEL and its graph's inputs and outputs."""
    from anomaly_seg_ros.backends import open_backend
    from anomaly_seg_ros.model_file import load_model_file
    model_file = load_model_file(model)
    if as_json:
        click.echo(json.dumps(json.loads(model_file.card.to_json()), indent=1))
        return
    table = Table(title=str(model), show_header=False)
    for key, value in json.loads(model_file.card.to_json()).items():
        if key == 'palette':
            continue
        table.add_row(key, ', '.join(map(str, value)) if isinstance(value, list) else str(value))
    table.add_row('sha256', model_file.sha256)
    with open_backend(model_file, 'cpu') as backend:
        table.add_row('runs on', ', '.join(f'{k} {v}' for k, v in backend.describe().items()))
    OUT.print(table)


@cli.command('evaluate')
@click.argument('model', type=_FILE)
@click.option('--dataset', type=DatasetName(), required=True,
              help='Name of the data set; "anomaly-seg datasets" lists them.')
@click.option('--root', type=_FILE, required=True, help='Its folder.')
@click.option('--output', type=_FILE, required=True, help='Folder for the results.')
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


@cli.command('metrics')
@click.argument('scores', type=_FILE)
@click.argument('masks', type=_FILE)
@click.option('--output', type=_FILE, required=True, help='Folder for the results.')
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


@cli.command('image-ood')
@click.argument('in_run', type=_FILE)
@click.argument('out_run', type=_FILE)
@click.option('--output', type=_FILE, help='Write the figures to this JSON file, too.')
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


@cli.command('datasets')
def datasets_command() -> None:
    """List the data sets, their splits and where they come from."""
    from anomaly_seg_ros.datasets import DATASETS
    table = Table('name', 'splits', 'from')
    for name, adapter in DATASETS.items():
        table.add_row(name, ', '.join(adapter.splits), adapter.source or 'you')
    OUT.print(table)


@cli.command('make-bag')
@click.option('--dataset', type=DatasetName(),
              help='Name of a data set; "anomaly-seg datasets" lists them.')
@click.option('--root', type=_FILE, help='Folder of the data set.')
@click.option('--split', help='Split of the data set. Default: the first that is there.')
@click.option('--option', 'options', multiple=True, metavar='KEY=VALUE',
              help='Further options of the data set.')
@click.option('--images', type=_FILE, help='A folder of images.')
@click.option('--video', type=_FILE, help='A video file.')
@click.option('--output', type=_FILE, required=True, help='The bag folder to write.')
@click.option('--rate', 'rate_hz', type=click.FloatRange(0, min_open=True), metavar='HZ',
              help='Frames per second. Default: that of the source, else 10.')
@click.option('--storage', type=click.Choice(['mcap', 'sqlite3']), default='mcap',
              show_default=True, help='Storage format of the bag.')
@click.option('--compressed', type=click.Choice(['jpeg', 'png']),
              help='Write CompressedImage. JPEG changes pixels.')
@click.option('--image-topic', default='/camera/image_raw', show_default=True,
              help='Topic of the images.')
@click.option('--overwrite', is_flag=True, help='Replace an existing bag.')
def make_bag_command(dataset: str | None, root: Path | None, split: str | None,
                     options: tuple[str, ...], images: Path | None, video: Path | None,
                     output: Path, rate_hz: float | None, storage: str, compressed: Any,
                     image_topic: str, overwrite: bool) -> None:
    """Record a data set, a folder of images or a video as a rosbag2, with its ground truth."""
    from anomaly_seg_ros.bags import make_bag
    from anomaly_seg_ros.datasets.media import ImageFolder, VideoFile
    from anomaly_seg_ros.datasets.source import FrameSource

    if sum(x is not None for x in (dataset, images, video)) != 1:
        raise click.UsageError('give exactly one of --dataset, --images and --video')
    source: FrameSource
    if dataset is not None:
        if root is None:
            raise click.UsageError('--dataset needs --root')
        source = dataset_source(dataset, root, split, options)
    elif images is not None:
        source = ImageFolder(images)
    else:
        assert video is not None
        source = VideoFile(video)
    with CONSOLE.status(f'writing {output}'):
        summary = make_bag(source, output, rate_hz=rate_hz, storage=storage,
                           compressed=compressed, image_topic=image_topic, overwrite=overwrite)
    OUT.print(f'{summary.path}: {summary.frames} frames at {rate_hz or source.rate_hz or 10:g} Hz '
              f'({summary.storage}), {summary.ground_truth} anomaly masks, {summary.labels} label '
              f'images; topics {", ".join(summary.topics)}', highlight=False, soft_wrap=True)


@cli.command('replay')
@click.argument('bag', type=_FILE)
@click.option('--model', type=_FILE, help='Model file. Default: the bundled one.')
@click.option('--output', type=_FILE, required=True, help='Folder for the results.')
@click.option('--through-node', is_flag=True, help='Through the live node, over DDS.')
@click.option('--realtime', is_flag=True,
              help='With --through-node: at the pace of the bag; drops are counted.')
@click.option('--image-topic', help='Topic of the images. Default: the only one.')
@click.option('--ground-truth-topic', help='Topic of the anomaly masks (mono8: 0, 1, 255).')
@click.option('--limit', type=click.IntRange(1), help='Take only the first N frames.')
@click.option('--save-scores', is_flag=True, help='Keep score maps and masks as .npy.')
@click.option('--track', type=click.Choice(['anomaly', 'obstacle']), default='anomaly',
              show_default=True, help='Sizes of the component metrics.')
@click.option('--storage', type=click.Choice(['mcap', 'sqlite3']), default='mcap',
              show_default=True, help='Storage format of the result bag.')
@click.option('--result-topics', metavar='LIST',
              default='image,labels,anomaly,anomaly_u8,obstacle_mask,overlay', show_default=True,
              help='What the result bag holds; "none" writes no result bag.')
@backend_options
@obstacle_options
def replay_command(bag: Path, model: Path | None, output: Path, through_node: bool,
                   realtime: bool, image_topic: str | None, ground_truth_topic: str | None,
                   limit: int | None, save_scores: bool, track: str, storage: str,
                   result_topics: str, backend: str, threads: int, threshold: float | None,
                   minimum_area_px: int, region: str) -> None:
    """Run every frame of BAG through the pipeline or the live node; score and record it."""
    from anomaly_seg_ros.replay import replay, ReplayOptions, RESULT_TOPICS
    topics = () if result_topics == 'none' else tuple(result_topics.split(','))
    unknown = [name for name in topics if name not in RESULT_TOPICS]
    if unknown:
        raise click.UsageError(f'--result-topics: no {", ".join(unknown)}; choose of '
                               f'{", ".join(RESULT_TOPICS)}, or none')
    if realtime and not through_node:
        raise click.UsageError('--realtime needs --through-node; offline every frame is answered')
    model = bundled_model() if model is None else model
    options = ReplayOptions(
        backend=backend, threads=threads, through_node=through_node, realtime=realtime,
        settings=obstacle_settings(model, threshold, minimum_area_px, region),
        image_topic=image_topic, ground_truth_topic=ground_truth_topic, limit=limit,
        save_scores=save_scores, storage=storage, result_topics=topics, track=track)
    with progress_bar() as progress:
        metrics = replay(bag, model, output, options, progress=progress)
    print_metrics(metrics)
    print_path(output / 'metrics.json')


@cli.command('compare')
@click.argument('runs', nargs=-1, required=True, type=_FILE)
@click.option('--output', type=_FILE, required=True, help='Folder for the comparison.')
@click.option('--resamples', type=click.IntRange(100), default=10000, show_default=True,
              help='Resamples of the paired bootstrap over frames.')
@click.option('--level', type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.95,
              show_default=True, help='Level of the confidence intervals.')
@click.option('--seed', type=int, default=0, show_default=True, help='Seed of the bootstrap.')
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


@cli.command('submit')
@click.argument('scores', nargs=-1, required=True, type=_FILE)
@click.option('--benchmark', required=True,
              help='Data set of SegmentMeIfYouCan: AnomalyTrack-all, ObstacleTrack-all, ...')
@click.option('--method', required=True, help='Name of the method.')
@click.option('--output', type=_FILE, required=True, help='Folder for the submission.')
def submit_command(scores: tuple[Path, ...], benchmark: str, method: str, output: Path) -> None:
    """Write score maps (folders SCORES of FRAME.npy) in SegmentMeIfYouCan's HDF5 layout."""
    require('submission', 'h5py')
    from anomaly_seg_ros.submission import write_smiyc_submission
    written = write_smiyc_submission(scores, output, method=method, dataset=benchmark)
    OUT.print(f'{len(written)} files in {written[0].parent}', highlight=False)


def bundled_model() -> Path:
    """Return the path of the bundled model."""
    from anomaly_seg_ros.resources import resource
    return resource('models/demo.onnx')


def dataset_source(name: str, root: Path, split: str | None, options: tuple[str, ...],
                   keep_going: bool = False) -> Any:
    """Open a data set with the options of the command line."""
    from anomaly_seg_ros.datasets import DATASETS, open_dataset
    given: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition('=')
        if not equals:
            raise click.UsageError(f'--option takes KEY=VALUE, got {option!r}')
        given[key] = value
    if split is not None:
        given['split'] = split
    if keep_going:
        given['keep_going'] = True
    known = signatures.signature(DATASETS[name]).parameters.keys() - {'root', 'keep_going'}
    wrong = sorted(given.keys() - known - {'keep_going'})
    if wrong:
        raise click.UsageError(f'{name} has no option {", ".join(wrong)}; it has '
                               f'{", ".join(sorted(known))}')
    return open_dataset(name, root, **given)


def obstacle_settings(model: Path, threshold: float | None, minimum_area_px: int,
                      region: str) -> Any:
    """Return the settings, with the card's threshold where none is given."""
    from anomaly_seg_ros.model_file import load_model_file
    from anomaly_seg_ros.obstacles import ObstacleSettings
    if threshold is None:
        threshold = load_model_file(model).card.threshold
    return ObstacleSettings(threshold, minimum_area_px, region)


def print_metrics(metrics: dict[str, Any]) -> None:
    """Print the headline figures as a table, and before it what was left out."""
    from anomaly_seg_ros.report import summary_table
    problems = metrics['run'].get('problems') or ()
    if problems:
        CONSOLE.print(f'{len(problems)} problems; these frames were left out:', style='yellow')
        for problem in problems:
            CONSOLE.print(f'  {problem}', highlight=False, markup=False, soft_wrap=True)
    table = Table(show_header=False)
    for name, value in summary_table(metrics):
        table.add_row(name, value)
    OUT.print(table)


def print_path(path: Path) -> None:
    """Print where the results are, on one line."""
    OUT.print(f'\n{path}', highlight=False, markup=False, soft_wrap=True)


def require(extra: str, *modules: str) -> None:
    """Raise UserError unless the modules of an extra are installed."""
    import importlib.util
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'this command needs {", ".join(missing)}: '
                        f'pip install "anomaly_seg_ros[{extra}]"')


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Give a function (what, done, total) that draws one bar for each ``what``."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn
    with Progress(TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(),
                  TimeRemainingColumn(), console=CONSOLE) as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield show


def main() -> None:
    """Run the command line: exit code 0 done, 1 the run failed, 2 wrong usage."""
    # Damaged files get a message of ours; OpenCV's warnings beside it only confuse.
    os.environ.setdefault('OPENCV_LOG_LEVEL', 'ERROR')
    try:
        cli.main(prog_name='anomaly-seg', standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        CONSOLE.print('stopped; what was written until now is kept')
        sys.exit(1)
    except UserError as error:
        CONSOLE.print(f'error: {error}', style='red', highlight=False, markup=False,
                      soft_wrap=True)
        sys.exit(1)


if __name__ == '__main__':
    main()
