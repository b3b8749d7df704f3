# SPDX-License-Identifier: Apache-2.0
"""Fast DDS's shared memory: what is asked for, what this process has, what others left behind."""

from collections.abc import Mapping
from contextlib import suppress
import fcntl
from pathlib import Path
import re
import xml.etree.ElementTree as ElementTree

from anomaly_seg_ros.errors import UserError

PROFILE_VARIABLES = ('FASTDDS_DEFAULT_PROFILES_FILE', 'FASTRTPS_DEFAULT_PROFILES_FILE')
SHARED_MEMORY = Path('/dev/shm')
# Segment of Fast DDS's built-in shared-memory transport.
_DEFAULT_SEGMENT = 512 * 1024
# Values of FASTDDS_BUILTIN_TRANSPORTS that leave shared memory out.
_WITHOUT = ('NONE', 'UDPv4', 'UDPv6')
_SEGMENT = re.compile(r'^([0-9a-f]+)-([0-9a-f]+) .*/fastrtps_[0-9a-f]{16}$', re.MULTILINE)


def profile_path(environment: Mapping[str, str]) -> str:
    """Return the Fast DDS profile that the environment names; empty where it names none."""
    return next((environment[name] for name in PROFILE_VARIABLES if environment.get(name)), '')


def segment_size(environment: Mapping[str, str]) -> int:
    """
    Return the bytes of the shared-memory segment that Fast DDS is asked for; 0 for none.

    Raises
    ------
    UserError
        If the profile is missing or not XML.

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


def has_segment(size: int, maps: Path = Path('/proc/self/maps')) -> bool:
    """
    Tell whether this process has a segment of Fast DDS of ``size`` bytes or more.

    Where it gets none of the size asked for, Fast DDS makes one of its default size, or none. True
    where that cannot be seen.
    """
    try:
        text = maps.read_text(encoding='utf-8', errors='replace')
    except OSError:
        return True
    return any(int(end, 16) - int(begin, 16) >= size for begin, end in _SEGMENT.findall(text))


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


def degraded(middleware: str, environment: Mapping[str, str]) -> str:
    """Say in what way big images travel worse than Fast DDS was asked for; empty for none."""
    if 'fastrtps' not in middleware:
        return ''
    try:
        wanted = segment_size(environment)
    except UserError as error:
        return str(error)
    if not wanted or has_segment(wanted):
        return ''
    return (f'Fast DDS got no {wanted / 2**20:.1f} MiB of shared memory, so images may be lost. '
            'Ask "anomaly-seg doctor" about /dev/shm, then start the node again')
