# SPDX-License-Identifier: Apache-2.0
"""
Cheap checks whether a camera frame can be trusted at all.

They look at some 2,300 samples and 12 small patches of the green channel, whatever the frame's
size, and take a fraction of a millisecond: most of it is waiting for memory. The limits are set
so that none of the ordinary street images tried raises a flag; they find a broken camera, not a
poor picture.
"""

import cv2
import numpy as np

FLAGS = ('frozen', 'black', 'over_exposed', 'blurred', 'half_transmitted')

# Grid of samples, and patches at full resolution.
_GRID_HW = (36, 64)
_PATCHES_HW = (3, 4)
_PATCH_PX = 48

# Frames in a row that repeat the one before, sample by sample; a live sensor has noise.
_FROZEN_AFTER = 3
# Black: 99 of 100 samples below this value. Over-exposed: at least this part saturated.
_BLACK_BELOW = 16
_SATURATED_FROM, _SATURATED_PART = 250, 0.7
# Half transmitted: this part of the rows, from the bottom, flat while others are not.
_FLAT_SPAN, _FLAT_ROWS_PART = 2, 0.1
# Blurred: mean difference of neighbours over that of pixels 8 apart. 1/8 is a pure ramp; sharp
# street images measure 0.17 to 0.7, the same blurred with a sigma of 5 pixels at most 0.142.
_LAG_PX, _BLUR_RATIO, _CONTRAST = 8, 0.15, 6.0


class QualityChecker:
    """Flags frames of one camera; keeps the samples of the last one to see a frozen picture."""

    def __init__(self) -> None:
        """Begin with no frame seen."""
        self._last = np.empty((0, 0), np.uint8)
        self._repeats = 0

    def __call__(self, image: np.ndarray) -> tuple[str, ...]:
        """Return the flags of a frame uint8 (H, W, 3), a subset of ``FLAGS`` in their order."""
        samples = _samples(image)
        same = samples.shape == self._last.shape and np.array_equal(samples, self._last)
        self._repeats = self._repeats + 1 if same else 0
        self._last = samples
        found = {
            'frozen': self._repeats >= _FROZEN_AFTER,
            'black': np.count_nonzero(samples >= _BLACK_BELOW) < samples.size / 100,
            'over_exposed': np.count_nonzero(samples >= _SATURATED_FROM)
            >= samples.size * _SATURATED_PART,
            'blurred': _is_blurred(image),
            'half_transmitted': _is_half_transmitted(samples)}
        return tuple(flag for flag in FLAGS if found[flag])


def _samples(image: np.ndarray) -> np.ndarray:
    """Return a grid of the green channel, about 36x64, with the last row always in it."""
    steps = [max(1, size // wanted) for size, wanted in zip(image.shape, _GRID_HW, strict=False)]
    return image[::-steps[0], ::steps[1], 1][::-1].copy()


def _is_half_transmitted(samples: np.ndarray) -> bool:
    """Tell whether the lowest rows hold one value each while others above hold a picture."""
    flat = samples.max(axis=1) - samples.min(axis=1) <= _FLAT_SPAN
    if flat.all() or not flat[-1]:
        return False
    lowest = int(np.argmin(flat[::-1]))  # flat rows before the first that is not
    return lowest >= max(1, len(flat) * _FLAT_ROWS_PART)


def _is_blurred(image: np.ndarray) -> bool:
    """
    Compare differences of neighbours with those of pixels further apart.

    The ratio does not depend on contrast or brightness, and noise raises it. A blur in one
    direction, by motion, lowers it in that direction only, so the lower of the two counts.
    """
    height, width = image.shape[:2]
    (rows, columns), size, lag = _PATCHES_HW, _PATCH_PX, _LAG_PX
    if height < rows * size or width < columns * size:
        return False
    green = image[(height // rows - size) // 2:, (width // columns - size) // 2:, 1]
    down, right = green.strides
    patches = np.lib.stride_tricks.as_strided(
        green, (rows, columns, size, size),
        (down * (height // rows), right * (width // columns), down, right), writeable=False)
    # Every patch twice, the second time on its side, so that rows are columns; all in one column.
    patches = np.stack([patches, patches.swapaxes(2, 3)]).reshape(-1, size)
    near = cv2.absdiff(patches[:, 1:], patches[:, :-1]).reshape(2, rows * columns, -1).sum(2)
    far = cv2.absdiff(patches[:, lag:], patches[:, :-lag]).reshape(2, rows * columns, -1).sum(2)
    near, far = near / (size * (size - 1)), far / (size * (size - lag))
    textured = far.min(axis=0) > _CONTRAST
    if not textured.any():
        return False
    ratios = near[:, textured].sum(axis=1) / far[:, textured].sum(axis=1)
    return bool(ratios.min() < _BLUR_RATIO)
