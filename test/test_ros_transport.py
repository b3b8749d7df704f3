# SPDX-License-Identifier: Apache-2.0
"""Fast DDS's shared memory: what is asked for, whether the node got it, what was left behind."""

import fcntl
from pathlib import Path
import re
import resource as limits

import _needs_ros  # noqa: F401
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.resources import resource
from anomaly_seg_ros.ros.client import NodeRun
from anomaly_seg_ros.ros.transport import (
    left_behind, profile_environment, PROFILE_VARIABLES, segment_size, SharedMemoryCheck)
import pytest
from ros_helpers import Driver, make_frame

UDP = '<transport_descriptor><transport_id>u</transport_id><type>UDPv4</type>' \
      '</transport_descriptor>'
SHM = '<transport_descriptor><transport_id>s</transport_id><type>SHM</type>' \
      '</transport_descriptor>'
NO_BUILTIN = '<useBuiltinTransports> false </useBuiltinTransports>'
DEFAULT = 512 * 1024


def profile(path: object) -> dict[str, str]:
    """Return an environment that names a profile for every release of Fast DDS."""
    return dict.fromkeys(PROFILE_VARIABLES, str(path))


SHIPPED = profile(resource('config/fastdds.xml'))


@pytest.mark.parametrize(('content', 'size'), [
    ('', DEFAULT), (UDP, DEFAULT), (UDP + NO_BUILTIN, 0), (UDP + SHM + NO_BUILTIN, DEFAULT)])
def test_segment_that_a_profile_asks_for(content: str, size: int, tmp_path: Path) -> None:
    path = tmp_path / 'profile.xml'
    path.write_text(f'<dds xmlns="http://www.eprosima.com"><p>{content}</p></dds>')
    assert segment_size(profile(path)) == size


def test_segment_that_is_asked_for(tmp_path: Path) -> None:
    assert segment_size(SHIPPED) == 64 * 2**20
    assert segment_size({}) == segment_size({'FASTDDS_BUILTIN_TRANSPORTS': 'SHM'}) == DEFAULT
    assert segment_size({'FASTDDS_BUILTIN_TRANSPORTS': 'UDPv4'}) == 0
    (tmp_path / 'broken.xml').write_text('<dds>')
    for name in ('broken.xml', 'absent.xml'):
        with pytest.raises(UserError, match=f'{name}: no readable Fast DDS profile'):
            segment_size(profile(tmp_path / name))


@pytest.mark.parametrize('given', [0, 1])
def test_a_profile_that_not_every_release_reads_is_told(given: int) -> None:
    """And mended where the environment is ours to make: Jazzy reads only the second variable."""
    name, other = PROFILE_VARIABLES[given], PROFILE_VARIABLES[1 - given]
    environment = {name: SHIPPED[name]}
    with pytest.raises(UserError, match='Set both to the same file'):
        segment_size(environment)
    assert 'Set both' in SharedMemoryCheck('rmw_fastrtps_cpp', environment).problem()
    assert profile_environment(environment, '/shipped.xml') == {other: SHIPPED[name]}
    assert profile_environment({other: ''}, '/shipped.xml') == profile('/shipped.xml')
    assert profile_environment(SHIPPED, '/shipped.xml') == {}


def test_shared_memory_of_a_process(tmp_path: Path) -> None:
    """Only a segment of its own counts, which is there and large enough."""
    files = tmp_path / 'fd'
    files.mkdir()
    check = SharedMemoryCheck('rmw_fastrtps_cpp', SHIPPED)
    for index, (name, size) in enumerate((
            ('fastrtps_port7411', 2**27), ('fastrtps_9c7e79bbcfc12a3b', 2**19), ('other', 2**27))):
        with (tmp_path / name).open('wb') as file:
            file.truncate(size)
        (files / str(index)).symlink_to(tmp_path / f'{name}_el')
    (files / '7').symlink_to('pipe:[1234]')
    assert 'no 64.0 MiB of shared memory' in check.problem(files)
    assert SharedMemoryCheck('rmw_fastrtps_cpp', {}).problem(files) == ''
    segment = tmp_path / 'fastrtps_0123456789abcdef'
    with segment.open('wb') as file:
        file.truncate(2**26 + 1000)
    (files / '8').symlink_to(f'{segment}_el (deleted)')
    assert check.problem(files) == ''
    segment.unlink()
    assert f'{segment}, shared memory of this node, has been deleted' in check.problem(files)


def test_shared_memory_that_nobody_asked_for(tmp_path: Path) -> None:
    """Another middleware, UDP on purpose, no /proc; but an unreadable profile is told."""
    empty = tmp_path / 'fd'
    empty.mkdir()
    assert SharedMemoryCheck('rmw_cyclonedds_cpp', SHIPPED).problem(empty) == ''
    udp = {'FASTDDS_BUILTIN_TRANSPORTS': 'UDPv4'}
    assert SharedMemoryCheck('rmw_fastrtps_cpp', udp).problem(empty) == ''
    assert SharedMemoryCheck('rmw_fastrtps_cpp', SHIPPED).problem(tmp_path / 'absent') == ''
    absent = profile(tmp_path / 'absent.xml')
    assert 'absent.xml: no readable' in SharedMemoryCheck('rmw_fastrtps_cpp', absent).problem()


def test_what_ended_programs_left(tmp_path: Path) -> None:
    """A program that lives holds the lock; the tool beside Fast DDS goes by the same."""
    for name in ('0123456789abcdef', 'fedcba9876543210', 'port7411'):
        (tmp_path / f'fastrtps_{name}').write_bytes(bytes(1000))
        (tmp_path / f'fastrtps_{name}_el').touch()
    (tmp_path / 'fastrtps_0000000000000000_el').touch()  # its segment is gone
    (tmp_path / 'somebody_else').write_bytes(bytes(1000))
    with (tmp_path / 'fastrtps_fedcba9876543210_el').open('wb') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert left_behind(tmp_path) == 2000
    assert left_behind(tmp_path) == 3000
    assert left_behind(tmp_path / 'absent') == 0


def test_a_node_that_got_no_shared_memory_says_so() -> None:
    """Its answers would get lost in silence. Files may not be as large as the segment here."""
    old = limits.getrlimit(limits.RLIMIT_FSIZE)
    limits.setrlimit(limits.RLIMIT_FSIZE, (32 << 20, old[1]))
    try:
        with NodeRun({'diagnostics_period_s': 0.1}) as run:
            diagnostics = run.client.diagnostics
            Driver(run).wait(lambda: diagnostics.get('node.level') == '1', what='warning')
            assert 'no 64.0 MiB of shared memory' in diagnostics['node']
            assert '/dev/shm' in diagnostics['node.transport']
    finally:
        limits.setrlimit(limits.RLIMIT_FSIZE, old)


def test_shared_memory_that_is_deleted_is_told() -> None:
    """As logind does for a user who logs out: known subscribers go on, new ones get nothing."""
    with NodeRun({'diagnostics_period_s': 0.1}) as run:
        driver, diagnostics = Driver(run), run.client.diagnostics
        driver.answer(make_frame(1))
        driver.wait(lambda: diagnostics.get('node.transport') == '')
        assert diagnostics['node.level'] == '0'
        for link in Path(f'/proc/{run.pid}/fd').iterdir():
            if re.fullmatch('fastrtps_[0-9a-f]{16}_el', link.readlink().name):
                Path(str(link.readlink()).removesuffix('_el')).unlink()
        driver.wait(lambda: diagnostics['node.level'] == '1', what='warning')
        assert 'has been deleted' in diagnostics['node']
