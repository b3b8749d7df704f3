# SPDX-License-Identifier: Apache-2.0
"""The real node in a process of its own, over DDS: answers, lifecycle, parameters."""

from collections.abc import Iterator
from pathlib import Path
import re
import signal
import subprocess
import sys
import time

import _needs_ros  # noqa: F401
from anomaly_seg_ros.backends import open_backend
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.images import message_array, message_data
from anomaly_seg_ros.model_file import load_model_file
from anomaly_seg_ros.pipeline import Pipeline
from anomaly_seg_ros.ros.client import make_header, NodeRun
from anomaly_seg_ros.ros.outputs import IMAGES
from anomaly_seg_ros.visualize import anomaly_u8, overlay
import cv2
import numpy as np
import pytest
from rclpy.lifecycle import LifecycleNode
from ros_helpers import Driver, make_frame, NAN, STALL, write_tiny_model
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import Header

ALL = tuple(IMAGES)
FAST = {'diagnostics_period_s': 0.1}


@pytest.fixture(scope='module')
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny model that stalls for about half a second on demand."""
    return write_tiny_model(tmp_path_factory.mktemp('model') / 'tiny.onnx',
                            stall_iterations=200_000)


@pytest.fixture(scope='module')
def pipeline(model: Path) -> Pipeline:
    """Return the offline pipeline of the same model."""
    return Pipeline(open_backend(load_model_file(model), 'cpu'))


@pytest.fixture(scope='module')
def shared(model: Path) -> Iterator[Driver]:
    """Return a node with all outputs, for the tests that leave it as it was."""
    with NodeRun({**FAST, 'model': str(model)}, outputs=ALL) as run:
        yield Driver(run)


def test_every_output_equals_the_offline_pipeline(shared: Driver, pipeline: Pipeline) -> None:
    frame = make_frame(1)
    expected = pipeline(frame)
    card = pipeline.card
    messages = shared.answer(frame)
    wanted = {
        'labels': expected.labels, 'anomaly': expected.anomaly, 'obstacle_mask': expected.mask,
        'anomaly_u8': anomaly_u8(expected.anomaly, card.score_range),
        'overlay': overlay(frame, expected.labels, expected.anomaly, expected.mask, card.palette,
                           card.score_range, 0.5)}
    assert set(wanted) == set(ALL)
    for name, array in wanted.items():
        assert messages[name].encoding == IMAGES[name][0]
        np.testing.assert_array_equal(message_array(messages[name]), array, name)
    report = {pair.key: pair.value for pair in messages['frame'].status[0].values}
    assert int(report['obstacles']) == len(expected.obstacles) > 0


def test_the_header_is_copied_to_every_output(shared: Driver) -> None:
    frame = make_frame(2)
    stamp_ns = 1_234_567_890_123_456_789
    shared.client.send(frame, stamp_ns, frame_id='front/left optical')
    shared.wait(lambda: stamp_ns in shared.client.complete(), what='answer')
    for name, message in shared.client.take(stamp_ns).items():
        assert message.header == make_header(stamp_ns, 'front/left optical'), name


def test_bgr_grey_and_padded_rows_give_the_answer_of_their_picture(
        shared: Driver, pipeline: Pipeline) -> None:
    frame = make_frame(3)
    grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    height, width = grey.shape
    padded = np.zeros((height, 3 * width + 13), np.uint8)
    padded[:, :3 * width] = frame[..., ::-1].reshape(height, -1)
    for picture, encoding, step, data in (
            (frame, 'bgr8', 3 * width, frame[..., ::-1]),
            (np.repeat(grey[..., None], 3, 2), 'mono8', width, grey),
            (frame, 'bgr8', padded.shape[1], padded)):
        stamp_ns = shared.next_stamp()
        shared.client.publish(Image(
            height=height, width=width, encoding=encoding, step=step, data=message_data(data),
            header=make_header(stamp_ns)))
        shared.wait(lambda stamp_ns=stamp_ns: stamp_ns in shared.client.complete(), what='answer')
        expected = pipeline(picture)
        messages = shared.client.take(stamp_ns)
        np.testing.assert_array_equal(message_array(messages['anomaly']), expected.anomaly)
        np.testing.assert_array_equal(message_array(messages['labels']), expected.labels)


def test_frames_may_change_their_size(shared: Driver, pipeline: Pipeline) -> None:
    for index, size_hw in enumerate([(96, 160), (64, 128), (200, 120), (33, 57), (96, 160)]):
        shared.check_answer(pipeline, make_frame(index, size_hw))


def test_diagnostics_name_model_backend_threshold_and_stages(
        shared: Driver, model: Path) -> None:
    shared.answer(make_frame(4))
    found = shared.fresh()
    assert found['node'] == 'active' and found['node.level'] == '0'
    assert found['model.sha256'] == load_model_file(model).sha256
    assert found['model.backend'] == 'onnxruntime cpu'
    assert found['model.threshold'] == '0.6'
    assert found['model.threshold_source'] == 'set by the test'
    assert int(found['input.received']) == int(found['processing.answered']) > 0
    for stage in ('wait', 'decode', 'quality', 'preprocess', 'network', 'upsample', 'obstacles',
                  'convert', 'publish', 'total'):
        p50, p95, p99 = (float(found[f'processing.{stage}_{p}_ms'])
                         for p in ('p50', 'p95', 'p99'))
        assert 0 <= p50 <= p95 <= p99 < 10_000


def test_parameters_that_may_change_hold_from_the_next_frame(
        shared: Driver, pipeline: Pipeline) -> None:
    frame = make_frame(5)
    assert shared.set_parameters(threshold=0.3, minimum_area_px=1) == ''
    messages = shared.answer(frame)
    anomaly = message_array(messages['anomaly'])
    np.testing.assert_array_equal(message_array(messages['obstacle_mask']),
                                  np.where(anomaly >= np.float32(0.3), 255, 0))
    assert shared.fresh()['model.threshold_source'] == 'parameter threshold'
    assert shared.set_parameters(threshold=float('nan'), minimum_area_px=50) == ''
    shared.check_answer(pipeline, frame)
    assert shared.set_parameters(overlay_opacity=0.0) == ''
    clear = message_array(shared.answer(frame)['overlay'])
    quiet = message_array(shared.answer(frame)['obstacle_mask']) == 0
    quiet = cv2.erode(quiet.astype(np.uint8), np.ones((9, 9), np.uint8)) == 1
    np.testing.assert_array_equal(clear[quiet], frame[quiet])
    assert shared.set_parameters(overlay_opacity=0.5) == ''


@pytest.mark.parametrize(('values', 'reason'), [
    ({'overlay_opacity': 2.0}, 'overlay_opacity'),
    ({'backend': 'cuda'}, 'while the node is unconfigured; deactivate and clean up'),
    ({'autostart': False}, 'read-only'),
    ({'region': 'nowhere'}, 'region must be of everywhere, drivable'),
    ({'threshold': 0.2, 'frame_policy': 'every'}, 'while the node is unconfigured'),
    ({'threshold': float('inf')}, 'threshold must be finite')])
def test_parameters_that_may_not_change_are_refused_and_change_nothing(
        shared: Driver, values: dict[str, object], reason: str) -> None:
    before = {name: shared.get_parameter(name) for name in values}
    assert reason in shared.set_parameters(**values)
    for name, value in before.items():
        after = shared.get_parameter(name)
        assert after == value or (after != after and value != value)
    assert shared.fresh()['model.threshold'] == '0.6'


def test_camera_info_comes_back_with_the_frame_header(shared: Driver) -> None:
    node = shared.client.node
    got: list[CameraInfo] = []
    publisher = node.create_publisher(CameraInfo, '/anomaly_seg/input/camera_info', 5)
    subscription = node.create_subscription(
        CameraInfo, '/anomaly_seg/output/camera_info', got.append, 5)
    shared.wait(lambda: publisher.get_subscription_count()
                and 'camera_info' in shared.client.diagnostics['node.subscribed'], what='match')
    info = CameraInfo(height=96, width=160, k=[100.0, 0, 80, 0, 100, 48, 0, 0, 1])
    publisher.publish(info)
    shared.settle(0.2)
    stamp_ns = shared.send(make_frame(6))
    shared.wait(lambda: got and stamp_ns in shared.client.complete(), what='camera info')
    info.header = make_header(stamp_ns)
    assert got == [info]
    node.destroy_subscription(subscription)
    node.destroy_publisher(publisher)


def test_newest_frame_wins_and_the_others_are_counted(shared: Driver, pipeline: Pipeline) -> None:
    """While one frame stalls, five come: the last is answered next, four are superseded."""
    before = int(shared.fresh()['input.dropped_superseded'])
    stall = shared.send(make_frame(10, corner=STALL))
    shared.settle(0.1)
    stamps = [shared.send(make_frame(11 + k)) for k in range(5)]
    shared.wait(lambda: {stall, stamps[-1]} <= set(shared.client.complete()), what='answers')
    messages = shared.client.take(stamps[-1])
    np.testing.assert_array_equal(message_array(messages['anomaly']),
                                  pipeline(make_frame(15)).anomaly)
    shared.client.take(stall)
    assert not set(stamps) & set(shared.client.complete())
    assert int(shared.fresh()['input.dropped_superseded']) == before + 4


def test_frames_that_are_too_old_are_dropped_and_counted(shared: Driver) -> None:
    assert shared.set_parameters(max_frame_age_ms=5000.0) == ''
    before = int(shared.fresh()['input.dropped_too_old'])
    old = time.time_ns() - 6_000_000_000
    shared.client.send(make_frame(20), old)
    shared.wait(lambda: int(shared.client.diagnostics['input.dropped_too_old']) == before + 1,
                what='drop')
    now = time.time_ns()
    shared.client.send(make_frame(21), now)
    shared.wait(lambda: now in shared.client.complete(), what='answer')
    shared.client.take(now)
    assert old not in shared.client.complete()
    assert shared.set_parameters(max_frame_age_ms=0.0) == ''


def test_quality_flags_reach_diagnostics_and_the_frame_report(shared: Driver) -> None:
    before = int(shared.fresh().get('input.flag_black', 0))
    messages = shared.answer(np.zeros((96, 160, 3), np.uint8))
    report = {pair.key: pair.value for pair in messages['frame'].status[0].values}
    assert report['flags'] == 'black'
    shared.wait(lambda: int(shared.client.diagnostics.get('input.flag_black', 0)) == before + 1)


def test_outputs_without_subscribers_are_not_published_and_the_network_pauses(
        model: Path) -> None:
    with NodeRun({**FAST, 'model': str(model)}, outputs=('labels',)) as run:
        driver = Driver(run)
        assert set(driver.answer(make_frame(1))) == {'labels', 'frame'}
        subscriptions = [s for s in run.client.node.subscriptions if 'anomaly_seg' in s.topic_name]
        assert len(subscriptions) == 2
        for subscription in subscriptions:
            run.client.node.destroy_subscription(subscription)
        driver.wait(lambda: not run.client.diagnostics['node.subscribed'], what='pause')
        assert run.client.diagnostics['node.paused'] == 'true'
        answered = int(driver.fresh()['processing.answered'])
        driver.send(make_frame(2))
        driver.wait(lambda: run.client.diagnostics['input.dropped_paused'] == '1', what='pause')
        assert int(run.client.diagnostics['processing.answered']) == answered
        assert driver.set_parameters(pause_without_subscribers=False) == ''
        driver.send(make_frame(3))
        driver.wait(lambda: int(run.client.diagnostics['processing.answered']) == answered + 1,
                    what='answer without pause')


def test_a_simulated_clock_that_nobody_publishes_is_a_warning(model: Path) -> None:
    """Ages are meaningless then; frames are answered all the same."""
    with NodeRun({**FAST, 'model': str(model), 'use_sim_time': True}, outputs=('labels',)) as run:
        driver = Driver(run)
        driver.answer(make_frame(1))
        found = driver.fresh()
        assert found['node.level'] == '1'
        assert found['node'] == 'use_sim_time is set, but no time comes on /clock'


def test_who_listens_for_fallbacks_only_is_told(model: Path) -> None:
    """The network does not pause for a subscriber of ~/output/fallback alone."""
    parameters = {**FAST, 'model': str(model), 'fallback_mask': True, 'stale_input_s': 60.0}
    with NodeRun(parameters, outputs=(), wait_active=False) as run:
        driver = Driver(run)
        node = run.client.node
        for subscription in list(node.subscriptions):
            if subscription.topic_name.endswith('/debug/frame'):
                node.destroy_subscription(subscription)
        got: list[Header] = []
        node.create_subscription(Header, '/anomaly_seg/output/fallback', got.append, 10)
        driver.wait(lambda: run.client.diagnostics.get('node.subscribed') == 'fallback', 30.0)
        stamp_ns = driver.send(make_frame(1, corner=NAN))
        driver.wait(lambda: got, what='header')
        assert got == [make_header(stamp_ns)]


def test_another_publisher_does_not_make_frames_up(model: Path) -> None:
    """Sequence numbers of two publishers say nothing about each other, also when one has gone."""
    with NodeRun({**FAST, 'model': str(model)}, outputs=('labels',)) as run:
        driver = Driver(run)
        node = run.client.node
        other = node.create_publisher(Image, '/anomaly_seg/input/image', 1)
        driver.wait(lambda: driver.fresh(1)['input.publishers'] == '2', what='match')
        frame = make_frame(1)
        message = Image(height=96, width=160, encoding='rgb8', step=480, data=message_data(frame))
        for _ in range(500):
            message.header = make_header(driver.next_stamp())
            other.publish(message)
        driver.settle(0.5)
        driver.answer(frame)
        run.client.stop_sending()
        driver.wait(lambda: driver.fresh(1)['input.publishers'] == '1', what='one publisher')
        before = int(driver.fresh()['input.received'])
        message.header = make_header(driver.next_stamp())
        other.publish(message)
        driver.wait(lambda: int(driver.fresh()['input.received']) > before, what='frame')
        assert int(driver.fresh()['input.received']) == before + 1


def test_a_second_node_on_the_same_topics_is_a_warning(model: Path) -> None:
    """A subscriber could not tell whose mask it has."""
    parameters = {**FAST, 'model': str(model)}
    with NodeRun(parameters, outputs=('labels',)) as run:
        driver = Driver(run)
        driver.wait(lambda: run.client.diagnostics.get('node.rivals') == '0')
        with NodeRun(parameters, outputs=('labels',), wait_active=False,
                     domain_id=run.domain_id):
            driver.wait(lambda: run.client.diagnostics['node.level'] == '1', what='warning')
            assert 'running twice' in run.client.diagnostics['node']
        driver.wait(lambda: run.client.diagnostics['node.level'] == '0', what='end of it')


def test_every_frame_waits_in_a_bounded_queue(model: Path) -> None:
    parameters = {**FAST, 'model': str(model), 'frame_policy': 'every', 'queue_size': 4,
                  'input_reliability': 'reliable', 'qos_depth': 32}
    with NodeRun(parameters, outputs=('labels',)) as run:
        driver = Driver(run)
        stall = driver.send(make_frame(0, corner=STALL))
        driver.settle(0.1)
        stamps = [driver.send(make_frame(k)) for k in range(1, 8)]
        driver.wait(lambda: {stall, *stamps[3:]} <= set(run.client.complete()), what='answers')
        assert run.client.complete() == [stall, *stamps[3:]]
        assert driver.fresh()['input.dropped_queue_full'] == '3'


def test_compressed_input_at_full_and_at_reduced_size(model: Path, pipeline: Pipeline) -> None:
    parameters = {**FAST, 'model': str(model), 'image_transport': 'compressed'}
    frame = cv2.GaussianBlur(make_frame(1, (256, 528)), (0, 0), 2)
    encoded = cv2.imencode('.jpg', frame[..., ::-1])[1].tobytes()
    decoded = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
    with NodeRun(parameters, outputs=('labels', 'anomaly', 'obstacle_mask', 'overlay')) as run:
        driver = Driver(run)
        for reduced in (False, True):
            assert driver.set_parameters(reduced_decode=reduced) == ''
            stamp_ns = driver.next_stamp()
            run.client.publish(CompressedImage(header=make_header(stamp_ns), format='jpeg',
                                               data=encoded))
            driver.wait(lambda s=stamp_ns: s in run.client.complete(), what='answer')
            got = {name: message_array(message)
                   for name, message in run.client.take(stamp_ns).items() if name != 'frame'}
            assert {array.shape[:2] for array in got.values()} == {(256, 528)}
            if reduced:  # a quarter of 528x256 is still as large as the network's 128x64
                small = cv2.imdecode(np.frombuffer(encoded, np.uint8),
                                     cv2.IMREAD_REDUCED_COLOR_4)
                expected = pipeline(small, 'bgr', size_hw=(256, 528)).copy()
                full = pipeline(decoded, 'bgr')
                assert np.abs(expected.anomaly - full.anomaly).mean() < 0.02
            else:
                expected = pipeline(decoded, 'bgr').copy()
            np.testing.assert_array_equal(got['anomaly'], expected.anomaly)
            np.testing.assert_array_equal(got['labels'], expected.labels)
            np.testing.assert_array_equal(got['obstacle_mask'], expected.mask)


def test_lifecycle_by_hand(model: Path, pipeline: Pipeline) -> None:
    """Each transition does what it says; a bad model leaves the node unconfigured, with why."""
    with NodeRun({**FAST, 'autostart': False, 'model': '/no/such.onnx'}, wait_active=False) as run:
        driver = Driver(run)
        driver.wait(lambda: run.client.reports, 20.0, 'diagnostics')
        assert driver.state() == 'unconfigured'
        assert not driver.change_state('configure')
        assert driver.state() == 'unconfigured'
        found = driver.fresh()
        assert '/no/such.onnx: no such model file' in found['node']
        assert found['node.level'] == '2'
        assert driver.set_parameters(model=str(model), threads=1) == ''
        assert driver.change_state('configure')
        assert (driver.state(), driver.fresh()['model.threads']) == ('inactive', '1')
        driver.send(make_frame(1))
        driver.settle(0.3)
        assert driver.fresh()['input.received'] == '0'

        assert driver.change_state('activate')
        driver.wait(lambda: run.client.ready, what='connection')
        driver.check_answer(pipeline, make_frame(2))

        stall = driver.send(make_frame(3, corner=STALL))
        driver.wait(lambda: driver.fresh(1)['input.received'] == '2', what='frame')
        assert driver.change_state('deactivate')
        driver.settle(1.0)
        assert stall not in run.client.complete()
        assert driver.fresh()['input.dropped_deactivated'] == '1'

        assert driver.change_state('activate')
        driver.wait(lambda: run.client.ready, what='connection')
        driver.check_answer(pipeline, make_frame(4))
        assert driver.change_state('deactivate')
        assert driver.change_state('cleanup')
        assert driver.state() == 'unconfigured'
        assert driver.fresh()['model'] == 'none loaded'
        assert driver.change_state('configure')
        assert driver.change_state('activate')
        driver.wait(lambda: run.client.ready, what='connection')
        driver.check_answer(pipeline, make_frame(5))
        assert driver.change_state('shutdown')
        assert driver.fresh()['node'] == 'finalized'


@pytest.mark.slow
def test_a_worker_that_does_not_end_is_an_error_with_its_reason(
        tmp_path: Path, pipeline: Pipeline, model: Path) -> None:
    """Cleanup gives up on it, the node goes back to unconfigured and can be configured again."""
    stuck = write_tiny_model(tmp_path / 'stuck.onnx', stall_iterations=20_000_000)
    with NodeRun({**FAST, 'model': str(stuck)}, outputs=('labels',)) as run:
        driver = Driver(run)
        driver.send(make_frame(1, corner=STALL))
        driver.wait(lambda: float(driver.fresh(1)['processing.busy_s']) > 0, what='stall')
        assert driver.change_state('deactivate')
        assert not driver.change_state('cleanup')
        assert driver.state() == 'unconfigured'
        assert 'the worker did not end within 10 s' in driver.fresh()['node']
        assert driver.set_parameters(model=str(model)) == ''
        assert driver.change_state('configure') and driver.change_state('activate')
        driver.wait(lambda: run.client.ready, what='connection')
        driver.check_answer(pipeline, make_frame(2))


@pytest.mark.slow
def test_a_stuck_worker_does_not_keep_the_process_alive(tmp_path: Path) -> None:
    stuck = write_tiny_model(tmp_path / 'stuck.onnx', stall_iterations=200_000_000)
    with NodeRun({**FAST, 'model': str(stuck)}, outputs=('labels',)) as run:
        driver = Driver(run)
        driver.send(make_frame(1, corner=STALL))
        driver.wait(lambda: float(driver.fresh(1)['processing.busy_s']) > 0, what='stall')
        assert run.stop(timeout_s=40.0) == 1
        assert 'the worker did not end within 10 s' in run.log_text()


def test_provisional_threshold_is_a_warning(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / 'p.onnx', threshold_source='provisional: 99th percentile')
    with NodeRun({**FAST, 'model': str(path)}, outputs=('labels',)) as run:
        found = Driver(run).fresh()
        assert found['model.level'] == '1'
        assert found['model'] == 'threshold is provisional: 99th percentile'


@pytest.mark.parametrize(('parameters', 'text'), [
    ({'model': 'absent.onnx'}, 'no such model'),
    ({'backend': 'auto', 'device': 1}, 'backend auto looks at GPU 0 only')])
def test_a_node_that_cannot_configure_is_told_by_the_client(parameters, text) -> None:
    with pytest.raises(UserError, match=f'the node did not start: configuring: .*{text}'), \
            NodeRun({**FAST, **parameters}):
        pass


@pytest.mark.parametrize(('arguments', 'text'), [
    (['-p', 'treshold:=1.0'], 'unknown parameters treshold'),
    (['-p', 'threshold:=1'], 'write 1.0, not 1'),
    (['-p', 'queue_size:=0'], 'queue_size'),
    (['-p', 'fallback_flags:=[]'], 'An empty list'),
    (['--log-level', 'loud'], 'loud'),
    (['-r', '~/input/image:=bad topic'], 'bad topic')])
def test_wrong_parameters_end_the_node_with_2_and_a_sentence(arguments, text) -> None:
    result = subprocess.run(
        [sys.executable, '-m', 'anomaly_seg_ros.ros', '--ros-args', *arguments],
        capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert text in result.stderr
    assert 'Traceback' not in result.stderr


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_node_cleanly(model: Path, number: signal.Signals) -> None:
    with NodeRun({**FAST, 'model': str(model)}, outputs=('labels',)) as run:
        driver = Driver(run)
        driver.answer(make_frame(1))
        driver.send(make_frame(2, corner=STALL))
        run._process.send_signal(number)
        deadline = time.monotonic() + 10
        while run.returncode() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert run.returncode() == 0, run.log_text()
        assert 'Traceback' not in run.log_text()


def test_attributes_do_not_hide_those_of_rclpy() -> None:
    """ROS keeps its own state in attributes of the node; an equal name would break it."""
    import inspect

    from anomaly_seg_ros.ros.node import AnomalySegNode
    import rclpy
    context = rclpy.Context()
    context.init(args=[])
    plain = LifecycleNode('plain', context=context, enable_rosout=False)
    taken = set(vars(plain)) | set(dir(plain))
    plain.destroy_node()
    context.try_shutdown()
    assigned = set(re.findall(r'self\.(\w+)(?:: [^=]+)? = ', inspect.getsource(AnomalySegNode)))
    methods = {name for name in vars(AnomalySegNode) if not name.startswith(('__', 'on_'))}
    assert len(assigned) > 10 and len(methods) > 10
    assert (assigned | methods) & taken == set()
