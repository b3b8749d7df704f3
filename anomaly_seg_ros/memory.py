# SPDX-License-Identifier: Apache-2.0
"""Memory that is kept from frame to frame."""

import ctypes
import math

import numpy as np

# Parameters of glibc's mallopt, from malloc.h, and the largest values that it takes.
_M_TRIM_THRESHOLD, _NEVER = -1, 2**31 - 1
_M_MMAP_THRESHOLD, _LARGEST = -3, 32 << 20
_M_ARENA_MAX = -8


def keep_freed_memory() -> None:
    """
    Let this process keep memory that it frees, up to 32 MiB in one piece, for its next messages.

    By default glibc gives it back and asks for it again: the kernel then clears a message's pages
    one by one each time, which can take longer than everything else that is done to it. For the
    tools: the node does without (its heap keeps such memory anyway, and stays 60 MiB smaller).
    Does nothing with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)


def share_one_heap() -> None:
    """
    Let all threads of this process allocate from one heap; call it before they begin.

    By default glibc makes an arena for each of the first threads, and ``malloc_trim`` does not
    reach the free end of any but the main one: with each change of the model the node could keep
    another 10 MiB in the arena of whichever thread had allocated last. Does nothing with another
    C library.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


def give_back_freed_memory() -> None:
    """
    Give what this process has freed back to the system; does nothing without glibc.

    For moments such as the end of a model: pieces that are still in use between those it held keep
    them otherwise. Takes some milliseconds, and reaches everything only after ``share_one_heap``.
    """
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
    if trim is not None:
        trim(0)


class Memory:
    """
    One array at a time, always in the same memory unless a larger one is wanted than ever before.

    Frames of changing size then neither allocate nor leave holes in the heap.
    """

    def __init__(self, dtype: type) -> None:
        """Begin empty."""
        self._memory: np.ndarray = np.empty(0, dtype)
        self._array: np.ndarray = self._memory

    def array(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return an array of ``shape``, of any content; the one before is overwritten with it."""
        if self._array.shape != shape:
            size = math.prod(shape)
            if self._memory.size < size:
                self._memory = np.empty(size, self._memory.dtype)
            self._array = self._memory[:size].reshape(shape)
        return self._array
