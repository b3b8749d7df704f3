# SPDX-License-Identifier: Apache-2.0
"""Replays give the figures of evaluate, offline and through the live node."""

import csv
import dataclasses
from pathlib import Path
from typing import Any

from anomaly_seg_ros.bags import make_bag, read_bag, ResultBag
from anomaly_seg_ros.datasets import ImageFolder, open_dataset, VideoFile
from anomaly_seg_ros.demo import run_demo, write_pictures
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.evaluate import evaluate
from anomaly_seg_ros.images import decode_message
from anomaly_seg_ros.model_file import load_model_file, write_model_file
from anomaly_seg_ros.obstacles import ObstacleSettings
from anomaly_seg_ros.replay import replay, ReplayOptions
from cards import card, device_model, identity_graph, identity_model
import cv2
import numpy as np
from onnx import helper, numpy_helper
import pytest
from rosbags.rosbag2 import Reader, StoragePlugin, Writer
from rosbags.typesys import get_typestore, Stores

TYPES = get_typestore(Stores.ROS2_JAZZY)
FIGURES = ('pixel', 'components', 'compat', 'segmentation')


def figures(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of metrics.json that must not depend on the way."""
    return {name: metrics[name] for name in FIGURES}


def as_bgr8(bag: Path, copy: Path) -> None:
    """Copy a bag with its colours in the order of most camera drivers."""
    with Reader(bag) as reader, Writer(copy, version=9, storage_plugin=StoragePlugin.MCAP) as out:
        topics = {connection.topic: out.add_connection(connection.topic, connection.msgtype,
                                                       typestore=TYPES)
                  for connection in reader.connections}
        for connection, log_ns, raw in reader.messages():
            message: Any = TYPES.deserialize_cdr(raw, connection.msgtype)
            if getattr(message, 'encoding', '') == 'rgb8':
                pixels = message.data.reshape(-1, 3)[:, ::-1]
                message = dataclasses.replace(message, encoding='bgr8',
                                              data=pixels.reshape(-1).copy())
            out.write(topics[connection.topic], log_ns,
                      TYPES.serialize_cdr(message, connection.msgtype))


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


@pytest.mark.parametrize('kind', ['jpeg', 'bgr8'])
def test_frames_reach_the_node_as_they_were_recorded(
        tiny_model: Path, small_benchmark: Path, tmp_path: Path, kind: str) -> None:
    """JPEG is decoded by the node, at reduced size; offline the same pixels are answered."""
    for path in small_benchmark.rglob('*.png'):  # twice as large: more than the network's size
        pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        cv2.imwrite(str(path), cv2.resize(pixels, None, fx=2, fy=2,
                                          interpolation=cv2.INTER_NEAREST))
    source = open_dataset('road_anomaly_21', small_benchmark)
    if kind == 'jpeg':
        make_bag(source, tmp_path / 'bag', compressed='jpeg')
    else:
        make_bag(source, tmp_path / 'rgb8')
        as_bgr8(tmp_path / 'rgb8', tmp_path / 'bag')
    bag, card = read_bag(tmp_path / 'bag'), load_model_file(tiny_model).card
    assert bag.image_transport == ('compressed' if kind == 'jpeg' else 'raw')
    decoded = decode_message(bag[0].message, card.reduced_hw)
    assert (decoded.array.shape[:2] != decoded.full_size_hw) == (kind == 'jpeg')
    offline, live = (
        replay(tmp_path / 'bag', tiny_model, tmp_path / f'{through_node}',
               ReplayOptions(through_node=through_node, result_topics=(), track='anomaly'))
        for through_node in (False, True))
    assert figures(offline) == figures(live)
    assert live['latency_ms']['frames'] == len(source)
    if kind == 'bgr8':
        expected = evaluate(tiny_model, source, tmp_path / 'evaluate', track='anomaly')
        assert figures(offline) == figures(expected)


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


def test_a_bag_is_scored_as_the_set_it_was_made_from(tmp_path: Path) -> None:
    """Its split, track and the classes of its labels travel along; options go before them."""
    image = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    (tmp_path / 'set').mkdir()
    for name, pixels in ('leftImg8bit', image), ('gtFine_labelTrainIds', image[..., 0] % 3):
        cv2.imwrite(str(tmp_path / 'set' / f'x_{name}.png'), pixels)
    labelled = open_dataset('cityscapes', tmp_path / 'set')
    make_bag(labelled, tmp_path / 'labelled')
    model = identity_model(tmp_path / 'm.onnx').path
    metrics = replay(tmp_path / 'labelled', model, tmp_path / 'out')
    assert 'cityscapes' in metrics['segmentation']['reason']
    assert figures(metrics) == figures(evaluate(model, labelled, tmp_path / 'evaluate'))

    for name in ('images', 'labels_masks'):
        (tmp_path / 'obstacles' / name).mkdir(parents=True)
    cv2.imwrite(str(tmp_path / 'obstacles' / 'images' / 'validation_1.png'), image)
    mask = np.zeros((24, 40), np.uint8)
    mask[:12, 20:] = 1
    cv2.imwrite(str(tmp_path / 'obstacles' / 'labels_masks' /
                    'validation_1_labels_semantic.png'), mask)
    obstacles = open_dataset('road_obstacle_21', tmp_path / 'obstacles')
    make_bag(obstacles, tmp_path / 'bag')
    metrics = replay(tmp_path / 'bag' / 'bag.mcap', model, tmp_path / 'out')
    assert metrics['components']['track'] == 'obstacle'
    assert metrics['run']['split'] == 'validation'
    assert figures(metrics) == figures(evaluate(model, obstacles, tmp_path / 'evaluate'))
    metrics = replay(tmp_path / 'bag', model, tmp_path / 'out', ReplayOptions(track='anomaly'))
    assert metrics['components']['track'] == 'anomaly'


def test_no_bag_is_lost_to_the_results(tmp_path: Path, small_benchmark: Path) -> None:
    """Neither the bag that is replayed, nor one of somebody else's of the same name."""
    model = identity_model(tmp_path / 'm.onnx').path
    bag = tmp_path / 'mine' / 'result_bag'
    make_bag(open_dataset('road_anomaly_21', small_benchmark), bag)
    (tmp_path / 'mine' / '.anomaly_seg_run').touch()
    for path in (bag, bag / 'result_bag.mcap'):
        with pytest.raises(UserError, match=r'would be lost(.|\n)*--output'):
            replay(path, model, tmp_path / 'mine')
    (tmp_path / 'mine' / '.anomaly_seg_run').unlink()
    make_bag(open_dataset('road_anomaly_21', small_benchmark), tmp_path / 'bag')
    with pytest.raises(UserError, match=r'result_bag: is there already'):
        replay(tmp_path / 'bag', model, tmp_path / 'mine')
    assert len(read_bag(bag)) == 5


def test_results_of_an_older_run_do_not_stay_beside_new_ones(
        tmp_path: Path, small_benchmark: Path) -> None:
    """A run without result bag, and evaluate, clear what replay had left."""
    source = open_dataset('road_anomaly_21', small_benchmark)
    make_bag(source, tmp_path / 'bag')
    model, out = identity_model(tmp_path / 'm.onnx').path, tmp_path / 'out'

    def bags() -> list[str]:
        return sorted(path.name for path in out.iterdir() if path.is_dir())

    for again in (lambda: replay(tmp_path / 'bag', model, out, ReplayOptions(result_topics=())),
                  lambda: evaluate(model, source, out)):
        replay(tmp_path / 'bag', model, out, ReplayOptions(result_topics=('labels',)))
        (out / 'result_bag').rename(out / 'result_bag.incomplete')
        replay(tmp_path / 'bag', model, out, ReplayOptions(result_topics=('labels',)))
        assert bags() == ['result_bag']
        again()
        assert bags() == []


def test_pictures_of_an_older_drive_are_removed(tmp_path: Path) -> None:
    """The demo's pictures are those of its own frames."""
    grey = np.full((48, 64), 7, np.uint8)
    (tmp_path / 'pictures').mkdir()
    (tmp_path / 'pictures' / 'frame_099.png').touch()
    with ResultBag(tmp_path / 'bag') as bag:
        for stamp_ns in (1, 2):
            bag.write(stamp_ns, 'camera', image_rgb=np.dstack([grey] * 3), labels=grey,
                      anomaly_u8=grey, overlay=np.dstack([grey] * 3))
    paths = write_pictures(tmp_path / 'bag', tmp_path / 'pictures', [(0, 0, 0)] * 19, count=2)
    assert sorted((tmp_path / 'pictures').iterdir()) == sorted(paths)


@pytest.mark.parametrize('theirs', ['drive/metadata.yaml', 'pictures/frame_000.png',
                                    'result_bag/metadata.yaml'])
def test_the_demo_writes_over_nothing_that_it_did_not_make(tmp_path: Path, theirs: str) -> None:
    """Also in a folder that another command's run has marked; told before anything is there."""
    out = tmp_path / 'out'
    (out / theirs).parent.mkdir(parents=True)
    (out / theirs).write_text('mine')
    if 'result_bag' not in theirs:
        (out / '.anomaly_seg_run').touch()
    before = sorted(out.rglob('*'))
    with pytest.raises(UserError, match='is there already and not from a run'):
        run_demo(out, frames=2)
    assert sorted(out.rglob('*')) == before
    assert (out / theirs).read_text() == 'mine'


def test_the_demo_reads_its_model_before_it_writes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'no\.onnx'):
        run_demo(tmp_path / 'out', frames=2, model=tmp_path / 'no.onnx')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('through_node', [False, True])
def test_frames_after_the_limit_are_not_read(tmp_path: Path, through_node: bool) -> None:
    """A damaged one there costs nothing."""
    model = identity_model(tmp_path / 'm.onnx').path
    image = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    (tmp_path / 'images').mkdir()
    for number in range(3):
        cv2.imwrite(str(tmp_path / 'images' / f'{number}.png'), image)
    make_bag(ImageFolder(tmp_path / 'images'), tmp_path / 'whole', compressed='jpeg')
    with Reader(tmp_path / 'whole') as reader, Writer(
            tmp_path / 'bag', version=9, storage_plugin=StoragePlugin.MCAP) as out:
        picture, = (c for c in reader.connections if c.msgtype.endswith('CompressedImage'))
        topic = out.add_connection(picture.topic, picture.msgtype, typestore=TYPES)
        for index, (_, log_ns, raw) in enumerate(reader.messages([picture])):
            message: Any = TYPES.deserialize_cdr(raw, picture.msgtype)
            if index == 2:
                message = dataclasses.replace(message, data=message.data[:100].copy())
            out.write(topic, log_ns, TYPES.serialize_cdr(message, picture.msgtype))
    options = ReplayOptions(through_node=through_node, result_topics=())
    with pytest.raises(UserError, match=r'frame 2 .*does not decode'):
        replay(tmp_path / 'bag', model, tmp_path / 'out', options)
    metrics = replay(tmp_path / 'bag', model, tmp_path / 'out',
                     dataclasses.replace(options, limit=2))
    assert metrics['latency_ms']['frames'] == 2 and metrics['latency_ms']['dropped'] == 0


def test_frames_a_device_model_does_not_take_are_named(tmp_path: Path,
                                                       small_benchmark: Path) -> None:
    """The camera's size changes in the bag: the frame, and what was scored before it."""
    make_bag(open_dataset('road_anomaly_21', small_benchmark), tmp_path / 'bag')
    with pytest.raises(UserError, match=r'frame 1: .*96x160, got 80x128(.|\n)*1 frames so far'):
        replay(tmp_path / 'bag', device_model(tmp_path / 'm.onnx', (96, 160)).path,
               tmp_path / 'out')


@pytest.mark.parametrize(('bright', 'through_node', 'match'), [
    (0.4, False, r'frame 0: .*not finite'), (0.6, True, 'no frame was answered')])
def test_a_model_that_answers_nothing_is_an_error_with_a_sentence(
        tmp_path: Path, bright: float, through_node: bool, match: str) -> None:
    """Its scores are NaN above a brightness: from the grey warm-up on, or from the first frame."""
    model = identity_graph()
    model.graph.node[-1].output[0] = 'darkness'
    model.graph.initializer.append(numpy_helper.from_array(np.array(bright, np.float32), 'most'))
    model.graph.node.extend([helper.make_node('Add', ['darkness', 'most'], ['root']),
                             helper.make_node('Sqrt', ['root'], ['anomaly'])])
    write_model_file(tmp_path / 'm.onnx', model.SerializeToString(), card())
    (tmp_path / 'images').mkdir()
    cv2.imwrite(str(tmp_path / 'images' / '0.png'), np.full((24, 40, 3), 250, np.uint8))
    make_bag(ImageFolder(tmp_path / 'images'), tmp_path / 'bag')
    with pytest.raises(UserError, match=match):
        replay(tmp_path / 'bag', tmp_path / 'm.onnx', tmp_path / 'out',
               ReplayOptions(through_node=through_node, realtime=through_node))


def test_realtime_needs_the_node(tiny_model: Path, tmp_path: Path) -> None:
    """Offline there is no pace to keep."""
    with pytest.raises(UserError, match='through-node'):
        replay(tmp_path, tiny_model, tmp_path / 'out', ReplayOptions(realtime=True))


def test_the_drivable_region_needs_drivable_classes(tmp_path: Path) -> None:
    """Told before the bag is opened or the node started."""
    model = identity_model(tmp_path / 'm.onnx', drivable=()).path
    with pytest.raises(UserError, match=r"'test' has no drivable classes\. Set region"):
        replay(tmp_path / 'no_bag', model, tmp_path / 'out',
               ReplayOptions(settings=ObstacleSettings(0.0, region='drivable')))


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
