# SPDX-License-Identifier: Apache-2.0
"""Commands about model files: export, engines, calibration, timing, download, inspection."""

import json
from pathlib import Path
from typing import Any

from anomaly_seg_ros.commands.options import (
    backend_options, CONSOLE, DATASET, dataset_source, FILE, FiniteFloat, FiniteRange,
    frame_source, NETWORK, OUT, progress_bar, SizeType, THREADS, ThreeFloats)
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.extras import require
import click
from click.core import ParameterSource
from rich.table import Table

# Options of export by what they need.
ONNX_ONLY = ('logits', 'mean', 'std', 'channel_order', 'classes', 'void_index', 'upsample')
INT8_ONLY = ('gate_dataset', 'gate_root', 'maximum_drop', 'int8_for')


@click.command('export')
@click.argument('network', type=NETWORK)
@click.option('--weights', type=FILE, required=True, multiple=True,
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
@click.option('--frame-channel-order', type=click.Choice(['rgb', 'bgr']), default='rgb',
              show_default=True, help='--input-variant device: order of the channels in the '
              'camera frames. Frames of the other order are converted on the CPU.')
@click.option('--resize', type=click.Choice(['antialiased', 'bilinear']),
              help='How frames are scaled to the input size. Default: as in the training of '
                   'NETWORK, antialiased for all but roadnet.')
@click.option('--temperature', type=FiniteRange(0, min_open=True), default=1.0,
              show_default=True, help='Divides the logits before the score.')
@click.option('--threshold', type=FiniteFloat(),
              help='Decision threshold for the card. Default: provisional, from the frames.')
@click.option('--frames', type=click.Path(exists=True, file_okay=False, path_type=Path),
              help='Folder of images: 20 of them, evenly spread, check the export, and 64 '
                   'calibrate int8. Default: synthetic frames.')
@click.option('--gate-dataset', type=DATASET,
              help='int8: data set whose metrics may not fall too far.')
@click.option('--gate-root', type=FILE, help='int8: its folder.')
@click.option('--maximum-drop', type=FiniteRange(0, 1), default=0.02, show_default=True,
              help='int8: by how much AP and mIoU may fall, as a fraction.')
@click.option('--int8-for', type=click.Choice(['onnxruntime', 'openvino', 'tensorrt']),
              default='onnxruntime', show_default=True,
              help='int8: what the file is best for. TensorRT runs no other.')
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
@click.option('--output', type=FILE, required=True, help='The .onnx file to write.')
def export_command(network: str, weights: tuple[Path, ...], output: Path,
                   frames: Path | None, input_size_hw: tuple[int, int] | None,
                   gate_dataset: str | None, gate_root: Path | None,
                   **options: Any) -> None:
    """
    Export NETWORK with its score to one model file, kept only if it agrees with PyTorch.

    NETWORK is erfnet, segformer, mask2former, eomt, ...; "onnx" takes any ONNX graph that gives
    logits.
    """
    _refuse_idle_options(network, options['precision'], options['input_variant'])
    require('export', 'torch', 'onnx', 'onnxscript')
    from anomaly_seg_ros.datasets.media import ImageFolder
    from anomaly_seg_ros.export import export_model, ExportRequest, most_frames, spread

    images = None
    if frames is not None:
        folder = ImageFolder(frames)
        chosen = spread(len(folder), most_frames(options['precision']))
        images = (folder[index].image_rgb for index in chosen)
    one = weights[0] if len(weights) == 1 else weights
    of_onnx = {name: options.pop(name) for name in ONNX_ONLY}
    with CONSOLE.status('exporting and comparing with the reference'):
        if network == 'onnx':
            card = _export_onnx(one, input_size_hw, options, of_onnx, output, images)
        else:
            gate = None if gate_dataset is None or gate_root is None else dataset_source(
                gate_dataset, gate_root, None, ())
            card = export_model(
                ExportRequest(network=network, weights=one,
                              input_size_hw=input_size_hw or (512, 1024), **options),
                output, frames=images, gate=gate)
    parity = card.parity
    OUT.print(f'{output}: {card.network}, {card.score}, {card.precision}, input '
              f'{card.input_size_hw[0]}x{card.input_size_hw[1]}', highlight=False, soft_wrap=True)
    OUT.print(f'against {parity["reference"]} on {parity["frames"]} frames: score error at most '
              f'{parity["max_score_error"]:.1e}, labels differ on {parity["label_mismatch"]:.1e} '
              'of the pixels', highlight=False, soft_wrap=True)
    OUT.print(f'threshold {card.threshold:.6g} ({card.threshold_source})', highlight=False,
              soft_wrap=True)


def _refuse_idle_options(network: str, precision: str, input_variant: str) -> None:
    """Raise UsageError for options that were given and would not be looked at."""
    context = click.get_current_context()
    for applies, needed, names in (
            (network == 'onnx', 'with NETWORK onnx', ONNX_ONLY),
            (precision == 'int8', 'with --precision int8', INT8_ONLY),
            (input_variant == 'device', 'with --input-variant device',
             ('frame_size_hw', 'frame_channel_order'))):
        idle = [parameter.opts[0] for parameter in context.command.params
                if parameter.name in names and context.get_parameter_source(parameter.name)
                is ParameterSource.COMMANDLINE]
        if idle and not applies:
            raise click.UsageError(f'{", ".join(idle)} only {needed}')


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
        except UnicodeDecodeError as error:
            raise UserError(f'{of_onnx["classes"]}: expected UTF-8 text with one class name a '
                            f'line, byte {error.start} is none. Store it as UTF-8.') from error
        classes = tuple(line.strip() for line in text.splitlines() if line.strip())
    return export_onnx(OnnxExportRequest(
        weights=weights, input_size_hw=input_size_hw, score=options['score'],
        temperature=options['temperature'], threshold=options['threshold'],
        resize=options['resize'] or 'antialiased', name=options['name'],
        **{**of_onnx, 'classes': classes}), output, frames=images)


@click.command('build-engine')
@click.argument('model', type=FILE)
@click.option('--output', type=FILE, help='The .engine to write. Default: beside the model.')
@click.option('--workspace', 'workspace_mib', type=click.IntRange(1), metavar='MIB',
              help='GPU memory a layer may use, in MiB.')
@click.option('--timing-cache', type=FILE, help='File of kernel timings to read and extend.')
@click.option('--hardware-compatibility', default='none', show_default=True,
              type=click.Choice(['none', 'ampere+', 'same-compute-capability']),
              help='GPUs that the engine runs on.')
@click.option('--optimization-level', type=click.IntRange(0, 5),
              help='How long TensorRT searches.')
@click.option('--device', type=click.IntRange(0), default=0, show_default=True,
              help='Index of the CUDA device that the engine is for.')
def build_engine_command(model: Path, output: Path | None, workspace_mib: int | None,
                         timing_cache: Path | None, hardware_compatibility: str,
                         optimization_level: int | None, device: int) -> None:
    """Build the TensorRT engine of MODEL on this machine's GPU."""
    from anomaly_seg_ros.engine import build_engine, engine_path, EngineSettings
    from anomaly_seg_ros.model_file import load_model_file
    model_file = load_model_file(model)
    with progress_bar() as progress:
        engine = build_engine(
            model_file, output or engine_path(model_file),
            EngineSettings(workspace_mib=workspace_mib, timing_cache=timing_cache,
                           hardware_compatibility=hardware_compatibility,
                           optimization_level=optimization_level, device=device),
            progress=progress)
    OUT.print(f'{engine.path}', highlight=False, soft_wrap=True)


@click.command('calibrate')
@click.argument('model', type=FILE)
@click.option('--images', type=FILE,
              help='A folder of images of your own camera in which nothing is an anomaly.')
@click.option('--dataset', type=DATASET,
              help='Or the name of a data set; "anomaly-seg datasets" lists them.')
@click.option('--root', type=FILE, help='Folder of the data set.')
@click.option('--split', help='Split of the data set. Default: the first that is there.')
@click.option('--option', 'options', multiple=True, metavar='KEY=VALUE',
              help='Further options of the data set.')
@click.option('--temperature', metavar='fit|keep|NUMBER',
              help='Default: fit where there are labels, and logits on which the score depends; '
                   'else keep.')
@click.option('--criterion', type=click.Choice(['fpr', 'tpr', 'best-f1']), default='fpr',
              show_default=True, help='What the threshold is chosen by.')
@click.option('--rate', type=click.FloatRange(0, 1, min_open=True, max_open=True),
              help='Fraction of pixels at or above the threshold: of the in-distribution ones for '
                   'fpr, of the anomalous ones for tpr. Default: 0.01 for fpr, 0.95 for tpr.')
@click.option('--limit', type=click.IntRange(1), help='Take only the first N frames.')
@click.option('--output', type=FILE, required=True, help='The model file to write.')
@backend_options
def calibrate_command(model: Path, images: Path | None, dataset: str | None, root: Path | None,
                      split: str | None, options: tuple[str, ...], temperature: str | None,
                      criterion: str, rate: float | None, limit: int | None, output: Path,
                      backend: str, threads: int) -> None:
    """Write MODEL with temperature and threshold set on frames: your own or a data set's."""
    from anomaly_seg_ros.calibration import calibrate, CalibrationRequest
    if (dataset is None) == (images is None):
        raise click.UsageError('give one of --images and --dataset')
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
    source = frame_source(dataset, root, split, options, images)
    with progress_bar() as progress:
        card = calibrate(model, source, output, request, backend=backend, threads=threads,
                         limit=limit, progress=progress)
    OUT.print(f'{output}: temperature {card.temperature:.4g}, threshold {card.threshold:.6g}\n'
              f'{card.threshold_source}', highlight=False, soft_wrap=True)


@click.command('bench')
@click.argument('model', type=FILE)
@click.option('--backend', 'backends', multiple=True,
              help='Measure this one; may be given several times. Default: all there are.')
@click.option('--frames', type=click.IntRange(1), default=100, show_default=True,
              help='Frames measured a backend.')
@click.option('--warm-up', type=click.IntRange(0), default=5, show_default=True,
              help='Frames before that are not counted.')
@click.option('--frame-size', 'frame_size_hw', type=SizeType(),
              help='Height x width of the camera frames. Default: what a device model is made '
                   'for, else 1024x2048.')
@click.option('--threads', type=THREADS, default=0, show_default=True,
              help='Threads of the network; 0 takes every core allowed.')
@click.option('--json', 'json_path', type=FILE, help='Write everything measured here, too.')
def bench_command(model: Path, backends: tuple[str, ...], frames: int, warm_up: int,
                  frame_size_hw: tuple[int, int] | None, threads: int,
                  json_path: Path | None) -> None:
    """Measure MODEL stage by stage on this machine; milliseconds, stages as p50."""
    from dataclasses import asdict

    from anomaly_seg_ros import bench
    from anomaly_seg_ros.evaluate import machine, versions
    from anomaly_seg_ros.files import atomic_write_text
    with progress_bar() as progress:
        results = bench.bench(model, names=backends or None, frames=frames, warm_up=warm_up,
                              frame_size_hw=frame_size_hw, threads=threads, progress=progress)
    sizes = {'{1}x{0}'.format(*result.frame_size_hw) for result in results
             if result.reason is None}
    _print_bench(bench.table(results), ', frames of '.join((str(model), *sizes)))
    if json_path is not None:
        atomic_write_text(json_path, json.dumps(
            {'model': str(model), 'results': [asdict(result) for result in results],
             'versions': versions(), 'machine': machine()}, indent=1) + '\n')
    if not sizes:
        raise UserError('nothing was measured; the reasons are above')


def _print_bench(rows: list[list[str]], title: str) -> None:
    # A column for each backend: 80 characters hold all figures, and what is too wide is folded.
    columns = [row for row in rows if len(row) == len(rows[0])]
    OUT.print(title, highlight=False, soft_wrap=True)
    table = Table()
    for index, column in enumerate(columns):
        table.add_column(column[0], overflow='fold', no_wrap=not index,
                         justify='right' if index else 'left')
    for figures in zip(*(column[1:] for column in columns), strict=True):
        table.add_row(*figures)
    if len(columns) > 1:
        OUT.print(table)
    for row in rows:
        if row not in columns:
            OUT.print(': '.join(row), highlight=False, soft_wrap=True)


@click.command('fetch')
@click.argument('name')
@click.option('--output', 'folder', type=FILE, show_default='NAME',
              help='Folder for the files; each checkpoint needs its own.')
def fetch_command(name: str, folder: Path | None) -> None:
    """
    Download the public checkpoint NAME of models/catalogue.yaml and verify it.

    Prints the command that exports it.
    """
    from anomaly_seg_ros.fetch import fetch
    folder = folder or Path(name)
    with progress_bar() as progress:
        entry = fetch(name, folder,
                      progress=lambda what, done, total: progress(what, done, total or done))
    OUT.print(f'{entry.name} in {folder}. To export it:', highlight=False, soft_wrap=True)
    click.echo(entry.export_command(folder))


@click.command()
@click.argument('model', type=FILE)
@click.option('--json', 'as_json', is_flag=True, help='Print the card as JSON.')
def inspect(model: Path, as_json: bool) -> None:
    """Show the card of MODEL and its graph's inputs and outputs."""
    from anomaly_seg_ros.backends import open_backend
    from anomaly_seg_ros.backends.tensorrt import TensorrtBackend
    from anomaly_seg_ros.model_file import load_model_file
    from anomaly_seg_ros.ports import input_port, output_ports
    model_file = load_model_file(model)
    if as_json:
        click.echo(json.dumps(json.loads(model_file.card.to_json()), indent=1))
        return
    table = Table(title=str(model), show_header=False)
    table.add_column()
    table.add_column(overflow='fold')  # digests are copied
    for key, value in json.loads(model_file.card.to_json()).items():
        if key == 'palette':
            continue
        table.add_row(key, ', '.join(map(str, value)) if isinstance(value, list) else str(value))
    table.add_row('input', str(input_port(model_file.card)))
    table.add_row('outputs', ', '.join(map(str, output_ports(model_file.card))))
    engine = model.suffix == '.engine'
    table.add_row('sha256 of the .onnx' if engine else 'sha256', model_file.sha256)
    reason = TensorrtBackend.unavailable(model_file) if engine else None
    try:
        if reason is not None:  # no fault of the file: it may be another machine's
            table.add_row('does not run here', reason)
        else:
            with open_backend(model_file, 'tensorrt' if engine else 'cpu') as backend:
                table.add_row('runs on',
                              ', '.join(f'{k} {v}' for k, v in backend.describe().items()))
    finally:
        OUT.print(table)
