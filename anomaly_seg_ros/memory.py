# SPDX-License-Identifier: Apache-2.0
"""Memory that is kept from frame to frame."""

import math

import numpy as np


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
