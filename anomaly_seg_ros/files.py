# SPDX-License-Identifier: Apache-2.0
"""Files that are either whole or absent: written under a temporary name, then renamed."""

from collections.abc import Iterator
from contextlib import contextmanager
import hashlib
import os
from pathlib import Path
import tempfile

from anomaly_seg_ros.errors import UserError


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """
    Give a temporary path beside ``path``; rename it to ``path`` when the block succeeds.

    The temporary file is removed when the block raises, so ``path`` is never half-written and an
    older ``path`` stays as it was.

    Raises
    ------
    UserError
        If the file cannot be written (folder not writable, disk full); names the file.

    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not the whole name: one as long as file systems take must fit.
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name[:40]}.',
                                        suffix='.tmp')
    except OSError as error:
        raise _cannot_write(path, error) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes the file private; give it the mode any other new file would have.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_bytes(path: Path | str, data: bytes) -> None:
    """Write ``data`` to ``path``, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: Path | str, text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8, whole or not at all."""
    atomic_write_bytes(path, text.encode('utf-8'))


def sha256_file(*paths: Path | str) -> str:
    """Return the hexadecimal SHA-256 of a file's content, of several one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, 'rb') as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def array_error(error: Exception) -> str:
    """Return why numpy could not read a file, but for its advice to execute what is in it."""
    return 'it holds pickled objects or no array' if 'allow_pickle' in str(error) else str(error)


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(
        f'{path}: cannot be written ({error.strerror or error}). Free disk space or choose '
        'another folder, then run again; files written before this one are complete.')
