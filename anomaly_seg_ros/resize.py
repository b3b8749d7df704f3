# SPDX-License-Identifier: Apache-2.0
"""
Camera frames to the network's input size, to the bit the same on every machine.

``bilinear`` reads the four pixels around each place and skips the others: shrinking aliases.
``antialiased`` weighs all pixels that a place stands for, as Pillow and torchvision do where
networks are trained: a triangle whose half-width is the scale. Its variance is split up: means of
2x2 pixels while the scale is large, then a small blur, then the bilinear interpolation. At a scale
of 2 that is Pillow's filter, (1, 3, 3, 1) / 8; at others it comes close. It takes a third to an
eighth of Pillow's time.
"""

from dataclasses import dataclass
from functools import lru_cache
import math

from anomaly_seg_ros.memory import Memory
import cv2
import numpy as np

HALVE_FROM = 3.5  # scale from which the mean of 2x2 pixels comes first
BILINEAR_VARIANCE = 1 / 6  # of linear interpolation, over all places between two pixels


@dataclass(frozen=True)
class Smoothing:
    """
    What antialiasing does to a frame before it is interpolated.

    Attributes
    ----------
    halvings
        How often 2x2 pixels become their mean.
    size_wh, sigma_wh
        Taps and standard deviation of ``cv2.GaussianBlur`` along x and y, in pixels after the
        halvings; one tap is no blur.

    """

    halvings: int = 0
    size_wh: tuple[int, int] = (1, 1)
    sigma_wh: tuple[float, float] = (1.0, 1.0)

    @property
    def blurs(self) -> bool:
        """Whether there is a blur along either axis."""
        return self.size_wh != (1, 1)

    def kernels(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the weights along x and y that OpenCV takes, int64, in steps of 1 / 256."""
        along_x, along_y = (_kernel(size, sigma)
                            for size, sigma in zip(self.size_wh, self.sigma_wh, strict=True))
        return along_x, along_y


@lru_cache(maxsize=64)
def smoothing(frame_hw: tuple[int, int], size_hw: tuple[int, int], resize: str,
              reduced: bool = False) -> Smoothing:
    """
    Return what comes before bilinear interpolation from ``frame_hw`` to ``size_hw``.

    Parameters
    ----------
    frame_hw, size_hw
        Height and width in pixels, before and after.
    resize
        ``antialiased`` or ``bilinear``.
    reduced
        Whether the frame is a larger one that a JPEG decoder gave at reduced size, sharp: then
        pixels that are not interpolated, because the size is right, are smoothed as if they were.

    """
    if resize == 'bilinear':
        return Smoothing()
    (height, width), halvings = frame_hw, 0
    while height % 2 == width % 2 == 0 \
            and min(height / size_hw[0], width / size_hw[1]) >= HALVE_FROM:
        height, width, halvings = height // 2, width // 2, halvings + 1
    blurs = [_blur(old / new, 2 ** halvings, reduced)
             for old, new in ((frame_hw[1], size_hw[1]), (frame_hw[0], size_hw[0]))]
    return Smoothing(halvings, (blurs[0][0], blurs[1][0]), (blurs[0][1], blurs[1][1]))


class Resizer:
    """Scales frames to one size; buffers are made once and reused."""

    def __init__(self, size_hw: tuple[int, int], resize: str) -> None:
        """Scale to height and width ``size_hw``, ``antialiased`` or ``bilinear``."""
        self._size_hw = size_hw
        self._resize = resize
        self._halves = [Memory(np.uint8), Memory(np.uint8)]
        self._blurred = Memory(np.uint8)
        self._resized = np.empty((*size_hw, 3), np.uint8)

    def __call__(self, image: np.ndarray, reduced: bool = False) -> np.ndarray:
        """
        Return uint8 (h, w, 3), valid until the next call, of uint8 (H, W, 3) of any size.

        ``reduced`` says that ``image`` is a reduced one of the camera's, see ``smoothing``.
        """
        smooth = smoothing(image.shape[:2], self._size_hw, self._resize, reduced)
        for number in range(smooth.halvings):
            height, width = image.shape[0] // 2, image.shape[1] // 2
            half = self._halves[number % 2].array((height, width, 3))
            image = cv2.resize(image, (width, height), dst=half,
                               interpolation=cv2.INTER_LINEAR_EXACT)
        if smooth.blurs:
            image = cv2.GaussianBlur(
                image, smooth.size_wh, smooth.sigma_wh[0], dst=self._blurred.array(image.shape),
                sigmaY=smooth.sigma_wh[1], borderType=cv2.BORDER_REPLICATE)
        if image.shape[:2] == self._size_hw:
            return image
        return cv2.resize(image, self._size_hw[::-1], dst=self._resized,
                          interpolation=cv2.INTER_LINEAR_EXACT)


def bilinear_taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Return what OpenCV's bit-exact bilinear resize takes along an axis of ``old`` pixels.

    Returns
    -------
    first, second, weight
        int64 (new,) indices of the two pixels, and float32 (new,) weight of the second in steps
        of 1/256. Blended along both axes and rounded half up they give INTER_LINEAR_EXACT to the
        bit (OpenCV's ``resize_bitExact``: 8.8 fixed-point coefficients).

    """
    scale = 1 / (new / old)
    place = (np.arange(new) + 0.5) * scale - 0.5
    floor = np.floor(place)
    weight = np.rint((place - floor) * 256) / 256
    weight[(floor < 0) | (floor >= old - 1)] = 0
    first = np.clip(floor, 0, old - 1).astype(np.int64)
    return first, np.minimum(first + 1, old - 1), weight.astype(np.float32)


@lru_cache(maxsize=64)
def nearest_taps(old: int, new: int) -> np.ndarray:
    """Return the int64 (new,) indices that OpenCV's INTER_NEAREST_EXACT takes; do not change."""
    index = np.arange(old, dtype=np.float32)[None]
    taps = cv2.resize(index, (new, 1), interpolation=cv2.INTER_NEAREST_EXACT)[0].astype(np.int64)
    taps.flags.writeable = False
    return taps


def _blur(scale: float, pixel: int, reduced: bool = False) -> tuple[int, float]:
    """
    Return taps and sigma of the blur for ``scale``, where pixels are means of ``pixel``.

    Variances add up: a triangle of half-width s has s^2 / 6, the mean of m pixels (m^2 - 1) / 12.
    """
    variance = (scale ** 2 / 6 - (pixel ** 2 - 1) / 12) / pixel ** 2
    if scale != 1 or not reduced:
        variance -= BILINEAR_VARIANCE
    if variance < 1 / 256:
        return 1, 1.0
    radius = 1
    while radius * (radius + 1) / 4 < variance:  # three quarters of what equal weights have
        radius += 1
    low, high = 0.05, 10.0 * radius
    while high - low > 1e-9:
        sigma = (low + high) / 2
        low, high = (sigma, high) if _variance(radius, sigma) < variance else (low, sigma)
    return 2 * radius + 1, high


def _variance(radius: int, sigma: float) -> float:
    """Return the variance of a Gaussian sampled at whole pixels up to ``radius``."""
    weights = [math.exp(-(x / sigma) ** 2 / 2) for x in range(radius + 1)]
    return 2 * sum(w * x * x for x, w in enumerate(weights)) / (2 * sum(weights) - 1)


def _kernel(size: int, sigma: float) -> np.ndarray:
    """Read OpenCV's fixed-point weights off its answer to a single white pixel."""
    if size == 1:
        return np.array([256])
    white = np.zeros((1, 2 * size + 1), np.uint8)
    white[0, size] = 255
    weights = cv2.GaussianBlur(white, (size, 1), sigma)[0].astype(np.int64)
    weights = weights[size - size // 2:size + size // 2 + 1]
    weights[size // 2] += 256 - weights.sum()  # 255 of 256 rounds right up to a weight of a half
    return weights
