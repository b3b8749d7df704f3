# SPDX-License-Identifier: Apache-2.0
"""The node's output topics: made once, computed only for subscribers, written in place."""

from collections.abc import Collection, Mapping
from importlib.util import find_spec
import threading
import time
from typing import Any

from anomaly_seg_ros.images import DecodedImage
from anomaly_seg_ros.model_file import ModelCard
from anomaly_seg_ros.pipeline import Detection
from anomaly_seg_ros.ros.conversions import (
    frame_report, full_name, ImageBuffer, label_info, rescaled_camera_info)
from anomaly_seg_ros.ros.parameters import NodeParameters
from anomaly_seg_ros.visualize import anomaly_u8, overlay
import cv2
from diagnostic_msgs.msg import DiagnosticArray
import numpy as np
from rclpy.lifecycle import LifecycleNode
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import Header

# Name -> encoding, type, channels; published in this order, the most urgent first.
IMAGES: dict[str, tuple[str, type, int]] = {
    'obstacle_mask': ('mono8', np.uint8, 1),
    'labels': ('mono8', np.uint8, 1),
    'anomaly_u8': ('mono8', np.uint8, 1),
    'anomaly': ('32FC1', np.float32, 1),
    'overlay': ('rgb8', np.uint8, 3),
}
# The images that are the pipeline's own maps, by its names.
MAPS = {'obstacle_mask': 'mask', 'labels': 'labels', 'anomaly': 'anomaly'}


class Outputs:
    """
    Publishers and their messages; image topics are for one thread at a time, see ``lock``.

    Attributes
    ----------
    lock
        Held while an answer or a fallback mask is published.
    camera_info
        The last message from ``~/input/camera_info``; None before the first.

    """

    def __init__(self, node: LifecycleNode, parameters: NodeParameters) -> None:
        """Create the publishers; they publish once the node is active."""
        self.lock = threading.Lock()
        self.camera_info: CameraInfo | None = None
        self._node = node
        qos = QoSProfile(
            depth=parameters.qos_depth,
            reliability=ReliabilityPolicy[parameters.output_reliability.upper()])
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        create = node.create_lifecycle_publisher
        self._images = {name: create(Image, f'~/output/{name}', qos) for name in IMAGES}
        self._camera_info = create(CameraInfo, '~/output/camera_info', qos)
        self._fallback = create(Header, '~/output/fallback', qos)
        self._frame = create(DiagnosticArray, '~/debug/frame', qos)
        self._label_info = None
        if find_spec('vision_msgs') is not None:
            from vision_msgs.msg import LabelInfo
            self._label_info = create(LabelInfo, '~/output/label_info', latched)
        self._buffers = {name: ImageBuffer(*layout) for name, layout in IMAGES.items()}
        # A buffer of its own: the fallback may be sent while the worker fills the others.
        self._all_obstacle = ImageBuffer(*IMAGES['obstacle_mask'])
        self._rgb = np.empty((0, 0, 3), np.uint8)

    def subscribed(self) -> tuple[str, ...]:
        """Return the names of the outputs that somebody receives."""
        extra = {'camera_info': self._camera_info, 'fallback': self._fallback,
                 'frame': self._frame}
        return tuple(name for name, publisher in (self._images | extra).items()
                     if publisher.get_subscription_count())

    def maps(self, size_hw: tuple[int, int], wanted: Collection[str]) -> dict[str, np.ndarray]:
        """Return the messages' pixels for those of the pipeline's maps that are wanted."""
        return {field: self._buffers[name].pixels(size_hw) for name, field in MAPS.items()
                if name in wanted}

    def publish(self, header: Header, image: DecodedImage, detection: Detection,
                card: ModelCard, opacity: float, wanted: Collection[str]) -> tuple[float, float]:
        """
        Publish one answer under the frame's own header; the caller holds ``lock``.

        Returns the milliseconds spent on making and on publishing the messages.
        """
        convert_s = publish_s = 0.0
        size_hw = detection.mask.shape
        for name in IMAGES:
            if name not in wanted:
                continue
            began = time.perf_counter()
            buffer = self._buffers[name]
            pixels = buffer.pixels(size_hw)
            self._fill(name, pixels, image, detection, card, opacity)
            buffer.message.header = header
            filled = time.perf_counter()
            self._images[name].publish(buffer.message)
            convert_s += filled - began
            publish_s += time.perf_counter() - filled
        if 'camera_info' in wanted and self.camera_info is not None:
            self._camera_info.publish(rescaled_camera_info(self.camera_info, header, size_hw))
        return convert_s * 1e3, publish_s * 1e3

    def publish_fallback(self, header: Header, size_hw: tuple[int, int]) -> None:
        """Publish a mask that is an obstacle everywhere, and its header as the flag."""
        self.flag_fallback(header)
        pixels = self._all_obstacle.pixels(size_hw)
        pixels.fill(255)
        self._all_obstacle.message.header = header
        self._images['obstacle_mask'].publish(self._all_obstacle.message)

    def flag_fallback(self, header: Header) -> None:
        """Say that the mask under this header is a fallback."""
        self._fallback.publish(header)

    def publish_frame_report(self, header: Header, values: Mapping[str, Any]) -> None:
        """Publish what is known about one answer on ``~/debug/frame``."""
        self._frame.publish(frame_report(header, full_name(self._node), values))

    def publish_label_info(self, card: ModelCard, threshold: float) -> None:
        """Publish the class names, latched; nothing where vision_msgs is not installed."""
        if self._label_info is not None:
            header = Header(stamp=self._node.get_clock().now().to_msg())
            self._label_info.publish(label_info(card, threshold, header))

    def destroy(self) -> None:
        """Destroy the publishers."""
        for publisher in (*self._images.values(), self._camera_info, self._fallback, self._frame,
                          self._label_info):
            if publisher is not None:
                self._node.destroy_lifecycle_publisher(publisher)

    def _fill(self, name: str, pixels: np.ndarray, image: DecodedImage, detection: Detection,
              card: ModelCard, opacity: float) -> None:
        if name == 'anomaly_u8':
            anomaly_u8(detection.anomaly, card.score_range, out=pixels)
        elif name == 'overlay':
            overlay(self._as_rgb(image), detection.labels, detection.anomaly, detection.mask,
                    card.palette, card.score_range, opacity, out=pixels)
        else:
            result = getattr(detection, MAPS[name])
            if not np.may_share_memory(result, pixels):
                np.copyto(pixels, result)

    def _as_rgb(self, image: DecodedImage) -> np.ndarray:
        """Return the picture as RGB, at the camera's size after a reduced decode too."""
        pixels = image.array
        if image.channel_order == 'bgr':
            if self._rgb.shape != pixels.shape:
                self._rgb = np.empty(pixels.shape, np.uint8)
            pixels = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=self._rgb)
        if pixels.shape[:2] == image.full_size_hw:
            return pixels
        return cv2.resize(pixels, image.full_size_hw[::-1], interpolation=cv2.INTER_LINEAR)
