# SPDX-License-Identifier: Apache-2.0
"""rosbag2 in and out: both storages, ground truth by stamp, and bags that are damaged."""

from collections.abc import Callable, Iterator
import hashlib
import json
from pathlib import Path
import resource
import shutil
import sqlite3
import tracemalloc
from typing import Any

from anomaly_seg_ros.bags import (
    FRAME_TOPIC, GROUND_TRUTH_TOPIC, IMAGE_TOPIC, ImageFolder, LABELS_TOPIC, make_bag, read_bag,
    ResultBag, START_NS, VideoFile)
from anomaly_seg_ros.datasets.frame import Frame
from anomaly_seg_ros.datasets.source import FrameSource
from anomaly_seg_ros.errors import UserError
import cv2
import numpy as np
import pytest
from rosbags.rosbag2 import CompressionFormat, CompressionMode, Reader, StoragePlugin, Writer
from rosbags.typesys import get_typestore, Stores
import yaml

STORAGES = ('mcap', 'sqlite3')
TYPES = get_typestore(Stores.ROS2_JAZZY)
IMAGE = 'sensor_msgs/msg/Image'


class Frames(FrameSource):
    """A source of random frames of changing size; every third without ground truth."""

    name = 'random'
    root = Path('random')

    def __init__(self, count: int = 6, bad: int | None = None) -> None:
        self._count = count
        self._bad = bad

    @property
    def frame_ids(self) -> list[str]:
        return [f'street_{index}' for index in range(self._count)]

    def __getitem__(self, index: int) -> Frame:
        if index == self._bad:
            raise UserError('street.png: cannot be read.')
        rng = np.random.default_rng(index)
        size_hw = (20 + index, 30 + 2 * index)
        image = rng.integers(0, 256, (*size_hw, 3), dtype=np.uint8)
        if index % 3 == 2:
            return Frame(f'street_{index}', image)
        return Frame(f'street_{index}', image,
                     rng.choice(np.array([0, 1, 255], np.uint8), size_hw),
                     rng.integers(0, 20, size_hw, dtype=np.uint8))


def image_message(pixels: np.ndarray, stamp_ns: int, encoding: str = 'rgb8',
                  **changes: Any) -> Any:
    """Return an Image message made without the module under test."""
    stamp = TYPES.types['builtin_interfaces/msg/Time'](stamp_ns // 10 ** 9, stamp_ns % 10 ** 9)
    fields = {'header': TYPES.types['std_msgs/msg/Header'](stamp, 'front'),
              'height': pixels.shape[0], 'width': pixels.shape[1], 'encoding': encoding,
              'is_bigendian': 0, 'step': pixels[0].nbytes, 'data': pixels.reshape(-1)}
    return TYPES.types[IMAGE](**{**fields, **changes})


Message = tuple[str, int, Any, str]


def write_bag(path: Path, messages: list[Message], storage: str = 'mcap',
              compression: CompressionMode | None = None) -> Path:
    """Write (topic, log time, message or bytes, type) with rosbags alone."""
    plugin = StoragePlugin.MCAP if storage == 'mcap' else StoragePlugin.SQLITE3
    writer = Writer(path, version=9, storage_plugin=plugin)
    if compression is not None:
        writer.set_compression(compression, CompressionFormat.ZSTD)
    with writer:
        connections = {}
        for topic, log_ns, message, msgtype in messages:
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, msgtype, typestore=TYPES)
            data = message if isinstance(message, bytes) else TYPES.serialize_cdr(message, msgtype)
            writer.write(connections[topic], log_ns, data)
    return path


def pictures(count: int) -> list[np.ndarray]:
    """Return small random RGB images."""
    return [np.random.default_rng(i).integers(0, 256, (4, 6, 3), dtype=np.uint8)
            for i in range(count)]


def check_same(frames: Iterator[Any], expected: FrameSource, *, rate_hz: float = 10) -> None:
    """Compare every pixel, name and stamp."""
    count = 0
    for index, (frame, wanted) in enumerate(zip(frames, expected, strict=True)):
        assert frame.frame_id == wanted.frame_id
        assert frame.stamp_ns == START_NS + round(index * 1e9 / rate_hz)
        np.testing.assert_array_equal(frame.image_rgb, wanted.image_rgb)
        for got, want in ((frame.anomaly_mask, wanted.anomaly_mask),
                          (frame.labels, wanted.labels)):
            assert (got is None) == (want is None)
            if want is not None:
                np.testing.assert_array_equal(got, want)
        count += 1
    assert count == len(expected)


@pytest.mark.parametrize('storage', STORAGES)
def test_round_trip(tmp_path: Path, storage: str) -> None:
    source = Frames()
    summary = make_bag(source, tmp_path / 'bag', storage=storage, frame_id='front')
    assert (summary.frames, summary.ground_truth, summary.labels) == (6, 4, 4)
    assert summary.end_ns - summary.start_ns == 500_000_000
    bag = read_bag(tmp_path / 'bag')
    assert len(bag) == 6 and bag.frame_ids == source.frame_ids
    assert bag.rate_hz == pytest.approx(10)
    assert bag.message_count == 6 + 6 + 4 + 4
    check_same(iter(bag), source)
    check_same((bag[i] for i in range(6)), source)
    frame = bag[-1]
    assert frame.frame_id == 'street_5' and frame.header_frame_id == 'front'
    assert frame.encoding == 'rgb8' and frame.message.width == 40
    assert [path.name for path in tmp_path.iterdir()] == ['bag']


@pytest.mark.parametrize('storage', STORAGES)
def test_same_frames_same_bytes(tmp_path: Path, storage: str) -> None:
    digests = []
    for folder in ('a', 'b'):
        make_bag(Frames(), tmp_path / folder / 'bag', storage=storage)
        digests.append([(path.name, hashlib.sha256(path.read_bytes()).hexdigest())
                        for path in sorted((tmp_path / folder / 'bag').iterdir())])
    assert digests[0] == digests[1] and len(digests[0]) == 2


@pytest.mark.parametrize('storage', STORAGES)
def test_what_ros_needs_is_in_the_bag(tmp_path: Path, storage: str) -> None:
    make_bag(Frames(), tmp_path / 'bag', storage=storage)
    info = yaml.safe_load((tmp_path / 'bag' / 'metadata.yaml').read_text())
    info = info['rosbag2_bagfile_information']
    assert info['storage_identifier'] == storage
    assert (tmp_path / 'bag' / info['relative_file_paths'][0]).is_file()
    assert info['message_count'] == 20 and info['duration']['nanoseconds'] == 500_000_000
    topics = {entry['topic_metadata']['name']: entry
              for entry in info['topics_with_message_count']}
    assert set(topics) == {IMAGE_TOPIC, FRAME_TOPIC, GROUND_TRUTH_TOPIC, LABELS_TOPIC}
    for entry in topics.values():
        meta = entry['topic_metadata']
        assert meta['serialization_format'] == 'cdr'
        assert meta['type_description_hash'] == TYPES.hash_rihs01(meta['type'])
        (qos,) = yaml.safe_load(meta['offered_qos_profiles'])
        assert (qos['reliability'], qos['durability'], qos['history']) == (1, 2, 1)
    with Reader(tmp_path / 'bag') as reader:
        for connection in reader.connections:
            assert connection.msgdef.data == TYPES.generate_msgdef(
                connection.msgtype, ros_version=2)[0]


def test_mcap_is_read_by_the_mcap_library(tmp_path: Path) -> None:
    reader = pytest.importorskip('mcap.reader', reason='pip install mcap')
    make_bag(Frames(), tmp_path / 'bag')
    with open(tmp_path / 'bag' / 'bag.mcap', 'rb') as stream:
        messages = list(reader.make_reader(stream, validate_crcs=True).iter_messages())
    assert len(messages) == 20
    times = [message.log_time for _, _, message in messages]
    assert times == sorted(times)
    assert {schema.name for schema, _, _ in messages} == {IMAGE, 'std_msgs/msg/String'}
    assert {schema.encoding for schema, _, _ in messages} == {'ros2msg'}


def test_messages_are_read_by_rclpy(tmp_path: Path) -> None:
    serialization = pytest.importorskip('rclpy.serialization', reason='needs ROS or its wheels')
    from anomaly_seg_ros.images import image_from_message
    from sensor_msgs.msg import CompressedImage, Image
    source = Frames(2)
    make_bag(source, tmp_path / 'raw', frame_id='front')
    make_bag(source, tmp_path / 'png', compressed='png')
    for folder, kind in (('raw', Image), ('png', CompressedImage)):
        with Reader(tmp_path / folder) as reader:
            connections = [c for c in reader.connections if c.topic.startswith(IMAGE_TOPIC)]
            raw = next(reader.messages(connections))[2]
        message = serialization.deserialize_message(raw, kind)
        assert message.header.stamp.sec == START_NS // 10 ** 9
        if folder == 'raw':
            assert message.header.frame_id == 'front' and message.encoding == 'rgb8'
            np.testing.assert_array_equal(image_from_message(message).array, source[0].image_rgb)
        else:
            image = cv2.imdecode(np.frombuffer(message.data, np.uint8), cv2.IMREAD_COLOR)
            np.testing.assert_array_equal(image[..., ::-1], source[0].image_rgb)


def test_sqlite3_is_read_by_sqlite(tmp_path: Path) -> None:
    make_bag(Frames(), tmp_path / 'bag', storage='sqlite3')
    connection = sqlite3.connect(tmp_path / 'bag' / 'bag.db3')
    assert connection.execute('PRAGMA integrity_check').fetchone() == ('ok',)
    rows = connection.execute('SELECT name, type, count(*) FROM messages JOIN topics ON '
                              'topic_id = topics.id GROUP BY topics.id').fetchall()
    assert (IMAGE_TOPIC, IMAGE, 6) in rows and (GROUND_TRUTH_TOPIC, IMAGE, 4) in rows
    connection.close()


@pytest.mark.parametrize(('storage', 'name'), [('mcap', 'bag.mcap'), ('sqlite3', 'bag.db3')])
def test_single_file_without_metadata(tmp_path: Path, storage: str, name: str) -> None:
    make_bag(Frames(), tmp_path / 'bag', storage=storage)
    shutil.move(tmp_path / 'bag' / name, tmp_path / name)
    check_same(iter(read_bag(tmp_path / name)), Frames())


@pytest.mark.parametrize('mode', [CompressionMode.FILE, CompressionMode.MESSAGE,
                                  CompressionMode.STORAGE])
def test_compressed_storage(tmp_path: Path, mode: CompressionMode) -> None:
    images = pictures(3)
    path = write_bag(tmp_path / 'bag', [('/image', i, image_message(image, i), IMAGE)
                                        for i, image in enumerate(images)], compression=mode)
    for frame, image in zip(read_bag(path), images, strict=True):
        np.testing.assert_array_equal(frame.image_rgb, image)


def test_png_compressed_is_exact_and_jpeg_is_close(tmp_path: Path) -> None:
    smooth = Frames()
    make_bag(smooth, tmp_path / 'png', compressed='png')
    bag = read_bag(tmp_path / 'png')
    assert bag.image_topic == f'{IMAGE_TOPIC}/compressed'
    assert bag[0].encoding == 'rgb8; png compressed bgr8'
    check_same(iter(bag), smooth)
    image = np.full((32, 48, 3), (200, 40, 90), np.uint8)
    cv2.imwrite(str(tmp_path / 'a.png'), image[..., ::-1])
    make_bag(ImageFolder(tmp_path), tmp_path / 'jpeg', compressed='jpeg')
    error = read_bag(tmp_path / 'jpeg')[0].image_rgb.astype(int) - image
    assert 0 < np.abs(error).max() < 8


@pytest.mark.parametrize('encoding', ['bgr8', 'mono8', 'yuv422_yuy2', 'bayer_rggb8'])
def test_other_encodings(tmp_path: Path, encoding: str) -> None:
    from rosbags.image import message_to_cvimage
    channels = {'bgr8': (3,), 'yuv422_yuy2': (2,)}.get(encoding, ())
    pixels = np.random.default_rng(0).integers(0, 256, (8, 10, *channels), dtype=np.uint8)
    message = image_message(pixels, 5, encoding)
    path = write_bag(tmp_path / 'bag', [('/image', 5, message, IMAGE)])
    np.testing.assert_array_equal(read_bag(path)[0].image_rgb, message_to_cvimage(message, 'rgb8'))


def mask_message(value: int, stamp_ns: int) -> Any:
    """Return a mask that can be told from the others."""
    return image_message(np.full((4, 6), value, np.uint8), stamp_ns, 'mono8')


def ordered(order: str, count: int) -> list[Message]:
    """Return images with labels in the given order in the bag; image i has labels i."""
    images = [(i, ('/image', image_message(image, 1000 + i))) for i, image in
              enumerate(pictures(count))]
    masks = [(i, (LABELS_TOPIC, mask_message(i, 1000 + i))) for i in range(count)]
    if order == 'masks first':
        sequence = masks + images
    elif order == 'masks last':
        sequence = images + masks
    elif order == 'mask before':
        sequence = [entry for pair in zip(masks, images, strict=True) for entry in pair]
    elif order == 'reversed':
        sequence = images + masks[::-1]
    else:
        sequence = [entry for pair in zip(images, masks, strict=True) for entry in pair]
    return [(topic, log_ns, message, IMAGE)
            for log_ns, (_, (topic, message)) in enumerate(sequence)]


@pytest.mark.parametrize('storage', STORAGES)
@pytest.mark.parametrize('order', ['mask after', 'mask before', 'masks first', 'masks last',
                                   'reversed'])
def test_ground_truth_is_found_wherever_it_is(tmp_path: Path, order: str, storage: str) -> None:
    path = write_bag(tmp_path / 'bag', ordered(order, 40), storage)
    bag = read_bag(path)
    images = pictures(40)
    for index, frame in enumerate(bag):
        assert frame.stamp_ns == 1000 + index
        assert frame.labels is not None and np.all(frame.labels == index)
        np.testing.assert_array_equal(frame.image_rgb, images[index])
    assert index == 39


@pytest.mark.parametrize('seed', range(8))
def test_any_order_and_any_gaps(tmp_path: Path, seed: int) -> None:
    """Some images without labels, everything shuffled, log times with ties."""
    rng = np.random.default_rng(seed)
    images, masks = ordered('masks last', 30)[:30], ordered('masks last', 30)[30:]
    with_labels = [index for index in range(30) if rng.random() < 0.7]
    messages = images + [masks[index] for index in with_labels]
    shuffled = [messages[place] for place in rng.permutation(len(messages))]
    times = np.sort(rng.integers(0, 50, len(messages))).tolist()
    path = write_bag(tmp_path / 'bag', [
        (topic, log_ns, message, kind)
        for (topic, _, message, kind), log_ns in zip(shuffled, times, strict=True)],
        STORAGES[seed % 2])
    bag = read_bag(path)
    for frame in bag:
        index = frame.stamp_ns - 1000
        np.testing.assert_array_equal(frame.image_rgb, pictures(30)[index])
        assert (frame.labels is not None) == (index in with_labels)
        assert frame.labels is None or np.all(frame.labels == index)
    assert sorted(bag.stamps_ns) == list(range(1000, 1030))


def test_one_log_time_for_everything(tmp_path: Path) -> None:
    messages = [(topic, 7, message, IMAGE)
                for topic, _, message, _ in ordered('masks last', 20)]
    for index, frame in enumerate(read_bag(write_bag(tmp_path / 'bag', messages))):
        assert frame.labels is not None and np.all(frame.labels == index)


def test_memory_does_not_grow_with_the_bag(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        image = np.zeros((200, 300, 3), np.uint8)
        messages: list[Message] = [('/image', i, image_message(image, i), IMAGE)
                                   for i in range(count)]
        messages += [(LABELS_TOPIC, count + i,
                      image_message(np.zeros((200, 300), np.uint8), i, 'mono8'), IMAGE)
                     for i in range(count)]
        path = write_bag(tmp_path / f'bag{count}', messages)
        tracemalloc.start()
        assert sum(frame.labels is not None for frame in read_bag(path)) == count
        _, top = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return top

    peak(10)
    assert peak(160) < 1.3 * peak(40)


def test_frames_without_names_are_numbered(tmp_path: Path) -> None:
    path = write_bag(tmp_path / 'bag', ordered('mask after', 3))
    assert read_bag(path).frame_ids == ['000000', '000001', '000002']


def test_stamps_may_go_back(tmp_path: Path) -> None:
    messages = [('/image', log_ns, image_message(image, stamp), IMAGE)
                for log_ns, (image, stamp) in enumerate(zip(pictures(3), (30, 10, 20),
                                                            strict=True))]
    bag = read_bag(write_bag(tmp_path / 'bag', messages))
    assert [frame.stamp_ns for frame in bag] == [30, 10, 20]


def refused(path: Path, *texts: str, **options: Any) -> None:
    """Expect an error that names the bag and says all ``texts``."""
    with pytest.raises(UserError) as caught:
        for _ in read_bag(path, **options):
            pass
    for text in (str(path), *texts):
        assert text in str(caught.value)


def test_missing_and_foreign_bags(tmp_path: Path) -> None:
    refused(tmp_path / 'none', 'no such bag')
    (tmp_path / 'folder').mkdir()
    refused(tmp_path / 'folder', 'not a readable rosbag2', 'metadata.yaml')
    (tmp_path / 'notes.txt').write_text('notes')
    refused(tmp_path / 'notes.txt', 'not a readable rosbag2')
    (tmp_path / 'empty.mcap').touch()
    refused(tmp_path / 'empty.mcap', 'not a readable rosbag2')
    (tmp_path / 'folder' / 'metadata.yaml').write_text('{: broken')
    refused(tmp_path / 'folder', 'not a readable rosbag2')


@pytest.mark.parametrize(('storage', 'name'), [('mcap', 'bag.mcap'), ('sqlite3', 'bag.db3')])
@pytest.mark.parametrize('alone', [True, False])
def test_truncated_bags(tmp_path: Path, storage: str, name: str, alone: bool) -> None:
    make_bag(Frames(20), tmp_path / 'bag', storage=storage)
    data = (tmp_path / 'bag' / name).read_bytes()
    path = tmp_path / name if alone else tmp_path / 'bag'
    file = tmp_path / name if alone else tmp_path / 'bag' / name
    for end in (10, 100, len(data) // 3, len(data) // 2, len(data) - 5000, len(data) - 10):
        file.write_bytes(data[:end])
        refused(path, 'not a readable rosbag2')


@pytest.mark.parametrize('storage', STORAGES)
def test_damage_never_loses_frames_silently(tmp_path: Path, storage: str) -> None:
    """Zeros written over a stretch of the file: an error that names the bag, or all frames."""
    name = 'bag.mcap' if storage == 'mcap' else 'bag.db3'
    make_bag(Frames(8), tmp_path / 'bag', storage=storage)
    data = (tmp_path / 'bag' / name).read_bytes()
    errors = 0
    for start in range(0, len(data), len(data) // 15):
        damaged = data[:start] + bytes(min(64, len(data) - start)) + data[start + 64:]
        (tmp_path / 'bag' / name).write_bytes(damaged)
        try:
            assert sum(1 for _ in read_bag(tmp_path / 'bag')) == 8
        except UserError as error:
            assert str(tmp_path / 'bag') in str(error)
            errors += 1
    assert errors > 0


def test_unfinished_sqlite3_recording(tmp_path: Path) -> None:
    make_bag(Frames(2), tmp_path / 'bag', storage='sqlite3')
    (tmp_path / 'bag' / 'bag.db3-wal').write_bytes(b'pages')
    refused(tmp_path / 'bag', 'bag.db3-wal holds messages')


def test_a_bag_without_messages(tmp_path: Path) -> None:
    writer = Writer(tmp_path / 'bag', version=8, storage_plugin=StoragePlugin.MCAP)
    with writer:
        writer.add_connection('/image', IMAGE, typestore=TYPES)
    refused(tmp_path / 'bag', '/image has no messages')


def text_message(text: str) -> Any:
    """Return a String message."""
    return TYPES.types['std_msgs/msg/String'](text)


def test_a_topic_given_as_masks_is_not_taken_for_labels(tmp_path: Path) -> None:
    """Nor the other way round, whatever its name; nor is one topic given as both."""
    image, truth = image_message(pictures(1)[0], 5), mask_message(1, 5)
    for topic in GROUND_TRUTH_TOPIC, LABELS_TOPIC:
        path = write_bag(tmp_path / topic.replace('/', '_'),
                         [('/left', 5, image, IMAGE), (topic, 5, truth, IMAGE)])
        masks, labels = (read_bag(path, **{kind: topic})[0]
                         for kind in ('ground_truth_topic', 'labels_topic'))
        for found, other in ((masks.anomaly_mask, masks.labels),
                             (labels.labels, labels.anomaly_mask)):
            np.testing.assert_array_equal(found, truth.data.reshape(truth.height, truth.width))
            assert other is None
        refused(path, f'{topic} is given for anomaly masks and for labels',
                ground_truth_topic=topic, labels_topic=topic)
    bare = read_bag(path, ground_truth_topic='none', labels_topic='none')[0]
    assert bare.anomaly_mask is None and bare.labels is None


def test_topics_are_chosen_with_care(tmp_path: Path) -> None:
    image = image_message(pictures(1)[0], 5)
    string = ('/chatter', 5, text_message('hello'), 'std_msgs/msg/String')
    path = write_bag(tmp_path / 'two', [('/left', 5, image, IMAGE), ('/right', 5, image, IMAGE),
                                        string])
    refused(path, '2 image topics (/left, /right)', '--image-topic')
    refused(path, 'no topic /front', '/chatter (std_msgs/msg/String)', image_topic='/front')
    refused(path, '/chatter must be', 'got std_msgs/msg/String', image_topic='/chatter')
    refused(path, 'no topic /truth', image_topic='/left', ground_truth_topic='/truth')
    refused(path, 'ground truth /chatter must be', image_topic='/left', labels_topic='/chatter')
    assert len(read_bag(path, image_topic='/left')) == 1
    mask = (GROUND_TRUTH_TOPIC, 6, mask_message(1, 6), IMAGE)
    path = write_bag(tmp_path / 'other', [('/left', 5, image, IMAGE), mask])
    refused(path, 'no image on /left with the same stamp: 6', '--ground-truth-topic none')
    assert read_bag(path, ground_truth_topic='none')[0].anomaly_mask is None
    refused(write_bag(tmp_path / 'none', [string]), 'no image topic', '/chatter')


def test_missing_frames_are_counted(tmp_path: Path) -> None:
    make_bag(Frames(6), tmp_path / 'bag', storage='sqlite3')
    connection = sqlite3.connect(tmp_path / 'bag' / 'bag.db3')
    connection.execute('DELETE FROM messages WHERE id = 1')
    connection.commit()
    connection.close()
    refused(tmp_path / 'bag', f'{IMAGE_TOPIC} should have 6 messages, found 5')


def test_equal_stamps_are_refused(tmp_path: Path) -> None:
    messages = [('/image', i, image_message(image, 5), IMAGE)
                for i, image in enumerate(pictures(2))]
    refused(write_bag(tmp_path / 'bag', messages), 'two messages with the stamp 5 ns')


def test_ground_truth_without_its_image_is_refused(tmp_path: Path) -> None:
    messages = ordered('mask after', 3)
    messages.append((LABELS_TOPIC, 99, mask_message(9, 4321), IMAGE))
    refused(write_bag(tmp_path / 'bag', messages), '1 of 4 messages', LABELS_TOPIC, '4321')


def test_ground_truth_must_fit_its_image(tmp_path: Path) -> None:
    image = ('/image', 5, image_message(pictures(1)[0], 5), IMAGE)
    small = image_message(np.zeros((4, 5), np.uint8), 5, 'mono8')
    refused(write_bag(tmp_path / 'size', [image, (GROUND_TRUTH_TOPIC, 5, small, IMAGE)]),
            'frame 0 (stamp 5 ns)', '5x4 pixels, its image 6x4')
    colour = image_message(pictures(1)[0], 5)
    refused(write_bag(tmp_path / 'colour', [image, (GROUND_TRUTH_TOPIC, 5, colour, IMAGE)]),
            "mono8 or 8UC1, got 'rgb8'")
    codes = image_message(np.full((4, 6), 2, np.uint8), 5, 'mono8')
    refused(write_bag(tmp_path / 'codes', [image, (GROUND_TRUTH_TOPIC, 5, codes, IMAGE)]),
            'must hold 0, 1 and 255, got also 2')


def test_a_frame_that_does_not_decode_is_named(tmp_path: Path) -> None:
    good, bad = pictures(2)
    messages = [('/image', 1, image_message(good, 10), IMAGE),
                ('/image', 2, image_message(bad, 20, data=bad.reshape(-1)[:50]), IMAGE)]
    path = write_bag(tmp_path / 'short', messages)
    bag = read_bag(path)
    np.testing.assert_array_equal(bag[0].image_rgb, good)
    refused(path, 'frame 1 (stamp 20 ns)', 'must have 72 bytes, got 50')
    compressed = 'sensor_msgs/msg/CompressedImage'
    data = cv2.imencode('.jpg', np.zeros((90, 90, 3), np.uint8))[1].reshape(-1)
    message = TYPES.types[compressed](header=messages[0][2].header, format='jpeg',
                                      data=data[:len(data) // 2])
    refused(write_bag(tmp_path / 'jpeg', [('/image', 1, message, compressed)]),
            'frame 0 (stamp 10 ns)', 'cut off')
    raw = bytes(TYPES.serialize_cdr(image_message(good, 10), IMAGE))[:40]
    refused(write_bag(tmp_path / 'cdr', [('/image', 1, raw, IMAGE)]),
            'frame 0 (stamp 10 ns)', f'is no {IMAGE}')
    refused(write_bag(tmp_path / 'tiny', [('/image', 1, b'\0\1\0\0', IMAGE)]), 'only 4 bytes')


def test_wrong_frame_names_are_refused(tmp_path: Path) -> None:
    image = ('/image', 5, image_message(pictures(1)[0], 5), IMAGE)
    names = (FRAME_TOPIC, 5, text_message('frame 0'), 'std_msgs/msg/String')
    refused(write_bag(tmp_path / 'text', [image, names]), FRAME_TOPIC, 'JSON')
    for entry in ({'track': 'street'}, {'class_set': 'pets'}, {'class_set': ['road']}):
        text = json.dumps({'stamp_ns': 5, 'frame_id': 'a', **entry})
        refused(write_bag(tmp_path / f'{len(text)}', [
            image, (FRAME_TOPIC, 5, text_message(text), 'std_msgs/msg/String')]), FRAME_TOPIC)
    second = ('/image', 6, image_message(pictures(2)[1], 6), IMAGE)
    twice = [(FRAME_TOPIC, stamp, text_message(json.dumps({'stamp_ns': stamp, 'frame_id': 'a'})),
              'std_msgs/msg/String') for stamp in (5, 6)]
    refused(write_bag(tmp_path / 'twice', [image, second, *twice]), 'one name to several')


def test_existing_bags_are_kept(tmp_path: Path) -> None:
    make_bag(Frames(2), tmp_path / 'bag')
    with pytest.raises(UserError, match='exists already'):
        make_bag(Frames(3), tmp_path / 'bag')
    assert len(read_bag(tmp_path / 'bag')) == 2
    make_bag(Frames(3), tmp_path / 'bag', storage='sqlite3', overwrite=True)
    assert len(read_bag(tmp_path / 'bag')) == 3
    assert not (tmp_path / 'bag' / 'bag.mcap').exists()
    (tmp_path / 'photos').mkdir()
    (tmp_path / 'photos' / 'cat.png').touch()
    with pytest.raises(UserError, match='is no bag, so it is not overwritten'):
        make_bag(Frames(2), tmp_path / 'photos', overwrite=True)
    assert (tmp_path / 'photos' / 'cat.png').exists()


def test_a_failed_recording_leaves_nothing(tmp_path: Path) -> None:
    make_bag(Frames(2), tmp_path / 'bag')
    with pytest.raises(UserError, match=r'street\.png'):
        make_bag(Frames(4, bad=2), tmp_path / 'bag', overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ['bag']
    assert len(read_bag(tmp_path / 'bag')) == 2


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Limit the size of files that this process writes: writing fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize('storage', STORAGES)
def test_full_disk(tmp_path: Path, storage: str, small_files: Callable[[int], None]) -> None:
    small_files(60_000)
    with pytest.raises(UserError, match=r'bag: the bag cannot be written .* Free disk space'):
        make_bag(Frames(80), tmp_path / 'bag', storage=storage)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('storage', STORAGES)
def test_results_are_kept_on_a_full_disk(tmp_path: Path, storage: str,
                                         small_files: Callable[[int], None]) -> None:
    """``mcap recover`` finds in the file what was written before the disk was full."""
    image = np.zeros((500, 500, 3), np.uint8)
    small_files(2_000_000)
    with pytest.raises(UserError, match=r'results: the bag cannot be written'), \
            ResultBag(tmp_path / 'results', storage) as bag:
        for stamp in range(8):
            bag.write(stamp, 'front', image_rgb=image)
    assert [path.name for path in tmp_path.iterdir()] == ['results.incomplete']
    if storage == 'mcap':
        kept = (tmp_path / 'results.incomplete' / 'results.mcap').read_bytes()
        assert len(kept) == 2_000_000 and kept.count(b'front') == 3  # the last is cut off


@pytest.mark.parametrize(('options', 'text'), [
    ({'rate_hz': 0.0}, 'rate_hz'), ({'rate_hz': 2e9}, 'rate_hz'), ({'start_ns': -1}, 'start_ns'),
    ({'start_ns': 2 ** 62}, 'start_ns'), ({'storage': 'rosbag'}, 'mcap, sqlite3'),
    ({'compressed': 'gif'}, 'jpeg or png'), ({'rate_hz': 1e-9}, 'rate_hz 1e-09'),
    ({'rate_hz': float('nan')}, 'rate_hz'), ({'image_topic': 'camera image'}, "'camera image'"),
    ({'image_topic': 'camera'}, 'whole names'), ({'labels_topic': '/a//b'}, 'whole names'),
    ({'image_topic': '/2/image'}, 'whole names'), ({'image_topic': '/image/'}, 'whole names'),
    ({'image_topic': GROUND_TRUTH_TOPIC}, 'topics of their own'),
    ({'ground_truth_topic': FRAME_TOPIC}, 'topics of their own'),
    ({'ground_truth_topic': '/a/compressed', 'image_topic': '/a', 'compressed': 'png'},
     'topics of their own')])
def test_wrong_arguments(tmp_path: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make_bag(Frames(2), tmp_path / 'bag', **options)
    assert list(tmp_path.iterdir()) == []


def test_rate_and_start(tmp_path: Path) -> None:
    make_bag(Frames(4), tmp_path / 'bag', rate_hz=30, start_ns=5)
    assert read_bag(tmp_path / 'bag').stamps_ns == [5, 33_333_338, 66_666_672, 100_000_005]


def test_masks_of_another_size_are_not_recorded(tmp_path: Path) -> None:
    class Wrong(Frames):
        def __getitem__(self, index: int) -> Frame:
            return Frame('a', np.zeros((4, 6, 3), np.uint8), np.zeros((4, 5), np.uint8))

    with pytest.raises(UserError, match=r'frame a: ground_truth must be uint8 \(4, 6\)'):
        make_bag(Wrong(1), tmp_path / 'bag')


@pytest.mark.parametrize('storage', STORAGES)
def test_result_bag(tmp_path: Path, storage: str) -> None:
    rng = np.random.default_rng(0)
    outputs = {
        'labels': rng.integers(0, 19, (4, 6), dtype=np.uint8),
        'anomaly': rng.normal(size=(4, 6)).astype(np.float32),
        'anomaly_u8': rng.integers(0, 256, (4, 6), dtype=np.uint8),
        'obstacle_mask': rng.choice(np.array([0, 255], np.uint8), (4, 6)),
        'overlay': rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)}
    image = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
    with ResultBag(tmp_path / 'results', storage) as bag:
        bag.write(1_500_000_007, 'front', image_rgb=image, **outputs)
        bag.write(2_500_000_007, 'front', labels=outputs['labels'])
    with Reader(tmp_path / 'results') as reader:
        messages = [(c.topic, log_ns, TYPES.deserialize_cdr(raw, c.msgtype))
                    for c, log_ns, raw in reader.messages()]
    assert len(messages) == 7
    for topic, log_ns, message in messages[:6]:
        assert (message.header.stamp.sec, message.header.stamp.nanosec) == (1, 500_000_007)
        assert message.header.frame_id == 'front' and log_ns == 1_500_000_007
        name = topic.rpartition('/')[2]
        wanted = image if name == 'image' else outputs[name]
        dtype = np.float32 if name == 'anomaly' else np.uint8
        np.testing.assert_array_equal(message.data.view(dtype), wanted.reshape(-1))
        assert message.encoding == {'anomaly': '32FC1', 'overlay': 'rgb8',
                                    'image': 'rgb8'}.get(name, 'mono8')
    assert {topic for topic, _, _ in messages} == {
        '/anomaly_seg/input/image', *(f'/anomaly_seg/output/{name}' for name in outputs)}


def test_result_bag_keeps_what_it_has(tmp_path: Path) -> None:
    labels = np.zeros((4, 6), np.uint8)
    with pytest.raises(KeyboardInterrupt), ResultBag(tmp_path / 'results') as bag:
        bag.write(1, 'front', labels=labels)
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ['results.incomplete']
    with Reader(tmp_path / 'results.incomplete') as reader:
        assert reader.message_count == 1
    with pytest.raises(ValueError, match='with statement'):
        ResultBag(tmp_path / 'other').write(1, 'front', labels=labels)
    with pytest.raises(ValueError, match='mono8 needs uint8'), \
            ResultBag(tmp_path / 'wrong') as bag:
        bag.write(1, 'front', labels=labels.astype(np.int64))


def test_image_folder(tmp_path: Path) -> None:
    images = {name: np.full((3, 4, 3), value, np.uint8)
              for name, value in (('2', 20), ('10', 100), ('1', 10))}
    for name, image in images.items():
        cv2.imwrite(str(tmp_path / f'{name}.png'), image)
    (tmp_path / 'notes.txt').touch()
    folder = ImageFolder(tmp_path)
    assert folder.frame_ids == ['1', '2', '10'] and folder.check() == []
    assert [frame.image_rgb[0, 0, 0] for frame in folder] == [10, 20, 100]
    (tmp_path / '2.png').write_bytes((tmp_path / '2.png').read_bytes()[:-20])
    assert len(folder.check()) == 1
    with pytest.raises(UserError, match=r'2\.png'):
        folder[1]
    cv2.imwrite(str(tmp_path / '2.jpg'), images['2'])
    with pytest.raises(UserError, match='two images have the same name'):
        ImageFolder(tmp_path)
    with pytest.raises(UserError, match='not a folder'):
        ImageFolder(tmp_path / 'none')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='no images'):
        ImageFolder(tmp_path / 'empty')


def test_no_video(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='no such file'):
        VideoFile(tmp_path / 'none.mp4')
    (tmp_path / 'text.mp4').write_text('no video')
    with pytest.raises(UserError, match=r'text\.mp4.*cannot open'):
        VideoFile(tmp_path / 'text.mp4')


def test_real_bag_with_compressed_messages(real_data: Path) -> None:
    bag = read_bag(real_data / 'bags' / 'amber_soccer_goal_12.mcap')
    assert bag.stamps_ns == [8_297_777_777, 8_331_088_888]
    assert bag.topics == {'/camera/image_raw': IMAGE}
    for frame in bag:
        assert frame.image_rgb.shape == (480, 640, 3)
        assert (frame.encoding, frame.header_frame_id) == ('rgb8', 'camera')
        assert 20 < frame.image_rgb.mean() < 235 and frame.image_rgb.std() > 10
    np.testing.assert_array_equal(bag[1].image_rgb, frame.image_rgb)


def test_real_video(real_data: Path, tmp_path: Path) -> None:
    path = real_data / 'video' / 'solidWhiteRight.mp4'
    video = VideoFile(path)
    assert len(video) == 221 and video.rate_hz == 25
    capture = cv2.VideoCapture(str(path))
    frames = {index: capture.read()[1][..., ::-1] for index in range(20)}
    for index in (19, 0, 7, 8):
        np.testing.assert_array_equal(video[index].image_rgb, frames[index])
    with pytest.raises(IndexError):
        video[221]
    make_bag(video, tmp_path / 'bag')
    bag = read_bag(tmp_path / 'bag')
    assert len(bag) == 221 and bag.rate_hz == pytest.approx(25)
    np.testing.assert_array_equal(bag[0].image_rgb, frames[0])
    last = video[-1]
    assert last.frame_id == '000220' and last.stamp_ns == 8_800_000_000
    np.testing.assert_array_equal(bag[-1].image_rgb, last.image_rgb)
    shutil.rmtree(tmp_path / 'bag')


def test_real_data_set_comes_back_whole(real_data: Path, tmp_path: Path) -> None:
    from anomaly_seg_ros.datasets import open_dataset
    source = open_dataset('road_anomaly_21', real_data / 'anomaly' / 'road_anomaly_21')
    make_bag(source, tmp_path / 'bag', rate_hz=2)
    check_same(iter(read_bag(tmp_path / 'bag')), source, rate_hz=2)
