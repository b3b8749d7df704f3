# SPDX-License-Identifier: Apache-2.0
"""
Look for what usually goes wrong between a camera and the node, and say what to do.

Each check is a function that returns one or more ``Check``; none changes anything.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
import math
import os
from pathlib import Path
import shutil
import time
from typing import Any

from anomaly_seg_ros.backends import open_backend
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.images import decode_message
from anomaly_seg_ros.pipeline import BadOutput, Pipeline
from anomaly_seg_ros.resources import resource
from anomaly_seg_ros.ros.conversions import stamp_to_ns
from anomaly_seg_ros.ros.loading import read_model
from anomaly_seg_ros.ros.parameters import IMAGE_TYPES
from anomaly_seg_ros.ros.transport import (
    left_behind, profile_path, PROFILE_VARIABLES, segment_size, SHARED_MEMORY)
import rclpy
from rclpy.context import Context
from rclpy.exceptions import InvalidTopicNameException
from rclpy.executors import SingleThreadedExecutor
from rclpy.expand_topic_name import expand_topic_name
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import qos_check_compatible, QoSCompatibility, QoSProfile, ReliabilityPolicy
from rclpy.validate_full_topic_name import validate_full_topic_name
from sensor_msgs.msg import CompressedImage, Image

OK, WARN, ERROR = 'ok', 'WARN', 'ERROR'
_MIB = 2**20
# Of ended programs, from which on it is worth a warning.
_MUCH_LEFT_BEHIND = 2**30
_NAME = 'anomaly_seg_doctor'  # of the node that listens


@dataclass(frozen=True)
class Check:
    """
    One finding.

    Attributes
    ----------
    name
        What was looked at.
    level
        ``ok``, ``WARN`` or ``ERROR``.
    message
        What was found.
    remedy
        What to do about it; empty where nothing is to be done.

    """

    name: str
    level: str
    message: str
    remedy: str = ''


@dataclass(frozen=True)
class Received:
    """
    What came on the image topic while it was listened to.

    Attributes
    ----------
    frames
        Number of frames.
    rate_hz
        Frames per second; 0 for fewer than two.
    size_hw, encoding, data_bytes
        Of the last frame; size (0, 0) where it could not be read.
    age_s
        Age of the last frame when it came, by the clock asked for.
    error
        Why the last frame could not be read; empty when it could.

    """

    frames: int
    rate_hz: float = 0.0
    size_hw: tuple[int, int] = (0, 0)
    encoding: str = ''
    data_bytes: int = 0
    age_s: float = 0.0
    error: str = ''


def run_doctor(image_topic: str = '/camera/image_raw', *, image_transport: str = 'raw',
               model: Path | str = '', backend: str = 'cpu', threads: int = 0,
               input_reliability: str = 'best_effort', use_sim_time: bool = False,
               listen_s: float = 3.0, domain_id: int | None = None) -> list[Check]:
    """
    Run every check and return the findings in order.

    Parameters
    ----------
    image_topic
        The camera's topic, as remapped to ``~/input/image``.
    image_transport
        ``raw`` or ``compressed``, as the node's parameter.
    model
        Model file; empty takes the bundled one.
    backend
        As the node's parameter.
    threads
        As the node's parameter.
    input_reliability
        As the node's parameter.
    use_sim_time
        As the node's parameter.
    listen_s
        How long to wait for publishers and frames, in seconds.
    domain_id
        ROS domain; None takes ROS_DOMAIN_ID.

    """
    if image_transport not in IMAGE_TYPES:
        raise ValueError(f'image_transport must be one of {", ".join(IMAGE_TYPES)}, '
                         f'got {image_transport!r}')
    checks = [check_ros(), *check_domain(os.environ)]
    checks += check_cores(len(os.sched_getaffinity(0)), cpu_quota(), os.getloadavg()[0], threads)
    model_checks, run_s = check_model(model, backend, threads)
    checks += model_checks
    with _listening(domain_id, use_sim_time) as (node, executor):
        qos = QoSProfile(depth=5, reliability=ReliabilityPolicy[input_reliability.upper()])
        received = listen(node, executor, image_topic, image_transport, qos, listen_s)
        publishers = node.get_publishers_info_by_topic(image_topic)
        others = {name: types for name, types in node.get_topic_names_and_types()
                  if set(types) & set(IMAGE_TYPES.values())}
        clocks = node.count_publishers('/clock')
    checks += check_publishers(image_topic, image_transport, qos, publishers, others)
    checks += check_frames(image_topic, received, len(publishers), run_s)
    checks += check_transport(os.environ, received.data_bytes or 2048 * 1024 * 3,
                              measured=bool(received.frames))
    checks += check_clock(use_sim_time, clocks, received)
    return checks


def check_topic_name(name: str) -> None:
    """Raise ValueError, with the reason, unless ROS takes ``name`` as that of a topic."""
    try:
        validate_full_topic_name(expand_topic_name(name, _NAME, '/'))
    except (ValueError, InvalidTopicNameException) as error:
        # Followed by the place in the source of rcl.
        reason = str(error).splitlines()[0].partition(', at ')[0].rstrip(':')
        raise ValueError(f'{name!r}: {reason}. Give one such as /camera/image_raw.') from error


def format_checks(checks: Sequence[Check]) -> str:
    """Return the findings as text, one line each, with the remedy below where there is one."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f'{check.level:<6}{check.name:<{width}}  {check.message}')
        if check.remedy:
            lines.append(f'{"":<6}{"":<{width}}  -> {check.remedy}')
    errors = sum(check.level == ERROR for check in checks)
    warnings = sum(check.level == WARN for check in checks)
    return '\n'.join([*lines, '', f'{errors} errors, {warnings} warnings'])


def check_ros() -> Check:
    """Tell which rclpy this is."""
    distribution = os.environ.get('ROS_DISTRO')
    path = Path(rclpy.__file__).parent
    if distribution and 'site-packages' in path.parts and '/opt/ros' not in str(path):
        return Check('ros', ERROR, f'ROS_DISTRO is {distribution}, but rclpy is {path}',
                     'uninstall the ros-* wheels from this Python, or do not source a ROS')
    return Check('ros', OK, f'{distribution or "wheels"}, rclpy at {path}, '
                 f'{os.environ.get("RMW_IMPLEMENTATION") or "default middleware"}')


def check_domain(environment: Mapping[str, str]) -> Iterator[Check]:
    """Judge ROS_DOMAIN_ID and the discovery range."""
    text = environment.get('ROS_DOMAIN_ID') or '0'
    number = int(text) if text.isdecimal() else -1
    if not 0 <= number <= 232:
        yield Check('domain', ERROR, f'ROS_DOMAIN_ID is {text!r}',
                    'set it to a number of 0 to 101')
    elif number > 101:
        yield Check('domain', WARN, f'ROS_DOMAIN_ID is {number}: its ports meet those of ordinary '
                    'connections', 'choose one of 0 to 101')
    else:
        yield Check('domain', OK, f'ROS_DOMAIN_ID {number}; the camera must have the same')
    localhost = environment.get('ROS_LOCALHOST_ONLY') == '1' \
        or environment.get('ROS_AUTOMATIC_DISCOVERY_RANGE', '').upper() in ('LOCALHOST', 'OFF')
    if localhost:
        yield Check('discovery', WARN, 'only publishers on this machine are found',
                    'unset ROS_LOCALHOST_ONLY and ROS_AUTOMATIC_DISCOVERY_RANGE if the camera is '
                    'on another one')


def cpu_quota() -> float | None:
    """Return the cores that this process's control group may use; None without a limit."""
    try:
        limit, period = Path('/sys/fs/cgroup/cpu.max').read_text(encoding='ascii').split()
    except (OSError, ValueError):
        return None
    return None if limit == 'max' else int(limit) / int(period)


def check_cores(cores: int, quota: float | None, load: float, threads: int) -> Iterator[Check]:
    """Judge threads against the cores that this process may use."""
    usable = cores if quota is None else min(cores, quota)
    wanted = threads or cores
    text = f'{cores} cores' + (f', limited to {quota:g} by the control group' if quota else '') \
        + f'; {wanted} network threads; load {load:.1f}'
    if wanted > math.ceil(usable):
        yield Check('cores', WARN, text, f'set threads to {max(1, math.floor(usable))}: more '
                    'threads than cores make frames late')
    elif load > cores:
        yield Check('cores', WARN, text, 'other programs compete for the cores; end them or give '
                    'the node cores of its own (taskset)')
    else:
        yield Check('cores', OK, text)


def check_model(model: Path | str, backend: str, threads: int) -> tuple[list[Check], float | None]:
    """Open the model, run it, and return the findings and the seconds of one frame."""
    try:
        file = read_model(str(model))
    except UserError as error:
        return [Check('model', ERROR, str(error))], None
    card = file.card
    checks = [Check('model', OK, f'{file.path}: {card.name}, {card.network}, {card.score}, '
                    f'{card.precision}, {card.input_size_hw[0]}x{card.input_size_hw[1]}')]
    if card.threshold_source.startswith('provisional'):
        checks.append(Check('threshold', WARN, f'{card.threshold:.6g}: {card.threshold_source}',
                            'calibrate it on frames of your camera: anomaly-seg calibrate'))
    try:
        with open_backend(file, backend, threads=threads) as device:
            pipeline = Pipeline(device)
            pipeline.warm_up()
            began = time.perf_counter()
            pipeline.warm_up(runs=3)
            run_s = (time.perf_counter() - began) / 3
            about = ', '.join(device.describe().values())
    except (UserError, BadOutput) as error:
        return [*checks, Check('backend', ERROR, str(error))], None
    return [*checks, Check('backend', OK, f'{about}: {run_s * 1e3:.0f} ms a frame')], run_s


def listen(node: Node, executor: SingleThreadedExecutor, topic: str, transport: str,
           qos: QoSProfile, listen_s: float) -> Received:
    """Subscribe as the node would and report what comes."""
    arrivals: list[float] = []
    ages_s: list[float] = []
    last: list[Any] = []

    def take(message: Any) -> None:
        arrivals.append(time.monotonic())
        ages_s.append((node.get_clock().now().nanoseconds - stamp_to_ns(message.header)) / 1e9)
        last[:] = [message]

    kind = Image if transport == 'raw' else CompressedImage
    node.create_subscription(kind, topic, take, qos)
    deadline = time.monotonic() + listen_s
    while time.monotonic() < deadline:
        executor.spin_once(timeout_sec=0.1)
    if not last:
        return Received(0)
    message = last[0]
    size_hw, error = (0, 0), ''
    try:
        size_hw = decode_message(message).full_size_hw
    except ValueError as problem:
        error = str(problem)
    span = arrivals[-1] - arrivals[0]
    return Received(
        frames=len(arrivals), rate_hz=(len(arrivals) - 1) / span if span > 0 else 0.0,
        size_hw=size_hw, encoding=message.encoding if transport == 'raw' else message.format,
        data_bytes=len(message.data), age_s=ages_s[-1], error=error)


def check_publishers(topic: str, transport: str, qos: QoSProfile, publishers: Sequence[Any],
                     image_topics: Mapping[str, Sequence[str]]) -> Iterator[Check]:
    """Judge who publishes the topic, of which type and with which QoS."""
    wanted = IMAGE_TYPES[transport]
    if not publishers:
        found = ', '.join(f'{name} ({types[0]})' for name, types in sorted(image_topics.items())
                          if name != topic)
        yield Check('publisher', ERROR, f'nobody publishes {topic}; image topics here: '
                    f'{found or "none"}',
                    'remap: image:=TOPIC; no topic at all means another domain, another network '
                    'or a camera driver that does not run')
        return
    for publisher in publishers:
        name = f'{publisher.node_namespace.rstrip("/")}/{publisher.node_name}'
        if publisher.topic_type != wanted:
            other = 'compressed' if transport == 'raw' else 'raw'
            remedy = f'set image_transport to {other}' if publisher.topic_type \
                == IMAGE_TYPES[other] else 'remap to an image topic'
            yield Check('publisher', ERROR, f'{name} publishes {publisher.topic_type}, not '
                        f'{wanted}', remedy)
            continue
        compatible, reason = qos_check_compatible(publisher.qos_profile, qos)
        if compatible == QoSCompatibility.ERROR:
            yield Check('qos', ERROR, f'{name}: {reason.strip()}',
                        'set input_reliability to best_effort')
        else:
            yield Check('qos', OK, f'{name}: {publisher.qos_profile.reliability.name.lower()}, '
                        'fits the subscription')


def check_frames(topic: str, received: Received, publishers: int,
                 run_s: float | None) -> Iterator[Check]:
    """Judge what came on the topic."""
    if not received.frames:
        if publishers:
            yield Check('frames', ERROR, f'{publishers} publishers of {topic}, but no frame came',
                        f'start the publisher, too, with the Fast DDS profile: {_use_profile()}')
        return
    height, width = received.size_hw
    text = f'{width}x{height} {received.encoding}, {received.rate_hz:.1f} Hz'
    if received.error:
        yield Check('frames', ERROR, f'frames come but cannot be read: {received.error}')
    elif run_s is not None and received.rate_hz * run_s > 1:
        yield Check('frames', WARN, f'{text}; the network holds {1 / run_s:.1f} Hz here',
                    'the newest frame wins and others are dropped; use a smaller input size, '
                    'another backend or a lower camera rate to answer each')
    else:
        yield Check('frames', OK, text)


def check_transport(environment: Mapping[str, str], frame_bytes: int,
                    measured: bool) -> Iterator[Check]:
    """Judge the middleware's buffers against the size of a frame."""
    size = f'{frame_bytes / _MIB:.1f} MiB frame' + ('' if measured else ' (assumed)')
    middleware = environment.get('RMW_IMPLEMENTATION', 'rmw_fastrtps_cpp')
    if 'fastrtps' not in middleware:
        yield from _check_socket_buffers(middleware, frame_bytes, size)
        return
    try:
        segment = segment_size(environment)
    except UserError as error:
        yield Check('transport', ERROR, str(error), _use_profile())
        return
    if not segment:
        yield from _check_socket_buffers(f'{middleware} without shared memory', frame_bytes, size)
        return
    where = profile_path(environment) or 'the default'
    # Two frames: one is read while the next is written.
    if segment < 2 * frame_bytes:
        yield Check('transport', ERROR if segment < frame_bytes else WARN,
                    f'shared-memory segment of {where} holds {segment / _MIB:.1f} MiB, less than '
                    f'two of a {size}: best-effort frames are lost',
                    f'{_use_profile()}, for the camera and the node')
    else:
        yield Check('transport', OK, f'shared-memory segment of {where} holds '
                    f'{segment / _MIB:.0f} MiB, {segment // frame_bytes} times a {size}')
    yield _check_shared_memory(segment)


def _use_profile() -> str:
    """Say how the profile that lets big images through is used."""
    new, old = PROFILE_VARIABLES
    return f'export {new}={resource("config/fastdds.xml")}; export {old}=${new}'


def _check_shared_memory(segment: int, folder: Path = SHARED_MEMORY) -> Check:
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        return Check('/dev/shm', ERROR, f'cannot be looked at ({error.strerror})',
                     'mount a tmpfs on /dev/shm')
    text = f'{usage.free / _MIB:.0f} of {usage.total / _MIB:.0f} MiB free'
    left = left_behind(folder)
    remedies = []
    if left:
        text += f', {left / _MIB:.0f} MiB left by programs that have ended'
        remedies.append('free what ended programs left: fastdds shm clean (running ones keep '
                        'theirs)')
    if usage.free < 3 * segment:
        remedies.append('in a container: docker run --shm-size=1g (or --ipc=host); otherwise: '
                        'mount -o remount,size=1g /dev/shm')
        return Check('/dev/shm', ERROR if usage.free < segment else WARN,
                     f'{text}; camera, node and viewer take {segment / _MIB:.0f} MiB each',
                     '; '.join(remedies))
    if left >= _MUCH_LEFT_BEHIND:
        return Check('/dev/shm', WARN, text, remedies[0])
    return Check('/dev/shm', OK, text)


def _check_socket_buffers(middleware: str, frame_bytes: int, size: str) -> Iterator[Check]:
    try:
        limit = int(Path('/proc/sys/net/core/rmem_max').read_text(encoding='ascii'))
    except (OSError, ValueError):
        yield Check('transport', WARN, f'{middleware}: its buffers are not known here')
        return
    if limit < frame_bytes:
        yield Check('transport', WARN, f'{middleware}: net.core.rmem_max is {limit / _MIB:.1f} '
                    f'MiB, less than a {size}', 'sysctl -w net.core.rmem_max=67108864')
    else:
        yield Check('transport', OK, f'{middleware}: net.core.rmem_max is {limit / _MIB:.0f} MiB')


def check_clock(use_sim_time: bool, clock_publishers: int, received: Received) -> Iterator[Check]:
    """Judge stamps and use_sim_time against the clock."""
    if use_sim_time and not clock_publishers:
        yield Check('clock', ERROR, 'use_sim_time is set, but nobody publishes /clock',
                    'start the simulator or "ros2 bag play --clock", or unset use_sim_time')
        return
    if not use_sim_time and clock_publishers:
        yield Check('clock', WARN, '/clock is published, but use_sim_time is not set',
                    'set use_sim_time, or frames seem old and max_frame_age_ms drops them')
        return
    if not received.frames:
        return
    text = f'frames are {received.age_s:.3f} s old when they come'
    if abs(received.age_s) > 1:
        yield Check('clock', WARN, text, 'synchronise the clocks (chrony, PTP); for a bag, play '
                    'it with --clock and set use_sim_time')
    else:
        yield Check('clock', OK, text)


@contextmanager
def _listening(domain_id: int | None,
               use_sim_time: bool) -> Iterator[tuple[Node, SingleThreadedExecutor]]:
    """Give a node and its executor in a domain."""
    context = Context()
    context.init(args=[], domain_id=domain_id)
    node = Node(_NAME, context=context, enable_rosout=False,
                start_parameter_services=False,
                parameter_overrides=[Parameter('use_sim_time', value=use_sim_time)])
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    try:
        yield node, executor
    finally:
        executor.shutdown()
        node.destroy_node()
        context.try_shutdown()
