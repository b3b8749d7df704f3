# SPDX-License-Identifier: Apache-2.0
"""
Image messages to arrays and back, without ROS.

Works on anything with the fields of sensor_msgs/msg/Image: rclpy's message (``data`` is an
array.array), rosbags' message (``data`` is an ndarray), or a message whose ``data`` is bytes.
Nothing is guessed: a message that contradicts itself raises :class:`BadImage`.
"""

import array
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
import re
import struct
from typing import Any, Protocol

from anomaly_seg_ros.memory import Memory
import cv2
import numpy as np

# Larger than any camera; a corrupt header asks for more.
MAX_PIXELS = 1 << 28
# More than any encoder writes (a colour profile of 16 MB takes 255); damaged data may have more.
_MAX_JPEG_SEGMENTS = 4096
# Fill bytes may come before a marker; in entropy-coded data 0xFF is followed by 0x00, by a restart
# marker, or by the marker that ends the scan. (Without the +, the second one is searched fast.)
_JPEG_MARKER = re.compile(rb'\xff+([^\x00\xff])')
_JPEG_SCAN_END = re.compile(rb'\xff([^\x00\xd0-\xd7\xff])')
_MAX_CODE_ZEROS = 1  # bytes, at the end of a picture's code; of black, say


class BadImage(ValueError):
    """
    An image message or an encoded image that cannot be right: expected, got, remedy.

    Attributes
    ----------
    problem
        The text without a remedy that is for messages only, for images that come from elsewhere.

    """

    def __init__(self, problem: str, remedy: str = '') -> None:
        """Join problem and remedy."""
        super().__init__(f'{problem} {remedy}'.rstrip())
        self.problem = problem


class ImageMessage(Protocol):
    """The fields of sensor_msgs/msg/Image that are read here."""

    height: int
    width: int
    encoding: str
    is_bigendian: int
    step: int
    data: Any


@dataclass(frozen=True)
class DecodedImage:
    """
    A colour image ready for the pipeline.

    Attributes
    ----------
    array
        uint8 (H, W, 3); may be a read-only view of the message's data.
    channel_order
        ``rgb`` or ``bgr``.
    full_size_hw
        (height, width) of the camera's image; differs from ``array`` only after a reduced decode.

    """

    array: np.ndarray
    channel_order: str
    full_size_hw: tuple[int, int]

    def rgb(self) -> np.ndarray:
        """Return uint8 (H, W, 3), RGB, C-contiguous; copies only where it must."""
        if self.channel_order == 'bgr':
            return cv2.cvtColor(self.array, cv2.COLOR_BGR2RGB)
        return np.ascontiguousarray(self.array)


@dataclass(frozen=True)
class _JpegFrame:
    size_hw: tuple[int, int]
    channels: int


@dataclass(frozen=True)
class _Layout:
    dtype: str
    channels: int
    # '' means: already in that order; otherwise the name of a cv2 conversion to RGB.
    to_rgb: str
    order: str = 'rgb'


# A Bayer pattern in ROS names the first two pixels of the first two rows; OpenCV's constants name
# the second row's second and third pixel, so RGGB is OpenCV's BayerBG.
_LAYOUTS: dict[str, _Layout] = {
    'rgb8': _Layout('u1', 3, ''),
    'bgr8': _Layout('u1', 3, '', 'bgr'),
    '8UC3': _Layout('u1', 3, '', 'bgr'),
    'rgba8': _Layout('u1', 4, 'COLOR_RGBA2RGB'),
    'bgra8': _Layout('u1', 4, 'COLOR_BGRA2RGB'),
    'mono8': _Layout('u1', 1, 'COLOR_GRAY2RGB'),
    '8UC1': _Layout('u1', 1, 'COLOR_GRAY2RGB'),
    'bayer_rggb8': _Layout('u1', 1, 'COLOR_BayerBG2RGB'),
    'bayer_bggr8': _Layout('u1', 1, 'COLOR_BayerRG2RGB'),
    'bayer_gbrg8': _Layout('u1', 1, 'COLOR_BayerGR2RGB'),
    'bayer_grbg8': _Layout('u1', 1, 'COLOR_BayerGB2RGB'),
    'yuv422': _Layout('u1', 2, 'COLOR_YUV2RGB_UYVY'),
    'uyvy': _Layout('u1', 2, 'COLOR_YUV2RGB_UYVY'),
    'yuv422_yuy2': _Layout('u1', 2, 'COLOR_YUV2RGB_YUYV'),
    'yuyv': _Layout('u1', 2, 'COLOR_YUV2RGB_YUYV'),
    'rgb16': _Layout('u2', 3, ''),
    'bgr16': _Layout('u2', 3, '', 'bgr'),
    'rgba16': _Layout('u2', 4, 'COLOR_RGBA2RGB'),
    'bgra16': _Layout('u2', 4, 'COLOR_BGRA2RGB'),
    'mono16': _Layout('u2', 1, 'COLOR_GRAY2RGB'),
    'bayer_rggb16': _Layout('u2', 1, 'COLOR_BayerBG2RGB'),
    'bayer_bggr16': _Layout('u2', 1, 'COLOR_BayerRG2RGB'),
    'bayer_gbrg16': _Layout('u2', 1, 'COLOR_BayerGR2RGB'),
    'bayer_grbg16': _Layout('u2', 1, 'COLOR_BayerGB2RGB'),
}
# Readable as an array, but not as a picture.
_DATA_LAYOUTS: dict[str, tuple[str, int]] = {'32FC1': ('f4', 1), '16UC1': ('u2', 1)}

ENCODINGS: tuple[str, ...] = tuple(_LAYOUTS)


def message_array(message: ImageMessage) -> np.ndarray:
    """
    View a message's pixels as they are, without a copy.

    Returns
    -------
    numpy.ndarray
        (H, W) or (H, W, C) of the encoding's type (uint8, uint16 or float32), read-only where the
        message's data is; rows are strided where ``step`` pads them. 16- and 32-bit data of the
        other byte order keep it in the dtype.

    Raises
    ------
    BadImage
        If size, step, encoding and length of the data do not fit each other.

    """
    height, width, step = int(message.height), int(message.width), int(message.step)
    encoding = message.encoding
    if encoding in _LAYOUTS:
        kind, channels = _LAYOUTS[encoding].dtype, _LAYOUTS[encoding].channels
    elif encoding in _DATA_LAYOUTS:
        kind, channels = _DATA_LAYOUTS[encoding]
    else:
        raise BadImage(f'image encoding must be one of {", ".join(ENCODINGS)}, got {encoding!r}. '
                       'Set the camera driver to rgb8 or bgr8.')
    if height <= 0 or width <= 0:
        raise BadImage(f'image must be at least 1x1 pixel, got {width}x{height}. '
                       'Check that the camera delivers frames.')
    _check_pixels(height, width)
    if channels == 2 and width % 2:
        raise BadImage(f'{encoding} image must have an even width, got {width}. '
                       'Set an even width in the camera driver.')
    dtype = np.dtype(kind).newbyteorder('>' if message.is_bigendian else '<')
    row_bytes = width * channels * dtype.itemsize
    if step < row_bytes:
        raise BadImage(f'step of a {width} pixels wide {encoding} image must be at least '
                       f'{row_bytes} bytes, got {step}. Correct step in the publisher.')
    try:
        raw = np.frombuffer(message.data, np.uint8)
    except (TypeError, ValueError, BufferError) as error:
        raise BadImage('image data must be a buffer of bytes (array.array, bytes or ndarray), got '
                       f'{type(message.data).__name__}: {error}') from error
    if raw.size != step * height:
        raise BadImage(f'data of a {width}x{height} {encoding} image with step {step} must have '
                       f'{step * height} bytes, got {raw.size}. The message was cut short, or '
                       'height or step is wrong in the publisher.')
    shape: tuple[int, ...] = (height, width) if channels == 1 else (height, width, channels)
    strides = (step, dtype.itemsize) if channels == 1 else \
        (step, channels * dtype.itemsize, dtype.itemsize)
    return np.ndarray(shape, dtype, buffer=raw, strides=strides)


def image_from_message(message: ImageMessage, buffer: Memory | None = None) -> DecodedImage:
    """
    Read a camera image from a message.

    rgb8, bgr8 and 8UC3 (taken as BGR, OpenCV's order) are viewed without a copy, also where
    ``step`` pads the rows. The other encodings are converted to RGB; results equal
    rosbags-image's. 16 bits become 8 by ``value // 257``. With ``buffer``, 8-bit encodings are
    converted into it.

    Raises
    ------
    BadImage
        If the message contradicts itself or is no picture; nothing is converted then.

    """
    pixels = message_array(message)
    if message.encoding not in _LAYOUTS:
        raise BadImage(f'{message.encoding} is not a camera image; expected one of '
                       f'{", ".join(ENCODINGS)}. Remap the input to the camera image topic.')
    return _colour_image(pixels, message.encoding, buffer)


def decode_message(message: Any, reduce_to_hw: tuple[int, int] | None = None,
                   buffer: Memory | None = None) -> DecodedImage:
    """
    Read a sensor_msgs Image or CompressedImage, of rclpy or of rosbags; raises BadImage.

    ``reduce_to_hw`` lets a JPEG be decoded at reduced size, see ``decode_compressed``; ``buffer``
    takes the pixels where they are not the message's own.
    """
    if hasattr(message, 'format'):
        return decode_compressed(message.data, message.format, reduce_to_hw, buffer)
    return image_from_message(message, buffer)


def mask_from_message(message: ImageMessage) -> np.ndarray:
    """
    View a label image or mask: uint8 (H, W).

    Raises
    ------
    BadImage
        If the encoding is not mono8 or 8UC1, or the message contradicts itself.

    """
    if message.encoding not in ('mono8', '8UC1'):
        raise BadImage(f'a mask must be mono8 or 8UC1, got {message.encoding!r}.')
    return message_array(message)


def decode_compressed(data: Any, image_format: str,
                      reduce_to_hw: tuple[int, int] | None = None,
                      buffer: Memory | None = None) -> DecodedImage:
    """
    Decode the data of a sensor_msgs/msg/CompressedImage, wholly or not at all.

    Cut-off data raises. Damage inside a JPEG raises only where it breaks the code: the format has
    no checksum, and most single flipped bits give other pixels unnoticed. ``simplejpeg``
    (libjpeg-turbo in strict mode, the same pixels as OpenCV's, in about half the time) notices
    what breaks the code; OpenCV alone fills what is missing with grey, so without it only a
    missing end is noticed. EXIF rotation is ignored: pixels stay where the camera put them.

    Parameters
    ----------
    data
        The encoded bytes: any buffer.
    image_format
        The message's ``format`` field, for example ``jpeg`` or ``rgb8; jpeg compressed bgr8``.
        The data's own signature decides how it is decoded. One channel of a Bayer encoding
        (``bayer_rggb8; png compressed ``) is the mosaic and becomes colour, unless the field says
        that the publisher made it grey (``bayer_rggb8; jpeg compressed mono8``).
    reduce_to_hw
        (height, width) that the network needs: a JPEG is then decoded at a half, a quarter or an
        eighth of its size as long as it stays at least that large and no part of a pixel is left
        over. Faster, but not the same pixels as full decoding and later resizing. A mosaic is
        never reduced.
    buffer
        Where the pixels of a JPEG (with simplejpeg) or of a mosaic are to be put; the result is
        then valid until its next use.

    Returns
    -------
    DecodedImage
        uint8 (H, W, 3).

    Raises
    ------
    BadImage
        If the data is empty, cut off, damaged, larger than MAX_PIXELS (checked before anything is
        allocated), a depth image, or not JPEG, PNG or WebP.

    """
    try:
        encoded = np.frombuffer(data, np.uint8)
    except (TypeError, ValueError, BufferError) as error:
        raise BadImage('compressed image data must be a buffer of bytes, got '
                       f'{type(data).__name__}: {error}') from error
    if 'compressedDepth' in image_format or _encoding(image_format) in _DATA_LAYOUTS:
        raise BadImage(f'format {image_format!r} is a depth image. Remap the input to the '
                       'compressed topic of the colour camera.')
    mosaic = _mosaic_encoding(image_format)
    head = encoded[:26].tobytes()
    if head[:3] == b'\xff\xd8\xff':
        frame = _jpeg_frame(encoded)
        _check_pixels(*frame.size_hw)
        if not mosaic or frame.channels != 1:
            return _decode_jpeg(encoded, frame.size_hw, reduce_to_hw, buffer)
        if mosaic.endswith('16'):
            raise BadImage(f'JPEG ({image_format!r}) cannot hold 16 bits: the publisher cut them '
                           'off. Set its format to png, or the camera driver to 8 bits.')
        grey = _decode_jpeg(encoded, frame.size_hw, None, None).array
        return _colour_image(np.ascontiguousarray(grey[..., 0]), mosaic, buffer)
    png = head[:8] == b'\x89PNG\r\n\x1a\n'
    if png or (head[:4] == b'RIFF' and head[8:12] == b'WEBP'):
        size_hw = encoded_size_hw(encoded.tobytes())
        _check_pixels(*size_hw)
        one_channel = bool(mosaic) and png and head[25] == 0
        flag = cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH if one_channel else cv2.IMREAD_COLOR
        pixels = cv2.imdecode(encoded, flag | cv2.IMREAD_IGNORE_ORIENTATION)
        if pixels is None:
            raise BadImage(f'compressed image of {encoded.size} bytes ({image_format!r}) is cut '
                           'off or damaged.', 'Check the publisher or the recording.')
        if one_channel:
            return _colour_image(pixels, mosaic, buffer)
        return DecodedImage(pixels, 'bgr', (pixels.shape[0], pixels.shape[1]))
    raise BadImage(f'compressed image must be JPEG, PNG or WebP, got {encoded.size} bytes '
                   f'starting with {head[:8].hex() or "nothing"} (format {image_format!r}).',
                   'Set the image transport to jpeg or png.')


def message_size_hw(message: Any) -> tuple[int, int]:
    """
    Return (height, width) of the picture in an Image or CompressedImage without decoding it.

    Raises
    ------
    BadImage
        If it cannot be told, or the picture is too large to be decoded.

    """
    if hasattr(message, 'format'):
        height, width = encoded_size_hw(bytes(message.data))
        _check_pixels(height, width)
    else:
        height, width = message_array(message).shape[:2]
    return height, width


def encoded_size_hw(data: bytes) -> tuple[int, int]:
    """
    Return (height, width) of a PNG, JPEG or WebP file without decoding its pixels.

    Raises
    ------
    BadImage
        If the data is none of these, has no size, or ends before the format's end marker.

    """
    remedy = 'The data is cut off or damaged.'
    if data[:3] == b'\xff\xd8\xff':
        encoded = np.frombuffer(data, np.uint8)
        if not _is_whole_jpeg(encoded):
            raise BadImage(f'JPEG of {len(data)} bytes has no end marker. {remedy}')
        return _jpeg_frame(encoded).size_hw
    if data[:8] == b'\x89PNG\r\n\x1a\n':
        if not _is_whole_png(data):
            raise BadImage(f'PNG of {len(data)} bytes has no end chunk. {remedy}')
        width, height = struct.unpack_from('>II', data, 16)
        return height, width
    if data[:4] == b'RIFF' and data[8:12] == b'WEBP' and len(data) >= 30:
        if len(data) < 8 + int.from_bytes(data[4:8], 'little'):
            raise BadImage(f'WebP of {len(data)} bytes is shorter than it says. {remedy}')
        if data[12:16] == b'VP8 ':
            width, height = struct.unpack_from('<HH', data, 26)
            return height & 0x3fff, width & 0x3fff
        if data[12:16] == b'VP8L':
            bits = int.from_bytes(data[21:25], 'little')
            return (bits >> 14 & 0x3fff) + 1, (bits & 0x3fff) + 1
        if data[12:16] == b'VP8X':
            return (int.from_bytes(data[27:30], 'little') + 1,
                    int.from_bytes(data[24:27], 'little') + 1)
    raise BadImage(f'expected a PNG, JPEG or WebP image, got {len(data)} bytes starting with '
                   f'{data[:8].hex() or "nothing"}.')


def message_data(pixels: np.ndarray) -> 'array.array[int]':
    """
    Return an array's bytes for a message's ``data`` field.

    rclpy checks every element of any other type than array.array('B'): 341 ms instead of 0.8 ms
    for a frame of 1920x1080.
    """
    data = array.array('B')
    if pixels.size:
        data.frombytes(np.ascontiguousarray(pixels).reshape(-1).view(np.uint8).data)
    return data


def _check_pixels(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise BadImage(f'image must have at most {MAX_PIXELS} pixels, got {width}x{height}. '
                       'The data is corrupt or not a camera image.')


def _colour_image(pixels: np.ndarray, encoding: str, buffer: Memory | None) -> DecodedImage:
    """Convert pixels of an encoding in ENCODINGS to 8-bit colour."""
    layout = _LAYOUTS[encoding]
    size_hw = (pixels.shape[0], pixels.shape[1])
    bayer = 'Bayer' in layout.to_rgb
    if bayer and min(size_hw) < 3:
        raise BadImage(f'{encoding} image must be at least 3x3 pixels, got '
                       f'{size_hw[1]}x{size_hw[0]}.')
    # Interpolation between the pixels of a Bayer pattern comes before rounding.
    if pixels.dtype.itemsize == 2 and not bayer:
        pixels = (pixels // 257).astype(np.uint8)
    elif pixels.dtype.itemsize == 2:
        pixels = pixels.astype(np.uint16)
    if layout.to_rgb:
        into = None if buffer is None or pixels.dtype != np.uint8 else buffer.array((*size_hw, 3))
        pixels = cv2.cvtColor(pixels, getattr(cv2, layout.to_rgb), dst=into)
    if pixels.dtype == np.uint16:
        pixels = (pixels // 257).astype(np.uint8)
    return DecodedImage(pixels, layout.order, size_hw)


def _encoding(image_format: str) -> str:
    """Return what image_transport puts first: the encoding of the image it compressed."""
    return image_format.partition(';')[0].strip()


def _mosaic_encoding(image_format: str) -> str:
    """
    Return the Bayer encoding of the compressed pixels, or nothing.

    image_transport's format field is ``ENCODING; jpeg compressed TARGET``. TARGET is what the
    image was converted to before (for a Bayer JPEG mono8, unless told otherwise); nothing (PNG,
    and JPEG in ROS 1) or ENCODING itself mean the mosaic as it came.
    """
    encoding = _encoding(image_format)
    target = image_format.partition('compressed')[2].strip()
    bayer = encoding in _LAYOUTS and 'Bayer' in _LAYOUTS[encoding].to_rgb
    return encoding if bayer and target in ('', encoding) else ''


def _decode_jpeg(encoded: np.ndarray, size_hw: tuple[int, int],
                 reduce_to_hw: tuple[int, int] | None, buffer: Memory | None) -> DecodedImage:
    factor = 1
    if reduce_to_hw is not None:
        for candidate in (2, 4, 8):
            if all(full % candidate == 0 and full // candidate >= need
                   for full, need in zip(size_hw, reduce_to_hw, strict=True)):
                factor = candidate
    if _has_simplejpeg():
        decoded_hw = (size_hw[0] // factor, size_hw[1] // factor)
        into = None if buffer is None else buffer.array((*decoded_hw, 3))
        try:
            pixels = _decode_strictly(encoded, decoded_hw, factor, into)
        except ValueError as error:
            mended = _decode_mended(encoded, decoded_hw, factor, into)
            if mended is None:
                raise BadImage(f'JPEG of {encoded.size} bytes is cut off or damaged ({error}).',
                               'Check the publisher or the recording.') from error
            pixels = mended
        return DecodedImage(pixels, 'bgr', size_hw)
    if not _is_whole_jpeg(encoded):
        raise BadImage(f'JPEG of {encoded.size} bytes is cut off: no end marker.',
                       'Check the publisher or the recording.')
    flag = {1: cv2.IMREAD_COLOR, 2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4,
            8: cv2.IMREAD_REDUCED_COLOR_8}[factor]
    decoded = cv2.imdecode(encoded, flag | cv2.IMREAD_IGNORE_ORIENTATION)
    if decoded is None:
        raise BadImage(f'JPEG of {encoded.size} bytes is damaged.',
                       'Check the publisher or the recording.')
    return DecodedImage(decoded, 'bgr', size_hw)


def _decode_strictly(encoded: np.ndarray, decoded_hw: tuple[int, int], factor: int,
                     into: np.ndarray | None) -> np.ndarray:
    """Decode to BGR with simplejpeg; ValueError at libjpeg's first warning."""
    import simplejpeg  # type: ignore[import-untyped,unused-ignore]
    smallest = {} if factor == 1 else dict(zip(('min_height', 'min_width'), decoded_hw,
                                               strict=True))
    pixels: np.ndarray = simplejpeg.decode_jpeg(encoded, 'BGR', min_factor=factor, **smallest,
                                                buffer=into)
    return pixels


def _decode_mended(encoded: np.ndarray, decoded_hw: tuple[int, int], factor: int,
                   into: np.ndarray | None) -> np.ndarray | None:
    """
    Decode a JPEG without what libjpeg merely warns of; None if that is not all.

    Some cameras pad with zeros before the end marker, and some encoders write a JFIF version, an
    Adobe transform, scan parameters or a colour profile that libjpeg warns of and passes over. A
    warning hides whatever else is wrong, so the data is mended as libjpeg reads it and decoded
    strictly again.
    """
    data = _with_plain_headers(encoded)
    attempts = [] if np.array_equal(data, encoded) else [data]
    end = next((at - 2 for marker, at in _jpeg_segments(data) if marker == 0xd9), 0)
    code = data[:end].tobytes().rstrip(b'\0')
    if code.endswith(b'\xff'):  # the zero behind it is no padding
        code += b'\0'
    # As few zeros as make the picture whole. With all of them, one that was cut off and filled up
    # would pass: libjpeg takes zeros for code until the picture is full.
    attempts += [np.frombuffer(code + bytes(count) + data[end:].tobytes(), np.uint8)
                 for count in range(min(end - len(code), _MAX_CODE_ZEROS + 1))]
    for attempt in attempts:
        with suppress(ValueError):
            return _decode_strictly(attempt, decoded_hw, factor, into)
    return None


def _with_plain_headers(encoded: np.ndarray) -> np.ndarray:
    """Return a JPEG whose header says in the usual way what libjpeg takes it to mean."""
    data, sequential = encoded.copy(), False
    transform = 2 if _jpeg_frame(encoded).channels == 4 else 1
    for marker, position in _jpeg_segments(encoded):
        end = position + int.from_bytes(encoded[position:position + 2].tobytes(), 'big')
        if end > len(data):
            break
        name = data[position + 2:position + 7].tobytes()
        if marker == 0xe0 and name == b'JFIF\0' and end >= position + 16:
            data[position + 7] = 1
        elif marker == 0xee and name == b'Adobe' and end >= position + 14:
            if data[position + 13] not in (0, transform):
                data[position + 13] = transform
        elif marker == 0xe2 and name == b'ICC_P':
            data[position + 2] = 0
        elif marker == 0xda and sequential and end >= position + 6:
            data[end - 3:end] = 0, 0x3f, 0
        sequential = sequential or marker in (0xc0, 0xc1)
    return data


def _jpeg_segments(encoded: np.ndarray) -> Iterator[tuple[int, int]]:
    """
    Yield each marker (ITU-T T.81, B.1) and the position behind it, where its segment begins.

    Thumbnails lie inside segments and are passed over. Ends behind the picture's end marker, or
    at what cannot be a segment.
    """
    data = encoded.data
    position, find = 2, _JPEG_MARKER.match
    for _ in range(_MAX_JPEG_SEGMENTS):
        found = find(data, position)
        if found is None:
            return
        marker, position = found[1][0], found.end()
        yield marker, position
        length = int.from_bytes(data[position:position + 2], 'big')
        # Below 0xC0 all are reserved; 0xD0 to 0xD9 have no segment.
        if marker < 0xc0 or 0xd0 <= marker <= 0xd9 or length < 2:
            return
        position += length
        find = _JPEG_SCAN_END.search if marker == 0xda else _JPEG_MARKER.match


def _jpeg_frame(encoded: np.ndarray) -> _JpegFrame:
    """Read the start-of-frame segment (ITU-T T.81, B.2.2)."""
    for marker, position in _jpeg_segments(encoded):
        if 0xc0 <= marker <= 0xcf and marker not in (0xc4, 0xc8, 0xcc):
            if position + 8 <= encoded.size:
                height, width, channels = struct.unpack_from('>HHB', encoded.data, position + 3)
                if height and width:
                    return _JpegFrame((height, width), channels)
            break
        if marker == 0xda:
            break
    raise BadImage(f'JPEG of {encoded.size} bytes is cut off or damaged: no frame header.',
                   'Check the publisher or the recording.')


def _is_whole_jpeg(encoded: np.ndarray) -> bool:
    """
    Return whether an end marker follows the picture's own scans.

    The end marker of a thumbnail is not it, nor that of a next frame behind a picture cut off.
    Padding behind the end marker is allowed.
    """
    scanned = False
    for marker, _ in _jpeg_segments(encoded):
        if marker == 0xd9:
            return scanned
        scanned = scanned or marker == 0xda
    return False


def _is_whole_png(data: bytes) -> bool:
    """
    Return whether the chunks (ISO/IEC 15948, 5.3) lead from IHDR to IEND.

    OpenCV takes memory for a chunk's length, up to 4 GB, before it sees that the data is shorter.
    """
    position = 8
    if data[12:16] != b'IHDR':
        return False
    while position + 12 <= len(data):
        length, kind = struct.unpack_from('>I4s', data, position)
        position += 12 + length
        if kind == b'IEND':
            return position <= len(data)
    return False


@cache
def _has_simplejpeg() -> bool:
    return find_spec('simplejpeg') is not None
