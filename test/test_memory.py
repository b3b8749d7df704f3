# SPDX-License-Identifier: Apache-2.0
"""Memory kept from frame to frame."""

import platform
import subprocess
import sys

from anomaly_seg_ros.memory import Memory
import numpy as np
import pytest

# Page faults of 50 messages of 6 MB that come and go in pairs, as rclpy makes them.
FAULTS = """
import resource
from anomaly_seg_ros.heap import keep_freed_memory
{call}
def message():
    serialised = bytearray(6 << 20)
    return bytes(serialised)
for _ in range(5):
    message()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    message()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(call: str) -> int:
    """Return the page faults of a process that makes ``call`` first."""
    result = subprocess.run([sys.executable, '-c', FAULTS.format(call=call)], check=True,
                            capture_output=True, text=True)
    return int(result.stdout)


def test_memory_stays_in_place() -> None:
    """The same array for the same shape, the same memory for a smaller one."""
    memory = Memory(np.uint8)
    large = memory.array((4, 6))
    assert memory.array((4, 6)) is large
    small = memory.array((2, 3, 3))
    assert small.shape == (2, 3, 3) and np.shares_memory(small, large)
    assert not np.shares_memory(memory.array((5, 6)), large)


KEPT = """
import os
from anomaly_seg_ros.heap import give_back_freed_memory, keep_freed_memory
keep_freed_memory()
def resident():
    with open('/proc/self/statm') as stream:
        return int(stream.read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2**20
pieces = [bytearray(b'x' * (1 << 20)) for _ in range(200)]
pinned = pieces[-1]
del pieces
before = resident()
give_back_freed_memory()
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason="malloc_trim is glibc's")
def test_freed_memory_is_given_back_on_demand() -> None:
    """Also below a piece that is still in use."""
    result = subprocess.run([sys.executable, '-c', KEPT], check=True, capture_output=True,
                            text=True)
    assert float(result.stdout) > 150


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason="mallopt is glibc's")
def test_freed_memory_is_kept() -> None:
    """Large messages that come and go then cost no page faults."""
    assert faults('keep_freed_memory()') < 100 < faults('')


HEAPS = """
import ctypes, threading
from anomaly_seg_ros.heap import share_one_heap
{call}
held, all_hold, done = [], threading.Barrier(7), threading.Event()
def work():
    held.append([bytearray(1000) for _ in range(1000)])
    all_hold.wait()
    done.wait()
threads = [threading.Thread(target=work) for _ in range(6)]
for thread in threads:
    thread.start()
all_hold.wait()
libc = ctypes.CDLL(None)
output = ctypes.c_void_p.in_dll(libc, 'stdout')
libc.malloc_info(0, output)
libc.fflush(output)
done.set()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='glibc has these settings')
def test_threads_share_one_heap() -> None:
    """By default each of a few threads has its own, whose end malloc_trim does not give back."""
    heaps = []
    for call in ('', 'share_one_heap()'):
        result = subprocess.run([sys.executable, '-c', HEAPS.format(call=call)], check=True,
                                capture_output=True, text=True)
        heaps.append(result.stdout.count('<heap nr='))
    assert heaps[0] > 1 and heaps[1] == 1
