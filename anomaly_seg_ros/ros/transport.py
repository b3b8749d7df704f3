# SPDX-License-Identifier: Apache-2.0
"""Fast DDS's shared memory: what is asked for, what this process has, what others left behind."""

from collections.abc import Mapping
from contextlib import suppress
import fcntl
import os
from pathlib import Path
import re
import xml.etree.ElementTree as ElementTree

from anomaly_seg_ros.errors import UserError

# Fast DDS 3 reads the first, Fast DDS 2, which is Jazzy's, only the second.
PROFILE_VARIABLES = ('FASTDDS_DEFAULT_PROFILES_FILE', 'FASTRTPS_DEFAULT_PROFILES_FILE')
SHARED_MEMORY = Path('/dev/shm')
# Segment of Fast DDS's built-in shared-memory transport.
_DEFAULT_SEGMENT = 512 * 1024
# Values of FASTDDS_BUILTIN_TRANSPORTS that leave shared memory out.
_WITHOUT = ('NONE', 'UDPv4', 'UDPv6')
# A process holds this lock, deleted or not, as long as it uses the segment beside it.
_OWN_LOCK = re.compile(r'(/.*/fastrtps_[0-9a-f]{16})_el( \(deleted\))?')


def profile_path(environment: Mapping[str, str]) -> str:
    """
    Return the Fast DDS profile that the environment names; empty where it names none.

    Raises
    ------
    UserError
        If the variables of Fast DDS 2 and 3 name different ones.

    """
    new, old = (environment.get(name, '') for name in PROFILE_VARIABLES)
    if new != old:
        raise UserError(f'{PROFILE_VARIABLES[0]} is {new!r} and {PROFILE_VARIABLES[1]} {old!r}: '
                        'Fast DDS 3 reads only the first, Fast DDS 2 (ROS 2 Jazzy) only the '
                        'second. Set both to the same file')
    return new


def profile_environment(environment: Mapping[str, str], shipped: str) -> dict[str, str]:
    """
    Return the variables to set so that every release of Fast DDS reads the user's profile.

    Where the user named none, it is ``shipped``, which lets big images through; what is set stays.
    """
    profile = next(filter(None, map(environment.get, PROFILE_VARIABLES)), shipped)
    return {name: profile for name in PROFILE_VARIABLES if not environment.get(name)}


def segment_size(environment: Mapping[str, str]) -> int:
    """
    Return the bytes of the shared-memory segment that Fast DDS is asked for; 0 for none.

    Raises
    ------
    UserError
        If the profile is missing or not XML, or not every release of Fast DDS reads it.

    """
    profile = profile_path(environment)
    if not profile:
        without = environment.get('FASTDDS_BUILTIN_TRANSPORTS', '') in _WITHOUT
        return 0 if without else _DEFAULT_SEGMENT
    try:
        root = ElementTree.parse(profile).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise UserError(f'{profile}: no readable Fast DDS profile ({error})') from error
    elements = [(element.tag.rpartition('}')[2], element) for element in root.iter()]
    for tag, element in elements:
        if tag == 'transport_descriptor':
            values = {child.tag.rpartition('}')[2]: (child.text or '').strip()
                      for child in element}
            if values.get('type') == 'SHM':
                size = values.get('segment_size', '')
                return int(size) if size.isdecimal() else _DEFAULT_SEGMENT
    builtin = [(element.text or '').strip() for tag, element in elements
               if tag == 'useBuiltinTransports']
    return 0 if 'false' in builtin else _DEFAULT_SEGMENT


def left_behind(folder: Path = SHARED_MEMORY) -> int:
    """
    Return the bytes of shared memory that belong to programs which have ended.

    Fast DDS cannot remove the segments of a program that was killed, unless another one that
    knew them lives on. A live one holds a lock on the file beside its segment.
    """
    size = 0
    for lock in folder.glob('fastrtps_*_el'):
        with suppress(OSError):  # held, another user's, or gone by now
            with lock.open('rb') as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            size += lock.with_name(lock.name.removesuffix('_el')).stat().st_size
    return size


class SharedMemoryCheck:
    """Whether this process still has the shared memory that Fast DDS was asked for."""

    def __init__(self, middleware: str, environment: Mapping[str, str]) -> None:
        """Take the identifier of the RMW implementation, and the variables it started with."""
        self._wanted, self._unreadable = 0, ''
        if 'fastrtps' in middleware:
            try:
                self._wanted = segment_size(environment)
            except UserError as error:
                self._unreadable = str(error)

    def problem(self, files: Path = Path('/proc/self/fd')) -> str:
        """
        Say what is wrong now; empty where nothing is, or where it cannot be seen.

        ``files`` are links to the files that this process has open.
        """
        if not self._wanted:
            return self._unreadable
        gone = ''
        try:
            links = list(files.iterdir())
        except OSError:
            return ''
        for link in links:
            with suppress(OSError):  # closed by now
                own = _OWN_LOCK.fullmatch(os.readlink(link))
                if own is None:
                    continue
                segment = Path(own[1])
                if not segment.exists():
                    gone = str(segment)
                elif segment.stat().st_size >= self._wanted:
                    return ''
        if gone:
            return (f'{gone}, shared memory of this node, has been deleted: who subscribes from '
                    'now on receives nothing. Start the node again; if it goes at the end of a '
                    'login, set RemoveIPC=no in logind.conf')
        return (f'Fast DDS got no {self._wanted / 2**20:.1f} MiB of shared memory, so images may '
                'be lost. Ask "anomaly-seg doctor" about /dev/shm, then start the node again')
