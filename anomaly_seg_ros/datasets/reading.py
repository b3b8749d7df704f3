# SPDX-License-Identifier: Apache-2.0
"""Image and mask files to arrays; every failure names the file."""

from pathlib import Path

from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.images import BadImage, decode_compressed, encoded_size_hw
import cv2
import numpy as np

IMAGE_ENDINGS = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.tif', '.tiff', '.ppm')


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
        raise UserError(f'{path}: {error} Download or copy the file again.') from error


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
        If the file is missing, cut off, damaged, or a colour picture.

    """
    data = _read_bytes(path)
    # OpenCV 4 fills what a cut-off PNG lacks with zeros: insist on the closing chunk.
    png = data[:8] == b'\x89PNG\r\n\x1a\n'
    whole = data and (not png or b'IEND' in data[-16:])
    mask = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if whole else None
    if mask is None:
        raise UserError(f'{path}: not a readable mask ({len(data)} bytes). '
                        'Download or copy it again.')
    if mask.dtype != np.uint8:
        raise UserError(f'{path}: a mask must have 8 bits a pixel, got {mask.dtype}. '
                        'Save it as an 8-bit grey PNG.')
    if png and data[25] == 3:
        return _palette_indices(path, data, mask)
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
        raise UserError(f'{path}: {error} Download or copy the file again.') from error


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


def _palette_indices(path: Path, data: bytes, colours_bgr: np.ndarray) -> np.ndarray:
    """Undo the palette: OpenCV gives colours, the codes are their places in the PLTE chunk."""
    position = 8
    palette = b''
    while position + 8 <= len(data):
        length = int.from_bytes(data[position:position + 4], 'big')
        if data[position + 4:position + 8] == b'PLTE':
            palette = data[position + 8:position + 8 + length]
            break
        position += 12 + length
    entries = np.frombuffer(palette, np.uint8).reshape(-1, 3).astype(np.int32)
    packed = entries[:, 0] << 16 | entries[:, 1] << 8 | entries[:, 2]
    order = np.argsort(packed, kind='stable')
    pixels = colours_bgr.astype(np.int32)
    wanted = pixels[..., 2] << 16 | pixels[..., 1] << 8 | pixels[..., 0]
    used = np.unique(wanted)
    if any(np.count_nonzero(packed == colour) != 1 for colour in used):
        raise UserError(f'{path}: the palette has one colour for several codes, so the codes '
                        'cannot be read. Save the mask as an 8-bit grey PNG.')
    indices: np.ndarray = order[np.searchsorted(packed[order], wanted)].astype(np.uint8)
    return indices
