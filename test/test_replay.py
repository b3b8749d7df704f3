# SPDX-License-Identifier: Apache-2.0
"""Replays give the figures of evaluate, offline and through the live node."""

import csv
from pathlib import Path
from typing import Any

from anomaly_seg_ros.bags import make_bag, read_bag
from anomaly_seg_ros.datasets import open_dataset, VideoFile
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.evaluate import evaluate
from anomaly_seg_ros.replay import replay, ReplayOptions
import numpy as np
import pytest

FIGURES = ('pixel', 'components', 'compat', 'segmentation')


def figures(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of metrics.json that must not depend on the way."""
    return {name: metrics[name] for name in FIGURES}


@pytest.mark.parametrize('storage', ['mcap', 'sqlite3'])
def test_replay_equals_evaluate_offline_and_through_the_node(
        tiny_model: Path, small_benchmark: Path, tmp_path: Path, storage: str) -> None:
    """Equal to the last digit, every frame answered, whichever way the frames went."""
    source = open_dataset('road_anomaly_21', small_benchmark)
    expected = evaluate(tiny_model, source, tmp_path / 'evaluate', track='anomaly')
    make_bag(source, tmp_path / 'bag', storage=storage)
    for through_node in (False, True):
        output = tmp_path / f'replay_{through_node}'
        metrics = replay(tmp_path / 'bag', tiny_model, output,
                         ReplayOptions(through_node=through_node, storage=storage,
                                       track='anomaly'))
        assert figures(metrics) == figures(expected)
        assert metrics['latency_ms']['frames'] == len(source)
        assert metrics['latency_ms']['dropped'] == 0
        results = read_bag(output / 'result_bag', image_topic='/anomaly_seg/output/overlay')
        assert results.stamps_ns == read_bag(tmp_path / 'bag').stamps_ns


def test_result_bag_holds_the_camera_image(tiny_model: Path, small_benchmark: Path,
                                           tmp_path: Path) -> None:
    """The result bag can be looked at without the original."""
    source = open_dataset('road_anomaly_21', small_benchmark)
    make_bag(source, tmp_path / 'bag')
    replay(tmp_path / 'bag', tiny_model, tmp_path / 'out',
           ReplayOptions(result_topics=('image', 'obstacle_mask')))
    results = read_bag(tmp_path / 'out' / 'result_bag',
                       image_topic='/anomaly_seg/input/image')
    for index, frame in enumerate(results):
        np.testing.assert_array_equal(frame.image_rgb, source[index].image_rgb)


def test_realtime_needs_the_node(tiny_model: Path, tmp_path: Path) -> None:
    """Offline there is no pace to keep."""
    with pytest.raises(UserError, match='through-node'):
        replay(tmp_path, tiny_model, tmp_path / 'out', ReplayOptions(realtime=True))


def test_unknown_result_topic_lists_the_choices(tiny_model: Path, tmp_path: Path) -> None:
    """A misspelt topic is refused before anything runs."""
    with pytest.raises(UserError, match='obstacle_mask'):
        replay(tmp_path, tiny_model, tmp_path / 'out', ReplayOptions(result_topics=('mask',)))


def test_missing_bag_names_it(tiny_model: Path, tmp_path: Path) -> None:
    """A bag that is not there is an error with its path."""
    with pytest.raises(UserError, match='no_such_bag'):
        replay(tmp_path / 'no_such_bag', tiny_model, tmp_path / 'out')


@pytest.mark.slow
def test_highway_video_replays_through_the_node(tiny_model: Path, real_data: Path,
                                                tmp_path: Path) -> None:
    """All 221 frames of a real drive are answered."""
    make_bag(VideoFile(real_data / 'video' / 'solidWhiteRight.mp4'), tmp_path / 'bag')
    metrics = replay(tmp_path / 'bag', tiny_model, tmp_path / 'out',
                     ReplayOptions(through_node=True, result_topics=()))
    assert metrics['latency_ms']['frames'] == 221
    assert metrics['latency_ms']['dropped'] == 0
    assert metrics['pixel']['reason']


def test_highway_video_replays_offline(tiny_model: Path, real_data: Path, tmp_path: Path) -> None:
    """The first 40 frames of a real drive replay without ground truth, twice the same."""
    make_bag(VideoFile(real_data / 'video' / 'solidWhiteRight.mp4'), tmp_path / 'bag')
    rows = []
    for run in ('first', 'second'):
        metrics = replay(tmp_path / 'bag', tiny_model, tmp_path / run,
                         ReplayOptions(limit=40, result_topics=()))
        assert metrics['latency_ms']['frames'] == 40
        with open(tmp_path / run / 'per_frame.csv', newline='') as stream:
            rows.append([{key: value for key, value in row.items() if not key.endswith('_ms')}
                         for row in csv.DictReader(stream)])
    assert rows[0] == rows[1]
    assert float(rows[0][39]['score_mean']) != float(rows[0][0]['score_mean'])
