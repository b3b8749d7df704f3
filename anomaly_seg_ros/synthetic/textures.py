# SPDX-License-Identifier: Apache-2.0
"""
Procedural textures and sprites: noise, facades, hedges, foliage and people.

Everything is a pure function of its arguments, so results may be cached freely. Textures are uint8
RGB (h, w, 3); sprites are uint8 RGBA (h, w, 4) with colour already multiplied by alpha.
"""

from functools import lru_cache

import cv2
import numpy as np


@lru_cache(maxsize=16)
def noise_tile(seed: int, size: int = 512, beta: float = 1.0) -> np.ndarray:
    """
    Return a tile of periodic noise with amplitude spectrum 1 / f ** beta.

    float32 (size, size), mean 0, standard deviation 1, clipped to +-3.
    """
    rng = np.random.default_rng([seed, 11])
    spectrum = np.fft.rfft2(rng.standard_normal((size, size)))
    fy = np.fft.fftfreq(size)[:, None]
    fx = np.fft.rfftfreq(size)[None, :]
    radius = np.hypot(fx, fy) * size
    radius[0, 0] = 1.0
    spectrum *= radius ** -beta
    spectrum[0, 0] = 0.0
    tile = np.fft.irfft2(spectrum, s=(size, size))
    tile /= tile.std()
    return np.clip(tile, -3.0, 3.0).astype(np.float32)


def noise_crop(rng: np.random.Generator, height: int, width: int, beta: float = 1.0
               ) -> np.ndarray:
    """Return a random (height, width) window of a noise tile, float32, about N(0, 1)."""
    tile = noise_tile(int(rng.integers(0, 4)), 512, beta)
    y, x = rng.integers(0, 512, 2)
    rows = np.arange(y, y + height) % 512
    cols = np.arange(x, x + width) % 512
    return tile[rows[:, None], cols[None, :]]


def mip_levels(texture: np.ndarray, smallest: int = 4) -> list[np.ndarray]:
    """Return ``texture`` and its halvings, down to ``smallest`` pixels on the short side."""
    levels = [texture]
    while min(levels[-1].shape[:2]) >= 2 * smallest:
        h, w = levels[-1].shape[:2]
        levels.append(cv2.resize(levels[-1], (w // 2, h // 2), interpolation=cv2.INTER_AREA))
    return levels


def blend(rng: np.random.Generator, low: tuple[float, ...], high: tuple[float, ...]
          ) -> np.ndarray:
    """Return a colour between two, with a slight cast of its own, float32 RGB."""
    share = rng.random()
    colour = np.array(low) * (1 - share) + np.array(high) * share
    return (colour * rng.uniform(0.96, 1.04, 3)).astype(np.float32)


FACADE_COLOURS = (
    (201, 183, 156), (186, 164, 140), (214, 203, 186), (160, 92, 74), (142, 78, 62),
    (176, 176, 170), (150, 158, 160), (221, 207, 164), (196, 150, 112), (128, 122, 118),
    (205, 196, 200), (168, 140, 120))


def facade(seed: int, width_m: float, height_m: float, pixels_per_m: int = 22
           ) -> tuple[np.ndarray, np.ndarray]:
    """Return a house front by day and by night, each uint8 RGB (h, w, 3), top row first."""
    rng = np.random.default_rng([seed, 21])
    h, w = int(height_m * pixels_per_m), int(width_m * pixels_per_m)
    colour = np.array(FACADE_COLOURS[rng.integers(len(FACADE_COLOURS))], np.float32)
    colour *= rng.uniform(0.8, 1.12)
    wall = np.repeat(colour[None, None, :], h, 0).repeat(w, 1)
    wall *= 1 + 0.035 * noise_crop(rng, h, w, 1.0)[..., None]
    wall *= np.linspace(1.03, 0.9, h, dtype=np.float32)[:, None, None]
    if rng.random() < 0.35:  # courses of brick
        course = np.where(np.arange(h) % 5 == 0, 0.86, 1.0).astype(np.float32)
        wall *= course[:, None, None]
    floor_px = int(rng.uniform(2.8, 3.5) * pixels_per_m)
    bay_px = int(rng.uniform(1.9, 3.4) * pixels_per_m)
    win_w, win_h = int(bay_px * rng.uniform(0.38, 0.62)), int(floor_px * rng.uniform(0.45, 0.62))
    glass = blend(rng, (42, 50, 58), (88, 104, 120))
    frame = np.full(3, rng.choice([235, 225, 70, 120]), np.float32)
    day = wall
    night = wall.copy()
    floors = max(1, round(h / floor_px))
    bays = max(1, w // bay_px)
    left = (w - bays * bay_px) // 2
    shop = rng.random() < 0.35 and floors > 2
    for floor in range(floors):
        top = int(h - (floor + 1) * floor_px + 0.22 * floor_px)
        if top < 0:
            continue
        ground = floor == 0
        if ground and shop:
            y0, y1 = h - int(0.8 * floor_px), h - int(0.1 * floor_px)
            paint = FACADE_COLOURS[rng.integers(len(FACADE_COLOURS))]
            band = blend(rng, paint, (50, 60, 70)) * 0.8
            for image in (day, night):
                image[h - floor_px:y0] = band
                image[y0:y1, 8:w - 8] = glass * 0.8
                image[y0:y1, 8:w - 8:bay_px] = frame
            night[y0 + 2:y1 - 2, 10:w - 10] = (236, 214, 160)
            continue
        for bay in range(bays):
            x = left + bay * bay_px + (bay_px - win_w) // 2
            y1 = min(top + win_h, h)
            if ground and bay == bays // 2:
                y1 = h
            x0, x1 = max(x, 0), min(x + win_w, w)
            shade = rng.uniform(0.75, 1.3)
            lit = rng.random() < 0.4
            for image in (day, night):
                image[max(top - 2, 0):y1 + 2, max(x0 - 2, 0):x1 + 2] = frame
                image[y1:y1 + 4, max(x0 - 4, 0):x1 + 4] = colour * 0.68
                image[top:y1, x0:x1] = glass * shade
            half = (top + y1) // 2
            day[top:half, x0:x1] += 22
            if lit:
                warm = np.array((250, 205, 130), np.float32) * rng.uniform(0.65, 1.0)
                night[top:y1, x0:x1] = warm
            for image in (day, night):
                image[top:y1, (x0 + x1) // 2] = frame
                if win_h > 24:
                    image[top + win_h // 3, x0:x1] = frame
    for image in (day, night):
        image[:max(3, h // 60)] *= 0.72  # cornice
    return (np.clip(day, 0, 255).astype(np.uint8), np.clip(night, 0, 255).astype(np.uint8))


def house_size(seed: int, gable: bool) -> tuple[float, float, float]:
    """Return length along the road, depth and height of house ``seed`` in metres."""
    rng = np.random.default_rng([seed, 22])
    if gable:
        return (float(rng.choice([8, 10, 12])), float(rng.uniform(8, 10)),
                float(rng.choice([4, 6, 7])))
    return (float(rng.choice([9, 12, 15, 18])), float(rng.uniform(9, 13)),
            float(rng.choice([7, 10, 13, 16, 20])))


@lru_cache(maxsize=256)
def house_mips(seed: int, gable: bool, night: bool) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the mip levels of a house's front and of its end wall, finest first."""
    length, depth, height = house_size(seed, gable)
    return (mip_levels(facade(seed, length, height)[int(night)]),
            mip_levels(facade(seed + 500, depth, height)[int(night)]))


@lru_cache(maxsize=64)
def hedge_mips(seed: int) -> list[np.ndarray]:
    """Return the mip levels of a tileable strip of hedge, finest first."""
    rng = np.random.default_rng([seed, 31])
    h, w = 64, 256
    image = np.tile(blend(rng, (42, 74, 30), (70, 104, 44)), (h, w, 1))
    image *= 1 + 0.32 * noise_crop(rng, h, w, 0.5)[..., None]
    image *= np.linspace(1.3, 0.6, h)[:, None, None]
    image *= 1 + 0.06 * noise_crop(rng, h, w, 0.6)[..., None]
    return mip_levels(np.clip(image, 0, 255).astype(np.uint8))


def _premultiply(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    scaled = np.clip(rgb, 0, 255) * (alpha[..., None].astype(np.float32) / 255.0)
    return np.dstack([scaled.astype(np.uint8), alpha.astype(np.uint8)])


@lru_cache(maxsize=128)
def foliage_sprite(kind: str, seed: int) -> list[np.ndarray]:
    """
    Return a tree as mip levels of a 320 x 256 sprite, light from the upper left.

    ``kind``: 'broadleaf', 'conifer' or 'bush'. The sprite stands on its bottom row.
    """
    rng = np.random.default_rng([seed, 41])
    h, w = 320, 256
    rgb = np.zeros((h, w, 3), np.float32)
    alpha = np.zeros((h, w), np.uint8)
    leaf = blend(rng, (48, 78, 26), (98, 124, 52))
    if rng.random() < 0.14:
        leaf = blend(rng, (120, 84, 28), (168, 116, 46))  # autumn
    if kind != 'bush':
        bark = blend(rng, (58, 44, 34), (98, 84, 70))
        girth = rng.uniform(5, 9)
        trunk = np.array([[w / 2 - girth, h], [w / 2 + girth, h], [w / 2 + girth * 0.5, h * 0.4],
                          [w / 2 - girth * 0.5, h * 0.4]])
        cv2.fillPoly(alpha, [trunk.astype(np.int32)], 255)
        rgb[:] = bark * np.linspace(1.25, 0.6, w)[None, :, None]
    clumps = []
    if kind == 'conifer':
        for _ in range(420):
            t = rng.random() ** 0.75
            half = 8 + 92 * t
            x = w / 2 + rng.uniform(-half, half)
            clumps.append((x, 14 + t * 245 + 14 * abs(x - w / 2) / half, rng.uniform(5, 11),
                           (x - w / 2) / half, 1 - 1.2 * (t * 6 % 1)))
        leaf *= (0.72, 0.82, 0.86)
    else:
        centre_y, radius_y = (108, 96) if kind == 'broadleaf' else (228, 88)
        lobes = [(w / 2 + rng.uniform(-52, 52), centre_y + rng.uniform(-48, 48) *
                  (1.0 if kind == 'broadleaf' else 0.7), rng.uniform(40, 62)) for _ in range(8)]
        for _ in range(460):
            x0, y0, r0 = lobes[rng.integers(len(lobes))]
            angle, r = rng.uniform(0, 2 * np.pi), r0 * rng.random() ** 0.5
            x, y = x0 + r * np.cos(angle), y0 + r * np.sin(angle)
            clumps.append((x, y, rng.uniform(5, 12), (x - w / 2) / 110,
                           (centre_y - y) / radius_y + 0.35 * (y0 - y) / r0))
    clumps.sort(key=lambda c: c[4] - 0.5 * c[3] + rng.normal(0, 0.25))
    for x, y, radius, side, up in clumps:
        shade = 0.74 + 0.30 * up - 0.16 * side + rng.normal(0, 0.10)
        tint = leaf * max(shade, 0.25) * np.array((1 + 0.10 * up, 1 + 0.04 * up, 1.0))
        centre, axes = (int(x), int(y)), (int(radius), max(3, int(radius * rng.uniform(0.5, 0.9))))
        turn = float(rng.uniform(0, 180))
        cv2.ellipse(rgb, centre, axes, turn, 0, 360, tuple(float(c) for c in tint), -1)
        cv2.ellipse(alpha, centre, axes, turn, 0, 360, 255, -1)
    # Displace by fine noise so that the outline looks leafy rather than round.
    yy, xx = np.mgrid[0:h, 0:w].astype(np.float32)
    strength = np.clip((h * 0.97 - yy) / 30, 0, 1) if kind == 'bush' else (yy < h * 0.72) * 1.0
    xx += (strength * 3.4 * noise_crop(rng, h, w, 0.55)).astype(np.float32)
    yy += (strength * 3.4 * noise_crop(rng, h, w, 0.55)).astype(np.float32)
    rgb = cv2.remap(rgb, xx, yy, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
    alpha = cv2.remap(alpha, xx, yy, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
    rgb *= 1 + 0.13 * noise_crop(rng, h, w, 0.3)[..., None]
    return mip_levels(_premultiply(rgb, alpha))


def inflate(rgb: np.ndarray, alpha: np.ndarray, light: tuple[float, float] = (-0.5, -0.7),
            depth_px: float = 14.0) -> np.ndarray:
    """
    Shade a flat silhouette as if it were inflated; float32 RGB, light from the upper left.

    The height is a rounded distance transform; its slope against ``light`` (x right, y down)
    brightens or darkens by up to about 45 %.
    """
    inside = cv2.distanceTransform((alpha > 127).astype(np.uint8), cv2.DIST_L2, 5)
    height = np.sqrt(np.clip(inside / depth_px, 0, 1)) * depth_px
    height = cv2.GaussianBlur(height, (0, 0), depth_px / 6)
    slope_x = cv2.Sobel(height, cv2.CV_32F, 1, 0, ksize=3) / 8
    slope_y = cv2.Sobel(height, cv2.CV_32F, 0, 1, ksize=3) / 8
    shade = 1 + np.clip(0.75 * (slope_x * light[0] + slope_y * light[1]) * -1.0, -0.45, 0.45)
    return rgb.astype(np.float32) * shade[..., None]


# Pairs of colours between which garments are dyed.
CLOTHES = (((24, 28, 40), (70, 80, 104)), ((150, 34, 36), (186, 70, 60)),
           ((196, 196, 190), (232, 230, 224)), ((40, 66, 48), (88, 112, 84)),
           ((30, 62, 118), (92, 132, 180)), ((22, 22, 24), (62, 60, 60)),
           ((176, 136, 70), (214, 178, 104)), ((110, 84, 66), (156, 128, 104)),
           ((92, 52, 84), (142, 96, 130)), ((120, 122, 126), (160, 162, 164)))
TROUSERS = (((24, 30, 50), (62, 78, 112)), ((20, 20, 22), (50, 50, 54)),
            ((92, 80, 62), (150, 134, 106)), ((70, 72, 76), (104, 106, 110)))
SKIN = ((224, 182, 154), (198, 148, 116), (150, 104, 76), (98, 66, 48))


@lru_cache(maxsize=512)
def person_sprite(seed: int, phase: int, side_view: bool) -> list[np.ndarray]:
    """Return a walking person as mip levels of a 208 x 112 sprite; ``phase`` is 0 to 7."""
    rng = np.random.default_rng([seed, 51])
    h, w = 208, 112
    rgb = np.zeros((h, w, 3), np.uint8)
    alpha = np.zeros((h, w), np.uint8)
    skin = SKIN[rng.integers(len(SKIN))]
    top = tuple(int(c) for c in blend(rng, *CLOTHES[rng.integers(len(CLOTHES))]))
    legs = tuple(int(c) for c in blend(rng, *TROUSERS[rng.integers(len(TROUSERS))]))
    hair = tuple(int(c) for c in blend(rng, (18, 14, 10), (150, 112, 70)))
    shoes = (32, 30, 30)
    bulk, coat, bag = rng.uniform(0.85, 1.25), rng.random() < 0.35, rng.random() < 0.35
    cx, hip, shoulder, head = w // 2, 110, 46, 22
    swing = np.sin(phase * np.pi / 4)

    def limb(a: tuple[float, float], b: tuple[float, float], size: float,
             colour: tuple[int, ...]) -> None:
        p, q = (round(a[0]), round(a[1])), (round(b[0]), round(b[1]))
        for image, value in ((rgb, colour), (alpha, (255,))):
            cv2.line(image, p, q, value, max(1, round(size)), cv2.LINE_AA)

    reach = 26 if side_view else 5
    spread = 0 if side_view else 8
    far = tuple(int(c * 0.72) for c in top)
    limb((cx - spread * 2.2, shoulder + 8), (cx - spread * 2.6 - reach * 0.7 * swing, hip + 2),
         11 * bulk, far)
    for sign in (-1, 1):
        stride = sign * swing
        lift = 8 * max(0.0, -stride) if side_view else 3 * max(0.0, stride)
        knee = (cx + sign * spread + reach * 0.55 * stride + (4 if side_view else 0), hip + 42)
        foot = (cx + sign * spread * 1.1 + reach * stride, h - 9 - lift)
        shade = legs if sign > 0 else tuple(int(c * 0.8) for c in legs)
        limb((cx + sign * spread * 0.9, hip), knee, 17 * bulk, shade)
        limb(knee, foot, 13 * bulk, shade)
        limb(foot, (foot[0] + (9 if side_view else 0), foot[1] + 3), 9, shoes)
    wide = 13 if side_view else 20
    bottom = hip + (34 if coat else 6)
    torso = np.array([[cx - wide * bulk, shoulder], [cx + wide * bulk, shoulder],
                      [cx + wide * 0.95 * bulk, bottom], [cx - wide * 0.95 * bulk, bottom]])
    for image, value in ((rgb, top), (alpha, (255,))):
        cv2.fillPoly(image, [torso.astype(np.int32)], value)
        cv2.line(image, (round(cx - wide * bulk + 6), shoulder + 1),
                 (round(cx + wide * bulk - 6), shoulder + 1), value, 13, cv2.LINE_AA)
    hand = (cx + spread * 2.6 + reach * 0.8 * swing, hip + 2)
    limb((cx + spread * 2.2, shoulder + 8), hand, 11 * bulk,
         tuple(int(c * 0.9) for c in top))
    limb(hand, (hand[0], hand[1] + 4), 8, skin)
    if bag:
        limb((hand[0], hand[1] + 14), (hand[0], hand[1] + 26), 17, hair)
    limb((cx, head + 8), (cx, shoulder), 11, skin)
    for image, value in ((rgb, skin), (alpha, (255,))):
        cv2.ellipse(image, (cx, head), (11, 14), 0, 0, 360, value, -1, cv2.LINE_AA)
    cv2.ellipse(rgb, (cx, head - 2), (11, 13), 0, 180, 360, hair, -1, cv2.LINE_AA)
    shaded = inflate(rgb, alpha, depth_px=9.0)
    return mip_levels(_premultiply(shaded, alpha))
