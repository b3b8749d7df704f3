# SPDX-License-Identifier: Apache-2.0
"""
Pictures for people: class colours, heat maps, overlays and panels. RGB throughout.

The functions that the node calls on every frame take ``out`` and allocate no frame-sized array
when it is given.
"""

from collections.abc import Iterator, Sequence
import functools

import cv2
import numpy as np

# Outline of an obstacle: a bright line on a black one, seen on any background.
OUTLINE_RGB = (255, 255, 255)
_HEAT_OPACITY = 0.8
_BLOCK_PIXELS = 1 << 18  # 1 MiB of float32


def colour_labels(labels: np.ndarray, palette: Sequence[Sequence[int]],
                  out: np.ndarray | None = None) -> np.ndarray:
    """
    Paint class ids in their colours.

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
    """
    Map a score to 0..255 by a fixed range, so that a value means the same in every frame.

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
    """
    Colour the result of ``anomaly_u8``: black, purple, orange, pale yellow.

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
    """
    Draw one detection on its image: class colours, heat on obstacles, obstacle outlines.

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
        part = picture[rows]
        colour_labels(labels[rows], palette, part)
        cv2.addWeighted(part, opacity, image_rgb[rows], 1.0 - opacity, 0.0, dst=part)
        x, y, width, height = cv2.boundingRect(mask[rows])
        if width:
            box = (slice(rows.start + y, rows.start + y + height), slice(x, x + width))
            heat = heat_map(anomaly_u8(anomaly[box], score_range))
            cv2.addWeighted(heat, _HEAT_OPACITY, image_rgb[box], 1.0 - _HEAT_OPACITY, 0.0,
                            dst=heat)
            picture[box] = cv2.copyTo(heat, mask[box], picture[box])
    draw_outlines(picture, mask)
    return picture


def draw_outlines(picture: np.ndarray, mask: np.ndarray,
                  colour: tuple[int, int, int] = OUTLINE_RGB,
                  width_px: int | None = None) -> None:
    """
    Draw the borders of a mask's regions into a picture, in place.

    Parameters
    ----------
    picture
        uint8 (H, W, 3) RGB, written to.
    mask
        uint8 (H, W), not 0 inside.
    colour
        RGB of the line just inside the region; a black one lies around it.
    width_px
        Width of each line; None takes one that suits the picture's height.

    """
    width = width_px or max(1, round(mask.shape[0] / 512))
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


def panel(pictures: Sequence[np.ndarray], titles: Sequence[str], columns: int = 2,
          cell_width: int = 800) -> np.ndarray:
    """
    Lay pictures of one frame side by side, each under its title.

    Parameters
    ----------
    pictures
        uint8 (H, W, 3) RGB or (H, W) grey, of any sizes.
    titles
        One line of ASCII text for each picture.
    columns
        Pictures in a row.
    cell_width
        Width of each picture in pixels; its shape is kept.

    Returns
    -------
    picture
        uint8 (H, W, 3) RGB, white where there is no picture.

    """
    if not pictures or len(pictures) != len(titles):
        raise ValueError(f'need one title for each of at least one picture, got {len(pictures)} '
                         f'pictures and {len(titles)} titles')
    if columns < 1 or cell_width < 16:
        raise ValueError('columns must be at least 1 and cell_width at least 16, got '
                         f'{columns} and {cell_width}')
    cells = [_cell(picture, title, cell_width)
             for picture, title in zip(pictures, titles, strict=True)]
    gap = max(4, cell_width // 100)
    rows = []
    for first in range(0, len(cells), columns):
        row = cells[first:first + columns]
        height = max(len(cell) for cell in row)
        full = np.full((height + gap, columns * (cell_width + gap) - gap, 3), 255, np.uint8)
        for i, cell in enumerate(row):
            left = i * (cell_width + gap)
            full[:len(cell), left:left + cell_width] = cell
        rows.append(full)
    return np.vstack(rows)[:-gap]


def legend(classes: Sequence[str], palette: Sequence[Sequence[int]], columns: int = 4,
           width: int = 800) -> np.ndarray:
    """
    Draw the names of classes beside their colours.

    Parameters
    ----------
    classes, palette
        Names and RGB colours.
    columns
        Names in a row.
    width
        Width of the picture in pixels.

    Returns
    -------
    picture
        uint8 (H, width, 3) RGB on white.

    """
    if not classes or len(classes) != len(palette):
        raise ValueError(f'need one colour for each of at least one class, got {len(classes)} '
                         f'classes and {len(palette)} colours')
    line, cell = 26, width // columns
    picture = np.full((line * -(-len(classes) // columns), width, 3), 255, np.uint8)
    for i, (name, colour) in enumerate(zip(classes, palette, strict=True)):
        x, y = i % columns * cell, i // columns * line
        cv2.rectangle(picture, (x + 4, y + 5), (x + 26, y + 20),
                      tuple(int(v) for v in colour), cv2.FILLED)
        _write(picture, name, (x + 34, y + 18), 0.5, cell - 38)
    return picture


def colour_bar(score_range: tuple[float, float], threshold: float | None = None,
               width: int = 800) -> np.ndarray:
    """
    Draw the scale of ``heat_map``, with the decision threshold where one is given.

    Parameters
    ----------
    score_range
        (low, high) as in ``anomaly_u8``.
    threshold
        Score from which a pixel is anomalous; marked if inside the range.
    width
        Width of the picture in pixels.

    Returns
    -------
    picture
        uint8 (48, width, 3) RGB on white.

    """
    low, high = score_range
    ramp = np.linspace(low, high, width, dtype=np.float32)[None].repeat(20, 0)
    picture = np.full((48, width, 3), 255, np.uint8)
    picture[:20] = heat_map(anomaly_u8(ramp, score_range))
    texts = [(low, f'{low:.3g}'), (high, f'{high:.3g}')]
    if threshold is not None and low <= threshold <= high:
        texts.append((threshold, f'threshold {threshold:.3g}'))
        x = round((threshold - low) / (high - low) * (width - 1))
        cv2.line(picture, (x, 0), (x, 26), (0, 0, 0), 3)
        cv2.line(picture, (x, 0), (x, 26), OUTLINE_RGB, 1)
    for value, text in texts:
        (length, _), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.5, 1)
        centre = round((value - low) / (high - low) * (width - 1))
        _write(picture, text, (min(max(0, centre - length // 2), width - length), 42), 0.5, length)
    return picture


def _cell(picture: np.ndarray, title: str, width: int) -> np.ndarray:
    """Return one picture at ``width`` with its title above, uint8 (H, width, 3)."""
    if picture.ndim == 2:
        _check(picture, 'picture', np.uint8)
        picture = cv2.cvtColor(picture, cv2.COLOR_GRAY2RGB)
    _check(picture, 'picture', np.uint8, channels=3)
    height = max(1, round(picture.shape[0] * width / picture.shape[1]))
    shrinks = width < picture.shape[1]
    picture = cv2.resize(picture, (width, height),
                         interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    size = width / 1000
    bar = np.full((round(48 * size) + 8, width, 3), 255, np.uint8)
    _write(bar, title, (2, len(bar) - round(14 * size) - 2), max(0.4, size), width - 4)
    return np.vstack([bar, picture])


def _write(picture: np.ndarray, text: str, origin_xy: tuple[int, int], size: float,
           room: int) -> None:
    """Write one line of dark text, smaller where it would be wider than ``room`` pixels."""
    (length, _), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, size, 1)
    size *= min(1.0, room / max(1, length))
    cv2.putText(picture, text, origin_xy, cv2.FONT_HERSHEY_SIMPLEX, size, (32, 32, 32),
                2 if size > 0.7 else 1, cv2.LINE_AA)


def _row_blocks(size_hw: tuple[int, ...]) -> Iterator[slice]:
    """Cut a picture into blocks of rows whose scratch arrays stay in the cache."""
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
