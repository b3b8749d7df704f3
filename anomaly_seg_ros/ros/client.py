# SPDX-License-Identifier: Apache-2.0
"""Start the real node in a process of its own and send frames through it over DDS."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, ExitStack
from dataclasses import dataclass, field
import fcntl
import os
from pathlib import Path
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from types import TracebackType
from typing import Any, Protocol

from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.heap import keep_freed_memory
from anomaly_seg_ros.images import message_array, message_data
from anomaly_seg_ros.resources import resource
from anomaly_seg_ros.ros.conversions import stamp_to_ns
from anomaly_seg_ros.ros.transport import profile_environment
from diagnostic_msgs.msg import DiagnosticArray
import numpy as np
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header
import yaml

NODE = 'anomaly_seg'
OUTPUTS = ('labels', 'anomaly', 'obstacle_mask')
# What "python -m anomaly_seg_ros.ros" does, but ends when its parent is killed (Linux's
# PR_SET_PDEATHSIG is 1): a node that is left over would go on for ever.
_NODE_PROGRAM = ('import ctypes, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM); '
                 'from anomaly_seg_ros.ros.__main__ import main; sys.exit(main())')
_QUEUE = 32  # messages that may wait to be read
_QUIET_S = 3.0  # at the end of a real-time run: what has not come by then was lost
_MOST_WAITING = 500  # stamps of which some outputs are still missing


class FrameLike(Protocol):
    """What is needed of a frame: an RGB image uint8 (H, W, 3) and its stamp."""

    @property
    def image_rgb(self) -> np.ndarray:
        """Return the image."""
        ...

    @property
    def stamp_ns(self) -> int | None:
        """Return the stamp."""
        ...


@dataclass(frozen=True)
class NodeAnswer:
    """
    What the node published for one frame.

    Attributes
    ----------
    stamp_ns
        Stamp of the frame, and of every message here.
    labels, anomaly, mask, anomaly_u8, overlay
        The outputs, at the camera's resolution; None where not asked for.
    obstacles
        Number of obstacles in ``mask``.
    latency_ms
        Milliseconds by stage in the node; ``end_to_end`` from publishing the frame here to the
        last of its outputs here, and ``transport`` what of that was spent outside the node.
    flags
        Input-quality flags of the frame.
    backend
        What the node says about its backend.

    """

    stamp_ns: int
    labels: np.ndarray | None
    anomaly: np.ndarray | None
    mask: np.ndarray | None
    obstacles: int
    latency_ms: Mapping[str, float]
    flags: tuple[str, ...] = ()
    backend: Mapping[str, str] = field(default_factory=dict)
    anomaly_u8: np.ndarray | None = None
    overlay: np.ndarray | None = None


def transport_environment() -> dict[str, str]:
    """Return the variables that make Fast DDS carry big images, unless the user set others."""
    return profile_environment(os.environ, str(resource('config/fastdds.xml')))


@contextmanager
def reserved_domain_id() -> Iterator[int]:
    """
    Give a ROS_DOMAIN_ID that no other process of this machine uses.

    Raises
    ------
    UserError
        If every one is taken.

    """
    candidates = list(range(1, 102))  # above, the ports meet those of ordinary connections
    random.SystemRandom().shuffle(candidates)
    for domain_id in candidates:
        path = Path(tempfile.gettempdir()) / f'anomaly_seg_ros_domain_{os.getuid()}_{domain_id}'
        with open(path, 'w', encoding='utf-8') as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            if not _domain_in_use(domain_id):
                yield domain_id
                return
    raise UserError('no free ROS_DOMAIN_ID from 1 to 101; end some ROS processes')


def _domain_in_use(domain_id: int) -> bool:
    """Tell whether the first participants' discovery ports of a domain are bound (RTPS 9.6.1)."""
    for port in (7400 + 250 * domain_id, 7410 + 250 * domain_id):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind(('', port))
            except OSError:
                return True
    return False


class NodeClient:
    """
    The other side of the node's topics: sends frames, gathers outputs and diagnostics.

    Attributes
    ----------
    diagnostics
        The last values, by ``<part>.<key>``, for instance ``input.rate_hz``; each part's sentence
        is ``<part>`` and its level ``<part>.level``.

    """

    def __init__(self, domain_id: int, outputs: Sequence[str] = OUTPUTS, *,
                 reliable: bool = True, image_transport: str = 'raw') -> None:
        """
        Join a domain and subscribe.

        Parameters
        ----------
        domain_id
            ROS domain of the node.
        outputs
            Names of image outputs, as in ``~/output/<name>``.
        reliable
            QoS of the frames and the outputs.
        image_transport
            ``raw`` or ``compressed``, as the node's parameter: type of the frames.

        """
        keep_freed_memory()
        self.outputs = tuple(outputs)
        self.diagnostics: dict[str, str] = {}
        self.reports = 0
        self._messages: dict[int, dict[str, Any]] = {}
        self._context = Context()
        with _environment({**transport_environment(),
                           'ROS_AUTOMATIC_DISCOVERY_RANGE': 'LOCALHOST'}):
            self._context.init(args=[], domain_id=domain_id)
            self.node = Node('anomaly_seg_client', context=self._context,
                             enable_rosout=False, start_parameter_services=False)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.node)
        qos = QoSProfile(depth=_QUEUE, reliability=ReliabilityPolicy.RELIABLE if reliable
                         else ReliabilityPolicy.BEST_EFFORT)
        subscribe = self.node.create_subscription
        for name in self.outputs:
            subscribe(Image, f'/{NODE}/output/{name}',
                      lambda message, name=name: self._take(name, message), qos)
        subscribe(DiagnosticArray, f'/{NODE}/debug/frame',
                  lambda message: self._take('frame', message), qos)
        subscribe(DiagnosticArray, '/diagnostics', self._take_diagnostics, 10)
        self._image_transport = image_transport
        kind = Image if image_transport == 'raw' else CompressedImage
        self._publisher = self.node.create_publisher(kind, f'/{NODE}/input/image', qos)

    @property
    def ready(self) -> bool:
        """Whether the node is active and both sides have found each other's topics."""
        found = self.diagnostics.get('node.subscribed', '').split()
        return (self.diagnostics.get('node') is not None
                and self.diagnostics['node.state'] == 'active'
                and self.diagnostics['input.publishers'] != '0'
                and {*self.outputs, 'frame'} <= set(found)
                and self._publisher.get_subscription_count() > 0)

    def send(self, image_rgb: np.ndarray, stamp_ns: int, frame_id: str = 'camera') -> None:
        """Publish one frame uint8 (H, W, 3) as rgb8."""
        height, width = image_rgb.shape[:2]
        self.publish(Image(height=height, width=width, encoding='rgb8', step=3 * width,
                           data=message_data(image_rgb), header=make_header(stamp_ns, frame_id)))

    def send_recorded(self, recorded: Any, stamp_ns: int) -> None:
        """Publish the Image or CompressedImage of a bag, as rosbags reads it, as it is."""
        message = Image() if self._image_transport == 'raw' else CompressedImage()
        for name in set(message.get_fields_and_field_types()) - {'header', 'data'}:
            setattr(message, name, getattr(recorded, name))
        message.header = make_header(stamp_ns, recorded.header.frame_id)
        message.data = message_data(recorded.data)
        self.publish(message)

    def publish(self, message: Any) -> None:
        """Publish a sensor_msgs Image or CompressedImage as it is."""
        self._publisher.publish(message)

    def stop_sending(self) -> None:
        """Leave the frames to another publisher, whose sequence numbers then say what is lost."""
        self.node.destroy_publisher(self._publisher)

    def spin(self, timeout_s: float) -> None:
        """Handle one message, or wait for at most ``timeout_s``."""
        self._executor.spin_once(timeout_sec=max(0.0, timeout_s))

    def complete(self) -> list[int]:
        """Return the stamps of which every output has arrived, in the order of arrival."""
        return [stamp for stamp, found in self._messages.items()
                if len(found) == len(self.outputs) + 1]

    def take(self, stamp_ns: int) -> dict[str, Any]:
        """Return and forget the messages of a stamp, by output and ``frame``."""
        return self._messages.pop(stamp_ns)

    def close(self) -> None:
        """Leave the domain."""
        self._executor.shutdown()
        self.node.destroy_node()
        self._context.try_shutdown()

    def _take(self, name: str, message: Any) -> None:
        found = self._messages.setdefault(stamp_to_ns(message.header), {})
        if name in found:
            raise UserError(f'the node answered stamp {stamp_to_ns(message.header)} ns twice on '
                            f'{name}')
        found[name] = message
        if len(self._messages) > _MOST_WAITING:  # outputs lost on the way leave stamps behind
            del self._messages[next(iter(self._messages))]

    def _take_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            name, _, part = status.name.partition(': ')
            if name == NODE:
                self.diagnostics[part] = status.message
                self.diagnostics[f'{part}.level'] = str(status.level[0])
                self.diagnostics.update(
                    {f'{part}.{pair.key}': pair.value for pair in status.values})
        self.reports += 1


class NodeRun:
    """
    The node in a process of its own on a private ROS domain; a context manager.

    Attributes
    ----------
    client
        Its counterpart in this process.
    domain_id
        The ROS domain.

    """

    def __init__(self, node_parameters: Mapping[str, Any], *,
                 outputs: Sequence[str] = OUTPUTS, reliable: bool = True,
                 start_timeout_s: float = 120.0, wait_active: bool = True,
                 domain_id: int | None = None) -> None:
        """
        Prepare; the process starts on entering.

        Parameters
        ----------
        node_parameters
            Parameters of the node that are not at their default.
        outputs
            As in ``NodeClient``.
        reliable
            As in ``NodeClient``.
        start_timeout_s
            How long loading and warming up may take.
        wait_active
            Wait until the node is active and its topics are connected.
        domain_id
            ROS domain; None takes a free one.

        """
        self._parameters = dict(node_parameters)
        self._outputs = outputs
        self._reliable = reliable
        self._start_timeout_s = start_timeout_s
        self._wait_active = wait_active
        self._given_domain_id = domain_id
        self._resources = ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self._log = Path()
        self.domain_id = -1
        self.client: NodeClient

    @property
    def pid(self) -> int:
        """Process id of the node."""
        if self._process is None:
            raise RuntimeError('the node has not been started')
        return self._process.pid

    def returncode(self) -> int | None:
        """Return the exit code of the node, None while it runs."""
        return None if self._process is None else self._process.poll()

    def log_text(self) -> str:
        """Return what the node has written to its console."""
        return self._log.read_text(encoding='utf-8', errors='replace')

    def __enter__(self) -> 'NodeRun':
        """
        Start the node and wait until it is active.

        Raises
        ------
        UserError
            If it ends or does not become active in time; with its reason.

        """
        with ExitStack() as stack:
            folder = Path(stack.enter_context(
                tempfile.TemporaryDirectory(prefix='anomaly_seg_node_')))
            self.domain_id = self._given_domain_id if self._given_domain_id is not None \
                else stack.enter_context(reserved_domain_id())
            file = folder / 'parameters.yaml'
            file.write_text(yaml.safe_dump(
                {'/**': {'ros__parameters': _plain(self._parameters)}}), encoding='utf-8')
            self._log = folder / 'log.txt'
            log = stack.enter_context(open(self._log, 'wb'))
            environment = {
                **os.environ, **transport_environment(), 'ROS_DOMAIN_ID': str(self.domain_id),
                'ROS_AUTOMATIC_DISCOVERY_RANGE': 'LOCALHOST', 'ROS_LOG_DIR': str(folder),
                'PYTHONUNBUFFERED': '1'}
            self._process = subprocess.Popen(
                [sys.executable, '-c', _NODE_PROGRAM, '--ros-args', '--params-file', str(file)],
                env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            stack.callback(self.stop)
            self.client = NodeClient(
                self.domain_id, self._outputs, reliable=self._reliable,
                image_transport=self._parameters.get('image_transport', 'raw'))
            stack.callback(self.client.close)
            if self._wait_active:
                self._wait_until_active()
            self._resources = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        """Stop the node."""
        self._resources.close()

    def stop(self, timeout_s: float = 15.0) -> int | None:
        """Interrupt the node, kill it if it does not end in time; return its exit code."""
        process = self._process
        if process is None:
            return None
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        return process.returncode

    def check(self) -> None:
        """Raise UserError with the end of its log if the node has ended."""
        if self.returncode() is not None:
            lines = self.log_text().strip().splitlines()[-15:]
            raise UserError(f'the node ended with exit code {self.returncode()}: '
                            + '\n'.join(lines))

    def _wait_until_active(self) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        while not self.client.ready:
            self.client.spin(0.1)
            self.check()
            if error := self.client.diagnostics.get('node.transition_error'):
                raise UserError(f'the node did not start: {error}')
            if time.monotonic() > deadline:
                raise UserError(
                    f'the node was not ready within {self._start_timeout_s:.0f} s: '
                    f'{self.client.diagnostics.get("node", "no diagnostics came")}. Its log:\n'
                    + self.log_text()[-2000:])


class NodeReplay:
    """
    Iterate over the node's answers to frames; see ``run_frames_through_node``.

    Attributes
    ----------
    sent
        Frames published so far.
    drops
        Frames without an answer by cause, known once the iteration has ended; ``transport`` are
        those that never reached the node or whose outputs never came back.
    diagnostics
        The node's last diagnostics.

    """

    def __init__(self, frames: Iterable[FrameLike], parameters: Mapping[str, Any],
                 outputs: Sequence[str], realtime: bool, rate: float, timeout_s: float) -> None:
        """Take what ``run_frames_through_node`` takes."""
        self.sent = 0
        self.drops: dict[str, int] = {}
        self.diagnostics: dict[str, str] = {}
        self._frames = frames
        self._parameters = parameters
        self._outputs = outputs
        self._realtime = realtime
        self._rate = rate
        self._timeout_s = timeout_s
        self._sent_at: dict[int, float] = {}
        self._arrived_at: dict[int, float] = {}
        self._answered = 0

    def __iter__(self) -> Iterator[NodeAnswer]:
        """Start the node, send the frames, yield the answers in the order of their arrival."""
        with NodeRun(self._parameters, outputs=self._outputs,
                     reliable=not self._realtime) as run:
            yield from (self._at_pace(run) if self._realtime else self._one_by_one(run))
            self._finish(run)

    def _one_by_one(self, run: NodeRun) -> Iterator[NodeAnswer]:
        """
        Send a frame when the one before it is answered; every one must be answered.

        A second frame on its way would wait for the first, and its latency would count that.
        """
        for frame in self._frames:
            self._send(run, frame)
            sent = time.monotonic()
            while self._sent_at:
                yield from self._collect(run, 0.05)
                self._check_answered(run, time.monotonic() - sent)

    def _at_pace(self, run: NodeRun) -> Iterator[NodeAnswer]:
        """Publish at the frames' own times; the node may drop."""
        start = first_ns = None
        for frame in self._frames:
            stamp_ns = _stamp(frame)
            if start is None or first_ns is None:
                start, first_ns = time.perf_counter(), stamp_ns
            due = start + (stamp_ns - first_ns) / 1e9 / self._rate
            while (left := due - time.perf_counter()) > 0:
                yield from self._collect(run, min(left, 0.05))
            self._send(run, frame)
        quiet_since, before = time.monotonic(), ''
        while self._unsettled(run) and time.monotonic() - quiet_since < _QUIET_S:
            yield from self._collect(run, 0.05)
            run.check()
            now = f'{self._answered} {_drops(run.client.diagnostics)}'
            if now != before or float(run.client.diagnostics['processing.busy_s']):
                quiet_since, before = time.monotonic(), now

    def _send(self, run: NodeRun, frame: FrameLike) -> None:
        stamp_ns = _stamp(frame)
        if stamp_ns in self._sent_at or stamp_ns in self._arrived_at:
            raise UserError(f'two frames have the stamp {stamp_ns} ns; answers could not be told '
                            'apart. Give every frame a stamp of its own.')
        self._sent_at[stamp_ns] = time.perf_counter()
        recorded = getattr(frame, 'message', None)
        if recorded is not None:
            run.client.send_recorded(recorded, stamp_ns)
        else:
            run.client.send(frame.image_rgb, stamp_ns)
        self.sent += 1

    def _collect(self, run: NodeRun, wait_s: float) -> Iterator[NodeAnswer]:
        run.client.spin(wait_s)
        for stamp_ns in run.client.complete():
            if stamp_ns not in self._sent_at:
                raise UserError(f'the node answered stamp {stamp_ns} ns, which no frame on its '
                                'way has')
            self._arrived_at[stamp_ns] = now = time.perf_counter()
            end_to_end_ms = (now - self._sent_at.pop(stamp_ns)) * 1e3
            self._answered += 1
            yield _answer(stamp_ns, run.client.take(stamp_ns), end_to_end_ms,
                          run.client.diagnostics)

    def _check_answered(self, run: NodeRun, waited_s: float) -> None:
        if not self._sent_at:
            return
        run.check()
        oldest_ns = next(iter(self._sent_at))
        diagnostics = run.client.diagnostics
        dropped = {cause: count for cause, count in _drops(diagnostics).items() if count}
        if dropped and self._unsettled(run) is False:
            raise UserError(f'the node did not answer the frame with stamp {oldest_ns} ns: '
                            f'{diagnostics.get("node.last_error") or dropped}')
        if waited_s > self._timeout_s:
            raise UserError(f'no answer to the frame with stamp {oldest_ns} ns within '
                            f'{self._timeout_s:.0f} s. Input: {diagnostics.get("input")}; '
                            f'processing: {diagnostics.get("processing")}')

    def _unsettled(self, run: NodeRun) -> bool:
        """Tell whether the node still has, or may still get, a frame that was sent."""
        diagnostics = run.client.diagnostics
        received = int(diagnostics.get('input.received', 0))
        done = int(diagnostics.get('processing.answered', 0)) + sum(_drops(diagnostics).values())
        return received < self.sent or done < received or self._answered < int(
            diagnostics.get('processing.answered', 0))

    def _finish(self, run: NodeRun) -> None:
        self.diagnostics = dict(run.client.diagnostics)
        self.drops = _drops(self.diagnostics)
        self.drops['transport'] = self.sent - self._answered - sum(self.drops.values())


def run_frames_through_node(
        frames: Iterable[FrameLike], *, model: Path | str,
        parameters: Mapping[str, Any] | None = None, realtime: bool = False, rate: float = 1.0,
        outputs: Sequence[str] = OUTPUTS, timeout_s: float = 60.0) -> NodeReplay:
    """
    Send frames through the live node and return its answers, matched by stamp.

    Parameters
    ----------
    frames
        Frames with ``image_rgb`` uint8 (H, W, 3) and ``stamp_ns``, each stamp once; published as
        rgb8 under their own stamps. Those of a bag, which have their ``message``, are published
        as they were recorded: the parameter ``image_transport`` must fit.
    model
        The model file.
    parameters
        Further parameters of the node.
    realtime
        Publish at the frames' own pace, best effort, newest frame wins; the node may drop.
        Otherwise reliable, one frame at a time, and every one must be answered.
    rate
        With ``realtime``: 2.0 publishes twice as fast as the stamps say.
    outputs
        Image outputs to subscribe to.
    timeout_s
        How long to wait for an answer.

    Raises
    ------
    UserError
        While iterating: if the node does not start, ends, drops a frame (not with ``realtime``),
        or does not answer in time; names the stamp.

    """
    if rate <= 0:
        raise ValueError(f'rate must be positive, got {rate}')
    reliability = 'best_effort' if realtime else 'reliable'
    values = {
        'diagnostics_period_s': 0.2, 'fallback_mask': False, 'qos_depth': _QUEUE,
        'input_reliability': reliability, 'output_reliability': reliability,
        'frame_policy': 'latest' if realtime else 'every', **(parameters or {}),
        'model': str(Path(model).resolve())}
    return NodeReplay(frames, values, tuple(outputs), realtime, rate, timeout_s)


def make_header(stamp_ns: int, frame_id: str = 'camera') -> Header:
    """Return a header with a stamp in nanoseconds."""
    header = Header(frame_id=frame_id)
    header.stamp.sec, header.stamp.nanosec = divmod(stamp_ns, 1_000_000_000)
    return header


def _stamp(frame: FrameLike) -> int:
    if frame.stamp_ns is None:
        raise UserError('a frame has no stamp; answers could not be matched to it')
    return frame.stamp_ns


def _answer(stamp_ns: int, messages: dict[str, Any], end_to_end_ms: float,
            diagnostics: Mapping[str, str]) -> NodeAnswer:
    report = {pair.key: pair.value for pair in messages.pop('frame').status[0].values}
    arrays = {name: message_array(message) for name, message in messages.items()}
    latency_ms = {key[:-3]: float(value) for key, value in report.items() if key.endswith('_ms')}
    latency_ms['transport'] = end_to_end_ms - latency_ms.pop('total')
    latency_ms['end_to_end'] = end_to_end_ms
    backend = {key: diagnostics[f'model.{key}'] for key in
               ('backend', 'version', 'provider', 'threads') if f'model.{key}' in diagnostics}
    return NodeAnswer(
        stamp_ns=stamp_ns, labels=arrays.get('labels'), anomaly=arrays.get('anomaly'),
        mask=arrays.get('obstacle_mask'), obstacles=int(report['obstacles']),
        latency_ms=latency_ms, flags=tuple(report['flags'].split()), backend=backend,
        anomaly_u8=arrays.get('anomaly_u8'), overlay=arrays.get('overlay'))


def _drops(diagnostics: Mapping[str, str]) -> dict[str, int]:
    prefix = 'input.dropped_'
    return {key[len(prefix):]: int(value) for key, value in diagnostics.items()
            if key.startswith(prefix)}


def _plain(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, (tuple, list)) else
            str(value) if isinstance(value, Path) else value
            for name, value in parameters.items()}


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
