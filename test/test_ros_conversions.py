# SPDX-License-Identifier: Apache-2.0
"""Between messages and arrays."""

import _needs_ros  # noqa: F401
from anomaly_seg_ros.images import decode_message, message_array, message_data
from anomaly_seg_ros.ros.conversions import (
    frame_report, ImageBuffer, label_info, rescaled_camera_info, stamp_to_ns)
import cv2
import numpy as np
import pytest
from rclpy.serialization import deserialize_message, serialize_message
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import Header


def header() -> Header:
    """Return a header with a stamp and a frame."""
    result = Header(frame_id='front')
    result.stamp.sec, result.stamp.nanosec = 1_700_000_000, 999_999_999
    return result


def test_stamp() -> None:
    assert stamp_to_ns(header()) == 1_700_000_000_999_999_999


@pytest.mark.parametrize(('encoding', 'dtype', 'channels'), [
    ('mono8', np.uint8, 1), ('32FC1', np.float32, 1), ('rgb8', np.uint8, 3)])
def test_buffer_is_written_in_place_and_survives_the_wire(encoding, dtype, channels) -> None:
    buffer = ImageBuffer(encoding, dtype, channels)
    rng = np.random.default_rng(0)
    data = None
    for size_hw in ((5, 7), (5, 7), (4, 9)):
        pixels = buffer.pixels(size_hw)
        values = (rng.random(pixels.shape) * 255).astype(dtype)
        pixels[:] = values
        kept = data is not None and buffer.message.data is data
        assert kept == (data is not None and size_hw == (5, 7))
        data = buffer.message.data
        received = deserialize_message(serialize_message(buffer.message), Image)
        np.testing.assert_array_equal(message_array(received), values)


def test_images_of_both_transports() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    raw = Image(height=6, width=8, step=24, encoding='bgr8', data=message_data(frame))
    image = decode_message(raw)
    assert image.channel_order == 'bgr'
    np.testing.assert_array_equal(image.array, frame)
    png = CompressedImage(format='png', data=cv2.imencode('.png', frame)[1].tobytes())
    np.testing.assert_array_equal(decode_message(png).array, frame)


def project(matrix: np.ndarray, point: np.ndarray) -> np.ndarray:
    """Return pixel coordinates, the centre of the first pixel at 0."""
    u = matrix @ point
    return u[:2] / u[2]


def test_camera_info_of_the_same_size_is_copied() -> None:
    info = CameraInfo(height=480, width=640, distortion_model='plumb_bob', d=[0.1, 0.2, 0, 0, 0])
    info.k = [400.0, 0, 320, 0, 410, 240, 0, 0, 1]
    info.p = [400.0, 0, 320, -40, 0, 410, 240, 0, 0, 0, 1, 0]
    info.header.frame_id = 'old'
    copied = rescaled_camera_info(info, header(), (480, 640))
    assert copied.header == header() and info.header.frame_id == 'old'
    info.header = header()
    assert copied == info


def test_camera_info_of_another_size_projects_onto_the_same_spot() -> None:
    """A point's place in the image, measured from its corner in image widths, stays."""
    info = CameraInfo(height=480, width=640, distortion_model='plumb_bob', d=[0.1, 0.2, 0, 0, 0])
    info.k = [400.0, 1.5, 320.25, 0, 410, 240.75, 0, 0, 1]
    info.p = [400.0, 0, 320.25, -40, 0, 410, 240.75, 7, 0, 0, 1, 0]
    info.roi.x_offset, info.roi.y_offset, info.roi.width, info.roi.height = 64, 48, 320, 240
    small = rescaled_camera_info(info, header(), (120, 320))
    point = np.array([0.3, -0.2, 2.0])
    before = (project(np.reshape(info.k, (3, 3)), point) + 0.5) / (640, 480)
    after = (project(np.reshape(small.k, (3, 3)), point) + 0.5) / (320, 120)
    np.testing.assert_allclose(after, before, rtol=1e-12)
    point4 = np.append(point, 1.0)
    before = (project(np.reshape(info.p, (3, 4)), point4) + 0.5) / (640, 480)
    after = (project(np.reshape(small.p, (3, 4)), point4) + 0.5) / (320, 120)
    np.testing.assert_allclose(after, before, rtol=1e-12)
    assert list(small.d) == list(info.d)
    assert (small.roi.x_offset, small.roi.y_offset, small.roi.width, small.roi.height) \
        == (32, 12, 160, 60)
    assert info.roi.x_offset == 64


def test_frame_report_carries_the_frame_header() -> None:
    message = frame_report(header(), 'anomaly_seg', {'network_ms': 3, 'flags': ''})
    assert message.header == header()
    assert [(pair.key, pair.value) for pair in message.status[0].values] \
        == [('network_ms', '3'), ('flags', '')]


def test_label_info_names_every_class_and_unlabelled() -> None:
    pytest.importorskip('vision_msgs')
    from test_ros_parameters import card
    message = label_info(card(score_range=(-1.0, 3.0)), 0.0, header())
    names = {item.class_id: item.class_name for item in message.class_map}
    assert names[0] == 'road' and names[18] == 'bicycle' and names[255] == 'unlabelled'
    assert len(names) == 20 and message.threshold == pytest.approx(0.25)
