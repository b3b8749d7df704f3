# SPDX-License-Identifier: Apache-2.0
"""
Write and read rosbag2 recordings (mcap and sqlite3) without ROS.

Ground truth travels as mono8 images on topics of its own and carries the header stamp of the
image that it belongs to; a small String topic carries the data set's frame names, and how it is
scored.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, ExitStack, suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
import json
from pathlib import Path
import re
import shutil
import struct
import sys
import tempfile
from types import TracebackType
from typing import Any, ClassVar, Literal

from anomaly_seg_ros.classes import CLASS_SETS
from anomaly_seg_ros.datasets.frame import Frame
from anomaly_seg_ros.datasets.media import ImageFolder, VideoFile
from anomaly_seg_ros.datasets.reading import codes_in
from anomaly_seg_ros.datasets.source import FrameSource
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.images import BadImage, decode_message, mask_from_message
from anomaly_seg_ros.metrics.components import find_track
import cv2
import numpy as np
from rosbags.interfaces import (
    Connection, Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime)
from rosbags.rosbag2 import Reader, StoragePlugin, Writer
from rosbags.typesys import get_typestore, Stores
from rosbags.typesys.store import Typestore

__all__ = [
    'BagFrame', 'BagReader', 'BagSummary', 'check_recording', 'DEFAULT_RATE_HZ', 'FRAME_TOPIC',
    'GROUND_TRUTH_TOPIC', 'ImageFolder', 'IMAGE_TOPIC', 'LABELS_TOPIC', 'make_bag', 'NO_TOPIC',
    'read_bag', 'ResultBag', 'STORAGES', 'VideoFile']

IMAGE_TOPIC = '/camera/image_raw'
GROUND_TRUTH_TOPIC = '/ground_truth/anomaly_mask'
LABELS_TOPIC = '/ground_truth/labels'
FRAME_TOPIC = '/ground_truth/frame'
#: In place of a topic: leave ground truth aside that the bag has.
NO_TOPIC = 'none'
# 2026-01-01 00:00:00 UTC: a fixed start makes bags of the same frames equal.
START_NS = 1_767_225_600_000_000_000
DEFAULT_RATE_HZ = 10.0

STORAGES = {'mcap': StoragePlugin.MCAP, 'sqlite3': StoragePlugin.SQLITE3}

_IMAGE = 'sensor_msgs/msg/Image'
_COMPRESSED = 'sensor_msgs/msg/CompressedImage'
_STRING = 'std_msgs/msg/String'
_NS = 1_000_000_000
# What rosbag2 records for an unset duration.
_INFINITE = QosTime(9223372036, 854775807)
_QOS = Qos(QosHistory.KEEP_LAST, 10, QosReliability.RELIABLE, QosDurability.VOLATILE, _INFINITE,
           _INFINITE, QosLiveliness.AUTOMATIC, _INFINITE, False)
# Messages that may wait for their partner before they are fetched from the file instead.
_MAX_WAITING = 8
# As rmw_validate_full_topic_name.
_TOPIC = re.compile(r'(/[A-Za-z_][A-Za-z0-9_]*)+')
_ZSTD_MAGIC = b'\x28\xb5\x2f\xfd'


@dataclass(frozen=True)
class BagSummary:
    """What :func:`make_bag` wrote."""

    path: Path
    storage: str
    frames: int
    ground_truth: int
    labels: int
    start_ns: int
    end_ns: int
    topics: tuple[str, ...]


@dataclass(frozen=True)
class BagFrame(Frame):
    """
    A frame of a bag with what its message said.

    Attributes
    ----------
    header_frame_id
        ``frame_id`` of the message's header.
    encoding
        ``encoding`` of an Image, ``format`` of a CompressedImage.
    message
        The image message itself, with the fields of sensor_msgs/msg/Image or CompressedImage.

    """

    header_frame_id: str = ''
    encoding: str = ''
    message: Any = None


@cache
def _typestore() -> Typestore:
    # Image, CompressedImage and String are the same in every distribution since Foxy.
    return get_typestore(Stores.ROS2_JAZZY)


def make_bag(source: FrameSource, output: Path | str, *, rate_hz: float | None = None,
             storage: str = 'mcap', image_topic: str = IMAGE_TOPIC,
             ground_truth_topic: str = GROUND_TRUTH_TOPIC, labels_topic: str = LABELS_TOPIC,
             frame_id: str = 'camera', start_ns: int = START_NS,
             compressed: Literal['jpeg', 'png'] | None = None,
             overwrite: bool = False) -> BagSummary:
    """
    Record a source of frames as a rosbag2 that ``ros2 bag play`` takes.

    Frame ``i`` has the stamp ``start_ns + round(i * 1e9 / rate_hz)``. Images are rgb8 (or
    compressed; JPEG at quality 95 changes pixels, PNG does not), anomaly masks mono8 with 0, 1
    and 255, labels mono8 train ids. The same frames give the same bytes with the same versions
    of rosbags and, for sqlite3, of SQLite. No CameraInfo is written: the calibration is unknown.

    Parameters
    ----------
    source
        A data set, :class:`ImageFolder` or :class:`VideoFile`.
    output
        Folder of the bag; appears only when it is complete.
    rate_hz
        Frames per second; None takes the source's own rate, else 10.
    storage
        ``mcap`` or ``sqlite3``.
    image_topic, ground_truth_topic, labels_topic
        Where images, anomaly masks and labels go.
    frame_id
        Coordinate frame in the image headers.
    start_ns
        Stamp of the first frame, nanoseconds since 1970.
    compressed
        ``jpeg`` or ``png`` writes sensor_msgs/msg/CompressedImage on ``image_topic`` +
        ``/compressed``.
    overwrite
        Replace an existing bag.

    Raises
    ------
    ValueError
        If an argument is out of its range, a topic is no whole name or has two uses.
    UserError
        If ``output`` exists, cannot be written, or a frame cannot be read.

    """
    if rate_hz is None:
        rate_hz = source.rate_hz or DEFAULT_RATE_HZ
    if compressed:
        image_topic += '/compressed'
    check_recording(len(source), rate_hz, (image_topic, ground_truth_topic, labels_topic),
                    start_ns)
    if compressed not in (None, 'jpeg', 'png'):
        raise ValueError(f'compressed must be None, jpeg or png, got {compressed!r}')
    if not len(source):
        raise UserError(f'{source.root}: no frames to record. Give a folder, video or data set '
                        'with at least one image.')
    output = Path(output)
    counts = {'frames': 0, 'ground_truth': 0, 'labels': 0}
    stamp_ns = start_ns
    with _new_bag(output, storage, overwrite, {'source': source.name}) as bag:
        images = bag.topic(image_topic, _COMPRESSED if compressed else _IMAGE)
        names = bag.topic(FRAME_TOPIC, _STRING)
        for index, frame in enumerate(source):
            stamp_ns = start_ns + round(index * _NS / rate_hz)
            image = _rgb8(frame.image_rgb, frame.frame_id, source)
            message = _compressed_message(image, compressed, stamp_ns, frame_id) if compressed \
                else _image_message(image, 'rgb8', stamp_ns, frame_id)
            bag.write(images, stamp_ns, message)
            bag.write(names, stamp_ns, _typestore().types[_STRING](json.dumps(
                {'stamp_ns': stamp_ns, 'frame_id': frame.frame_id, 'source': source.name,
                 'split': source.split, 'track': source.track,
                 'class_set': source.class_set})))
            counts['frames'] += 1
            for kind, topic, mask in (('ground_truth', ground_truth_topic, frame.anomaly_mask),
                                      ('labels', labels_topic, frame.labels)):
                if mask is None:
                    continue
                if mask.dtype != np.uint8 or mask.shape != image.shape[:2]:
                    raise UserError(
                        f'{source.root}: frame {frame.frame_id}: {kind} must be uint8 '
                        f'{image.shape[:2]} like its image, got {mask.dtype} {mask.shape}. '
                        'Correct the file; masks are never resized.')
                bag.write(bag.topic(topic, _IMAGE), stamp_ns,
                          _image_message(mask, 'mono8', stamp_ns, frame_id))
                counts[kind] += 1
        topics = bag.topics
    return BagSummary(output, storage, start_ns=start_ns, end_ns=stamp_ns, topics=topics, **counts)


def check_recording(frames: int, rate_hz: float,
                    topics: tuple[str, ...] = (IMAGE_TOPIC, GROUND_TRUTH_TOPIC, LABELS_TOPIC),
                    start_ns: int = START_NS) -> None:
    """Raise ValueError for times or topics that :func:`make_bag` cannot record."""
    if not 0 < rate_hz <= _NS:
        raise ValueError(f'rate_hz must be in (0, 1e9], got {rate_hz}')
    if not 0 <= start_ns <= 2 ** 31 * _NS - frames * _NS / rate_hz:
        raise ValueError('start_ns must be 0 or more and all stamps below 2**31 s (the range of '
                         f'ROS time), got {start_ns} and {frames} frames at rate_hz {rate_hz}')
    for topic in topics:
        if not _TOPIC.fullmatch(topic):
            raise ValueError('topics must be whole names such as /camera/image_raw, of letters, '
                             f'digits and _, got {topic!r}')
    if len({*topics, FRAME_TOPIC}) <= len(topics):
        raise ValueError('images, masks, labels and frame names need topics of their own, got '
                         f'{", ".join((*topics, FRAME_TOPIC))}')


class ResultBag:
    """
    Record the node's outputs, frame by frame, on the node's topics.

    A context manager. The bag appears at ``path`` when the block ends. When the block raises,
    what was written until then is kept as ``<path>.incomplete``.
    """

    #: Output name -> encoding.
    OUTPUTS: ClassVar[dict[str, str]] = {
        'labels': 'mono8', 'anomaly': '32FC1', 'anomaly_u8': 'mono8', 'obstacle_mask': 'mono8',
        'overlay': 'rgb8'}

    def __init__(self, path: Path | str, storage: str = 'mcap', *, overwrite: bool = False,
                 node: str = '/anomaly_seg') -> None:
        """Choose where to write; nothing is written before the block starts."""
        self.path = Path(path)
        self._context = _new_bag(self.path, storage, overwrite, {'source': node},
                                 keep_incomplete=True)
        self._node = node.rstrip('/')
        self._bag: _BagWriter | None = None

    def __enter__(self) -> 'ResultBag':
        """Start the bag under a temporary name."""
        self._bag = self._context.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> bool | None:
        """Finish the bag."""
        return self._context.__exit__(kind, error, traceback)

    def write(self, stamp_ns: int, frame_id: str, *, image_rgb: np.ndarray | None = None,
              labels: np.ndarray | None = None, anomaly: np.ndarray | None = None,
              anomaly_u8: np.ndarray | None = None, obstacle_mask: np.ndarray | None = None,
              overlay: np.ndarray | None = None) -> None:
        """
        Write one frame's results; None leaves a topic out.

        Parameters
        ----------
        stamp_ns, frame_id
            Header of the input image; every output gets the same.
        image_rgb, overlay
            uint8 (H, W, 3), RGB.
        labels, anomaly_u8, obstacle_mask
            uint8 (H, W).
        anomaly
            float32 (H, W), higher is more anomalous.

        """
        if self._bag is None:
            raise ValueError('ResultBag is not open; use it in a with statement')
        outputs = {'labels': labels, 'anomaly': anomaly, 'anomaly_u8': anomaly_u8,
                   'obstacle_mask': obstacle_mask, 'overlay': overlay}
        messages = [(f'{self._node}/output/{name}', pixels, self.OUTPUTS[name])
                    for name, pixels in outputs.items()]
        messages.insert(0, (f'{self._node}/input/image', image_rgb, 'rgb8'))
        for topic, pixels, encoding in messages:
            if pixels is not None:
                self._bag.write(self._bag.topic(topic, _IMAGE), stamp_ns,
                                _image_message(pixels, encoding, stamp_ns, frame_id))


def read_bag(path: Path | str, *, image_topic: str | None = None,
             ground_truth_topic: str | None = None,
             labels_topic: str | None = None) -> 'BagReader':
    """
    Open a bag folder, or one .mcap or .db3 file, as a source of frames.

    Parameters
    ----------
    path
        A rosbag2 folder with metadata.yaml, or a single storage file.
    image_topic
        None takes the only image topic that is not ground truth.
    ground_truth_topic, labels_topic
        None takes ``/ground_truth/anomaly_mask`` and ``/ground_truth/labels`` where they exist;
        ``none`` takes nothing; any other name must exist. A topic given as one of the two is not
        taken for the other.

    Raises
    ------
    UserError
        If the bag is missing, damaged or empty, if a topic is missing, of another type or given
        as both kinds of ground truth, if two images have one stamp, or if ground truth has no
        image of the same stamp. Names the file and the remedy.

    """
    return BagReader(path, image_topic, ground_truth_topic, labels_topic)


@dataclass
class _Topic:
    """Where a topic's messages are: header stamp -> time in the bag."""

    name: str
    msgtype: str
    log_time_ns: dict[int, int] = field(default_factory=dict)


class BagReader(FrameSource):
    """
    The images of a bag, each with the ground truth of the same header stamp.

    Opening walks through the bag once, reading stamps only, so that a damaged bag or ground truth
    without its image is reported before the first frame. Iterating reads the bag in order and
    holds a few messages at a time.
    """

    def __init__(self, path: Path | str, image_topic: str | None,
                 ground_truth_topic: str | None, labels_topic: str | None) -> None:
        """See :func:`read_bag`."""
        self.root = Path(path)
        self.name = self.root.resolve().stem
        if not self.root.exists():
            raise UserError(f'{path}: no such bag. Give a rosbag2 folder, an .mcap or a .db3 '
                            'file.')
        self._names: dict[int, str] = {}
        with self._reading() as reader:
            #: Topic -> message type of everything in the bag.
            self.topics = {c.topic: _full_type(c.msgtype) for c in reader.connections}
            #: Number of messages of all topics.
            self.message_count = reader.message_count
            self._check_definitions(reader.connections)
            self._truth = self._truth_topics(ground_truth_topic, labels_topic)
            image_topic = self._choose_image_topic(image_topic)
            self._images = _Topic(image_topic, self.topics[image_topic])
            self._index(reader)
        self._stamps = list(self._images.log_time_ns)
        if len(self._stamps) > 1:
            span_ns = max(self._stamps) - min(self._stamps)
            self.rate_hz = (len(self._stamps) - 1) * _NS / span_ns
        self._frame_ids = [self._names.get(stamp, f'{index:06d}')
                           for index, stamp in enumerate(self._stamps)]
        if len(set(self._frame_ids)) < len(self._frame_ids):
            raise UserError(f'{path}: {FRAME_TOPIC} gives one name to several frames. '
                            'Record the bag again with make-bag.')

    @property
    def image_topic(self) -> str:
        """Name of the topic that the frames come from."""
        return self._images.name

    @property
    def image_transport(self) -> str:
        """How they were recorded, as the node's parameter: ``raw`` or ``compressed``."""
        return 'compressed' if self._images.msgtype == _COMPRESSED else 'raw'

    @property
    def frame_ids(self) -> list[str]:
        """Names of the recorded data set's frames, else six-digit numbers in bag order."""
        return list(self._frame_ids)

    @property
    def stamps_ns(self) -> list[int]:
        """Header stamps of the images in bag order, nanoseconds."""
        return list(self._stamps)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._stamps)

    def __getitem__(self, index: int) -> BagFrame:
        """Read one frame."""
        stamp = self._stamps[index]
        with self._reading() as reader:
            raw = self._fetch(reader, self._images, stamp)
            truth = {kind: self._fetch(reader, topic, stamp)
                     for kind, topic in self._truth.items() if stamp in topic.log_time_ns}
        return self._frame(index % len(self), raw, truth)

    def __iter__(self) -> Iterator[BagFrame]:
        """
        Read all frames in the order of the bag.

        Images wait for their ground truth, wherever it is: what follows shortly is waited for,
        what is further away is fetched by its time in the bag, so few messages are held.
        """
        kinds = {topic.name: kind for kind, topic in self._truth.items()}
        truth: dict[tuple[str, int], bytes] = {}
        waiting: deque[tuple[int, bytes]] = deque()
        index = 0
        with ExitStack() as stack:
            reader = stack.enter_context(self._reading())
            fetcher: Reader | None = None
            messages = self._messages(reader, [self._images, *self._truth.values()])
            for message in chain(messages, [None]):
                if message is not None:
                    connection, now_ns, raw = message
                    if connection.topic == self._images.name:
                        waiting.append((_header_stamp_ns(raw), raw))
                    elif len(truth) < _MAX_WAITING:
                        truth[kinds[connection.topic], _header_stamp_ns(raw)] = raw
                while waiting:
                    stamp, image = waiting[0]
                    wanted = [kind for kind, topic in self._truth.items()
                              if stamp in topic.log_time_ns]
                    missing = [kind for kind in wanted if (kind, stamp) not in truth]
                    may_come = message is not None and len(waiting) <= _MAX_WAITING and all(
                        self._truth[kind].log_time_ns[stamp] >= now_ns for kind in missing)
                    if missing and may_come:
                        break
                    for kind in missing:
                        fetcher = fetcher or stack.enter_context(self._reading())
                        truth[kind, stamp] = self._fetch(fetcher, self._truth[kind], stamp)
                    waiting.popleft()
                    yield self._frame(index, image,
                                      {kind: truth.pop((kind, stamp)) for kind in wanted})
                    index += 1

    def _choose_image_topic(self, wanted: str | None) -> str:
        truth = {topic.name for topic in self._truth.values()}
        if wanted is None:  # that they are left aside does not make them camera images
            truth |= {GROUND_TRUTH_TOPIC, LABELS_TOPIC}
        pictures = [name for name, kind in self.topics.items()
                    if kind in (_IMAGE, _COMPRESSED) and name not in truth]
        listed = ', '.join(f'{name} ({kind})' for name, kind in self.topics.items()) or 'nothing'
        if wanted is not None:
            if wanted not in self.topics:
                raise UserError(f'{self.root}: no topic {wanted}. The bag has: {listed}. '
                                'Choose one with --image-topic.')
            if wanted not in pictures:
                raise UserError(f'{self.root}: {wanted} must be {_IMAGE} or {_COMPRESSED} and no '
                                f'ground truth, got {self.topics[wanted]}. '
                                'Choose another with --image-topic.')
            return wanted
        if len(pictures) != 1:
            what = f'{len(pictures)} image topics ({", ".join(pictures)})' if pictures \
                else f'no image topic; it has: {listed}'
            raise UserError(f'{self.root}: expected one image topic, the bag has {what}. '
                            'Choose one with --image-topic.')
        return pictures[0]

    def _truth_topics(self, masks: str | None, labels: str | None) -> dict[str, _Topic]:
        if masks == labels and masks not in (None, NO_TOPIC):
            raise UserError(f'{self.root}: {masks} is given for anomaly masks and for labels. '
                            f'Give each a topic of its own, or {NO_TOPIC}.')
        # A topic that is given as the one kind is not also the other by its name.
        masks_default = None if labels == GROUND_TRUTH_TOPIC else GROUND_TRUTH_TOPIC
        labels_default = None if masks == LABELS_TOPIC else LABELS_TOPIC
        names = {'anomaly_mask': self._truth_topic(masks, masks_default),
                 'labels': self._truth_topic(labels, labels_default)}
        return {kind: _Topic(name, _IMAGE) for kind, name in names.items() if name is not None}

    def _truth_topic(self, wanted: str | None, default: str | None) -> str | None:
        name = default if wanted is None else wanted
        if name is None or name == NO_TOPIC:
            return None
        if name not in self.topics:
            if wanted is None:
                return None
            raise UserError(f'{self.root}: no topic {name}. The bag has: '
                            f'{", ".join(self.topics) or "nothing"}. '
                            'Leave the option out where the bag has no ground truth.')
        if self.topics[name] != _IMAGE:
            raise UserError(f'{self.root}: ground truth {name} must be {_IMAGE}, got '
                            f'{self.topics[name]}. Record it as mono8 images.')
        return name

    def _check_definitions(self, connections: list[Connection]) -> None:
        for connection in connections:
            kind = _full_type(connection.msgtype)
            if kind in (_IMAGE, _COMPRESSED, _STRING) and connection.digest \
                    and connection.digest != _typestore().hash_rihs01(kind):
                raise UserError(f'{self.root}: {connection.topic} has another definition of '
                                f'{kind} than ROS 2. Convert the bag with ros2 bag convert.')

    def _index(self, reader: Reader) -> None:
        """Read every header stamp once; raise where frames and ground truth do not fit."""
        topics = {topic.name: topic for topic in (self._images, *self._truth.values())}
        expected: dict[str, int] = dict.fromkeys(topics, 0)
        seen: dict[str, int] = dict.fromkeys(topics, 0)
        names = [_Topic(FRAME_TOPIC, _STRING)] if self.topics.get(FRAME_TOPIC) == _STRING \
            else []
        for connection in reader.connections:
            if connection.topic in expected:
                expected[connection.topic] += connection.msgcount
        for connection, log_ns, raw in self._messages(reader, [*topics.values(), *names]):
            if connection.topic == FRAME_TOPIC:
                self._read_name(raw)
                continue
            topic = topics[connection.topic]
            seen[topic.name] += 1
            if len(raw) < 16:
                raise UserError(f'{self.root}: message {seen[topic.name] - 1} of {topic.name} '
                                f'has only {len(raw)} bytes. The bag is damaged; record it '
                                'again.')
            stamp = _header_stamp_ns(raw)
            if stamp in topic.log_time_ns:
                raise UserError(
                    f'{self.root}: {topic.name} has two messages with the stamp {stamp} ns '
                    f'(message {seen[topic.name] - 1}), so results cannot be told apart. '
                    'Make the publisher stamp every frame.')
            topic.log_time_ns[stamp] = log_ns
        for name, count in expected.items():
            if seen[name] != count:
                raise UserError(f'{self.root}: {name} should have {count} messages, found '
                                f'{seen[name]}. The bag is damaged; try ros2 bag reindex or mcap '
                                'recover, or record it again.')
        if not self._images.log_time_ns:
            raise UserError(f'{self.root}: {self._images.name} has no messages. '
                            'Record the camera while it publishes.')
        for topic in self._truth.values():
            lost = [stamp for stamp in topic.log_time_ns if stamp not in self._images.log_time_ns]
            if lost:
                more = f' and {len(lost) - 8} more' if len(lost) > 8 else ''
                raise UserError(
                    f'{self.root}: {len(lost)} of {len(topic.log_time_ns)} messages of '
                    f'{topic.name} have no image on {self._images.name} with the same stamp: '
                    f'{", ".join(map(str, lost[:8]))}{more} (ns). Choose the image topic that the '
                    'ground truth belongs to, record both together, or leave the ground truth '
                    f'aside with --ground-truth-topic {NO_TOPIC}.')

    def _read_name(self, raw: bytes) -> None:
        try:
            message: Any = _typestore().deserialize_cdr(raw, _STRING)
            entry = json.loads(message.data)
            self._names[int(entry['stamp_ns'])] = str(entry['frame_id'])
            # Not in bags of earlier versions.
            self.track = find_track(entry.get('track', self.track)).name
            self.class_set = entry.get('class_set', self.class_set)
            split = entry.get('split')
            self.split = None if split is None else str(split)
            if self.class_set is not None and self.class_set not in CLASS_SETS:
                raise ValueError(f'unknown class_set {self.class_set!r}')
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f'{self.root}: {FRAME_TOPIC} must hold JSON with stamp_ns and '
                            f'frame_id ({error}). Record the bag again with make-bag, or drop the '
                            'topic.') from error

    def _fetch(self, reader: Reader, topic: _Topic, stamp_ns: int) -> bytes:
        log_ns = topic.log_time_ns[stamp_ns]
        for _, _, raw in self._messages(reader, [topic], log_ns, log_ns + 1):
            if _header_stamp_ns(raw) == stamp_ns:
                return raw
        raise UserError(f'{self.root}: the message of {topic.name} with the stamp {stamp_ns} ns '
                        'is gone. The bag changed while it was read; open it again.')

    def _frame(self, index: int, raw: bytes, truth: dict[str, bytes]) -> BagFrame:
        stamp_ns = self._stamps[index]
        where = f'{self.root}: frame {index} (stamp {stamp_ns} ns)'
        message = self._deserialize(raw, self._images, where)
        try:
            image = decode_message(message)
        except BadImage as error:
            raise UserError(f'{where} on {self._images.name} does not decode: {error}') from error
        masks: dict[str, np.ndarray] = {}
        for kind, data in truth.items():
            topic = self._truth[kind]
            try:
                mask = mask_from_message(self._deserialize(data, topic, where))
            except BadImage as error:
                raise UserError(f'{where}: ground truth on {topic.name}: {error}') from error
            if mask.shape != image.full_size_hw:
                raise UserError(f'{where}: ground truth on {topic.name} has {mask.shape[1]}x'
                                f'{mask.shape[0]} pixels, its image {image.full_size_hw[1]}x'
                                f'{image.full_size_hw[0]}. Record both at one size.')
            if kind == 'anomaly_mask' and (other := set(codes_in(mask)) - {0, 1, 255}):
                raise UserError(f'{where}: {topic.name} must hold 0, 1 and 255, got also '
                                f'{", ".join(map(str, sorted(other)))}. Record it with make-bag.')
            masks[kind] = mask
        return BagFrame(self._frame_ids[index], image.rgb(), masks.get('anomaly_mask'),
                        masks.get('labels'), stamp_ns,
                        header_frame_id=message.header.frame_id, encoding=_encoding(message),
                        message=message)

    def _deserialize(self, raw: bytes, topic: _Topic, where: str) -> Any:
        try:
            return _typestore().deserialize_cdr(raw, topic.msgtype)
        # rosbags raises whatever the damaged bytes lead to.
        except Exception as error:
            raise UserError(f'{where} on {topic.name} is no {topic.msgtype} '
                            f'({type(error).__name__}: {error}). The bag is damaged; record it '
                            'again.') from error

    def _messages(self, reader: Reader, topics: list[_Topic], start_ns: int | None = None,
                  stop_ns: int | None = None) -> Iterator[tuple[Connection, int, bytes]]:
        names = {topic.name for topic in topics}
        connections = [c for c in reader.connections if c.topic in names]
        if not connections:
            return
        messages = reader.messages(connections, start_ns, stop_ns)
        while True:
            try:
                connection, log_ns, raw = next(messages)
                # A single file of a bag with compressed messages has no metadata that says so;
                # CDR never starts with these bytes.
                if raw[:4] == _ZSTD_MAGIC:
                    raw = _unzstd(raw)
            except StopIteration:
                return
            except Exception as error:
                raise self._unreadable(error) from error
            yield connection, log_ns, raw

    @contextmanager
    def _reading(self) -> Iterator[Reader]:
        reader = Reader(self.root) if self._is_bag() else None
        try:
            if reader is None:
                raise ValueError('neither a folder with metadata.yaml nor an .mcap or .db3 file')
            for path in self.root.glob('[!.]*.db3') if self.root.is_dir() else (self.root,):
                _check_whole(path)
            reader.open()
        except Exception as error:
            raise self._unreadable(error) from error
        try:
            yield reader
        finally:
            reader.close()

    def _is_bag(self) -> bool:
        if self.root.is_dir():
            return (self.root / 'metadata.yaml').is_file()
        return self.root.suffix in ('.mcap', '.db3')

    def _unreadable(self, error: Exception) -> UserError:
        """Name the bag; rosbags lets through what struct, sqlite, zstd, yaml and asserts raise."""
        detail = str(error) or type(error).__name__
        return UserError(f'{self.root}: not a readable rosbag2 ({detail}). The bag may be cut off '
                         'or still being written; try ros2 bag reindex or mcap recover, or record '
                         'it again.')


class _BagWriter:
    """A rosbags Writer that makes topics when they are first used."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._connections: dict[str, Connection] = {}

    @property
    def topics(self) -> tuple[str, ...]:
        return tuple(self._connections)

    def topic(self, name: str, msgtype: str) -> Connection:
        if name not in self._connections:
            self._connections[name] = self._writer.add_connection(
                name, msgtype, typestore=_typestore(), offered_qos_profiles=[_QOS])
        return self._connections[name]

    def write(self, connection: Connection, stamp_ns: int, message: Any) -> None:
        self._writer.write(connection, stamp_ns,
                           _typestore().serialize_cdr(message, connection.msgtype))


@contextmanager
def _new_bag(path: Path, storage: str, overwrite: bool, notes: dict[str, str],
             keep_incomplete: bool = False) -> Iterator[_BagWriter]:
    """
    Write a bag beside ``path`` and move it there when the block succeeds.

    ``notes`` go into the bag's custom metadata.
    """
    if storage not in STORAGES:
        raise ValueError(f'storage must be one of {", ".join(STORAGES)}, got {storage!r}')
    if path.exists():
        if not overwrite:
            raise UserError(f'{path}: exists already. Choose another name, remove it or allow '
                            'overwriting.')
        if path.is_file() or (any(path.iterdir()) and not (path / 'metadata.yaml').exists()):
            raise UserError(f'{path}: exists and is no bag, so it is not overwritten. '
                            'Choose another name or remove it.')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f'.{path.name}.', suffix='.tmp'))
    except OSError as error:
        raise _cannot_write(path, error) from error
    # The file inside the bag carries the folder's name, so the folder has its own from the start.
    folder = temporary / path.name
    try:
        writer = Writer(folder, version=8, storage_plugin=STORAGES[storage])
        for key, value in notes.items():
            writer.set_custom_data(key, value)
        try:
            writer.open()
            try:
                yield _BagWriter(writer)
            except BaseException:
                if keep_incomplete and writer.connections:
                    with suppress(Exception):  # on a full disk the end cannot be written either
                        writer.close()
                    _move(folder, path.with_name(path.name + '.incomplete'))
                else:
                    with suppress(Exception):
                        writer.abort()
                raise
            writer.close()
            _move(folder, path)
        except OSError as error:
            raise _cannot_write(path, error) from error
        except Exception as error:
            # Python's sqlite3 reports a full disk as its own OperationalError.
            if type(error).__module__ == 'sqlite3':
                raise _cannot_write(path, error) from error
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move(folder: Path, path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
    folder.rename(path)


def _cannot_write(path: Path, error: Exception) -> UserError:
    detail = getattr(error, 'strerror', None) or error
    return UserError(f'{path}: the bag cannot be written ({detail}). Free disk space or choose '
                     'another folder.')


def _check_whole(path: Path) -> None:
    """
    Raise ValueError where an SQLite file lacks pages; SQLite reads a cut last page as zeros.

    See https://sqlite.org/fileformat2.html, section 1.3.
    """
    if path.suffix != '.db3':
        return
    log = path.with_name(path.name + '-wal')
    if log.exists() and log.stat().st_size:
        raise ValueError(f'{log.name} holds messages that are not yet in the bag')
    with open(path, 'rb') as stream:
        head = stream.read(100)
    if len(head) < 100:
        raise ValueError(f'{path.name} has only {len(head)} bytes')
    page_size = int.from_bytes(head[16:18], 'big')
    pages = int.from_bytes(head[28:32], 'big')
    expected = (65536 if page_size == 1 else page_size) * pages
    if head[24:28] == head[92:96] and path.stat().st_size < expected:
        raise ValueError(f'{path.name} has {path.stat().st_size} of {expected} bytes')


def _full_type(msgtype: str) -> str:
    """``sensor_msgs/Image`` -> ``sensor_msgs/msg/Image``; some writers leave the middle out."""
    package, _, name = msgtype.rpartition('/')
    return msgtype if '/' in package else f'{package}/msg/{name}'


def _header_stamp_ns(raw: bytes) -> int:
    """Read the stamp of a CDR message that starts with a std_msgs/Header."""
    seconds, nanoseconds = struct.unpack_from('<iI' if raw[1] & 1 else '>iI', raw, 4)
    stamp_ns: int = seconds * _NS + nanoseconds
    return stamp_ns


def _header(stamp_ns: int, frame_id: str) -> Any:
    types = _typestore().types
    seconds, nanoseconds = divmod(stamp_ns, _NS)
    return types['std_msgs/msg/Header'](
        types['builtin_interfaces/msg/Time'](seconds, nanoseconds), frame_id)


def _image_message(pixels: np.ndarray, encoding: str, stamp_ns: int, frame_id: str) -> Any:
    dtype, channels = {'rgb8': ('u1', 3), 'mono8': ('u1', 1), '32FC1': ('<f4', 1)}[encoding]
    expected = 3 if channels == 3 else 2
    if pixels.ndim != expected or (channels == 3 and pixels.shape[2] != 3) \
            or pixels.dtype != np.dtype(dtype):
        raise ValueError(f'{encoding} needs {np.dtype(dtype)} with {expected} dimensions, got '
                         f'{pixels.dtype} {pixels.shape}')
    height, width = pixels.shape[:2]
    data = np.ascontiguousarray(pixels)
    return _typestore().types[_IMAGE](
        header=_header(stamp_ns, frame_id), height=height, width=width, encoding=encoding,
        is_bigendian=0, step=width * channels * data.itemsize,
        data=data.view(np.uint8).reshape(-1))


def _compressed_message(image_rgb: np.ndarray, kind: str, stamp_ns: int, frame_id: str) -> Any:
    options = [cv2.IMWRITE_JPEG_QUALITY, 95] if kind == 'jpeg' else []
    _, encoded = cv2.imencode('.jpg' if kind == 'jpeg' else '.png',
                              cv2.cvtColor(image_rgb, cv2.COLOR_RGB2BGR), options)
    return _typestore().types[_COMPRESSED](
        header=_header(stamp_ns, frame_id), format=f'rgb8; {kind} compressed bgr8',
        data=encoded.reshape(-1))


def _rgb8(image: np.ndarray, frame_id: str, source: FrameSource) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise UserError(f'{source.root}: frame {frame_id} must be uint8 (H, W, 3), got '
                        f'{image.dtype} {image.shape}.')
    return image


def _encoding(message: Any) -> str:
    encoding: str = message.format if hasattr(message, 'format') else message.encoding
    return encoding


def _unzstd(raw: bytes) -> bytes:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd.decompress(raw)
