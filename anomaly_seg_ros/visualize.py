# SPDX-License-Identifier: Apache-2.0
"""Pictures for people: class colours, heat maps, overlays and panels. RGB throughout.

The functions that the node calls on every frame take ``out`` and allocate no frame-sized array
when it is given.
"""

from collections.abc import Iterator, Sequence
import functools

import cv2
import numpy as np

# Outline of an obstacle: a bright line on a black one, seen on any background.
OUTLINE_RGB = (255, 255, 255)
_BLOCK_PIXELS = 1 << 16  # 256 KiB of float32


def colour_labels(labels: np.ndarray, palette: Sequence[Sequence[int]],
                  out: np.ndarray | None = None) -> np.ndarray:
    """Paint class ids in their colours.

    Parameters
    ----------
    labels
        uint8 (H, W), class ids.
    palette
        RGB colours, 0 to 255, of the ids 0, 1, ...; ids beyond it (255, unlabelled) are black.
    out
        uint8 (H, W, 3) to write into.

    Returns
    -------
    picture
        uint8 (H, W, 3) RGB.

    """
    _check(labels, 'labels', np.uint8)
    colours = tuple((int(r), int(g), int(b)) for r, g, b in palette)
    picture: np.ndarray = cv2.applyColorMap(labels, _palette_table(colours),
                                            dst=_checked_out(out, labels, 3))
    return picture


def anomaly_u8(anomaly: np.ndarray, score_range: tuple[float, float],
               out: np.ndarray | None = None) -> np.ndarray:
    """Map a score to 0..255 by a fixed range, so that a value means the same in every frame.

    Parameters
    ----------
    anomaly
        float32 (H, W), higher is more anomalous. Infinities saturate; NaN becomes 0.
    score_range
        (low, high), the scores that become 0 and 255; beyond them the result saturates.
    out
        uint8 (H, W) to write into.

    Returns
    -------
    scaled
        uint8 (H, W), ``round(255 * (score - low) / (high - low))``.

    """
    _check(anomaly, 'anomaly', np.float32)
    low, high = (float(v) for v in score_range)
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise ValueError(f'score_range must be finite and increasing, got {score_range}')
    result = _checked_out(out, anomaly)
    if result is None:
        result = np.empty(anomaly.shape, np.uint8)
    scale = 255.0 / (high - low)
    # OpenCV's conversion takes the absolute value and wraps at 2**31: clip first, block by block.
    for rows in _row_blocks(anomaly.shape):
        clipped = np.clip(anomaly[rows], low, high)
        cv2.convertScaleAbs(clipped, dst=result[rows], alpha=scale, beta=-low * scale)
    return result


def heat_map(scaled: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Colour the result of ``anomaly_u8``: black, purple, orange, pale yellow.

    The colours are matplotlib's "inferno": lightness grows evenly with the value, so the picture
    also reads in grey and with colour-blind eyes.

    Parameters
    ----------
    scaled
        uint8 (H, W).
    out
        uint8 (H, W, 3) to write into.

    Returns
    -------
    picture
        uint8 (H, W, 3) RGB.

    """
    _check(scaled, 'scaled', np.uint8)
    picture: np.ndarray = cv2.applyColorMap(scaled, _heat_table(),
                                            dst=_checked_out(out, scaled, 3))
    return picture


def overlay(image_rgb: np.ndarray, labels: np.ndarray, anomaly: np.ndarray, mask: np.ndarray,
            palette: Sequence[Sequence[int]], score_range: tuple[float, float],
            opacity: float = 0.5, out: np.ndarray | None = None) -> np.ndarray:
    """Draw one detection on its image: class colours, heat on obstacles, obstacle outlines.

    Parameters
    ----------
    image_rgb
        uint8 (H, W, 3).
    labels, anomaly, mask
        uint8, float32 and uint8 (H, W): class ids, score, and not 0 where an obstacle is.
    palette, score_range
        As in ``colour_labels`` and ``anomaly_u8``.
    opacity
        Weight of the class colours, 0 (image only) to 1.
    out
        uint8 (H, W, 3) to write into; not ``image_rgb`` itself.

    Returns
    -------
    picture
        uint8 (H, W, 3) RGB.

    """
    _check(image_rgb, 'image_rgb', np.uint8, channels=3)
    for name, array, dtype in (('anomaly', anomaly, np.float32), ('mask', mask, np.uint8)):
        _check(array, name, dtype)
    for name, array in (('labels', labels), ('anomaly', anomaly), ('mask', mask)):
        if array.shape != image_rgb.shape[:2]:
            raise ValueError(f'{name} must have the size of the image {image_rgb.shape[:2]}, '
                             f'got {array.shape}')
    if not 0.0 <= opacity <= 1.0:
        raise ValueError(f'opacity must be 0 to 1, got {opacity}')
    result = _checked_out(out, labels, 3)
    picture = np.empty(image_rgb.shape, np.uint8) if result is None else result
    for rows in _row_blocks(image_rgb.shape[:2]):
        part, found = picture[rows], mask[rows]
        colour_labels(labels[rows], palette, part)
        if cv2.countNonZero(found):
            cv2.copyTo(heat_map(anomaly_u8(anomaly[rows], score_range)), found, part)
        cv2.addWeighted(part, opacity, image_rgb[rows], 1.0 - opacity, 0.0, dst=part)
    draw_outlines(picture, mask)
    return picture


def draw_outlines(picture: np.ndarray, mask: np.ndarray,
                  colour: tuple[int, int, int] = OUTLINE_RGB) -> None:
    """Draw the borders of a mask's regions into a picture, in place.

    Parameters
    ----------
    picture
        uint8 (H, W, 3) RGB, written to.
    mask
        uint8 (H, W), not 0 inside.
    colour
        RGB of the line just inside the region; a black one lies around it.

    """
    width = max(1, round(mask.shape[0] / 512))
    kernel = np.ones((2 * width + 1, 2 * width + 1), np.uint8)
    table = _palette_table(((0, 0, 0),) * 255 + (colour,))
    # Morphology takes the same time for one obstacle as for thousands; tracing contours does not.
    for rows in _row_blocks(mask.shape):
        wide = slice(max(0, rows.start - width), rows.stop + width)
        region = cv2.threshold(mask[wide], 0, 255, cv2.THRESH_BINARY)[1]
        if not cv2.countNonZero(region):
            continue
        border = cv2.morphologyEx(region, cv2.MORPH_GRADIENT, kernel)
        inner = slice(rows.start - wide.start, rows.stop - wide.start)
        cv2.copyTo(cv2.applyColorMap(region[inner], table), border[inner], picture[rows])


def _row_blocks(size_hw: tuple[int, ...]) -> Iterator[slice]:
    """Cut a picture into blocks of rows whose scratch arrays stay in the second-level cache."""
    height, width = size_hw
    rows = max(1, _BLOCK_PIXELS // max(1, width))
    for top in range(0, height, rows):
        yield slice(top, min(top + rows, height))


@functools.lru_cache(maxsize=8)
def _palette_table(palette: tuple[tuple[int, int, int], ...]) -> np.ndarray:
    """Return the colours of all 256 ids as uint8 (256, 1, 3)."""
    if not 1 <= len(palette) <= 256:
        raise ValueError(f'palette must hold 1 to 256 colours, got {len(palette)}')
    if any(not 0 <= v <= 255 for colour in palette for v in colour):
        raise ValueError('palette must hold RGB colours of 0..255')
    table = np.zeros((256, 1, 3), np.uint8)
    table[:len(palette), 0] = palette
    return table


@functools.lru_cache(maxsize=1)
def _heat_table() -> np.ndarray:
    """Return the heat colours of 0..255 as uint8 (256, 1, 3), RGB."""
    steps = np.arange(256, dtype=np.uint8).reshape(256, 1)
    return np.ascontiguousarray(cv2.applyColorMap(steps, cv2.COLORMAP_INFERNO)[..., ::-1])


def _check(array: np.ndarray, name: str, dtype: type, channels: int | None = None) -> None:
    shape = '(H, W)' if channels is None else f'(H, W, {channels})'
    fits = array.ndim == 2 if channels is None else (
        array.ndim == 3 and array.shape[2] == channels)
    if array.dtype != dtype or not fits or 0 in array.shape:
        raise ValueError(f'{name} must be {np.dtype(dtype)} {shape}, not empty, '
                         f'got {array.dtype} {array.shape}')


def _checked_out(out: np.ndarray | None, like: np.ndarray,
                 channels: int | None = None) -> np.ndarray | None:
    """Return ``out`` if it can take the result; OpenCV would silently allocate another."""
    shape = like.shape if channels is None else (*like.shape, channels)
    if out is not None and (out.dtype != np.uint8 or out.shape != shape
                            or not out.flags.c_contiguous or not out.flags.writeable):
        raise ValueError(f'out must be writeable contiguous uint8 {shape}, '
                         f'got {out.dtype} {out.shape}')
    return out
