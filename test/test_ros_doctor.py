# SPDX-License-Identifier: Apache-2.0
"""The doctor finds each fault when it is there, and says nothing when it is not."""

from collections.abc import Iterator
import os
from pathlib import Path
import subprocess
import threading
import time
from types import SimpleNamespace

import _needs_ros  # noqa: F401
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.model_file import load_model_file
from anomaly_seg_ros.resources import resource
from anomaly_seg_ros.ros import doctor
from anomaly_seg_ros.ros.client import make_header, reserved_domain_id
from anomaly_seg_ros.ros.doctor import Check, ERROR, format_checks, OK, Received, run_doctor, WARN
from anomaly_seg_ros.ros.transport import PROFILE_VARIABLES
import pytest
from rclpy.context import Context
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from ros_helpers import make_frame, write_tiny_model
from sensor_msgs.msg import CompressedImage, Image

PROFILE = dict.fromkeys(PROFILE_VARIABLES, str(resource('config/fastdds.xml')))
FRAME = 2048 * 1024 * 3


def by_name(checks: list[Check]) -> dict[str, Check]:
    """Return the last finding of each name."""
    return {check.name: check for check in checks}


@pytest.mark.parametrize(('environment', 'level'), [
    ({}, OK), ({'ROS_DOMAIN_ID': ''}, OK), ({'ROS_DOMAIN_ID': '42'}, OK),
    ({'ROS_DOMAIN_ID': '150'}, WARN), ({'ROS_DOMAIN_ID': '233'}, ERROR),
    ({'ROS_DOMAIN_ID': 'robot'}, ERROR), ({'ROS_DOMAIN_ID': '-1'}, ERROR)])
def test_domain(environment: dict[str, str], level: str) -> None:
    assert [check.level for check in doctor.check_domain(environment)] == [level]


@pytest.mark.parametrize('environment', [
    {'ROS_LOCALHOST_ONLY': '1'}, {'ROS_AUTOMATIC_DISCOVERY_RANGE': 'localhost'}])
def test_discovery_range(environment: dict[str, str]) -> None:
    assert by_name(list(doctor.check_domain(environment)))['discovery'].level == WARN


@pytest.mark.parametrize(('cores', 'quota', 'load', 'threads', 'level'), [
    (4, None, 0.5, 0, OK), (4, None, 0.5, 4, OK), (4, None, 0.5, 8, WARN), (4, 2.0, 0.5, 0, WARN),
    (4, 2.0, 0.5, 2, OK), (4, None, 9.0, 2, WARN)])
def test_cores(cores: int, quota: float | None, load: float, threads: int, level: str) -> None:
    check, = doctor.check_cores(cores, quota, load, threads)
    assert check.level == level
    assert bool(check.remedy) == (level != OK)


def test_transport() -> None:
    """The default segment is too small for a camera frame, the shipped profile's is not."""
    default = by_name(list(doctor.check_transport({}, FRAME, True)))['transport']
    assert default.level == ERROR and 'config/fastdds.xml' in default.remedy
    assert by_name(list(doctor.check_transport(PROFILE, FRAME, True)))['transport'].level == OK
    huge = by_name(list(doctor.check_transport(PROFILE, 40 * 2**20, True)))['transport']
    assert huge.level == WARN
    small = by_name(list(doctor.check_transport({}, 100_000, True)))['transport']
    assert small.level == OK
    other = list(doctor.check_transport({'RMW_IMPLEMENTATION': 'rmw_cyclonedds_cpp'}, 2**40, True))
    assert [check.level for check in other] == [WARN] and 'rmem_max' in other[0].remedy


def test_transport_by_profile(tmp_path: Path) -> None:
    """One that cannot be read is an error; without shared memory the sockets' buffers count."""
    broken = tmp_path / 'broken.xml'
    broken.write_text('<dds>')
    checks = list(doctor.check_transport(
        dict.fromkeys(PROFILE_VARIABLES, str(broken)), FRAME, True))
    assert [check.level for check in checks] == [ERROR]
    name = PROFILE_VARIABLES[0]  # Jazzy's Fast DDS does not read it
    checks = list(doctor.check_transport({name: PROFILE[name]}, FRAME, True))
    assert [check.level for check in checks] == [ERROR] and 'Set both' in checks[0].message
    script = f'{checks[0].remedy}; echo "${PROFILE_VARIABLES[0]} ${PROFILE_VARIABLES[1]}"'
    said = subprocess.run(['sh', '-c', script], capture_output=True, text=True, check=True,
                          env={'PATH': os.environ['PATH']}).stdout
    assert said.split() == list(PROFILE.values()), 'what the remedy does in a shell'
    checks = list(doctor.check_transport(
        {'FASTDDS_BUILTIN_TRANSPORTS': 'UDPv4'}, 2**40, True))
    assert [check.level for check in checks] == [WARN] and 'rmem_max' in checks[0].remedy


def test_shared_memory_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named always, a warning from a gigabyte on or where room is short."""
    def check(free_mib: int, left_mib: int) -> Check:
        monkeypatch.setattr(doctor, 'left_behind', lambda folder: left_mib << 20)
        monkeypatch.setattr(doctor.shutil, 'disk_usage', lambda folder: SimpleNamespace(
            free=free_mib << 20, total=24000 << 20))
        return doctor._check_shared_memory(64 << 20, tmp_path)

    assert check(20000, 0) == Check('/dev/shm', OK, '20000 of 24000 MiB free')
    few = check(20000, 70)
    assert few.level == OK and '70 MiB left by programs that have ended' in few.message
    many = check(20000, 3585)
    assert many.level == WARN and 'fastdds shm clean' in many.remedy
    assert check(100, 0).level == WARN and 'fastdds' not in check(100, 0).remedy
    full = check(40, 70)
    assert full.level == ERROR
    assert 'fastdds shm clean' in full.remedy and '--shm-size' in full.remedy


@pytest.mark.parametrize(('sim', 'clocks', 'age_s', 'level'), [
    (False, 0, 0.02, OK), (False, 0, 5.0, WARN), (False, 0, -5.0, WARN), (True, 1, 0.02, OK),
    (True, 0, 0.02, ERROR), (False, 1, 0.02, WARN)])
def test_clock(sim: bool, clocks: int, age_s: float, level: str) -> None:
    check, = doctor.check_clock(sim, clocks, Received(10, 10.0, age_s=age_s))
    assert check.level == level


def test_model(tmp_path: Path) -> None:
    good = write_tiny_model(tmp_path / 'good.onnx')
    checks, run_s = doctor.check_model(good, 'cpu', 1)
    assert [check.level for check in checks] == [OK, OK] and 0 < run_s < 5
    guessed = write_tiny_model(tmp_path / 'p.onnx', threshold_source='provisional: a guess')
    checks, _ = doctor.check_model(guessed, 'cpu', 1)
    assert by_name(checks)['threshold'].level == WARN
    for path, backend, name in ((tmp_path / 'absent.onnx', 'cpu', 'model'),
                                (good, 'abacus', 'backend'),
                                (write_tiny_model(tmp_path / 'w.onnx', input_size_hw=(32, 32)),
                                 'cpu', 'backend')):
        checks, run_s = doctor.check_model(path, backend, 1)
        assert (checks[-1].name, checks[-1].level, run_s) == (name, ERROR, None)


def test_a_model_that_cannot_be_read_is_told_once(tmp_path: Path) -> None:
    """In the words of the model file, with its own remedy."""
    (tmp_path / 'broken.onnx').write_bytes(b'no model')
    for name in ('absent.onnx', 'broken.onnx'):
        with pytest.raises(UserError) as error:
            load_model_file(tmp_path / name)
        checks, _ = doctor.check_model(tmp_path / name, 'cpu', 1)
        assert [check.message for check in checks] == [str(error.value)]


def test_text() -> None:
    text = format_checks([Check('a', OK, 'fine'), Check('longer', ERROR, 'bad', 'do that'),
                          Check('b', WARN, 'so so')])
    assert text.splitlines() == ['ok    a       fine', 'ERROR longer  bad',
                                 '              -> do that', 'WARN  b       so so', '',
                                 '1 errors, 1 warnings']


class Camera:
    """A publisher in this process, on a thread of its own."""

    def __init__(self, domain_id: int) -> None:
        self._context = Context()
        self._context.init(args=[], domain_id=domain_id)
        self.node = Node('camera', context=self._context, enable_rosout=False,
                         start_parameter_services=False)
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, message: object, reliability: str = 'RELIABLE', age_ns: int = 0) -> None:
        """Publish ``message`` on /camera/image_raw at 20 Hz."""
        publisher = self.node.create_publisher(
            type(message), '/camera/image_raw',
            QoSProfile(depth=5, reliability=ReliabilityPolicy[reliability]))

        def run() -> None:
            while not self._stop.wait(0.05):
                message.header = make_header(time.time_ns() - age_ns)
                publisher.publish(message)

        self._threads.append(threading.Thread(target=run))
        self._threads[-1].start()

    def close(self) -> None:
        """Stop publishing."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self.node.destroy_node()
        self._context.try_shutdown()


@pytest.fixture
def camera(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Camera, int]]:
    """Return a camera and its ROS domain."""
    monkeypatch.setenv('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
    with reserved_domain_id() as domain_id:
        camera = Camera(domain_id)
        yield camera, domain_id
        camera.close()


def image(**changes: object) -> Image:
    """Return an image message."""
    frame = make_frame(0)
    height, width = frame.shape[:2]
    return Image(**({'height': height, 'width': width, 'encoding': 'rgb8', 'step': 3 * width,
                     'data': frame.tobytes()} | changes))


def test_a_camera_that_fits(camera: tuple[Camera, int], tmp_path: Path) -> None:
    """No errors, size and rate as sent; the whole report as text."""
    eyes, domain_id = camera
    eyes.start(image())
    model = write_tiny_model(tmp_path / 'tiny.onnx')
    checks = run_doctor(model=model, listen_s=2.0, domain_id=domain_id)
    found = by_name(checks)
    assert not [check for check in checks if check.level == ERROR], format_checks(checks)
    assert found['qos'].level == OK and '/camera' in found['qos'].message
    assert '160x96 rgb8' in found['frames'].message
    assert found['clock'].level == OK and found['transport'].level == OK
    assert format_checks(checks).endswith(' warnings')


@pytest.mark.parametrize(('start', 'options', 'name', 'text'), [
    ({'reliability': 'BEST_EFFORT'}, {'input_reliability': 'reliable'}, 'qos',
     'set input_reliability to best_effort'),
    ({}, {'image_transport': 'compressed'}, 'publisher', 'set image_transport to raw'),
    ({'message': image(step=1)}, {}, 'frames', ''),
    ({'age_ns': 10_000_000_000}, {}, 'clock', 'synchronise the clocks'),
    (None, {}, 'publisher', 'remap')])
def test_a_camera_that_does_not_fit(camera: tuple[Camera, int], tmp_path: Path, start: object,
                                    options: dict[str, str], name: str, text: str) -> None:
    eyes, domain_id = camera
    if start is not None:
        eyes.start(**({'message': image()} | start))
    else:
        eyes.node.create_publisher(CompressedImage, '/other/compressed', 5)
    checks = run_doctor(model=write_tiny_model(tmp_path / 'tiny.onnx'), listen_s=3.0,
                        domain_id=domain_id, **options)
    finding = by_name(checks)[name]
    assert finding.level in (ERROR, WARN), format_checks(checks)
    assert text in finding.remedy
    if start is None:
        assert '/other/compressed (sensor_msgs/msg/CompressedImage)' in finding.message


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match='image_transport must be one of raw, compressed'):
        run_doctor(image_transport='theora')


def test_the_quota_is_read_where_there_is_one() -> None:
    quota = doctor.cpu_quota()
    assert quota is None or 0 < quota <= 4 * (os.cpu_count() or 1)
