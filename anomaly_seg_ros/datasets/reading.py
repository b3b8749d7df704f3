# SPDX-License-Identifier: Apache-2.0
"""Image and mask files to arrays; every failure names the file."""

from pathlib import Path
import struct
import zlib

from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.images import BadImage, decode_compressed, encoded_size_hw
import cv2
import numpy as np

IMAGE_ENDINGS = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.tif', '.tiff', '.ppm')

_PNG = b'\x89PNG\r\n\x1a\n'
_GREY, _PALETTE = 0, 3  # colour types in the header of a PNG


def read_image(path: Path) -> np.ndarray:
    """
    Read a colour image; the content decides the format, not the file's ending.

    Returns
    -------
    numpy.ndarray
        uint8 (H, W, 3), RGB. EXIF rotation and gamma are ignored, so pixels fit the masks.

    Raises
    ------
    UserError
        If the file is missing, cut off, damaged or no image.

    """
    data = _read_bytes(path)
    if path.suffix.lower() in ('.bmp', '.tif', '.tiff', '.ppm'):
        image = cv2.imdecode(np.frombuffer(data, np.uint8),
                             cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        if image is None:
            raise UserError(f'{path}: not a readable image ({len(data)} bytes). '
                            'Download or copy it again.')
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    try:
        return decode_compressed(data, path.suffix.lstrip('.')).rgb()
    except BadImage as error:
        raise UserError(f'{path}: {error.problem} Download or copy the file again.') from error


def read_mask(path: Path) -> np.ndarray:
    """
    Read a label image with its codes as they are.

    Grey images, palette images (the indices are the codes) and colour images whose channels are
    all equal are accepted.

    Returns
    -------
    numpy.ndarray
        uint8 (H, W).

    Raises
    ------
    UserError
        If the file is missing, cut off, damaged, no PNG, a colour picture, or grey in fewer than
        8 bits.

    """
    mask = read_codes(path)
    if mask.dtype != np.uint8:
        raise UserError(f'{path}: a mask must have 8 bits a pixel, got {mask.dtype}. '
                        'Save it as an 8-bit grey PNG.')
    return mask


def read_codes(path: Path) -> np.ndarray:
    """Read a label image as :func:`read_mask` does, but 16-bit ones too, as uint16 (H, W)."""
    data = _read_bytes(path)
    # OpenCV 4 fills what a cut-off PNG lacks with zeros: insist on the closing chunk. JPEG, which
    # some call .png, does not keep codes.
    whole = data[:8] == _PNG and b'IEND' in data[-16:]
    mask = _decode(data) if whole else None
    if mask is not None and data[25] == _PALETTE:
        mask = _decode(_with_plain_palette(data))
    if mask is None:
        raise UserError(f'{path}: not a readable mask ({len(data)} bytes); must be a whole PNG '
                        'file. Download or copy it again.')
    if data[25] == _GREY and data[24] < 8:
        # Pillow writes True as 1, what shrinks PNGs writes 255 as 1; OpenCV reads 255: void.
        raise UserError(f'{path}: a mask must have 8 bits a pixel, got {data[24]}, whose codes '
                        'are not certain: 1 may be 1 or white. Save it as an 8-bit grey PNG, a '
                        'boolean mask with mask.astype(numpy.uint8).')
    if mask.ndim == 3:
        if np.any(mask[..., 1:3] != mask[..., :1]):
            raise UserError(f'{path}: a mask must hold one code a pixel, got a colour image. '
                            'Save it as an 8-bit grey PNG.')
        mask = np.ascontiguousarray(mask[..., 0])
    return mask


def file_size_hw(path: Path) -> tuple[int, int]:
    """
    Return (height, width) of an image file from its header.

    Raises
    ------
    UserError
        If the file is missing or its header is not that of a whole PNG, JPEG or WebP.

    """
    data = _read_bytes(path)
    try:
        return encoded_size_hw(data)
    except BadImage as error:
        raise UserError(f'{path}: {error.problem} Download or copy the file again.') from error


def codes_in(mask: np.ndarray) -> list[int]:
    """Return the codes that occur in a mask, uint8 (H, W), in rising order."""
    counts = cv2.calcHist([mask], [0], None, [256], [0, 256])
    return [int(code) for code in np.flatnonzero(counts)]


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror or error}). '
                        'Check the path and its permissions.') from error


def _decode(data: bytes) -> np.ndarray | None:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)


def _with_plain_palette(data: bytes) -> bytes:
    """
    Give a palette PNG the colour (i, i, i) for each index i.

    OpenCV gives colours, from which indices cannot be told where some share a colour.
    """
    plain = b'PLTE' + bytes(index for index in range(1 << data[24]) for _ in 'RGB')
    chunks = [struct.pack('>I', len(plain) - 4), plain, struct.pack('>I', zlib.crc32(plain))]
    position = len(_PNG)
    while position < len(data):
        end = position + 12 + int.from_bytes(data[position:position + 4], 'big')
        kind = data[position + 4:position + 8]
        if kind == b'IHDR':
            chunks.insert(0, data[position:end])
        elif kind in (b'IDAT', b'IEND'):
            chunks.append(data[position:end])
        position = end
    return _PNG + b''.join(chunks)
