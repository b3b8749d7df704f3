# SPDX-License-Identifier: Apache-2.0
"""Run a recorded bag through the pipeline, or through the live node, and score it."""

from collections.abc import Iterator, Sequence
import contextlib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from anomaly_seg_ros.backends import open_backend
from anomaly_seg_ros.bags import BagFrame, BagReader, read_bag, ResultBag
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.evaluate import (
    Answer, answer_offline, Progress, Recorder, RESULT_BAG, RunInfo)
from anomaly_seg_ros.images import decode_message
from anomaly_seg_ros.model_file import load_model_file, ModelFile
from anomaly_seg_ros.obstacles import ObstacleSettings, settings_for
from anomaly_seg_ros.pipeline import BadOutput, Pipeline
from anomaly_seg_ros.visualize import anomaly_u8, overlay

RESULT_TOPICS = ('image', 'labels', 'anomaly', 'anomaly_u8', 'obstacle_mask', 'overlay')


@dataclass(frozen=True)
class ReplayOptions:
    """
    How a bag is replayed.

    Attributes
    ----------
    backend, threads
        Which backend, and its threads (0: as many as there are cores).
    settings
        Threshold, minimum area and region; None takes the card's threshold.
    through_node
        Through the live node in a process of its own, over DDS, instead of the pipeline here.
    realtime
        With ``through_node``: publish at the bag's own pace and let the node drop what it cannot
        hold, instead of one frame after the other.
    image_topic, ground_truth_topic, labels_topic
        Topics of the bag; None takes the only one that fits.
    result_topics
        What the result bag holds, of ``RESULT_TOPICS``; empty writes no result bag.
    storage
        Storage of the result bag, ``mcap`` or ``sqlite3``.
    limit
        Take only this many frames, from the first.
    save_scores
        Keep the score maps and masks.
    track
        Component metrics of the ``anomaly`` or ``obstacle`` track; None takes the bag's own.

    """

    backend: str = 'cpu'
    threads: int = 0
    settings: ObstacleSettings | None = None
    through_node: bool = False
    realtime: bool = False
    image_topic: str | None = None
    ground_truth_topic: str | None = None
    labels_topic: str | None = None
    result_topics: Sequence[str] = RESULT_TOPICS
    storage: str = 'mcap'
    limit: int | None = None
    save_scores: bool = False
    track: str | None = None


def replay(bag: Path | str, model: Path | str, output: Path | str,
           options: ReplayOptions | None = None,
           progress: Progress | None = None) -> dict[str, Any]:
    """
    Answer every frame of a bag; write metrics.json, per_frame.csv, report.html, result_bag.

    Returns the content of metrics.json. Offline the result is deterministic, and equal to
    ``evaluate`` on the frames that the bag was made from; through the node it is equal too, as
    long as no frame is dropped (``realtime`` may drop, and counts).

    Raises
    ------
    UserError
        If bag or model cannot be read, a frame is damaged, or the node fails; what was computed
        until then stays in the output folder.

    """
    options = options or ReplayOptions()
    unknown = sorted(set(options.result_topics) - set(RESULT_TOPICS))
    if unknown:
        raise UserError(f'unknown result topics {unknown}; choose of {", ".join(RESULT_TOPICS)}')
    if options.realtime and not options.through_node:
        raise UserError('--realtime needs --through-node; offline, every frame is answered')
    model_file = load_model_file(model)
    settings = settings_for(model_file.card, options.settings)
    reader = read_bag(bag, image_topic=options.image_topic,
                      ground_truth_topic=options.ground_truth_topic,
                      labels_topic=options.labels_topic)
    total = min(len(reader), options.limit or len(reader))
    for each in (RESULT_BAG, f'{RESULT_BAG}.incomplete'):
        if Path(bag).resolve().is_relative_to((Path(output) / each).resolve()):
            raise UserError(f'{bag}: this bag lies where the results go and would be lost. Choose '
                            'another --output.')
    recorder = Recorder(output, model_file.card, save_scores=options.save_scores,
                        track=options.track or reader.track, class_set=reader.class_set)
    counts: dict[str, Any] = {'dropped': 0, 'backend': {}}
    answers = (_through_node if options.through_node else _offline)(
        reader, model_file, settings, options, counts)
    with recorder.keeping(), _result_bag(recorder.output, options) as results:
        for frame, answer in answers:
            recorder.add(frame, answer)
            if results is not None:
                _write_results(results, frame, answer, model_file, options.result_topics)
            if progress is not None:
                progress('frames', recorder.frames, total)
    run = RunInfo(model_file, f'{bag} ({reader.image_topic})', counts.pop('backend'), settings,
                  {'split': reader.split, 'through_node': options.through_node,
                   'realtime': options.realtime, **counts})
    return recorder.finish(run, dropped=counts['dropped'], title=Path(bag).name,
                           progress=progress)


def _offline(reader: BagReader, model: ModelFile, settings: ObstacleSettings,
             options: ReplayOptions, counts: dict[str, Any]) -> Iterator[tuple[BagFrame, Answer]]:
    with open_backend(model, options.backend, threads=options.threads) as device:
        counts['backend'] = device.describe()
        pipeline = Pipeline(device, settings)
        warm = None
        for frame in islice(reader, options.limit):
            size_hw = frame.image_rgb.shape[:2]
            try:
                if size_hw != warm:
                    warm = size_hw
                    pipeline.warm_up(size_hw)
                yield frame, _answer(pipeline, frame)
            except (UserError, BadOutput) as error:
                raise UserError(f'frame {frame.frame_id}: {error}') from error


def _answer(pipeline: Pipeline, frame: BagFrame) -> Answer:
    """Run the pipeline on the frame as the node sees it: decoded from its message."""
    image = decode_message(frame.message, pipeline.card.reduced_hw)
    return answer_offline(pipeline, image.array, image.channel_order, image.full_size_hw)


def _through_node(reader: BagReader, model: ModelFile, settings: ObstacleSettings,
                  options: ReplayOptions, counts: dict[str, Any]
                  ) -> Iterator[tuple[BagFrame, Answer]]:
    from anomaly_seg_ros.ros.client import run_frames_through_node

    # Frames that are on their way, by stamp, as sent; an answer to a later one means the earlier
    # are lost.
    waiting: dict[int, BagFrame] = {}

    def sent() -> Iterator[BagFrame]:
        for frame in islice(reader, options.limit):
            waiting[frame.stamp_ns or 0] = frame
            yield frame

    parameters = {'backend': options.backend, 'threads': options.threads,
                  'threshold': settings.threshold, 'minimum_area_px': settings.minimum_area_px,
                  'region': settings.region, 'image_transport': reader.image_transport}
    for answer in run_frames_through_node(sent(), model=model.path, parameters=parameters,
                                          realtime=options.realtime):
        if answer.stamp_ns not in waiting:
            raise UserError(f'the node answered with stamp {answer.stamp_ns} ns, which no frame '
                            'of the bag has (or twice)')
        while (stamp_ns := next(iter(waiting))) != answer.stamp_ns:
            del waiting[stamp_ns]
            counts['dropped'] += 1
        frame = waiting.pop(answer.stamp_ns)
        counts['backend'] = answer.backend
        if answer.labels is None or answer.anomaly is None or answer.mask is None:
            raise UserError(f'frame {frame.frame_id}: the node did not publish labels, anomaly '
                            'and obstacle mask, all three')
        yield frame, Answer(answer.labels, answer.anomaly, answer.mask, answer.obstacles,
                            answer.latency_ms)
    counts['dropped'] += len(waiting)


def _result_bag(output: Path, options: ReplayOptions
                ) -> 'contextlib.AbstractContextManager[ResultBag | None]':
    if not options.result_topics:
        return contextlib.nullcontext()
    return ResultBag(output / RESULT_BAG, options.storage, overwrite=True)


def _write_results(results: ResultBag, frame: BagFrame, answer: Answer, model: ModelFile,
                   topics: Sequence[str]) -> None:
    card = model.card
    makers = {
        'image': lambda: frame.image_rgb,
        'labels': lambda: answer.labels,
        'anomaly': lambda: answer.anomaly,
        'anomaly_u8': lambda: anomaly_u8(answer.anomaly, card.score_range),
        'obstacle_mask': lambda: answer.mask,
        'overlay': lambda: overlay(frame.image_rgb, answer.labels, answer.anomaly, answer.mask,
                                   card.palette, card.score_range)}
    images = {'image_rgb' if name == 'image' else name: makers[name]() for name in topics}
    results.write(frame.stamp_ns or 0, frame.header_frame_id, **images)
