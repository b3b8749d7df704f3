# SPDX-License-Identifier: Apache-2.0
"""From a camera frame to the network's input on the CPU."""

from anomaly_seg_ros.model_card import ModelCard
from anomaly_seg_ros.resize import Resizer
import cv2
import numpy as np


class Preprocessor:
    """
    Resize and normalise frames for a ``host`` model; buffers are made once and reused.

    Frames are resized as the card says, with half-pixel centres and to the same bits everywhere
    (OpenCV's plain INTER_LINEAR gives other bits on other machines and rounds down by an eighth of
    a grey level on average). Normalisation looks each plane's 256 possible values up in a table,
    10 times faster than arithmetic on interleaved pixels.
    """

    def __init__(self, card: ModelCard, out: np.ndarray | None = None) -> None:
        """Take size, resizing, channels and normalisation from ``card``; write into ``out``."""
        height, width = card.input_size_hw
        self._resize = Resizer((height, width), card.resize)
        self._channel_order = card.channel_order
        self._planes = [np.empty((height, width), np.uint8) for _ in range(3)]
        self._input = np.empty((1, 3, height, width), np.float32) if out is None else out
        # (v / 255 - mean) / std has 256 possible values a channel.
        values = np.arange(256) / 255.0
        self._tables = [((values - mean) / std).astype(np.float32)
                        for mean, std in zip(card.mean, card.std, strict=True)]

    def __call__(self, image: np.ndarray, channel_order: str = 'rgb',
                 reduced: bool = False) -> np.ndarray:
        """
        Return float32 (1, 3, h, w), valid until the next call.

        Parameters
        ----------
        image
            uint8 (H, W, 3), any size.
        channel_order
            ``rgb`` or ``bgr``: the order of ``image``.
        reduced
            Whether ``image`` is a reduced one of the camera's.

        """
        check_image(image, channel_order)
        planes = cv2.split(self._resize(image, reduced), self._planes)
        if channel_order != self._channel_order:
            planes = planes[::-1]
        for plane, table, out in zip(planes, self._tables, self._input[0], strict=True):
            cv2.LUT(plane, table, dst=out)
        return self._input


def check_image(image: np.ndarray, channel_order: str) -> None:
    """Raise ValueError unless ``image`` is uint8 (H, W, 3) and the order is known."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 \
            or image.shape[2] != 3 or 0 in image.shape:
        got = f'{image.dtype} {image.shape}' if isinstance(image, np.ndarray) else type(image)
        raise ValueError(f'image must be uint8 (H, W, 3) with H, W > 0, got {got}')
    if channel_order not in ('rgb', 'bgr'):
        raise ValueError(f'channel_order must be rgb or bgr, got {channel_order!r}')
