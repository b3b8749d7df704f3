# SPDX-License-Identifier: Apache-2.0
"""Files are whole or absent, whatever goes wrong."""

import hashlib
import os
from pathlib import Path
import subprocess
import sys

from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.files import atomic_write, atomic_write_bytes, atomic_write_text, sha256_file
import pytest


def test_writes_and_replaces(tmp_path: Path) -> None:
    """The content arrives, parents are made, and an older file is replaced."""
    path = tmp_path / 'a' / 'b.bin'
    atomic_write_bytes(path, b'one')
    atomic_write_bytes(path, b'two')
    assert path.read_bytes() == b'two'
    atomic_write_text(path, 'grün')
    assert path.read_bytes() == b'gr\xc3\xbcn'
    assert os.listdir(path.parent) == ['b.bin']


def test_a_name_as_long_as_file_systems_take(tmp_path: Path) -> None:
    """The temporary name is not longer, in bytes, than the file's own."""
    for name in 'n' * 255, 'ü' * 127:
        atomic_write_bytes(tmp_path / name, b'one')
    assert len(os.listdir(tmp_path)) == 2


def test_a_new_file_has_the_usual_mode(tmp_path: Path) -> None:
    """Others may read it, as the umask says; temporary files alone are private."""
    plain = tmp_path / 'plain'
    plain.write_bytes(b'')
    atomic_write_bytes(tmp_path / 'atomic', b'')
    assert (tmp_path / 'atomic').stat().st_mode == plain.stat().st_mode


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    """When the block raises, its exception passes and the folder is as before."""
    path = tmp_path / 'model.onnx'
    path.write_bytes(b'old')

    def write_half() -> None:
        with atomic_write(path) as temporary:
            temporary.write_bytes(b'half')
            assert temporary.parent == tmp_path
            raise KeyError('x')
    with pytest.raises(KeyError):
        write_half()
    assert path.read_bytes() == b'old'
    assert os.listdir(tmp_path) == ['model.onnx']


def test_a_full_disk_is_a_clear_error(tmp_path: Path) -> None:
    """
    A write that the system refuses half-way names the file; the older one stays.

    The refusal is real: the process may write files of 64 KiB at most.
    """
    path = tmp_path / 'result.bin'
    path.write_bytes(b'old')
    code = ('import resource, sys\n'
            'from anomaly_seg_ros.errors import UserError\n'
            'from anomaly_seg_ros.files import atomic_write_bytes\n'
            'resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n'
            'try:\n'
            '    atomic_write_bytes(sys.argv[1], bytes(200_000))\n'
            'except UserError as error:\n'
            '    print(error)\n')
    result = subprocess.run([sys.executable, '-B', '-c', code, str(path)], capture_output=True,
                            text=True, check=True)
    assert str(path) in result.stdout
    assert 'Free disk space' in result.stdout
    assert path.read_bytes() == b'old'
    assert os.listdir(tmp_path) == ['result.bin']


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    """A file where a folder should be."""
    (tmp_path / 'file').write_bytes(b'')
    with pytest.raises(UserError, match='cannot be written'):
        atomic_write_bytes(tmp_path / 'file' / 'x.bin', b'')


def test_sha256_of_a_file_larger_than_a_block(tmp_path: Path) -> None:
    """Equal to hashlib over the whole content."""
    data = bytes(range(256)) * 10_000
    (tmp_path / 'data').write_bytes(data)
    assert sha256_file(tmp_path / 'data') == hashlib.sha256(data).hexdigest()
