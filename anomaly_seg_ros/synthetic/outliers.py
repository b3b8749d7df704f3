# SPDX-License-Identifier: Apache-2.0
"""
Cut-outs pasted into training scenes, to teach a network what being unknown looks like.

This is outlier exposure (Hendrycks et al., ICLR 2019) in the form of Fishyscapes' overlays
(Blum et al., IJCV 2021). The cut-outs are flat outlines filled with mathematical patterns or with
recoloured pieces of other scenes. They share no shape and no texture with the obstacles of test
drives (``obstacles.py``), which training never sees.
"""

from collections.abc import Callable
import math

from anomaly_seg_ros.synthetic.textures import noise_crop
import cv2
import numpy as np

Rng = np.random.Generator

INLIER, OUTLIER, IGNORED = 0, 1, 255


def _polygon(rng: Rng, size: int) -> np.ndarray:
    count = int(rng.integers(5, 12))
    angles = np.sort(rng.uniform(0, 2 * math.pi, count))
    radii = rng.uniform(0.25, 0.5, count) * size
    return _filled(size, np.stack([np.cos(angles) * radii, np.sin(angles) * radii], 1))


def _lobes(rng: Rng, size: int) -> np.ndarray:
    angles = np.arange(48) * (2 * math.pi / 48)
    radii = np.full(48, 0.34)
    for k in range(2, 7):
        radii += rng.normal(0, 0.16 / k) * np.cos(k * angles + rng.uniform(0, 2 * math.pi))
    radii = np.clip(radii, 0.06, 0.5) * size
    return _filled(size, np.stack([np.cos(angles) * radii, np.sin(angles) * radii], 1))


def _stroke(rng: Rng, size: int) -> np.ndarray:
    mask = np.zeros((size, size), np.uint8)
    points = rng.uniform(0.15, 0.85, (int(rng.integers(2, 5)), 2)) * size
    cv2.polylines(mask, [points.astype(np.int32)], False, 255,
                  max(2, int(size * rng.uniform(0.1, 0.3))), cv2.LINE_AA)
    return mask


def _splinters(rng: Rng, size: int) -> np.ndarray:
    mask = np.zeros((size, size), np.uint8)
    for _ in range(int(rng.integers(3, 9))):
        corners = rng.uniform(0.2, 0.8, 2) * size + rng.normal(0, 0.16 * size, (3, 2))
        cv2.fillPoly(mask, [corners.astype(np.int32)], 255, cv2.LINE_AA)
    return mask


def _filled(size: int, offsets: np.ndarray) -> np.ndarray:
    mask = np.zeros((size, size), np.uint8)
    cv2.fillPoly(mask, [np.round((offsets + size / 2) * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)
    return mask


def _two(rng: Rng) -> tuple[np.ndarray, np.ndarray]:
    a, b = rng.uniform(5, 250, 3), rng.uniform(5, 250, 3)
    if rng.random() < 0.4:  # greyish
        a, b = a * 0.25 + a.mean() * 0.75, b * 0.25 + b.mean() * 0.75
    if rng.random() < 0.25:  # nearly plain
        b = a * rng.uniform(0.8, 1.2)
    return a.astype(np.float32), b.astype(np.float32)


def _ramp(rng: Rng, size: int) -> np.ndarray:
    a, b = _two(rng)
    turn = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[0:size, 0:size] / max(size - 1, 1) - 0.5
    mix = np.clip(0.5 + (x * math.cos(turn) + y * math.sin(turn)), 0, 1)[..., None]
    return (a * mix + b * (1 - mix)).astype(np.float32)


def _fractal(rng: Rng, size: int) -> np.ndarray:
    a, b = _two(rng)
    mix = np.clip(0.5 + 0.35 * noise_crop(rng, size, size, rng.uniform(0.3, 1.6)), 0, 1)[..., None]
    return a * mix + b * (1 - mix)


def _ripples(rng: Rng, size: int) -> np.ndarray:
    a, b = _two(rng)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    cx, cy = rng.uniform(-size, 2 * size, 2)
    mix = 0.5 + 0.5 * np.sin(np.hypot(x - cx, y - cy) * rng.uniform(0.15, 1.2))[..., None]
    return (a * mix + b * (1 - mix)).astype(np.float32)


def _cells(rng: Rng, size: int) -> np.ndarray:
    count = int(rng.integers(4, 20))
    seeds = rng.uniform(0, size, (count, 2)).astype(np.float32)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    nearest = np.argmin([(x - u) ** 2 + (y - v) ** 2 for u, v in seeds], 0)
    a, b = _two(rng)
    return (a + (b - a) * rng.random((count, 1)).astype(np.float32))[nearest].astype(np.float32)


def _static(rng: Rng, size: int) -> np.ndarray:
    a, b = _two(rng)
    mix = rng.random((size, size, 1)).astype(np.float32) ** rng.uniform(0.5, 2)
    return cv2.GaussianBlur(a * mix + b * (1 - mix), (0, 0), rng.uniform(0.4, 1.5))


# What cut-outs look like; disjoint from obstacles.SHAPES and obstacles.TEXTURES.
SHAPES: dict[str, Callable[[Rng, int], np.ndarray]] = {
    'polygon': _polygon, 'lobes': _lobes, 'stroke': _stroke, 'splinters': _splinters}
TEXTURES: dict[str, Callable[[Rng, int], np.ndarray]] = {
    'ramp': _ramp, 'fractal': _fractal, 'ripples': _ripples, 'cells': _cells, 'static': _static}
# Besides these, pieces of another scene, turned and recoloured.
SCRAMBLED = 'scrambled_scene'


def _scrambled(rng: Rng, size: int, other: np.ndarray) -> np.ndarray:
    h, w = other.shape[:2]
    span = int(min(size * rng.uniform(0.6, 2.0), h - 1, w - 1))
    y, x = int(rng.integers(0, h - span)), int(rng.integers(0, w - span))
    piece = cv2.resize(other[y:y + span, x:x + span], (size, size)).astype(np.float32)
    piece = np.rot90(piece, int(rng.integers(0, 4)))[..., rng.permutation(3)]
    if rng.random() < 0.5:
        piece = 255 - piece
    return np.ascontiguousarray(piece)


def paste_outliers(rng: Rng, image: np.ndarray, labels: np.ndarray,
                   other: np.ndarray, count: int) -> np.ndarray:
    """
    Paste ``count`` cut-outs into ``image`` in place.

    Parameters
    ----------
    rng
        Source of all randomness.
    image
        uint8 RGB (H, W, 3), changed in place.
    labels
        uint8 (H, W), train ids; most cut-outs are put where the label is 0 (road).
    other
        uint8 RGB image of another scene, for recoloured pieces.
    count
        Number of cut-outs.

    Returns
    -------
    numpy.ndarray
        uint8 (H, W): 0 untouched, 1 cut-out, 255 its soft edge.

    """
    h, w = labels.shape
    marks = np.zeros((h, w), np.uint8)
    road_v, road_u = np.nonzero(labels[::4, ::4] == 0)
    horizon = 0.44 * h
    for _ in range(count):
        if len(road_v) and rng.random() < 0.7:
            k = int(rng.integers(len(road_v)))
            u, v = int(road_u[k]) * 4, int(road_v[k]) * 4
            size = int(rng.uniform(0.25, 1.7) * max(v - horizon, 6) / 1.5)
        else:
            u, v = int(rng.integers(0, w)), int(rng.integers(0, h))
            size = int(math.exp(rng.uniform(math.log(8), math.log(130))))
        size = min(max(size, 7), 200)
        _paste(rng, image, marks, other, u, v, size)
    return marks


def _paste(rng: Rng, image: np.ndarray, marks: np.ndarray,
           other: np.ndarray, u: int, v: int, size: int) -> None:
    h, w = marks.shape
    mask = SHAPES[str(rng.choice(list(SHAPES)))](rng, size)
    squeeze = rng.uniform(0.45, 1.0)
    tall = max(4, int(size * squeeze)) if rng.random() < 0.6 else size
    wide = size if tall < size else max(4, int(size * squeeze))
    mask = cv2.resize(mask, (wide, tall), interpolation=cv2.INTER_AREA)
    name = str(rng.choice([*TEXTURES, SCRAMBLED], p=(.16, .2, .1, .12, .1, .32)))
    patch = _scrambled(rng, size, other) if name == SCRAMBLED else TEXTURES[name](rng, size)
    patch = cv2.resize(patch, (wide, tall), interpolation=cv2.INTER_AREA)
    # Bottom centre at (u, v).
    u0, v0 = u - wide // 2, v - tall
    a0, b0 = max(u0, 0), max(v0, 0)
    a1, b1 = min(u0 + wide, w), min(v0 + tall, h)
    if a1 - a0 < 4 or b1 - b0 < 4:
        return
    cut = (slice(b0 - v0, b1 - v0), slice(a0 - u0, a1 - u0))
    area = (slice(b0, b1), slice(a0, a1))
    mask, patch = mask[cut], patch[cut]
    # Light it like its surroundings, brighter on one side; three in ten are much darker.
    around = float(image[area].mean())
    patch *= (around / max(float(patch.mean()), 8.0)) ** rng.uniform(0.3, 1.0)
    slope = np.linspace(rng.uniform(0.9, 1.4), rng.uniform(0.5, 1.0), patch.shape[0])
    lean = np.linspace(rng.uniform(0.7, 1.2), rng.uniform(0.7, 1.2), patch.shape[1])
    brightness = rng.uniform(0.6, 1.5) if rng.random() < 0.7 else rng.uniform(0.12, 0.6)
    patch *= (slope[:, None, None] * lean[None, :, None] * brightness).astype(np.float32)
    if rng.random() < 0.6:
        _cast_shadow(rng, image, u, v, wide, tall)
    alpha = cv2.GaussianBlur(mask, (3, 3), 0.5).astype(np.float32)[..., None] / 255
    patch += rng.normal(0, 3, patch.shape).astype(np.float32)
    mixed = image[area] * (1 - alpha) + np.clip(patch, 0, 255) * alpha
    image[area] = mixed.astype(np.uint8)
    mark = marks[area]
    soft = alpha[..., 0]
    mark[(soft > 0.1) & (soft < 0.75)] = IGNORED
    mark[soft >= 0.75] = OUTLIER


def _cast_shadow(rng: Rng, image: np.ndarray, u: int, v: int, wide: int, tall: int) -> None:
    """Darken the ground at the foot of a cut-out; it stays an inlier."""
    h, w = image.shape[:2]
    half = int(wide * rng.uniform(0.4, 0.8))
    low = max(2, int(tall * rng.uniform(0.06, 0.22)))
    shift = int(wide * rng.uniform(-0.4, 0.4))
    a0, a1 = max(u + shift - half - 4, 0), min(u + shift + half + 4, w)
    b0, b1 = max(v - low - 4, 0), min(v + low + 4, h)
    if a0 >= a1 or b0 >= b1:
        return
    veil = np.full((b1 - b0, a1 - a0), 255, np.uint8)
    cv2.ellipse(veil, (u + shift - a0, v - b0), (half, low), 0, 0, 360, int(rng.uniform(70, 200)),
                -1, cv2.LINE_AA)
    veil = cv2.GaussianBlur(veil, (5, 5), 1.5)
    area = image[b0:b1, a0:a1]
    image[b0:b1, a0:a1] = cv2.multiply(area, cv2.cvtColor(veil, cv2.COLOR_GRAY2RGB), scale=1 / 255)
