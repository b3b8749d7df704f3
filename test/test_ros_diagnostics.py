# SPDX-License-Identifier: Apache-2.0
"""Counting and judging: what the monitor says of a made-up history."""

import threading
import time

import _needs_ros  # noqa: F401
from anomaly_seg_ros.ros import diagnostics
from anomaly_seg_ros.ros.diagnostics import (
    assess, DROPS, ERROR, Latencies, Monitor, NodeState, OK, Rate, STAGES, to_message, WARN)
from anomaly_seg_ros.ros.parameters import NodeParameters
from anomaly_seg_ros.ros.watchdog import Watchdog
from builtin_interfaces.msg import Time
import numpy as np
import pytest

TIMES = dict.fromkeys(STAGES, 1.0)


def active(**values: object) -> NodeState:
    """Return the state of an active node that somebody listens to."""
    return NodeState(**({'lifecycle': 'active', 'subscribed': ('labels',), 'publishers': 1,
                         'input_topic': '/camera'} | values))


def judge(monitor: Monitor, state: NodeState | None = None, **limits: object) -> dict:
    """Return the statuses by part."""
    statuses = assess(monitor.snapshot(), state or active(), NodeParameters(**limits))
    return {status.part: status for status in statuses}


def test_percentiles_are_those_of_the_last_window() -> None:
    window = Latencies(100)
    assert window.percentiles() is None
    for value in [1e6] * 50 + list(range(100)):
        window.add(float(value))
    np.testing.assert_allclose(window.percentiles(), np.percentile(np.arange(100), (50, 95, 99)))
    short = Latencies(100)
    short.add(7.0)
    assert short.percentiles() == (7.0, 7.0, 7.0)


def test_rate() -> None:
    rate = Rate(window_s=5.0)
    assert rate.per_second(0.0) == 0.0
    for k in range(41):
        rate.add(k * 0.1)
    assert rate.per_second(4.0) == pytest.approx(10.0)
    assert rate.per_second(6.0) < 5.0  # nothing for two seconds
    assert rate.per_second(20.0) == 0.0
    for k in range(5):  # three at a time
        rate.add(30 + k * 0.3, 3)
    assert rate.per_second(31.2) == pytest.approx(10.0)


def test_a_healthy_node_is_ok() -> None:
    monitor = Monitor()
    monitor.activated()
    for k in range(20):
        monitor.received(k * 10, 3.0)
        monitor.begun()
        monitor.answered(TIMES, 500.0)
        monitor.idle()
    statuses = judge(monitor)
    assert {part: status.level for part, status in statuses.items()} \
        == dict.fromkeys(('node', 'input', 'processing', 'model'), OK)
    assert statuses['input'].values['received'] == '20'
    assert statuses['processing'].values['answered'] == '20'
    assert statuses['processing'].values['network_p99_ms'] == '1.00'
    assert statuses['input'].values['age_ms'] == '3.0'


@pytest.mark.parametrize('cause', DROPS)
def test_each_drop_is_counted_under_its_cause(cause: str) -> None:
    monitor = Monitor()
    monitor.dropped(cause, 'why')
    monitor.dropped(cause, 'why', count=2)
    values = judge(monitor)['input'].values
    assert values[f'dropped_{cause}'] == '3'
    assert sum(int(v) for k, v in values.items() if k.startswith('dropped_')) == 3


def test_an_unknown_cause_is_refused() -> None:
    with pytest.raises(ValueError, match='cause must be one of superseded'):
        Monitor().dropped('lost')


def test_bad_frames_warn_once_and_stay_counted() -> None:
    monitor = Monitor()
    monitor.activated()
    monitor.dropped('bad_image', 'step is wrong')
    first = judge(monitor)
    assert first['input'].level == WARN
    assert 'contradicts itself' in first['input'].message
    assert first['node'].values['last_error'] == 'bad_image: step is wrong'
    second = judge(monitor)
    assert second['input'].level == OK
    assert second['input'].values['dropped_bad_image'] == '1'


def test_repeated_failures_are_an_error_until_an_answer() -> None:
    monitor = Monitor()
    monitor.activated()
    for _ in range(3):
        monitor.dropped('failed', 'boom')
    status = judge(monitor, max_consecutive_failures=3)['processing']
    assert (status.level, '3 frames in a row' in status.message, 'boom' in status.message) \
        == (ERROR, True, True)
    assert judge(monitor, max_consecutive_failures=4)['processing'].level == OK
    monitor.answered(TIMES, 0.0)
    assert judge(monitor, max_consecutive_failures=3)['processing'].level == OK


def test_slow_frames_warn_and_then_are_an_error() -> None:
    monitor = Monitor()
    monitor.activated()
    slow = TIMES | {'total': 80.0}
    monitor.answered(slow, 50.0)
    limits = {'max_allowed_processing_time_ms': 50.0,
              'max_acceptable_consecutive_delay_ms': 200.0}
    assert judge(monitor, **limits)['processing'].level == WARN
    time.sleep(0.25)
    assert judge(monitor, **limits)['processing'].level == OK  # one slow frame, none since
    monitor.answered(slow, 50.0)
    status = judge(monitor, **limits)['processing']
    assert status.level == ERROR
    assert 'every frame too slow' in status.message
    monitor.answered(TIMES, 50.0)
    assert judge(monitor, **limits)['processing'].level == OK


def test_a_rest_ends_what_was_too_slow_or_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow frames with minutes between them, and whatever was before nobody wanted answers."""
    now_s = 1000.0
    monkeypatch.setattr(diagnostics.time, 'monotonic', lambda: now_s)
    monitor, slow = Monitor(), TIMES | {'total': 600.0}
    monitor.activated()
    limits = {'max_allowed_processing_time_ms': 500.0, 'max_consecutive_failures': 3,
              'max_acceptable_consecutive_delay_ms': 2000.0}
    for _ in range(3):
        now_s += 600.0
        monitor.answered(slow, 500.0)
        assert judge(monitor, **limits)['processing'].level == WARN
    for _ in range(3):
        now_s += 1.0
        monitor.answered(slow, 500.0)
    assert judge(monitor, **limits)['processing'].level == ERROR
    monitor.dropped('paused')
    assert judge(monitor, **limits)['processing'].level == OK
    for _ in range(3):
        monitor.dropped('bad_image')
    assert judge(monitor, **limits)['processing'].level == ERROR
    monitor.dropped('paused')
    assert judge(monitor, **limits)['processing'].level == OK


def test_stale_input_is_an_error_that_says_what_to_check() -> None:
    monitor = Monitor()
    monitor.activated()
    time.sleep(0.12)
    status = judge(monitor, stale_input_s=0.1)['input']
    assert status.level == ERROR
    assert 'no frame on /camera' in status.message and 'QoS' in status.message
    nobody = judge(monitor, active(publishers=0), stale_input_s=0.1)['input']
    assert 'nobody publishes it' in nobody.message
    other = judge(monitor, active(other_types=['sensor_msgs/msg/CompressedImage']),
                  stale_input_s=0.1)['input']
    assert 'it carries sensor_msgs/msg/CompressedImage, image_transport is raw' in other.message
    inactive = judge(monitor, active(lifecycle='inactive'), stale_input_s=0.1)['input']
    assert inactive.level == OK


def test_frames_that_were_replaced_unseen_are_superseded_unless_lost() -> None:
    monitor = Monitor()
    monitor.activated()
    monitor.received(1, 0.0)
    monitor.received(9, 0.0, skipped=7)
    monitor.dropped('superseded')
    monitor.event('transport_lost', 2)
    values = judge(monitor)['input'].values
    assert (values['received'], values['dropped_superseded'], values['transport_lost']) \
        == ('9', '6', '2')


def test_input_is_not_stale_while_the_worker_works() -> None:
    monitor = Monitor()
    monitor.activated()
    monitor.begun()
    time.sleep(0.12)
    assert judge(monitor, stale_input_s=0.1)['input'].level == OK
    monitor.idle()
    assert judge(monitor, stale_input_s=0.1)['input'].level == OK
    time.sleep(0.12)
    assert judge(monitor, stale_input_s=0.1)['input'].level == ERROR


def test_stalled_worker_is_an_error_while_it_lasts() -> None:
    monitor = Monitor()
    monitor.activated()
    monitor.begun()
    time.sleep(0.12)
    status = judge(monitor, stalled_worker_s=0.1)['processing']
    assert (status.level, 'worker stalled' in status.message) == (ERROR, True)
    monitor.idle()
    assert judge(monitor, stalled_worker_s=0.1)['processing'].level == OK


def test_stamps_that_go_back_or_repeat_are_noticed() -> None:
    monitor = Monitor()
    monitor.activated()
    for stamp in (10, 20, 20, 5, 6):
        monitor.received(stamp, 0.0)
    status = judge(monitor)['input']
    assert status.level == WARN
    assert (status.values['time_backwards'], status.values['stamp_repeated']) == ('1', '1')


def test_flags_fallback_and_callback_errors() -> None:
    monitor = Monitor()
    monitor.activated()
    monitor.flagged(('black', 'frozen'))
    monitor.flagged(('black',))
    monitor.event('fallback_masks', 2)
    monitor.event('callback_errors')
    statuses = judge(monitor)
    assert statuses['input'].values['flag_black'] == '2'
    assert 'frames flagged: 2 black, 1 frozen' in statuses['input'].message
    assert statuses['node'].level == ERROR
    assert '2 fallback masks' in statuses['node'].message
    assert judge(monitor)['node'].level == OK


def test_a_long_error_is_cut() -> None:
    """It is in every report, and may quote what a message held."""
    monitor = Monitor()
    monitor.dropped('bad_image', 'x' * 5_000_000)
    assert len(judge(monitor)['node'].values['last_error']) < 1100


def test_model_warnings_and_refused_swap() -> None:
    monitor = Monitor()
    note = judge(monitor, active(model_note='threshold is provisional: guessed'))['model']
    assert (note.level, note.message) == (WARN, 'threshold is provisional: guessed')
    swap = judge(monitor, active(swap='x.onnx: not whole', swap_failed=True))['model']
    assert swap.level == ERROR
    assert 'the model was not changed: x.onnx: not whole' in swap.message


def test_lifecycle_errors_are_shown() -> None:
    failed = judge(Monitor(), NodeState('unconfigured', error='no such model'))['node']
    assert (failed.level, failed.message) == (ERROR, 'no such model')
    assert judge(Monitor(), NodeState('unconfigured'))['node'].level == WARN
    assert judge(Monitor(), NodeState('inactive'))['node'].level == OK


def test_who_publishes_the_same_and_how_images_travel() -> None:
    found = judge(Monitor(), active(rivals=1, transport_note='no shared memory'))['node']
    assert found.level == WARN and found.values['rivals'] == '1'
    assert 'running twice' in found.message and 'no shared memory' in found.message


def test_message() -> None:
    statuses = assess(Monitor().snapshot(), active(), NodeParameters())
    message = to_message(statuses, 'anomaly_seg', '/camera', Time(sec=3, nanosec=4))
    assert (message.header.stamp.sec, message.header.stamp.nanosec) == (3, 4)
    assert [status.name for status in message.status] \
        == [f'anomaly_seg: {part}' for part in ('node', 'input', 'processing', 'model')]
    assert message.status[0].level == b'\x00'
    assert {pair.key: pair.value for pair in message.status[0].values}['state'] == 'active'


def test_monitor_counts_right_under_load_from_two_threads() -> None:
    monitor = Monitor()

    def work() -> None:
        for k in range(3000):
            monitor.received(k, 0.0)
            monitor.answered(TIMES, 0.0)
            monitor.event('callback_errors')

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    seen = [monitor.snapshot().new_events['callback_errors'] for _ in range(50)]
    for thread in threads:
        thread.join()
    last = monitor.snapshot()
    assert (last.received, last.answered) == (6000, 6000)
    assert sum(seen) + last.new_events['callback_errors'] == 6000


def test_watchdog_keeps_ticking_after_an_error_and_stops() -> None:
    ticks, errors = [], []

    def tick() -> None:
        ticks.append(time.monotonic())
        if len(ticks) == 2:
            raise RuntimeError('once')

    watchdog = Watchdog(0.03, tick, errors.append)
    time.sleep(0.4)
    watchdog.stop()
    count = len(ticks)
    assert 6 <= count <= 14
    assert errors == ['watchdog: RuntimeError: once']
    time.sleep(0.1)
    assert len(ticks) == count
