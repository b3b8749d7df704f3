# SPDX-License-Identifier: Apache-2.0
"""Commands that run the node, and those that make and replay bags."""

from pathlib import Path
import sys
from typing import Any

from anomaly_seg_ros.commands.options import (
    backend_options, bundled_model, CONSOLE, DATASET, FILE, frame_source, obstacle_options,
    obstacle_settings, OUT, print_metrics, print_path, progress_bar)
from anomaly_seg_ros.extras import require
import click
from rich.text import Text


@click.command()
@click.option('--output', type=FILE, default=Path('demo_output'), show_default=True,
              help='Folder for bag, results, pictures and report.')
@click.option('--frames', type=click.IntRange(2), default=60, show_default=True,
              help='Length of the drive.')
@click.option('--seed', type=click.IntRange(0), default=23, show_default=True,
              help='Seed of the drive.')
@click.option('--model', type=FILE, help='Model file. Default: the bundled one.')
def demo(output: Path, frames: int, seed: int, model: Path | None) -> None:
    """Synthetic drive -> bag -> the real node over DDS -> metrics, latency, report."""
    require('ros', 'rclpy')
    from anomaly_seg_ros.demo import run_demo
    with progress_bar() as progress:
        result = run_demo(output, frames=frames, seed=seed, model=model, progress=progress)
    print_metrics(result.metrics)
    OUT.print(f'\nreport    {output / "report.html"}\npictures  {output / "pictures"}\n'
              f'bag       {result.bag}\nresults   {output / "result_bag"}', highlight=False,
              soft_wrap=True)


@click.command('make-bag')
@click.option('--dataset', type=DATASET,
              help='Name of a data set; "anomaly-seg datasets" lists them.')
@click.option('--root', type=FILE, help='Folder of the data set.')
@click.option('--split', help='Split of the data set. Default: the first that is there.')
@click.option('--option', 'options', multiple=True, metavar='KEY=VALUE',
              help='Further options of the data set.')
@click.option('--images', type=FILE, help='A folder of images.')
@click.option('--video', type=FILE, help='A video file.')
@click.option('--output', type=FILE, required=True, help='The bag folder to write.')
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
    from anomaly_seg_ros.bags import (
        check_recording, DEFAULT_RATE_HZ, GROUND_TRUTH_TOPIC, LABELS_TOPIC, make_bag)

    if sum(x is not None for x in (dataset, images, video)) != 1:
        raise click.UsageError('give exactly one of --dataset, --images and --video')
    source = frame_source(dataset, root, split, options, images, video)
    rate_hz = rate_hz or source.rate_hz or DEFAULT_RATE_HZ
    try:
        check_recording(len(source), rate_hz, (image_topic, GROUND_TRUTH_TOPIC, LABELS_TOPIC))
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    with CONSOLE.status(Text(f'writing {output}')):
        summary = make_bag(source, output, rate_hz=rate_hz, storage=storage,
                           compressed=compressed, image_topic=image_topic, overwrite=overwrite)
    OUT.print(f'{summary.path}: {summary.frames} frames at {rate_hz:g} Hz '
              f'({summary.storage}), {summary.ground_truth} anomaly masks, {summary.labels} label '
              f'images; topics {", ".join(summary.topics)}', highlight=False, soft_wrap=True)


@click.command('replay')
@click.argument('bag', type=FILE)
@click.option('--model', type=FILE, help='Model file. Default: the bundled one.')
@click.option('--output', type=FILE, required=True, help='Folder for the results.')
@click.option('--through-node', is_flag=True, help='Through the live node, over DDS.')
@click.option('--realtime', is_flag=True,
              help='With --through-node: at the pace of the bag; drops are counted.')
@click.option('--image-topic', help='Topic of the images. Default: the only one.')
@click.option('--ground-truth-topic',
              help='Topic of the anomaly masks (mono8: 0, 1, 255), which is then no topic of '
                   'labels, whatever its name; "none" leaves masks and labels aside.')
@click.option('--limit', type=click.IntRange(1), help='Take only the first N frames.')
@click.option('--save-scores', is_flag=True, help='Keep score maps and masks as .npy.')
@click.option('--track', type=click.Choice(['anomaly', 'obstacle']),
              help='Sizes of the component metrics. Default: those of the recorded data set, else '
                   'anomaly.')
@click.option('--storage', type=click.Choice(['mcap', 'sqlite3']), default='mcap',
              show_default=True, help='Storage format of the result bag.')
@click.option('--result-topics', metavar='LIST',
              default='image,labels,anomaly,anomaly_u8,obstacle_mask,overlay', show_default=True,
              help='What the result bag holds; "none" writes no result bag.')
@backend_options
@obstacle_options
def replay_command(bag: Path, model: Path | None, output: Path, through_node: bool,
                   realtime: bool, image_topic: str | None, ground_truth_topic: str | None,
                   limit: int | None, save_scores: bool, track: str | None, storage: str,
                   result_topics: str, backend: str, threads: int, threshold: float | None,
                   minimum_area_px: int, region: str) -> None:
    """Run every frame of BAG through the pipeline or the live node; score and record it."""
    from anomaly_seg_ros.bags import NO_TOPIC
    from anomaly_seg_ros.replay import replay, ReplayOptions, RESULT_TOPICS
    topics = () if result_topics == 'none' else tuple(result_topics.split(','))
    unknown = [name for name in topics if name not in RESULT_TOPICS]
    if unknown:
        raise click.UsageError(f'--result-topics: no {", ".join(unknown)}; choose of '
                               f'{", ".join(RESULT_TOPICS)}, or none')
    if realtime and not through_node:
        raise click.UsageError('--realtime needs --through-node; offline every frame is answered')
    if through_node:
        require('ros', 'rclpy')
    model = bundled_model() if model is None else model
    options = ReplayOptions(
        backend=backend, threads=threads, through_node=through_node, realtime=realtime,
        settings=obstacle_settings(model, threshold, minimum_area_px, region),
        image_topic=image_topic, ground_truth_topic=ground_truth_topic,
        labels_topic=NO_TOPIC if ground_truth_topic == NO_TOPIC else None, limit=limit,
        save_scores=save_scores, storage=storage, result_topics=topics, track=track)
    with progress_bar() as progress:
        metrics = replay(bag, model, output, options, progress=progress)
    print_metrics(metrics)
    print_path(output / 'metrics.json')


@click.command('doctor')
@click.option('--image', 'image_topic', default='/camera/image_raw', show_default=True,
              help='Topic of the camera.')
@click.option('--image-transport', type=click.Choice(['raw', 'compressed']), default='raw',
              show_default=True, help='As the parameter of the node.')
@click.option('--model', type=FILE, help='Model file. Default: the bundled one.')
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
    from anomaly_seg_ros.ros.doctor import check_topic_name, format_checks, run_doctor
    try:
        check_topic_name(image_topic)
    except ValueError as error:
        raise click.UsageError(f'--image: {error}') from error
    checks = run_doctor(image_topic, image_transport=image_transport, model=model or '',
                        backend=backend, threads=threads, input_reliability=input_reliability,
                        use_sim_time=use_sim_time, listen_s=listen_s)
    click.echo(format_checks(checks))
    if any(check.level == 'ERROR' for check in checks):
        sys.exit(1)
