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
from sensor_msgs.msg import CameraInfo, Image
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
            self.message.data = array.array('B', bytes(step * height))
            # The message may have copied the array: view the one that it holds.
            self._pixels = np.frombuffer(self.message.data, self._dtype).reshape(shape)
        return self._pixels


def rescaled_camera_info(info: CameraInfo, header: Header,
                         size_hw: tuple[int, int]) -> CameraInfo:
    """
    Return ``info`` for an image of ``size_hw``, with ``header``.

    Equal to ``info`` where the size is the same. Otherwise focal lengths and principal point are
    scaled with half-pixel centres (the centre of the first pixel is at 0, its edge at -0.5), the
    region of interest with them; distortion and rotation stay.
    """
    result = copy.copy(info)
    result.header = header
    height, width = size_hw
    if (info.height, info.width) == size_hw or not info.height or not info.width:
        return result
    sy, sx = height / info.height, width / info.width
    result.height, result.width = height, width
    result.k = _scaled_matrix(info.k, 3, sx, sy)
    result.p = _scaled_matrix(info.p, 4, sx, sy)
    result.roi = copy.copy(info.roi)
    result.roi.x_offset, result.roi.width = (
        round(v * sx) for v in (info.roi.x_offset, info.roi.width))
    result.roi.y_offset, result.roi.height = (
        round(v * sy) for v in (info.roi.y_offset, info.roi.height))
    return result


def _scaled_matrix(values: Sequence[float], columns: int, sx: float, sy: float) -> list[float]:
    """Scale a row-major camera matrix whose rows are x, y, 1."""
    matrix = np.array(values, np.float64).reshape(3, columns)
    matrix[0] *= sx
    matrix[1] *= sy
    # x' = sx (x + 1/2) - 1/2; the third row says how much of a constant reaches x.
    matrix[0] += (sx - 1) / 2 * matrix[2]
    matrix[1] += (sy - 1) / 2 * matrix[2]
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
