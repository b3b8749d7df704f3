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


def camera_info(roi: tuple[int, int, int, int] = (0, 0, 0, 0),
                binning: tuple[int, int] = (0, 0)) -> CameraInfo:
    """Return a camera of 640x480; ``roi`` is x, y, width, height and ``binning`` x, y."""
    info = CameraInfo(height=480, width=640, distortion_model='plumb_bob', d=[0.1, 0.2, 0, 0, 0])
    info.k = [400.0, 0, 320.25, 0, 410, 240.75, 0, 0, 1]
    info.p = [400.0, 0, 320.25, -40, 0, 410, 240.75, 7, 0, 0, 1, 0]
    info.roi.x_offset, info.roi.y_offset, info.roi.width, info.roi.height = roi
    info.binning_x, info.binning_y = binning
    return info


def image_geometry(info: CameraInfo) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Return K, P and size (width, height) of the image, as PinholeCameraModel has them."""
    k, p = np.reshape(info.k, (3, 3)).copy(), np.reshape(info.p, (3, 4)).copy()
    offsets = (info.roi.x_offset, info.roi.y_offset)
    size = (info.roi.width, info.roi.height)
    if (*offsets, *size) == (0, 0, 0, 0):
        size = (info.width, info.height)
    binning = (max(info.binning_x, 1), max(info.binning_y, 1))
    for matrix in (k, p):
        for axis in (0, 1):
            matrix[axis, 2] -= offsets[axis]
            matrix[axis] /= binning[axis]
    return k, p, (size[0] // binning[0], size[1] // binning[1])


@pytest.mark.parametrize(('roi', 'binning', 'size_hw'), [
    ((0, 0, 0, 0), (0, 0), (480, 640)),
    ((0, 0, 0, 0), (1, 1), (480, 640)),
    ((0, 0, 0, 0), (2, 3), (160, 320)),
    ((0, 0, 0, 0), (3, 1), (480, 213)),
    ((64, 48, 320, 240), (0, 0), (240, 320)),
    ((64, 48, 321, 240), (2, 2), (120, 160)),
    ((0, 0, 640, 480), (0, 2), (240, 640)),
    ((0, 0, 100, 480), (1000, 1), (480, 640)),
])
def test_camera_info_of_this_image_is_only_given_the_header(roi, binning, size_hw) -> None:
    """Also with a region of interest, with binning, and where it describes no image at all."""
    info = camera_info(roi, binning)
    copied = rescaled_camera_info(info, header(), size_hw)
    info.header = header()
    assert copied == info
    width, height = image_geometry(copied)[2]
    assert (height, width) == size_hw or width == 0


@pytest.mark.parametrize(('roi', 'binning'), [
    ((0, 0, 0, 0), (0, 0)), ((0, 0, 0, 0), (2, 3)), ((64, 48, 320, 240), (0, 0)),
    ((64, 48, 321, 240), (2, 2)), ((0, 0, 640, 480), (4, 4))])
@pytest.mark.parametrize('size_hw', [(480, 639), (100, 90), (1, 1), (960, 1281)])
def test_camera_info_of_another_size_projects_onto_the_same_spot(roi, binning, size_hw) -> None:
    """A point's place in the image, measured from its corner in image widths, stays."""
    info = camera_info(roi, binning)
    k, p, size = image_geometry(info)
    scaled = rescaled_camera_info(info, header(), size_hw)
    new_k, new_p, new_size = image_geometry(scaled)
    assert new_size == size_hw[::-1] and (scaled.height, scaled.width) == size_hw
    point = np.array([0.3, -0.2, 2.0, 1.0])
    for old, new, at in ((k, new_k, point[:3]), (p, new_p, point)):
        np.testing.assert_allclose((project(new, at) + 0.5) / new_size,
                                   (project(old, at) + 0.5) / size, rtol=1e-12)
    assert scaled.header == header() and list(scaled.d) == list(info.d)
    assert (info.roi.width, info.binning_x, info.height) == (roi[2], binning[0], 480)
    assert rescaled_camera_info(scaled, header(), size_hw) == scaled


def test_an_uncalibrated_camera_stays_uncalibrated() -> None:
    scaled = rescaled_camera_info(CameraInfo(height=480, width=640, binning_x=2), header(),
                                  (100, 100))
    assert not np.any(scaled.k) and not np.any(scaled.p)


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
