# SPDX-License-Identifier: Apache-2.0
"""Image messages: every encoding against rosbags-image, and messages that cannot be right."""

import array
import time
from types import SimpleNamespace

from anomaly_seg_ros import images
from anomaly_seg_ros.images import (
    BadImage, decode_compressed, encoded_size_hw, ENCODINGS, image_from_message,
    mask_from_message, message_array, message_data)
from anomaly_seg_ros.memory import Memory
import cv2
import numpy as np
import pytest
from rosbags.image import message_to_cvimage

BYTES_A_PIXEL = {'rgb8': 3, 'bgr8': 3, '8UC3': 3, 'rgba8': 4, 'bgra8': 4, 'mono8': 1, '8UC1': 1,
                 'yuv422': 2, 'uyvy': 2, 'yuv422_yuy2': 2, 'yuyv': 2, 'rgb16': 6, 'bgr16': 6,
                 'rgba16': 8, 'bgra16': 8, 'mono16': 2}


def make_message(encoding: str, height: int = 12, width: int = 16, *, padding: int = 0,
                 is_bigendian: int = 0, seed: int = 0) -> SimpleNamespace:
    """Return a message with random pixels, ``padding`` bytes after each row."""
    pixel = BYTES_A_PIXEL.get(encoding) or (2 if encoding.endswith('16') else 1)
    step = width * pixel + padding
    data = np.random.default_rng(seed).integers(0, 256, step * height, dtype=np.uint8)
    return SimpleNamespace(height=height, width=width, encoding=encoding, step=step, data=data,
                           is_bigendian=is_bigendian)


@pytest.mark.parametrize('is_bigendian', [0, 1])
@pytest.mark.parametrize('encoding', [e for e in ENCODINGS if not e.startswith('8UC')])
def test_every_encoding_equals_rosbags_image(encoding: str, is_bigendian: int) -> None:
    message = make_message(encoding, is_bigendian=is_bigendian)
    np.testing.assert_array_equal(image_from_message(message).rgb(),
                                  message_to_cvimage(message, 'rgb8'))


def test_generic_encodings_are_grey_and_bgr() -> None:
    grey = make_message('8UC1')
    np.testing.assert_array_equal(image_from_message(grey).rgb(),
                                  np.repeat(grey.data.reshape(12, 16, 1), 3, axis=2))
    colour = make_message('8UC3')
    np.testing.assert_array_equal(image_from_message(colour).rgb(),
                                  colour.data.reshape(12, 16, 3)[..., ::-1])


@pytest.mark.parametrize('encoding', ENCODINGS)
def test_row_padding_changes_nothing(encoding: str) -> None:
    plain = make_message(encoding)
    padded = make_message(encoding, padding=6, seed=1)
    rows = padded.data.reshape(plain.height, padded.step)
    rows[:, :plain.step] = plain.data.reshape(plain.height, plain.step)
    np.testing.assert_array_equal(image_from_message(padded).rgb(),
                                  image_from_message(plain).rgb())


@pytest.mark.parametrize('encoding', ['rgb8', 'bgr8', '8UC3'])
@pytest.mark.parametrize('kind', [bytes, bytearray, memoryview, 'array', 'ndarray'])
def test_colour_is_viewed_without_a_copy(encoding: str, kind: object) -> None:
    message = make_message(encoding, padding=4)
    raw = message.data.tobytes()
    if kind == 'array':
        message.data = array.array('B', raw)
    elif kind != 'ndarray':
        message.data = kind(raw)  # type: ignore[operator]
    image = image_from_message(message)
    assert np.shares_memory(image.array, np.frombuffer(message.data, np.uint8))
    expected = np.frombuffer(raw, np.uint8).reshape(12, message.step)[:, :48].reshape(12, 16, 3)
    np.testing.assert_array_equal(image.array, expected)
    assert image.channel_order == ('rgb' if encoding == 'rgb8' else 'bgr')
    assert image.full_size_hw == (12, 16)


def test_masks_and_scores_are_viewed() -> None:
    mask = make_message('mono8', padding=3)
    view = mask_from_message(mask)
    assert np.shares_memory(view, mask.data)
    np.testing.assert_array_equal(view, mask.data.reshape(12, 19)[:, :16])
    scores = np.random.default_rng(3).normal(size=(5, 7)).astype(np.float32)
    message = SimpleNamespace(height=5, width=7, encoding='32FC1', step=28, is_bigendian=0,
                              data=message_data(scores))
    np.testing.assert_array_equal(message_array(message), scores)
    swapped = SimpleNamespace(**{**vars(message), 'is_bigendian': 1,
                                 'data': message_data(scores.byteswap())})
    np.testing.assert_array_equal(message_array(swapped), scores)
    with pytest.raises(BadImage, match='not a camera image'):
        image_from_message(message)
    with pytest.raises(BadImage, match="mono8 or 8UC1, got 'rgb8'"):
        mask_from_message(make_message('rgb8'))


@pytest.mark.parametrize(('changes', 'text'), [
    ({'height': 0}, 'at least 1x1 pixel, got 16x0'),
    ({'width': 0}, 'at least 1x1 pixel, got 0x12'),
    ({'step': 47}, 'at least 48 bytes, got 47'),
    ({'step': 0}, 'at least 48 bytes, got 0'),
    ({'height': 11}, 'must have 528 bytes, got 576'),
    ({'height': 13}, 'must have 624 bytes, got 576'),
    ({'data': np.zeros(575, np.uint8)}, 'must have 576 bytes, got 575'),
    ({'data': b''}, 'must have 576 bytes, got 0'),
    ({'data': [0] * 576}, 'must be a buffer of bytes'),
    ({'encoding': 'rgb9'}, "got 'rgb9'"),
    ({'encoding': ''}, "got ''"),
    ({'width': 4294967295, 'step': 4294967295}, 'at most 268435456 pixels'),
])
def test_contradicting_messages_are_refused(changes: dict[str, object], text: str) -> None:
    message = make_message('rgb8')
    image_from_message(message)
    for name, value in changes.items():
        setattr(message, name, value)
    with pytest.raises(BadImage, match=text):
        image_from_message(message)


def test_odd_width_and_tiny_bayer_are_refused() -> None:
    with pytest.raises(BadImage, match='even width, got 15'):
        image_from_message(make_message('yuv422', width=15))
    with pytest.raises(BadImage, match='at least 3x3'):
        image_from_message(make_message('bayer_rggb8', height=2, width=2))


def test_message_data_is_the_fast_type() -> None:
    pixels = np.arange(24, dtype=np.float32).reshape(4, 6)[:, ::2]
    data = message_data(pixels)
    assert isinstance(data, array.array) and data.typecode == 'B'
    assert data.tobytes() == pixels.tobytes()
    assert len(message_data(np.empty((0, 4), np.uint8))) == 0


@pytest.fixture
def picture() -> np.ndarray:
    """Return a smooth but detailed BGR picture, 203x301, so that JPEG has work to do."""
    rng = np.random.default_rng(5)
    return cv2.GaussianBlur(rng.integers(0, 256, (203, 301, 3), dtype=np.uint8), (5, 5), 0)


def encode(picture: np.ndarray, ending: str) -> bytes:
    """Encode with OpenCV."""
    options = [cv2.IMWRITE_WEBP_QUALITY, 101] if ending == '.webp' else []
    return cv2.imencode(ending, picture, options)[1].tobytes()


@pytest.mark.parametrize('ending', ['.png', '.webp'])
def test_lossless_formats_come_back(picture: np.ndarray, ending: str) -> None:
    image = decode_compressed(encode(picture, ending), 'whatever')
    np.testing.assert_array_equal(image.array, picture)
    assert (image.channel_order, image.full_size_hw) == ('bgr', (203, 301))


@pytest.mark.parametrize('strict', [True, False])
def test_jpeg_equals_opencv(picture: np.ndarray, strict: bool,
                            monkeypatch: pytest.MonkeyPatch) -> None:
    use_strict(monkeypatch, strict)
    data = encode(picture, '.jpg')
    image = decode_compressed(array.array('B', data), 'rgb8; jpeg compressed bgr8')
    np.testing.assert_array_equal(image.array, cv2.imdecode(np.frombuffer(data, np.uint8), 1))
    assert image.full_size_hw == (203, 301)


@pytest.mark.parametrize('strict', [True, False])
@pytest.mark.parametrize(('need_hw', 'shape', 'flag'), [
    ((100, 148), (100, 148), cv2.IMREAD_REDUCED_COLOR_2),
    ((101, 148), (200, 296), cv2.IMREAD_COLOR),
    ((50, 74), (50, 74), cv2.IMREAD_REDUCED_COLOR_4),
    ((1, 1), (25, 37), cv2.IMREAD_REDUCED_COLOR_8),
    ((500, 500), (200, 296), cv2.IMREAD_COLOR),
])
def test_reduced_jpeg_is_never_smaller_than_needed(
        picture: np.ndarray, need_hw: tuple[int, int], shape: tuple[int, int], flag: int,
        strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    use_strict(monkeypatch, strict)
    data = encode(picture[:200, :296], '.jpg')
    image = decode_compressed(data, 'jpeg', reduce_to_hw=need_hw)
    assert image.array.shape[:2] == shape
    assert image.full_size_hw == (200, 296)
    np.testing.assert_array_equal(image.array, cv2.imdecode(np.frombuffer(data, np.uint8), flag))


def test_a_jpeg_is_not_reduced_by_what_does_not_divide_its_size(picture: np.ndarray) -> None:
    """A reduced pixel that reaches beyond the edge would shift all others."""
    for size_hw, reduced_hw in (((203, 301), (203, 301)), ((202, 300), (101, 150)),
                                ((202, 301), (202, 301)), ((200, 300), (50, 75))):
        data = encode(np.ascontiguousarray(picture[:size_hw[0], :size_hw[1]]), '.jpg')
        image = decode_compressed(data, 'jpeg', reduce_to_hw=(1, 1))
        assert image.array.shape[:2] == reduced_hw and image.full_size_hw == size_hw


def test_one_buffer_for_all_frames(picture: np.ndarray) -> None:
    """Whatever came before, frames of one size land in the same memory, with the same pixels."""
    pytest.importorskip('simplejpeg')
    buffer = Memory(np.uint8)
    for seed, size_hw in enumerate([(203, 301), (64, 48), (64, 48)]):
        data = encode(np.ascontiguousarray(np.rot90(picture, seed)[:size_hw[0], :size_hw[1]]),
                      '.jpg')
        for need_hw in (None, (32, 24), (8, 6)):
            image = decode_compressed(data, 'jpeg', need_hw, buffer)
            np.testing.assert_array_equal(image.array,
                                          decode_compressed(data, 'jpeg', need_hw).array)
            assert np.shares_memory(image.array, buffer.array(image.array.shape))
    for encoding in ('yuyv', 'bayer_rggb8', 'rgba8', 'mono8', 'mono16'):
        message = make_message(encoding, seed=3)
        image = image_from_message(message, buffer)
        np.testing.assert_array_equal(image.array, image_from_message(message).array)
        assert np.shares_memory(image.array, buffer.array((12, 16, 3)))


@pytest.mark.parametrize('strict', [True, False])
@pytest.mark.parametrize('ending', ['.jpg', '.png', '.webp'])
def test_no_half_read_images(picture: np.ndarray, ending: str, strict: bool,
                             monkeypatch: pytest.MonkeyPatch) -> None:
    use_strict(monkeypatch, strict)
    data = encode(picture, ending)
    for end in (0, 2, 10, 30, 200, len(data) // 4, len(data) // 2, len(data) - 200, len(data) - 2):
        with pytest.raises(BadImage):
            decode_compressed(data[:end], ending)
        with pytest.raises(BadImage):
            encoded_size_hw(data[:end])


def test_damage_that_breaks_the_code_of_a_jpeg_is_noticed(
        picture: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    use_strict(monkeypatch, True)
    data = encode(picture, '.jpg')
    for broken in (data[:len(data) // 2] + b'\xff\xd9',
                   data[:len(data) // 2] + bytes(60) + data[len(data) // 2 + 60:]):
        with pytest.raises(BadImage, match='cut off or damaged'):
            decode_compressed(broken, 'jpeg')


def test_what_libjpeg_merely_warns_of_costs_no_frame(
        picture: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    use_strict(monkeypatch, True)
    plain = encode(picture, '.jpg')
    expected = decode_compressed(plain, 'jpeg', (50, 50)).array

    def changed(before: bytes, after: bytes) -> bytes:
        assert plain.count(before) == 1
        return plain.replace(before, after)

    def inserted(marker: bytes, content: bytes) -> bytes:
        return plain[:2] + marker + (len(content) + 2).to_bytes(2, 'big') + content + plain[20:]

    def padded(data: bytes, padding: bytes = bytes(9)) -> bytes:
        return data[:-2] + padding + data[-2:]

    jfif_2 = changed(b'JFIF\0\1\1', b'JFIF\0\2\1')
    for odd in (padded(plain), padded(plain) + b'more', jfif_2, padded(jfif_2),
                inserted(b'\xff\xee', b'Adobe\0\x64\0\0\0\0\5'),
                inserted(b'\xff\xe2', b'ICC_PROFILE\0\5\2'),
                changed(b'\3\1\0\2\x11\3\x11\0\x3f\0', b'\3\1\0\2\x11\3\x11\0\0\0')):
        np.testing.assert_array_equal(decode_compressed(odd, 'jpeg', (50, 50)).array, expected)
    # The code itself ends in a zero where the picture ends in black.
    black = encode(np.zeros((96, 128, 3), np.uint8), '.jpg')
    assert black.endswith(b'\0\xff\xd9')
    for odd in (padded(black), padded(black, bytes(1000)),
                padded(black.replace(b'JFIF\0\1\1', b'JFIF\0\2\1'))):
        assert not decode_compressed(odd, 'jpeg').array.any()
    # What hides behind such a warning is not passed over with it.
    half = len(plain) // 2
    for data in (plain, jfif_2):
        for broken in (padded(data, b'\1\2\3\4\5' * 9), padded(data[:half] + data[-2:]),
                       padded(data[:half] + bytes(60) + data[half + 60:])):
            with pytest.raises(BadImage, match='cut off or damaged'):
                decode_compressed(broken, 'jpeg')
    # libjpeg takes zeros for code: the rest of a picture that was cut off becomes stripes.
    for cut in (len(plain) // 3, half, len(plain) * 9 // 10, len(plain) - 400):
        for zeros in (60, len(plain), 50 * len(plain)):
            with pytest.raises(BadImage, match='cut off or damaged'):
                decode_compressed(plain[:cut] + bytes(zeros) + plain[-2:], 'jpeg')


def test_grey_jpeg_becomes_colour(picture: np.ndarray) -> None:
    grey = np.ascontiguousarray(picture[..., 0])
    image = decode_compressed(encode(grey, '.jpg'), 'mono8; jpeg compressed mono8')
    assert image.array.shape == (203, 301, 3)
    np.testing.assert_array_equal(image.array[..., 0], image.array[..., 2])


@pytest.mark.parametrize('encoding', [e for e in ENCODINGS if e.startswith('bayer')])
def test_a_compressed_mosaic_becomes_the_same_colour_as_a_raw_one(encoding: str) -> None:
    message = make_message(encoding)
    expected = image_from_message(message).rgb()
    png = cv2.imencode('.png', message_array(message))[1]
    buffer = Memory(np.uint8)
    image = decode_compressed(png, f'{encoding}; png compressed ', (3, 4), buffer)
    np.testing.assert_array_equal(image.rgb(), expected)
    assert image.full_size_hw == (12, 16)
    assert encoding.endswith('16') or np.shares_memory(image.array, buffer.array((12, 16, 3)))


@pytest.mark.parametrize('strict', [True, False])
def test_a_mosaic_as_jpeg(picture: np.ndarray, strict: bool,
                          monkeypatch: pytest.MonkeyPatch) -> None:
    """image_transport says what it made of the mosaic; that decides, as do the channels."""
    use_strict(monkeypatch, strict)
    mosaic = np.ascontiguousarray(picture[:200, :296, 0])
    grey = encode(mosaic, '.jpg')
    pixels = cv2.imdecode(np.frombuffer(grey, np.uint8), cv2.IMREAD_GRAYSCALE)
    raw = SimpleNamespace(height=200, width=296, encoding='bayer_gbrg8', step=296, data=pixels,
                          is_bigendian=0)
    for target in ('', 'bayer_gbrg8'):
        image = decode_compressed(grey, f'bayer_gbrg8; jpeg compressed {target}', (10, 10))
        np.testing.assert_array_equal(image.rgb(), image_from_message(raw).rgb())
    image = decode_compressed(grey, 'bayer_gbrg8; jpeg compressed mono8')
    np.testing.assert_array_equal(image.rgb(), np.repeat(pixels[..., None], 3, axis=2))
    for ending in ('.jpg', '.png'):
        colour = encode(picture, ending)
        image = decode_compressed(colour, f'bayer_gbrg8; {ending[1:]} compressed ')
        np.testing.assert_array_equal(image.array, decode_compressed(colour, 'jpeg').array)
    with pytest.raises(BadImage, match='cannot hold 16 bits'):
        decode_compressed(grey, 'bayer_gbrg16; jpeg compressed ')


def thumbnail_segment(picture: np.ndarray) -> bytes:
    """Return an EXIF segment with a whole JPEG in it."""
    content = b'Exif\0\0II*\0\x08\0\0\0' + bytes(6)
    content += encode(cv2.resize(picture, (64, 48)), '.jpg')
    return b'\xff\xe1' + (len(content) + 2).to_bytes(2, 'big') + content


@pytest.mark.parametrize('strict', [True, False])
@pytest.mark.parametrize('progressive', [0, 1])
def test_another_pictures_end_marker_does_not_count(
        picture: np.ndarray, progressive: int, strict: bool,
        monkeypatch: pytest.MonkeyPatch) -> None:
    use_strict(monkeypatch, strict)
    plain = cv2.imencode('.jpg', picture, [cv2.IMWRITE_JPEG_PROGRESSIVE, progressive,
                                           cv2.IMWRITE_JPEG_RST_INTERVAL, 2])[1].tobytes()
    data = plain[:2] + thumbnail_segment(picture) + plain[2:]
    for whole in (data, data + bytes(100), data + plain):
        np.testing.assert_array_equal(decode_compressed(whole, 'jpeg').array,
                                      decode_compressed(plain, 'jpeg').array)
        assert encoded_size_hw(whole) == (203, 301)
    for end in (len(data) // 2, len(data) - 200, len(data) - 2):
        for cut in (data[:end], data[:end] + bytes(100), data[:end] + plain):
            with pytest.raises(BadImage, match='cut off'):
                decode_compressed(cut, 'jpeg')
            with pytest.raises(BadImage, match='no end marker'):
                encoded_size_hw(cut)


def test_a_header_that_asks_for_too_much_is_refused_before_memory_is_taken(
        picture: np.ndarray) -> None:
    def patched(data: bytes, marker: bytes, offset: int, size: bytes) -> bytes:
        at = data.index(marker) + offset
        return data[:at] + size + data[at + len(size):]

    jpeg, png = encode(picture, '.jpg'), encode(picture, '.png')
    extended = b'VP8X' + (10).to_bytes(4, 'little') + bytes(4) + b'\xff\xff\0' * 2
    buffer = Memory(np.uint8)
    for data in (patched(jpeg, b'\xff\xc0', 5, b'\xff' * 4),
                 patched(png, b'IHDR', 4, b'\0\0\xff\xff' * 2),
                 b'RIFF' + (len(extended) + 4).to_bytes(4, 'little') + b'WEBP' + extended):
        with pytest.raises(BadImage, match='at most 268435456 pixels, got 655'):
            decode_compressed(data, 'bayer_rggb8', None, buffer)
        with pytest.raises(BadImage, match='at most 268435456 pixels, got 655'):
            decode_compressed(data, 'jpeg', None, buffer)
    first = buffer.array((1, 1))
    assert (first.base if first.base is not None else first).nbytes == 1


def test_a_png_chunk_longer_than_the_data_never_reaches_opencv(picture: np.ndarray) -> None:
    """It would take 4 GB for that chunk."""
    data = encode(picture, '.png')
    at = data.index(b'IDAT') - 4
    broken = data[:at] + b'\xff\0\0\0' + data[at + 4:]
    for attempt in (lambda: decode_compressed(broken, 'png'), lambda: encoded_size_hw(broken)):
        with pytest.raises(BadImage, match='no end chunk'):
            attempt()
    decode_compressed(data + b'more', 'png')


def test_endless_jpeg_headers_end_soon() -> None:
    began = time.perf_counter()
    for content in (b'\xff' * 10_000_000, b'\xff\xe0\0\2' * 2_500_000, b'\xff\xe0\0\0' * 9):
        with pytest.raises(BadImage, match='no frame header'):
            decode_compressed(b'\xff\xd8' + content, 'jpeg')
    assert time.perf_counter() - began < 1.0


def test_exif_rotation_is_ignored(picture: np.ndarray) -> None:
    data = encode(picture, '.jpg')
    orientation_6 = (b'Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0')
    segment = b'\xff\xe1' + (len(orientation_6) + 2).to_bytes(2, 'big') + orientation_6
    rotated = data[:2] + segment + data[2:]
    assert cv2.imdecode(np.frombuffer(rotated, np.uint8), 1).shape[:2] == (301, 203)
    np.testing.assert_array_equal(decode_compressed(rotated, 'jpeg').array,
                                  decode_compressed(data, 'jpeg').array)


@pytest.mark.parametrize(('data', 'image_format', 'text'), [
    (b'', 'jpeg', 'got 0 bytes starting with nothing'),
    (b'GIF89a' + bytes(100), 'gif', 'must be JPEG, PNG or WebP'),
    (b'\x89PNG\r\n\x1a\n' + bytes(50), '16UC1; compressedDepth png', 'depth image'),
    (cv2.imencode('.png', np.ones((4, 4), np.uint16))[1], '16UC1; png compressed ', 'depth image'),
    (cv2.imencode('.png', np.ones((4, 4), np.uint16))[1], '32FC1; png compressed', 'depth image'),
    (b'\x89PNG\r\n\x1a\nIEND\xaeB`\x82', 'png', 'cut off'),
    ('text', 'jpeg', 'buffer of bytes'),
])
def test_other_data_is_refused(data: object, image_format: str, text: str) -> None:
    with pytest.raises(BadImage, match=text):
        decode_compressed(data, image_format)


@pytest.mark.parametrize(('ending', 'options'), [
    ('.png', []), ('.jpg', []), ('.jpg', [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]),
    ('.webp', [cv2.IMWRITE_WEBP_QUALITY, 101]), ('.webp', [cv2.IMWRITE_WEBP_QUALITY, 60])])
@pytest.mark.parametrize('size_hw', [(1, 1), (7, 301), (1080, 19)])
def test_size_from_the_header(ending: str, options: list[int], size_hw: tuple[int, int]) -> None:
    pixels = np.full((*size_hw, 3), 90, np.uint8)
    data = cv2.imencode(ending, pixels, options)[1].tobytes()
    assert encoded_size_hw(data) == size_hw


def use_strict(monkeypatch: pytest.MonkeyPatch, strict: bool) -> None:
    """Decode JPEG with simplejpeg, or as where it is not installed."""
    if strict:
        pytest.importorskip('simplejpeg', reason='the optional strict JPEG decoder')
    monkeypatch.setattr(images, '_has_simplejpeg', lambda: strict)
