# SPDX-License-Identifier: Apache-2.0
"""
What the node knows about itself, and what it says on /diagnostics.

``Monitor`` counts, under one lock, what the callbacks and the worker report. ``assess`` is a pure
function from a snapshot of it to statuses; it runs on a thread of its own, so that a stalled
worker or a long configure is still reported.
"""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
import threading
import time

from anomaly_seg_ros.ros.parameters import NodeParameters
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
import numpy as np

OK, WARN, ERROR = 0, 1, 2

# Why a frame that was received got no answer.
DROPS = {
    'superseded': 'a newer frame came before its turn',
    'queue_full': 'the queue was full',
    'too_old': 'older than max_frame_age_ms when its turn came',
    'bad_image': 'the message contradicts itself or cannot be decoded',
    'bad_output': 'the network gave NaN or infinity',
    'failed': 'an error while it was worked on',
    'paused': 'no output had a subscriber',
    'deactivated': 'the node was deactivated while it waited or was worked on',
}
# Those that mean that something is wrong with the frame or the node.
FAILURES = ('bad_image', 'bad_output', 'failed', 'too_old')

# What else can happen at the input.
_INPUT_EVENTS = {
    'time_backwards': 'stamps went backwards',
    'stamp_repeated': 'stamps were repeated',
    'transport_lost': 'frames were lost by the transport',
    'incompatible_qos': 'publishers with incompatible QoS appeared',
}

# Stages of one frame in the node, in order; "total" is from its arrival to its last output.
STAGES = ('wait', 'decode', 'quality', 'preprocess', 'network', 'upsample', 'obstacles', 'convert',
          'publish', 'total')
_WINDOW = 1000   # frames over which percentiles are taken
_RATE_WINDOW_S = 5.0
_PAUSE_S = 5.0  # without an answer: what was too slow before does not count any more
_ERROR_CHARACTERS = 1000  # of the last error, which may quote a message


class Latencies:
    """The last times of one stage, for percentiles."""

    def __init__(self, window: int = _WINDOW) -> None:
        """Keep the last ``window`` times."""
        self._times_ms = np.zeros(window)
        self._count = 0

    def add(self, time_ms: float) -> None:
        """Add one time in milliseconds."""
        self._times_ms[self._count % len(self._times_ms)] = time_ms
        self._count += 1

    def percentiles(self) -> tuple[float, float, float] | None:
        """Return p50, p95 and p99 in milliseconds; None before the first frame."""
        if not self._count:
            return None
        p50, p95, p99 = np.percentile(self._times_ms[:self._count], (50, 95, 99))
        return float(p50), float(p95), float(p99)


class Rate:
    """Events per second over the last seconds."""

    def __init__(self, window_s: float = _RATE_WINDOW_S) -> None:
        """Look back ``window_s`` seconds, and at 1000 moments at most."""
        self._window_s = window_s
        self._moments: deque[tuple[float, int]] = deque(maxlen=1000)  # seconds, events so far
        self._total = 0

    def add(self, now_s: float, count: int = 1) -> None:
        """Note ``count`` events since the last call."""
        self._total += count
        self._moments.append((now_s, self._total))

    def per_second(self, now_s: float) -> float:
        """Return the rate; 0 when fewer than two moments are in the window."""
        while self._moments and now_s - self._moments[0][0] > self._window_s:
            self._moments.popleft()
        if len(self._moments) < 2:
            return 0.0
        (first_s, first), (last_s, last) = self._moments[0], self._moments[-1]
        # An interval that is still open counts once it is longer than the others.
        open_s = (now_s - last_s) * (len(self._moments) - 1)
        return (last - first) / max(last_s - first_s, open_s, 1e-9)


@dataclass(frozen=True)
class Snapshot:
    """The monitor at one moment; ``new`` counts what came since the last snapshot."""

    received: int
    answered: int
    drops: Mapping[str, int]
    flags: Mapping[str, int]
    new_drops: Counter[str]
    new_flags: Counter[str]
    events: Mapping[str, int]
    new_events: Counter[str]
    input_hz: float
    output_hz: float
    since_input_s: float
    busy_s: float
    late_s: float
    slowest_ms: float
    age_ms: float | None
    consecutive_failures: int
    last_error: str
    stages: Mapping[str, tuple[float, float, float]]


class Monitor:
    """Counts and times, reported by the callbacks and the worker; safe for several threads."""

    def __init__(self) -> None:
        """Start with nothing seen."""
        self._lock = threading.Lock()
        self._received = self._answered = 0
        self._drops: Counter[str] = Counter()
        self._flags: Counter[str] = Counter()
        self._events: Counter[str] = Counter()
        self._reported: dict[str, Counter[str]] = {
            'drops': Counter(), 'flags': Counter(), 'events': Counter()}
        self._input, self._output = Rate(), Rate()
        self._skipped = 0
        self._last_input_s: float | None = None
        self._idle_since_s = 0.0
        self._last_stamp_ns: int | None = None
        self._busy_since_s: float | None = None
        self._answered_s = 0.0
        self._late_since_s: float | None = None
        self._late_s = 0.0
        self._slowest_ms = 0.0
        self._age_ms: float | None = None
        self._consecutive_failures = 0
        self._last_error = ''
        self._stages = {stage: Latencies() for stage in STAGES}

    def activated(self) -> None:
        """Forget what belongs to an earlier activation; counts go on."""
        with self._lock:
            self._input, self._output = Rate(), Rate()
            self._last_input_s = time.monotonic()
            self._last_stamp_ns = self._late_since_s = self._age_ms = None
            self._consecutive_failures = 0
            self._late_s = 0.0

    def received(self, stamp_ns: int, age_ms: float, skipped: int = 0) -> None:
        """Count an arrived frame, and those before it that a newer one replaced unseen."""
        with self._lock:
            now_s = time.monotonic()
            self._received += 1 + skipped
            self._skipped += skipped
            self._last_input_s = now_s
            self._input.add(now_s, 1 + skipped)
            self._age_ms = age_ms
            if self._last_stamp_ns is not None and stamp_ns <= self._last_stamp_ns:
                self._events['time_backwards' if stamp_ns < self._last_stamp_ns
                             else 'stamp_repeated'] += 1
            self._last_stamp_ns = stamp_ns

    def begun(self) -> None:
        """Note that the worker has taken a frame."""
        with self._lock:
            self._busy_since_s = time.monotonic()

    def idle(self) -> None:
        """Note that the worker waits for a frame."""
        with self._lock:
            self._busy_since_s = None
            self._idle_since_s = time.monotonic()

    def dropped(self, cause: str, error: str = '', count: int = 1) -> None:
        """Count frames without an answer; ``cause`` is one of ``DROPS``."""
        if cause not in DROPS:
            raise ValueError(f'cause must be one of {", ".join(DROPS)}, got {cause!r}')
        with self._lock:
            self._drops[cause] += count
            if cause == 'paused':  # nothing is known of frames that nobody wants
                self._consecutive_failures, self._late_since_s, self._late_s = 0, None, 0.0
            if cause in FAILURES:
                self._consecutive_failures += count
                self._last_error = _short(f'{cause}: {error}')

    def answered(self, stages_ms: Mapping[str, float], limit_ms: float) -> None:
        """Count an answered frame with the times of its stages."""
        with self._lock:
            now_s = time.monotonic()
            self._answered += 1
            self._consecutive_failures = 0
            self._output.add(now_s)
            for stage, time_ms in stages_ms.items():
                self._stages[stage].add(time_ms)
            total_ms = stages_ms['total']
            self._slowest_ms = max(self._slowest_ms, total_ms)
            arrived_s = now_s - total_ms / 1e3
            rested = arrived_s - self._answered_s > _PAUSE_S
            self._answered_s = now_s
            if not limit_ms or total_ms <= limit_ms:
                self._late_since_s = None
            elif self._late_since_s is None or rested:
                self._late_since_s = arrived_s
            self._late_s = 0.0 if self._late_since_s is None else now_s - self._late_since_s

    def flagged(self, flags: Sequence[str]) -> None:
        """Count the input-quality flags of a frame."""
        if flags:
            with self._lock:
                self._flags.update(flags)

    def event(self, name: str, count: int = 1) -> None:
        """Count anything else worth knowing, by name."""
        with self._lock:
            self._events[name] += count

    def error(self, text: str) -> None:
        """Keep ``text`` as the last error."""
        with self._lock:
            self._last_error = _short(text)

    @property
    def busy_s(self) -> float:
        """Time for which the worker has been on its present frame; 0 while it waits."""
        with self._lock:
            return self._busy()

    @property
    def since_input_s(self) -> float:
        """Time for which the worker has waited for a frame in vain; 0 while it works."""
        with self._lock:
            return self._since_input()

    def snapshot(self) -> Snapshot:
        """Return everything, and begin a new reporting period."""
        with self._lock:
            now_s = time.monotonic()
            new = {}
            drops = self._drops.copy()
            # Of the frames that never got here the transport says which it lost.
            drops['superseded'] += max(0, self._skipped - self._events['transport_lost'])
            for name, counts in (('drops', drops), ('flags', self._flags),
                                 ('events', self._events)):
                new[name] = counts - self._reported[name]
                self._reported[name] = counts.copy()
            slowest_ms, self._slowest_ms = self._slowest_ms, 0.0
            stages = {stage: times for stage, window in self._stages.items()
                      if (times := window.percentiles()) is not None}
            return Snapshot(
                received=self._received, answered=self._answered,
                drops=dict(drops), flags=dict(self._flags), events=dict(self._events),
                new_drops=new['drops'], new_flags=new['flags'], new_events=new['events'],
                input_hz=self._input.per_second(now_s), output_hz=self._output.per_second(now_s),
                since_input_s=self._since_input(),
                busy_s=self._busy(),
                late_s=self._late_s,
                slowest_ms=slowest_ms, age_ms=self._age_ms,
                consecutive_failures=self._consecutive_failures, last_error=self._last_error,
                stages=stages)

    def _since_input(self) -> float:
        if self._last_input_s is None or self._busy_since_s is not None:
            return 0.0
        return time.monotonic() - max(self._last_input_s, self._idle_since_s)

    def _busy(self) -> float:
        return 0.0 if self._busy_since_s is None else time.monotonic() - self._busy_since_s


@dataclass(frozen=True)
class NodeState:
    """
    What the node adds to the monitor's snapshot.

    Attributes
    ----------
    lifecycle
        Label of the lifecycle state, or of the transition under way.
    error
        Why the last transition failed; empty when it did not.
    model
        What is known about the loaded model and its backend.
    model_note
        What is worth a warning about the model; empty when nothing is.
    transport_note
        In what way big images travel worse than asked for; empty when they do not.
    swap
        What became of the last change of the model at run time; empty when there was none.
    swap_failed
        Whether that change was refused.
    subscribed
        Outputs that have a subscriber.
    publishers
        Number of publishers of the input image.
    other_types
        Types that are published there, but are not what the node subscribes to.
    input_topic
        Its resolved name.
    rivals
        Number of other publishers of the obstacle mask's topic.
    paused
        Whether the network pauses because nobody subscribes.
    has_time
        Whether the node's clock runs: a simulated one needs somebody who publishes it.

    """

    lifecycle: str
    error: str = ''
    model: Mapping[str, str] = field(default_factory=dict)
    model_note: str = ''
    transport_note: str = ''
    swap: str = ''
    swap_failed: bool = False
    subscribed: Sequence[str] = ()
    publishers: int = 0
    other_types: Sequence[str] = ()
    input_topic: str = ''
    rivals: int = 0
    paused: bool = False
    has_time: bool = True


@dataclass(frozen=True)
class Status:
    """One part of the report: OK, WARN or ERROR with a sentence and values."""

    part: str
    level: int
    message: str
    values: Mapping[str, str]


def _short(text: str) -> str:
    """Cut a text that is too long to be sent with every report."""
    return text if len(text) <= _ERROR_CHARACTERS else f'{text[:_ERROR_CHARACTERS]} ...'


def assess(snapshot: Snapshot, state: NodeState, limits: NodeParameters) -> list[Status]:
    """Judge a snapshot; parts are ``node``, ``input``, ``processing`` and ``model``."""
    active = state.lifecycle == 'active'
    return [_node(snapshot, state), _input(snapshot, state, limits, active),
            _processing(snapshot, state, limits, active), _model(state)]


def to_message(statuses: Sequence[Status], node_name: str, hardware_id: str,
               stamp: Time) -> DiagnosticArray:
    """Return statuses as a message; names are ``<node>: <part>``."""
    message = DiagnosticArray()
    message.header.stamp = stamp
    message.status = [
        DiagnosticStatus(
            level=bytes([status.level]), name=f'{node_name}: {status.part}',
            message=status.message, hardware_id=hardware_id,
            values=[KeyValue(key=key, value=value) for key, value in status.values.items()])
        for status in statuses]
    return message


class _Findings:
    """Collects what is wrong; the worst level counts, and its sentences come first."""

    def __init__(self) -> None:
        self._found: list[tuple[int, str]] = []

    def add(self, level: int, text: str) -> None:
        self._found.append((level, text))

    def status(self, part: str, fine: str, values: Mapping[str, str]) -> Status:
        found = sorted(self._found, key=lambda item: -item[0])
        return Status(part, found[0][0] if found else OK,
                      '; '.join(text for _, text in found) or fine, values)


def _node(snapshot: Snapshot, state: NodeState) -> Status:
    findings = _Findings()
    if state.error:
        findings.add(ERROR, state.error)
    elif state.lifecycle == 'unconfigured':
        findings.add(WARN, 'not configured')
    if not state.has_time:
        findings.add(WARN, 'use_sim_time is set, but no time comes on /clock')
    if state.rivals:
        findings.add(WARN, f'{state.rivals} others publish the same outputs: is this node running '
                     'twice, or was one killed seconds ago?')
    if state.transport_note:
        findings.add(WARN, state.transport_note)
    if masks := snapshot.new_events['fallback_masks']:
        findings.add(WARN, f'{masks} fallback masks published')
    if errors := snapshot.new_events['callback_errors']:
        findings.add(ERROR, f'{errors} errors in callbacks; last: {snapshot.last_error}')
    return findings.status('node', state.lifecycle, {
        'state': state.lifecycle,
        'subscribed': ' '.join(state.subscribed),
        'paused': str(state.paused).lower(),
        'fallback_masks': str(snapshot.events.get('fallback_masks', 0)),
        'callback_errors': str(snapshot.events.get('callback_errors', 0)),
        'rivals': str(state.rivals),
        'transport': state.transport_note,
        'transition_error': state.error,
        'last_error': snapshot.last_error})


def _input(snapshot: Snapshot, state: NodeState, limits: NodeParameters, active: bool) -> Status:
    findings = _Findings()
    if active:
        since_s = snapshot.since_input_s
        if since_s > limits.stale_input_s:
            why = (f'it carries {", ".join(state.other_types)}, image_transport is '
                   f'{limits.image_transport}' if state.other_types else
                   'nobody publishes it; check the remapping' if not state.publishers else
                   f'{state.publishers} publishers; check their QoS and the transport with '
                   '"anomaly-seg doctor"')
            findings.add(ERROR, f'no frame on {state.input_topic} for {since_s:.1f} s ({why})')
        for cause, count in snapshot.new_drops.items():
            if cause in ('bad_image', 'too_old', 'queue_full'):
                findings.add(WARN, f'{count} frames dropped: {DROPS[cause]}')
        if snapshot.new_flags:
            findings.add(WARN, 'frames flagged: ' + ', '.join(
                f'{count} {flag}' for flag, count in sorted(snapshot.new_flags.items())))
        for name, text in _INPUT_EVENTS.items():
            if snapshot.new_events[name]:
                findings.add(WARN, f'{text} ({snapshot.new_events[name]})')
    values = {
        'topic': state.input_topic, 'publishers': str(state.publishers),
        'received': str(snapshot.received), 'rate_hz': f'{snapshot.input_hz:.2f}',
        'age_ms': '' if snapshot.age_ms is None else f'{snapshot.age_ms:.1f}',
        **{f'dropped_{cause}': str(snapshot.drops.get(cause, 0)) for cause in DROPS},
        **{name: str(snapshot.events.get(name, 0)) for name in _INPUT_EVENTS},
        **{f'flag_{flag}': str(count) for flag, count in sorted(snapshot.flags.items())}}
    return findings.status('input', f'{snapshot.input_hz:.1f} Hz' if active else 'off', values)


def _processing(snapshot: Snapshot, state: NodeState, limits: NodeParameters,
                active: bool) -> Status:
    findings = _Findings()
    if active:
        if snapshot.busy_s > limits.stalled_worker_s:
            findings.add(ERROR, f'worker stalled: on one frame for {snapshot.busy_s:.1f} s')
        failures = snapshot.consecutive_failures
        if failures >= limits.max_consecutive_failures:
            findings.add(ERROR, f'{failures} frames in a row without an answer; last: '
                         f'{snapshot.last_error}')
        elif failed := snapshot.new_drops['failed'] + snapshot.new_drops['bad_output']:
            findings.add(WARN, f'{failed} frames failed; last: {snapshot.last_error}')
        limit_ms = limits.max_acceptable_consecutive_delay_ms
        if limit_ms and snapshot.late_s * 1e3 > limit_ms:
            findings.add(ERROR, f'every frame too slow for {snapshot.late_s:.1f} s')
        limit_ms = limits.max_allowed_processing_time_ms
        if limit_ms and snapshot.slowest_ms > limit_ms:
            findings.add(WARN, f'a frame took {snapshot.slowest_ms:.0f} ms, allowed are '
                         f'{limit_ms:.0f} ms')
    fine = ('off' if not active else 'paused: no subscribers' if state.paused else
            f'{snapshot.output_hz:.1f} Hz')
    values = {'answered': str(snapshot.answered), 'rate_hz': f'{snapshot.output_hz:.2f}',
              'busy_s': f'{snapshot.busy_s:.2f}',
              'consecutive_failures': str(snapshot.consecutive_failures)}
    for stage, times_ms in snapshot.stages.items():
        for name, time_ms in zip(('p50', 'p95', 'p99'), times_ms, strict=True):
            values[f'{stage}_{name}_ms'] = f'{time_ms:.2f}'
    return findings.status('processing', fine, values)


def _model(state: NodeState) -> Status:
    findings = _Findings()
    if state.swap_failed:
        findings.add(ERROR, f'the model was not changed: {state.swap}')
    if state.model_note:
        findings.add(WARN, state.model_note)
    return findings.status('model', state.model.get('name', 'none loaded'),
                           {**state.model, 'last_change': state.swap})
