# SPDX-License-Identifier: Apache-2.0
"""Fast DDS's shared memory: what is asked for, whether the node got it, what was left behind."""

import fcntl
from pathlib import Path
import resource as limits

import _needs_ros  # noqa: F401
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.resources import resource
from anomaly_seg_ros.ros.client import NodeRun
from anomaly_seg_ros.ros.transport import has_segment, left_behind, segment_size
import pytest
from ros_helpers import Driver

UDP = '<transport_descriptor><transport_id>u</transport_id><type>UDPv4</type>' \
      '</transport_descriptor>'
SHM = '<transport_descriptor><transport_id>s</transport_id><type>SHM</type>' \
      '</transport_descriptor>'
NO_BUILTIN = '<useBuiltinTransports> false </useBuiltinTransports>'
DEFAULT = 512 * 1024


@pytest.mark.parametrize(('content', 'size'), [
    ('', DEFAULT), (UDP, DEFAULT), (UDP + NO_BUILTIN, 0), (UDP + SHM + NO_BUILTIN, DEFAULT)])
def test_segment_that_a_profile_asks_for(content: str, size: int, tmp_path: Path) -> None:
    profile = tmp_path / 'profile.xml'
    profile.write_text(f'<dds xmlns="http://www.eprosima.com"><p>{content}</p></dds>')
    assert segment_size({'FASTRTPS_DEFAULT_PROFILES_FILE': str(profile)}) == size


def test_segment_that_is_asked_for(tmp_path: Path) -> None:
    shipped = str(resource('config/fastdds.xml'))
    assert segment_size({'FASTDDS_DEFAULT_PROFILES_FILE': shipped}) == 64 * 2**20
    assert segment_size({}) == segment_size({'FASTDDS_BUILTIN_TRANSPORTS': 'SHM'}) == DEFAULT
    assert segment_size({'FASTDDS_BUILTIN_TRANSPORTS': 'UDPv4'}) == 0
    (tmp_path / 'broken.xml').write_text('<dds>')
    for name in ('broken.xml', 'absent.xml'):
        with pytest.raises(UserError, match=f'{name}: no readable Fast DDS profile'):
            segment_size({'FASTDDS_DEFAULT_PROFILES_FILE': str(tmp_path / name)})


def test_segment_of_a_process(tmp_path: Path) -> None:
    """Only a mapping of a segment counts: no port, no library, none that is smaller."""
    maps = tmp_path / 'maps'
    maps.write_text(
        '7f0000000000-7f0004300000 r-xp 00000000 fe:00 1    /lib/libfastrtps_0123456789abcdef.so\n'
        '7f0010000000-7f0014300000 rw-s 00000000 00:1b 2    /dev/shm/fastrtps_port7411\n'
        '7f0020000000-7f0020087000 rw-s 00000000 00:1b 3    /dev/shm/fastrtps_9c7e79bbcfc12a3b\n')
    assert has_segment(DEFAULT, maps) and not has_segment(64 * 2**20, maps)
    assert has_segment(64 * 2**20, tmp_path / 'absent')


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
    parameters = {'diagnostics_period_s': 0.1}
    old = limits.getrlimit(limits.RLIMIT_FSIZE)
    limits.setrlimit(limits.RLIMIT_FSIZE, (32 << 20, old[1]))
    try:
        with NodeRun(parameters) as run:
            Driver(run).wait(lambda: 'node.transport' in run.client.diagnostics)
            assert run.client.diagnostics['node.level'] == '1'
            assert 'no 64.0 MiB of shared memory' in run.client.diagnostics['node']
            assert '/dev/shm' in run.client.diagnostics['node.transport']
    finally:
        limits.setrlimit(limits.RLIMIT_FSIZE, old)
    with NodeRun(parameters) as run:
        Driver(run).wait(lambda: 'node.transport' in run.client.diagnostics)
        assert run.client.diagnostics['node.level'] == '0'
        assert run.client.diagnostics['node.transport'] == ''
