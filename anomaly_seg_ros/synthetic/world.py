# SPDX-License-Identifier: Apache-2.0
"""What stands where along a road, and under which sky: drawn at random from one generator."""

from dataclasses import dataclass, field
import math

from anomaly_seg_ros.synthetic.canvas import Lighting
from anomaly_seg_ros.synthetic.textures import blend, house_size
import cv2
import numpy as np

# The train ids that occur in the synthetic world; the other Cityscapes classes stay unused.
CLASSES_USED = (ROAD, SIDEWALK, BUILDING, POLE, SIGN, VEGETATION, TERRAIN, SKY, PERSON, CAR) = (
    0, 1, 2, 5, 7, 8, 9, 10, 11, 13)

WEATHERS = ('clear', 'golden', 'overcast', 'dusk', 'fog', 'rain')
SIDE_STYLES = ('urban', 'suburb', 'park', 'rural')

PROFILE_STEP_M = 0.02
PROFILE_HALF_M = 64.0
PROFILE_LEVELS = 8


@dataclass(frozen=True)
class Item:
    """
    One thing beside or on the road.

    ``s``, ``d`` in road coordinates at time 0 (for things with a length along the road: their
    near end); ``size`` is (along s, across d, height) in metres; ``speed`` metres per second along
    s; ``yaw`` radians against the road's direction.
    """

    kind: str
    s: float
    d: float
    seed: int = 0
    size: tuple[float, float, float] = (0.0, 0.0, 0.0)
    yaw: float = 0.0
    speed: float = 0.0
    variant: str = ''

    def at(self, time_s: float) -> float:
        """Return where along the road it is at a time, metres."""
        return self.s + self.speed * time_s


@dataclass(frozen=True)
class Ground:
    """
    The road's cross-section as tables over d, for one texture look-up per pixel.

    ``colour`` (levels, n, 3) RGB; ``noise`` (levels, n, 3) strength of fine, medium and coarse
    noise; ``marks`` (levels, n, 3) opacity of dashed lines, of slab joints and of zebra crossings.
    Level k is blurred for a pixel footprint of PROFILE_STEP_M * 2 ** k metres. ``labels`` (n,).
    """

    colour: np.ndarray
    noise: np.ndarray
    marks: np.ndarray
    labels: np.ndarray
    dash_period_m: float
    dash_length_m: float
    slab_m: float
    crossings_s: tuple[float, ...]
    mark_rgb: tuple[float, float, float]


@dataclass(frozen=True)
class World:
    """A road with everything along it."""

    heading_s: np.ndarray
    heading_rad: np.ndarray
    ground: Ground
    light: Lighting
    items: tuple[Item, ...]
    decals: tuple[tuple[float, np.ndarray, float], ...]
    skyline: np.ndarray
    skyline_label: int
    lanes: tuple[float, ...]
    lane_width_m: float
    kerbs_d: tuple[float, float]
    style: tuple[str, str] = field(default=('urban', 'urban'))


def make_light(rng: np.random.Generator, weather: str | None = None) -> Lighting:
    """Draw light, sky and air; ``weather`` is one of WEATHERS, drawn too when None."""
    if weather is None:
        weather = str(rng.choice(WEATHERS, p=(0.30, 0.17, 0.19, 0.12, 0.09, 0.13)))
    elif weather not in WEATHERS:
        raise ValueError(f'weather must be one of {WEATHERS}, got {weather!r}')
    azimuth = rng.uniform(-math.pi, math.pi)
    elevation = rng.uniform(0.5, 1.15)
    sun, ambient = np.array((0.78, 0.74, 0.66)), np.array((0.42, 0.47, 0.55))
    zenith, horizon = np.array((0.24, 0.44, 0.76)), np.array((0.76, 0.84, 0.92))
    cloud, fog, wet, rain, lamps = rng.uniform(0.1, 0.65), rng.uniform(8e-4, 3e-3), 0.0, 0.0, False
    if weather == 'golden':
        elevation = rng.uniform(0.14, 0.42)
        sun, ambient = np.array((0.90, 0.62, 0.36)), np.array((0.44, 0.43, 0.48))
        zenith, horizon = np.array((0.36, 0.48, 0.72)), np.array((0.98, 0.82, 0.62))
    elif weather == 'overcast':
        sun, ambient = np.full(3, rng.uniform(0.04, 0.16)), np.array((0.74, 0.77, 0.80))
        zenith, horizon = np.array((0.62, 0.66, 0.70)), np.array((0.82, 0.84, 0.86))
        cloud, fog = rng.uniform(0.8, 1.0), rng.uniform(2e-3, 6e-3)
    elif weather == 'dusk':
        elevation = rng.uniform(0.03, 0.12)
        sun, ambient = np.array((0.16, 0.09, 0.06)), np.array((0.29, 0.31, 0.42))
        zenith, horizon = np.array((0.13, 0.18, 0.36)), np.array((0.80, 0.52, 0.40))
        horizon = horizon * rng.uniform(0.7, 1.0)
        lamps = True
    elif weather == 'fog':
        sun, ambient = np.full(3, 0.05), np.array((0.76, 0.78, 0.80))
        zenith, horizon = np.array((0.76, 0.78, 0.80)), np.array((0.80, 0.81, 0.82))
        cloud, fog, lamps = 1.0, rng.uniform(0.011, 0.026), rng.random() < 0.5
    elif weather == 'rain':
        sun, ambient = np.full(3, 0.03), np.array((0.60, 0.63, 0.68))
        zenith, horizon = np.array((0.46, 0.50, 0.55)), np.array((0.68, 0.71, 0.74))
        cloud, fog, wet = 1.0, rng.uniform(4e-3, 9e-3), rng.uniform(0.6, 1.0)
        rain, lamps = rng.uniform(0.3, 1.0), True
    tint = rng.uniform(0.94, 1.06, 3)
    direction = np.array((math.cos(elevation) * math.sin(azimuth), math.sin(elevation),
                          math.cos(elevation) * math.cos(azimuth)))
    return Lighting(direction, sun * tint * rng.uniform(0.85, 1.1), ambient * tint, zenith * tint,
                    np.minimum(horizon * tint, 1.0), float(cloud), int(rng.integers(1 << 30)),
                    float(fog), float(wet), float(rain), bool(lamps))


def make_world(rng: np.random.Generator, length_m: float, weather: str | None = None,
               styles: tuple[str, str] | None = None, bank: int = 0, parking_share: float = 0.55,
               speed_mps: float = 9.0, people: float = 1.0) -> World:
    """
    Draw a road of ``length_m`` metres.

    Parameters
    ----------
    rng
        Source of all randomness.
    length_m
        Things are placed for s from -10 to ``length_m``.
    weather, styles
        One of WEATHERS, and one of SIDE_STYLES for the left and the right; drawn when None.
    parking_share
        Chance of cars parked along each side of a town's or suburb's street.
    bank
        Number of the bank of house fronts, trees and people, so that training and test worlds
        do not share any one of them.
    speed_mps
        The camera's speed; nothing in its direction is slower.
    people
        How many people are about, 1 for as many as in drives.

    """
    light = make_light(rng, weather)
    if styles is None:
        first = str(rng.choice(SIDE_STYLES, p=(0.38, 0.27, 0.15, 0.20)))
        same = rng.random() < 0.6 or first == 'rural'
        second = first if same else str(rng.choice(SIDE_STYLES[:3]))
        styles = (first, second)
    heading_s = np.arange(-40.0, length_m + 460.0, 5.0)
    curve = np.cumsum(rng.normal(0, 1, len(heading_s)))
    curve = cv2.GaussianBlur(curve[:, None], (0, 0), 9, borderType=cv2.BORDER_REPLICATE)[:, 0]
    curve = (curve - curve.mean()) / max(float(curve.std()), 1e-6)
    heading_rad = curve * rng.uniform(0.0, 0.11)

    lane = float(rng.uniform(3.1, 3.7))
    per_side = 2 if styles[0] == 'urban' and rng.random() < 0.25 else 1
    lanes = tuple((k + 0.5) * lane for k in range(-per_side, per_side))
    half = per_side * lane
    parking = tuple(2.1 if style in ('urban', 'suburb') and rng.random() < parking_share
                    else 0.0 for style in styles)
    kerbs = (-half - parking[0] - 0.3, half + parking[1] + 0.3)
    walks = tuple(float(rng.uniform(2.2, 4.2) if style == 'urban' else rng.uniform(1.5, 2.6))
                  if style != 'rural' else 0.0 for style in styles)
    crossings = tuple(float(s) for s in np.arange(rng.uniform(10, 60), length_m,
                                                  rng.uniform(60, 140))
                      ) if styles[0] != 'rural' and rng.random() < 0.75 else ()
    ground = _make_ground(rng, half, kerbs, walks, styles, parking, per_side, lane, crossings,
                          light)
    items: list[Item] = []
    for k, side in enumerate((-1, 1)):
        _fill_side(rng, items, side, styles[k], abs(kerbs[k]), walks[k], length_m, bank,
                   parking[k], crossings, people)
    _add_traffic(rng, items, lanes, length_m, crossings, bank, speed_mps)
    decals = _make_decals(rng, half, length_m)
    roughness = float(rng.uniform(0.01, 0.05))
    skyline = np.abs(cv2.GaussianBlur(rng.normal(0, 1, (720, 1)), (0, 0), rng.uniform(2, 9),
                                      borderType=cv2.BORDER_REFLECT)[:, 0])
    skyline = roughness * (0.35 + skyline / max(float(skyline.max()), 1e-6))
    return World(heading_s, heading_rad, ground, light, tuple(items), decals, skyline,
                 VEGETATION, lanes, lane, kerbs, styles)


def _make_ground(rng: np.random.Generator, half: float, kerbs: tuple[float, float],
                 walks: tuple[float, ...], styles: tuple[str, str], parking: tuple[float, ...],
                 per_side: int, lane: float, crossings: tuple[float, ...],
                 light: Lighting) -> Ground:
    count = int(2 * PROFILE_HALF_M / PROFILE_STEP_M)
    d = (np.arange(count) + 0.5) * PROFILE_STEP_M - PROFILE_HALF_M
    grey = rng.uniform(74, 128) * (1 - 0.34 * light.wet)
    asphalt = grey * rng.uniform((0.99, 0.985, 0.98), (1.01, 1.0, 1.03))
    colour = np.repeat(asphalt[None].astype(np.float32), count, 0)
    noise = np.tile(np.array((0.085, 0.05, 0.05), np.float32), (count, 1))
    marks = np.zeros((count, 3), np.float32)
    labels = np.full(count, ROAD, np.uint8)
    for centre in (np.arange(-per_side, per_side) + 0.5) * lane:  # wheel tracks
        for offset in (-0.8, 0.8):
            track = np.exp(-((d - centre - offset) / 0.32) ** 2)
            colour *= (1 - 0.07 * track)[:, None].astype(np.float32)
    white = np.array((228, 228, 222)) * rng.uniform(0.82, 1.05)
    mark_rgb = tuple(float(c) for c in white)

    def line(at: float, width: float, strength: float = 0.9) -> None:
        on = np.abs(d - at) < width / 2
        colour[on] = colour[on] * (1 - strength) + white * strength

    middle = rng.choice(['dashed', 'double', 'solid', 'none'], p=(0.55, 0.15, 0.18, 0.12))
    if per_side == 2 and middle == 'none':
        middle = 'double'
    if middle == 'dashed':
        marks[np.abs(d) < 0.065, 0] = 0.92
    elif middle == 'double':
        line(-0.14, 0.12)
        line(0.14, 0.12)
    elif middle == 'solid':
        line(0.0, 0.13)
    if per_side == 2:
        for at in (-lane, lane):
            marks[np.abs(d - at) < 0.065, 0] = 0.92
    if rng.random() < 0.7:
        for at, park in ((-half, parking[0]), (half, parking[1])):
            if park:
                marks[np.abs(d - at) < 0.06, 0] = 0.8
            else:
                line(at, 0.12, 0.85)
    on_road = np.abs(d) < half
    marks[on_road & (np.mod(d + 0.25, 1.0) < 0.5), 2] = 0.88
    slab = rng.uniform(128, 176) * rng.uniform((0.97, 0.95, 0.90), (1.05, 1.0, 1.0))
    slab *= 1 - 0.2 * light.wet
    grass = blend(rng, (74, 100, 38), (124, 132, 66))
    for k, side in enumerate((-1, 1)):
        edge, walk = abs(kerbs[k]), walks[k]
        out = d * side
        if styles[k] == 'rural':
            shoulder = out > edge
            colour[shoulder] = blend(rng, (120, 108, 88), (156, 144, 122))
            noise[shoulder] = (0.16, 0.10, 0.08)
            labels[shoulder] = TERRAIN
            edge += rng.uniform(0.4, 1.1)
        else:
            gutter = (out > edge - 0.28) & (out <= edge)
            colour[gutter] *= 0.86
            walkway = out > edge
            colour[walkway] = slab
            noise[walkway] = (0.06, 0.05, 0.06)
            labels[walkway] = SIDEWALK
            joints = walkway & (np.mod(out - edge, 0.6) < 0.035)
            colour[joints] *= 0.78
            marks[walkway, 1] = 0.22
            kerb = (out > edge) & (out < edge + 0.16)
            colour[kerb] = np.array((176, 174, 168)) * rng.uniform(0.8, 1.1)
            marks[kerb, 1] = 0.45
            face = (out > edge) & (out < edge + 0.05)
            colour[face] *= 0.7
            edge += walk
        if styles[k] != 'urban':
            verge = out > edge
            colour[verge] = grass * rng.uniform(0.9, 1.1)
            noise[verge] = (0.24, 0.16, 0.16)
            labels[verge] = TERRAIN
            marks[verge] = 0
            rim = verge & (out < edge + 0.25)
            colour[rim] = colour[rim] * 0.8 + np.array((18, 15, 10))
    levels = _levels(np.concatenate([colour, noise, marks], 1))
    colour, noise, marks = (np.ascontiguousarray(levels[..., k:k + 3]) for k in (0, 3, 6))
    return Ground(colour, noise, marks, labels, float(rng.uniform(6, 12)),
                  float(rng.uniform(2, 4)), float(rng.uniform(0.5, 1.6)), crossings,
                  (mark_rgb[0], mark_rgb[1], mark_rgb[2]))


def _levels(table: np.ndarray) -> np.ndarray:
    table = np.ascontiguousarray(table.T, np.float32)  # rows: OpenCV blurs along them faster
    return np.stack([(table if k == 0 else cv2.blur(table, (2 ** k, 1))).T
                     for k in range(PROFILE_LEVELS)])


def _fill_side(rng: np.random.Generator, items: list[Item], side: int, style: str, kerb: float,
               walk: float, length_m: float, bank: int, parking: float,
               crossings: tuple[float, ...], people: float) -> None:
    def pick(count: int) -> int:
        return int(bank * 1000 + rng.integers(count))

    far = length_m
    line = kerb + walk
    if style == 'urban':
        s = -rng.uniform(5, 25)
        while s < far:
            if rng.random() < 0.9:
                setback = line + rng.choice([0.0, 0.0, 0.6, 1.5])
                seed = pick(40)
                size = house_size(seed, False)
                length = size[0]
                items.append(Item('house', s, side * setback, seed, size))
            else:
                length = float(rng.uniform(5, 12))
                items.extend(Item('tree', s + rng.uniform(0, length),
                                  side * (line + rng.uniform(3, 9)), pick(16),
                                  (0, 0, float(rng.uniform(6, 10))), variant='broadleaf')
                             for _ in range(3))
                items.append(Item('hedge', s, side * (line + 0.3), pick(4),
                                  (length, 0.3, float(rng.uniform(1.2, 2.2)))))
            s += length + (rng.uniform(2, 5) if rng.random() < 0.12 else 0.0)
        if rng.random() < 0.55:
            kind = str(rng.choice(['broadleaf', 'broadleaf', 'conifer']))
            _row(rng, items, 'tree', side * (kerb + 0.9), far, rng.uniform(9, 18), pick(16), kind,
                 (4.5, 8.0))
    elif style == 'suburb':
        garden = line + rng.uniform(0.3, 1.5)
        s = -rng.uniform(5, 25)
        while s < far:
            length = float(rng.uniform(14, 24))
            seed = pick(24)
            items.append(Item('house', s + 3, side * (garden + rng.uniform(4, 8)), seed,
                              house_size(seed, True), variant='gable'))
            if rng.random() < 0.6:
                items.append(Item('hedge', s, side * garden, pick(4),
                                  (length - 3.0, 0.5, float(rng.uniform(0.9, 1.8))),
                                  variant='hedge'))
            for _ in range(rng.integers(0, 4)):
                kind = str(rng.choice(['broadleaf', 'conifer', 'bush']))
                items.append(Item('tree', s + rng.uniform(0, length),
                                  side * (garden + rng.uniform(1.5, 14)), pick(16),
                                  (0, 0, float(rng.uniform(1.2, 2.5) if kind == 'bush'
                                               else rng.uniform(4, 9))), variant=kind))
            s += length
        if rng.random() < 0.4:
            _row(rng, items, 'tree', side * (kerb + walk * 0.5), far, rng.uniform(11, 22),
                 pick(16), 'broadleaf', (4.0, 7.0))
    else:
        dense = rng.uniform(0.25, 0.7) if style == 'park' else rng.uniform(0.08, 0.35)
        for _ in range(int(dense * (far + 80))):
            kind = str(rng.choice(['broadleaf', 'conifer', 'bush'], p=(0.5, 0.25, 0.25)))
            spread = rng.uniform(1.5, 34) if style == 'park' else rng.uniform(4, 44)
            items.append(Item('tree', rng.uniform(-5, far + 60), side * (line + spread), pick(16),
                              (0, 0, float(rng.uniform(1.0, 2.6) if kind == 'bush'
                                           else rng.uniform(4.5, 12))), variant=kind))
        for s in np.arange(rng.uniform(20, 90), far, rng.uniform(60, 160)):
            seed = pick(24)
            items.append(Item('house', float(s), side * (line + rng.uniform(16, 30)), seed,
                              house_size(seed, True), variant='gable'))
        if style == 'rural':
            _row(rng, items, 'delineator', side * (kerb + 0.6), far, 25.0, 0, '', (1.0, 1.0), 0.0)
        elif rng.random() < 0.4:
            items.append(Item('hedge', 0.0, side * (line + 0.4), pick(4),
                              (far, 0.3, float(rng.uniform(0.8, 1.4)))))
    if style != 'rural':
        if rng.random() < 0.8:
            _row(rng, items, 'lamp', side * (kerb + 0.5), far, rng.uniform(22, 36), 0, '',
                 (6.0, 6.0), 1.0)
        per_metre = rng.uniform(0.0, 0.14) if style == 'urban' else rng.uniform(0.0, 0.06)
        for _ in range(rng.poisson(people * per_metre * (far + 10))):
            forward = 1.0 if rng.random() < 0.5 else -1.0
            items.append(Item('person', rng.uniform(3, far), side *
                              (kerb + rng.uniform(0.5, max(walk - 0.3, 0.8))), pick(40),
                              (0, 0, float(rng.uniform(1.5, 1.9))),
                              speed=forward * float(rng.uniform(0.9, 1.6))))
    items.extend(Item('sign', float(s), side * (kerb + rng.uniform(0.4, 0.8)),
                      int(rng.integers(1000)), (0, 0, float(rng.uniform(2.2, 2.8))))
                 for s in np.arange(rng.uniform(5, 40), far, rng.uniform(18, 60))
                 if rng.random() < 0.7)
    items.extend(Item('sign', s - 0.5, side * (kerb + 0.4), 4, (0, 0, 2.4))
                 for s in crossings if rng.random() < 0.7)
    if parking:
        s = -rng.uniform(0, 12)
        full = rng.uniform(0.2, 0.9)
        while s < far:
            s += rng.uniform(5.2, 6.6)
            if rng.random() < full and all(abs(s - c) > 7 for c in crossings):
                items.append(_vehicle(rng, s, side * (kerb - 1.3), 0.0, side < 0, parked=True))


def _row(rng: np.random.Generator, items: list[Item], kind: str, d: float, far: float,
         spacing: float, seed: int, variant: str, heights: tuple[float, float],
         jitter: float = 1.5) -> None:
    items.extend(Item(kind, float(s + rng.uniform(-jitter, jitter)), d, seed,
                      (0, 0, float(rng.uniform(*heights))), variant=variant)
                 for s in np.arange(rng.uniform(-5, spacing), far, spacing))


def _vehicle(rng: np.random.Generator, s: float, d: float, speed: float, facing_us: bool,
             parked: bool = False) -> Item:
    kind = str(rng.choice(['sedan', 'hatch', 'suv', 'van'], p=(0.32, 0.3, 0.2, 0.18)))
    return Item('vehicle', float(s), float(d), int(rng.integers(30)), yaw=math.pi if facing_us
                else 0.0, speed=speed, variant=kind)


def _add_traffic(rng: np.random.Generator, items: list[Item], lanes: tuple[float, ...],
                 length_m: float, crossings: tuple[float, ...], bank: int,
                 speed_mps: float) -> None:
    for d in lanes:
        ours = d > 0
        s = rng.uniform(12, 60) if ours else rng.uniform(5, 50)
        speed = speed_mps + rng.uniform(0, 2) if ours else rng.uniform(7, 13)
        while s < length_m + 100:
            items.append(_vehicle(rng, s, d + rng.normal(0, 0.12), speed if ours else -speed,
                                  not ours))
            s += rng.uniform(14, 70)
    items.extend(Item('person', s + rng.uniform(-1, 1), float(rng.uniform(-4, 4)),
                      int(bank * 1000 + rng.integers(40)), (0, 0, 1.75), variant='crossing')
                 for s in crossings if rng.random() < 0.4)


def _make_decals(rng: np.random.Generator, half: float, length_m: float
                 ) -> tuple[tuple[float, np.ndarray, float], ...]:
    """Repairs and manhole covers: (s, outline (n, 2) of s and d, brightness factor)."""
    decals = []
    for _ in range(int(length_m / 14)):
        s, d = rng.uniform(0, length_m), rng.uniform(-half + 0.6, half - 0.6)
        if rng.random() < 0.4:
            angles = np.arange(14) * (2 * math.pi / 14)
            outline = np.stack([s + 0.34 * np.cos(angles), d + 0.34 * np.sin(angles)], 1)
            factor = rng.uniform(0.5, 0.75)
        else:
            a, b = rng.uniform(0.5, 4.5), rng.uniform(0.25, 0.9)
            outline = np.array([(s, d - b), (s + a, d - b * rng.uniform(0.7, 1)), (s + a, d + b),
                                (s, d + b * rng.uniform(0.7, 1))])
            factor = rng.uniform(0.72, 0.92)
        decals.append((float(s), outline, float(factor)))
    return tuple(decals)
