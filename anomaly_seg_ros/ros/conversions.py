# SPDX-License-Identifier: Apache-2.0
"""Between ROS messages and arrays."""

import array
from collections.abc import Mapping, Sequence
import copy
from typing import Any

from anomaly_seg_ros.classes import UNLABELLED
from anomaly_seg_ros.model_file import ModelCard
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
import numpy as np
from rclpy.node import Node
from sensor_msgs.msg import CameraInfo, Image, RegionOfInterest
from std_msgs.msg import Header


def stamp_to_ns(header: Header) -> int:
    """Return a header's stamp in nanoseconds."""
    return int(header.stamp.sec) * 1_000_000_000 + int(header.stamp.nanosec)


def full_name(node: Node) -> str:
    """Return a node's name with its namespace, as diagnostics tell nodes apart: ``front/name``."""
    return str(node.get_fully_qualified_name()).lstrip('/')


class ImageBuffer:
    """
    An Image message whose pixels are written in place, frame after frame.

    rclpy copies ``data`` while it publishes, so the buffer is free again afterwards. A new array
    is made only when the size changes.
    """

    def __init__(self, encoding: str, dtype: type, channels: int = 1) -> None:
        """Take the encoding, and the type and number of its channels."""
        self.message = Image(encoding=encoding)
        self._dtype: np.dtype = np.dtype(dtype)
        self._channels = channels
        self._pixels: np.ndarray = np.empty((0, 0), dtype)

    def pixels(self, size_hw: tuple[int, int]) -> np.ndarray:
        """Return the writeable array (H, W) or (H, W, C) behind the message."""
        if self._pixels.shape[:2] != size_hw:
            height, width = size_hw
            step = width * self._channels * self._dtype.itemsize
            shape = size_hw if self._channels == 1 else (*size_hw, self._channels)
            self.message.height, self.message.width, self.message.step = height, width, step
            self.message.data = array.array('B', [0]) * (step * height)
            # The message may have copied the array: view the one that it holds.
            self._pixels = np.frombuffer(self.message.data, self._dtype).reshape(shape)
        return self._pixels


def rescaled_camera_info(info: CameraInfo, header: Header,
                         size_hw: tuple[int, int]) -> CameraInfo:
    """
    Return ``info`` for an image of ``size_hw``, with ``header``.

    By the message's definition its size, K and P are those of the whole sensor at full resolution;
    ``roi`` and ``binning`` say what the image shows of it: (roi or full size) // binning pixels.
    Equal to ``info`` where the image has that size, or where that size is 0.

    Otherwise (calibrated at another resolution, or the image was resized since) K and P are those
    which image_geometry derives from roi and binning, scaled to ``size_hw`` with half-pixel
    centres (the centre of the first pixel is at 0, its edge at -0.5). The result then describes
    the image itself, without roi and binning; distortion and rotation stay.
    """
    result = copy.copy(info)
    result.header = header
    described_hw = described_size_hw(info)
    if described_hw == size_hw or 0 in described_hw:
        return result
    scale_y, scale_x = (size / described
                        for size, described in zip(size_hw, described_hw, strict=True))
    axes = ((info.roi.x_offset, info.binning_x or 1, scale_x),
            (info.roi.y_offset, info.binning_y or 1, scale_y))
    result.height, result.width = size_hw
    result.k = _reduced_matrix(info.k, 3, axes)
    result.p = _reduced_matrix(info.p, 4, axes)
    result.binning_x = result.binning_y = 0
    result.roi = RegionOfInterest()
    return result


def described_size_hw(info: CameraInfo) -> tuple[int, int]:
    """
    Return the size of the images that a CameraInfo is about; (0, 0) where it does not say.

    A roi of size 0 is the whole.
    """
    roi = info.roi
    height, width = (roi.height, roi.width) if roi.height or roi.width \
        else (info.height, info.width)
    return height // (info.binning_y or 1), width // (info.binning_x or 1)


def _reduced_matrix(values: Sequence[float], columns: int,
                    axes: Sequence[tuple[int, int, float]]) -> list[float]:
    """Take offset, binning and scale of x and y into a row-major camera matrix (rows x, y, 1)."""
    matrix = np.array(values, np.float64).reshape(3, columns)
    for row, (offset, binning, scale) in enumerate(axes):
        # As image_geometry: the roi's corner is at 0, and binning keeps the first pixel's centre
        # there. The third row says how much of a constant reaches x or y.
        matrix[row] = (matrix[row] - offset * matrix[2]) / binning
        # x' = scale (x + 1/2) - 1/2
        matrix[row] = scale * matrix[row] + (scale - 1) / 2 * matrix[2]
    return [float(v) for v in matrix.ravel()]


def label_info(card: ModelCard, threshold: float, header: Header) -> Any:
    """
    Return a vision_msgs/LabelInfo that names the class ids of ``~/output/labels``.

    Its ``threshold`` is 0 to 1 by the message's definition: the decision threshold on the scale
    of ``~/output/anomaly_u8``, divided by 255.
    """
    from vision_msgs.msg import LabelInfo, VisionClass
    low, high = card.score_range
    names = {**dict(enumerate(card.classes)), UNLABELLED: 'unlabelled'}
    return LabelInfo(
        header=header, threshold=min(1.0, max(0.0, (threshold - low) / (high - low))),
        class_map=[VisionClass(class_id=index, class_name=name) for index, name in names.items()])


def frame_report(header: Header, node_name: str, values: Mapping[str, Any]) -> DiagnosticArray:
    """Return what is known about one answer, under the frame's own header."""
    message = DiagnosticArray(header=header)
    message.status = [DiagnosticStatus(
        name=f'{node_name}: frame', message='answered',
        values=[KeyValue(key=key, value=str(value)) for key, value in values.items()])]
    return message
