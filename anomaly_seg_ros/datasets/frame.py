# SPDX-License-Identifier: Apache-2.0
"""One image with whatever is known about it."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Frame:
    """
    An image and its ground truth.

    Attributes
    ----------
    frame_id
        Name of the frame, unique in its data set; used for result files.
    image_rgb
        uint8 (H, W, 3), RGB.
    anomaly_mask
        uint8 (H, W): 0 in-distribution, 1 anomaly, 255 void (not evaluated); None if unknown.
    labels
        uint8 (H, W), train ids, 255 unlabelled; None if unknown.
    stamp_ns
        Time of the frame in nanoseconds where the source has one.

    """

    frame_id: str
    image_rgb: np.ndarray
    anomaly_mask: np.ndarray | None = None
    labels: np.ndarray | None = None
    stamp_ns: int | None = None
