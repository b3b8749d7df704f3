# SPDX-License-Identifier: Apache-2.0
"""
What glibc does with memory that is freed; nothing here does anything with another C library.

This module imports nothing that starts threads, see ``share_one_heap``.
"""

import ctypes

# Parameters of glibc's mallopt, from malloc.h, and the largest values that it takes.
_M_TRIM_THRESHOLD, _NO_LIMIT = -1, 2**31 - 1
_M_MMAP_THRESHOLD, _LARGEST = -3, 32 << 20
_M_ARENA_MAX = -8


def keep_freed_memory(most_bytes: int = _NO_LIMIT) -> None:
    """
    Let this process keep memory that it frees, up to 32 MiB in one piece, for its next messages.

    By default glibc gives it back and asks for it again: the kernel then clears a message's pages
    one by one each time, which can take longer than everything else that is done to it. From which
    size on it does so, glibc learns from what is freed; that makes two runs of one program differ
    by tens of MiB.

    ``most_bytes`` is what may lie unused at the end of the heap.
    """
    _call('mallopt', _M_MMAP_THRESHOLD, _LARGEST)
    _call('mallopt', _M_TRIM_THRESHOLD, most_bytes)


def share_one_heap() -> None:
    """
    Let all threads of this process allocate from one heap; call it before they begin.

    By default glibc makes an arena for each of the first threads, and ``malloc_trim`` does not
    reach the free end of any but the main one: with each change of the model the node could keep
    another 10 MiB in the arena of whichever thread had allocated last.
    """
    _call('mallopt', _M_ARENA_MAX, 1)


def give_back_freed_memory() -> None:
    """
    Give what this process has freed back to the system.

    For moments such as the end of a model: pieces that are still in use between those it held keep
    them otherwise. Takes some milliseconds, and reaches everything only after ``share_one_heap``.
    """
    _call('malloc_trim', 0)


def _call(function: str, *arguments: int) -> None:
    """Call a function of glibc; another C library lacks it."""
    found = getattr(ctypes.CDLL(None), function, None)
    if found is not None:
        found(*arguments)
