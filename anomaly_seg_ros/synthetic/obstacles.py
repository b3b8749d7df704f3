# SPDX-License-Identifier: Apache-2.0
"""
Things that do not belong on a road: the anomalies of test drives.

No training scene contains any of them, and the training outliers of ``outliers.py`` share neither
a shape nor a texture with them: those are flat cut-outs with mathematical patterns, these are
solid things with the surfaces of real ones.
"""

from collections.abc import Callable
from functools import lru_cache, partial
import math

from anomaly_seg_ros.synthetic.camera import NEAR_M
from anomaly_seg_ros.synthetic.canvas import Canvas, OBSTACLE
from anomaly_seg_ros.synthetic.meshes import Mesh, MeshBuilder, paint_mesh, yaw_matrix
from anomaly_seg_ros.synthetic.solids import SOLIDS
from anomaly_seg_ros.synthetic.textures import blend, inflate, mip_levels, noise_crop
from anomaly_seg_ros.synthetic.world import Item
import cv2
import numpy as np

Rng = np.random.Generator


def _planks(rng: Rng) -> np.ndarray:
    image = np.full((128, 128, 3), blend(rng, (150, 108, 62), (196, 150, 96)), np.float32)
    boards = rng.integers(4, 7)
    for k in range(boards):
        rows = slice(k * 128 // boards, (k + 1) * 128 // boards)
        image[rows] *= rng.uniform(0.78, 1.12)
        image[rows.start:rows.start + 2] *= 0.35
    image *= 1 + 0.10 * noise_crop(rng, 128, 8, 0.6).repeat(16, 1)[..., None]
    for at in (0, 112):
        image[:, at:at + 16] *= 0.82
        image[:, at + (15 if at == 0 else 0)] *= 0.5
    cv2.line(image, (10, 118), (118, 10), (130, 92, 52), 12, cv2.LINE_AA)
    return image


def _cardboard(rng: Rng) -> np.ndarray:
    image = np.full((128, 128, 3), (186, 146, 100), np.float32) * rng.uniform(0.85, 1.1)
    image *= 1 + 0.035 * noise_crop(rng, 128, 128, 1.2)[..., None]
    image[:, 54:74] = image[:, 54:74] * 0.35 + np.array((214, 190, 140)) * 0.65
    image[60:62] *= 0.62
    x = int(rng.integers(6, 30))
    cv2.rectangle(image, (x, 84), (x + 30, 112), (226, 224, 216), -1)
    for k in range(4):
        cv2.line(image, (x + 4, 90 + 5 * k), (x + 26 - 3 * k, 90 + 5 * k), (60, 56, 52), 1)
    return image


def _upholstery(rng: Rng) -> np.ndarray:
    base = blend(rng, (70, 20, 40), (150, 110, 150))
    image = np.full((128, 128, 3), base, np.float32)
    image *= 1 + 0.08 * noise_crop(rng, 128, 128, 0.2)[..., None]
    for y in range(16, 128, 32):
        for x in range(16, 128, 32):
            cv2.circle(image, (x, y), 3, tuple(float(c) * 0.5 for c in base), -1)
    return image


def _plaid(rng: Rng) -> np.ndarray:
    a, b = rng.uniform(20, 235, 3), rng.uniform(20, 235, 3)
    image = np.full((128, 128, 3), a, np.float32)
    bands = np.zeros(128)
    for at, width in ((8, 20), (40, 6), (60, 30), (104, 8)):
        bands[at:at + width] = 0.5
    weave = (bands[:, None] + bands[None, :])[..., None]
    return image * (1 - weave) + b * weave


def _rust(rng: Rng) -> np.ndarray:
    spots = noise_crop(rng, 128, 128, 1.3)[..., None]
    metal = np.array(blend(rng, (60, 90, 70), (150, 150, 150)), np.float32)
    image = np.where(spots > 0.4, np.array((138, 70, 34), np.float32), metal)
    image[30:36] *= 0.6
    image[92:98] *= 0.6
    return image * (1 + 0.1 * noise_crop(rng, 128, 128, 0.5)[..., None])


def _enamel(rng: Rng) -> np.ndarray:
    image = np.full((128, 128, 3), rng.uniform(205, 240), np.float32)
    image[44:47] *= 0.45
    image[20:38, 12:17] = (90, 92, 96)
    image[54:84, 12:17] = (90, 92, 96)
    return image * np.linspace(1.05, 0.88, 128)[None, :, None]


def _quilt(rng: Rng) -> np.ndarray:
    base = blend(rng, (170, 160, 150), (226, 222, 226))
    y, x = np.mgrid[0:128, 0:128]
    relief = np.abs(np.sin((x + y) * math.pi / 32)) * np.abs(np.sin((x - y) * math.pi / 32))
    return (base * (0.72 + 0.35 * relief[..., None] ** 0.4)).astype(np.float32)


# Surfaces of flat-sided obstacles: name -> 128 x 128 RGB float32.
TEXTURES: dict[str, Callable[[Rng], np.ndarray]] = {
    'planks': _planks, 'cardboard': _cardboard, 'upholstery': _upholstery, 'plaid': _plaid,
    'rust': _rust, 'enamel': _enamel, 'quilt': _quilt}


@lru_cache(maxsize=128)
def texture_mips(name: str, seed: int) -> list[np.ndarray]:
    """Return an obstacle texture and its halvings, uint8 RGB."""
    image = TEXTURES[name](np.random.default_rng([seed, 81]))
    return mip_levels(np.clip(image, 0, 255).astype(np.uint8))


X, Y, Z = np.eye(3)


def _tyre(rng: Rng) -> Mesh:
    build = MeshBuilder()
    standing = rng.random() < 0.4
    outer, inner = 0.34, 0.13
    turns = np.arange(25) * (2 * math.pi / 24)
    rings = []
    for t in turns:
        if standing:
            out = math.cos(t) * Z + math.sin(t) * Y
            rings.append((out * outer + Y * (outer + inner), inner, out, X))
        else:
            out = math.cos(t) * X + math.sin(t) * Z
            rings.append((out * outer + Y * inner, inner, out, Y))

    def tread(k: int, j: int) -> tuple[float, ...]:
        base = 30 + (18 if (k + j) % 2 and j in (0, 9) else 0) + (16 if j in (2, 3) else 0)
        return base, base, base + 2

    build.tube(rings, 10, tread)
    return build.build()


def _barrel(rng: Rng) -> Mesh:
    build = MeshBuilder()
    body = np.array([(30, 90, 170), (190, 60, 30), (40, 130, 80), (216, 180, 40)]
                    [rng.integers(4)], float)
    heights = (0, .05, .28, .32, .58, .62, .85, .9)
    radii = (.29, .3, .3, .32, .32, .3, .3, .29)
    if rng.random() < 0.5:
        rings = [(Y * h, r, X, Z) for h, r in zip(heights, radii, strict=True)]
        lid = [(Y * .9, .29, X, Z), (Y * .895, .01, X, Z)]
    else:  # on its side
        rings = [(X * (h - .45) + Y * .32, r, Y, Z) for h, r in zip(heights, radii, strict=True)]
        lid = [(X * s * .45 + Y * .32, r, Y, Z) for s, r in ((1, .29), (1, .01))]
    build.tube(rings, 14, lambda k, j: tuple(body * (0.62 if k in (2, 4) else 1.0)))
    build.tube(lid, 14, lambda k, j: tuple(body * 0.8))
    return build.build()


def _cell(table: np.ndarray, row: int, column: int) -> tuple[float, ...]:
    return tuple(table[row, column])


def _log_pile(rng: Rng) -> Mesh:
    build = MeshBuilder()
    places = ((-.3, .17), (.08, .16), (-.1, .46)) if rng.random() < 0.6 else ((0.0, .2),)
    for z, y in places:
        radius, half = rng.uniform(0.14, 0.19), rng.uniform(0.7, 1.2)
        bark = blend(rng, (70, 50, 36), (110, 84, 60))
        rings = [(X * x + Y * y + Z * z, radius * rng.uniform(0.95, 1.05), Y, Z)
                 for x in (-half, -half / 3, half / 3, half)]
        tints = bark * rng.uniform(0.75, 1.15, (4, 9, 1))
        build.tube(rings, 9, partial(_cell, tints))
        for sign in (-1, 1):
            for share, colour in ((1.0, (206, 168, 112)), (0.6, (180, 138, 86)),
                                  (0.3, (160, 116, 70))):
                build.disc((sign * half, y, z), radius * share, sign, colour, 0.05 + .02 / share)
    return build.build()


def _boulder(rng: Rng) -> Mesh:
    build = MeshBuilder()
    size = rng.uniform(0.3, 0.7)
    rings, sides = 6, 10
    grid = np.zeros((rings + 1, sides + 1, 3))
    bumps = rng.uniform(0.78, 1.15, (rings + 1, sides))
    for k in range(rings + 1):
        polar = math.pi * k / rings
        for j in range(sides + 1):
            turn, r = 2 * math.pi * j / sides, size * bumps[k, j % sides]
            if k in (0, rings):
                r = size
            grid[k, j] = (1.15 * r * math.sin(polar) * math.cos(turn),
                          max(0.72 * r * math.cos(polar) + size * 0.42, 0.0),
                          r * math.sin(polar) * math.sin(turn))
    stone = blend(rng, (112, 106, 98), (156, 148, 138))
    for k in range(rings):
        for j in range(sides):
            quad = np.array([grid[k, j], grid[k, j + 1], grid[k + 1, j + 1], grid[k + 1, j]])
            build.face(quad, tuple(stone * rng.uniform(0.72, 1.12)), Y * size * 0.4)
    return build.build()


def _ball(rng: Rng) -> Mesh:
    build = MeshBuilder()
    radius = rng.uniform(0.3, 0.6)
    rings = [(Y * (radius - radius * math.cos(p)), max(radius * math.sin(p), 1e-3), X, Z)
             for p in np.linspace(0, math.pi, 9)]
    colours = [(232, 60, 50), (245, 245, 240), (40, 110, 220), (245, 245, 240), (250, 200, 40),
               (245, 245, 240)]
    build.tube(rings, 12, lambda k, j: colours[j // 2 % 6])
    return build.build()


def _chair(rng: Rng) -> Mesh:
    build = MeshBuilder()
    colour = blend(rng, (40, 20, 10), (220, 190, 160))
    dark = tuple(colour * 0.7)
    for x in (-.22, .18):
        for z in (-.2, .16):
            build.box((x, 0, z), (x + .05, .45, z + .05), dark)
    build.box((-.25, .44, -.24), (.25, .5, .24), tuple(colour))
    for y in (.62, .76, .9):
        build.box((-.24, y, .19), (.24, y + .08, .23), tuple(colour))
    for x in (-.24, .2):
        build.box((x, .5, .18), (x + .05, 1.0, .24), dark)
    return build.build()


def _table(rng: Rng) -> Mesh:
    build = MeshBuilder()
    wood = blend(rng, (110, 70, 40), (190, 140, 96))
    build.box((-.8, .70, -.45), (.8, .76, .45), tuple(wood))
    for x in (-.74, .66):
        for z in (-.4, .32):
            build.box((x, 0, z), (x + .08, .7, z + .08), tuple(wood * 0.8))
    return build.build()


def _pallet(rng: Rng) -> Mesh:
    build = MeshBuilder()
    wood = blend(rng, (140, 108, 70), (190, 158, 112))
    for z in (-.55, -.06, .43):
        build.box((-.6, 0, z), (.6, .1, z + .12), tuple(wood * 0.7))
    for x in np.arange(-.6, .55, .2):
        build.box((x, .1, -.55), (x + .13, .13, .55), tuple(wood * rng.uniform(0.8, 1.1)), .03)
    return build.build()


def _debris(rng: Rng) -> Mesh:
    build = MeshBuilder()
    for _ in range(int(rng.integers(7, 13))):
        at = rng.normal(0, 0.38, 2)
        a, b = rng.normal(0, 1, 3), rng.normal(0, 1, 3)
        a *= rng.uniform(0.3, 0.8) / np.linalg.norm(a)
        b *= rng.uniform(0.06, 0.22) / np.linalg.norm(b)
        a[1] = abs(a[1]) * 0.4
        centre = np.array([at[0], 0.12 + abs(rng.normal(0, 0.1)), at[1]])
        quad = np.array([centre - a - b, centre + a - b, centre + a + b, centre - a + b])
        quad[:, 1] = np.maximum(quad[:, 1], 0.01)
        colour = blend(rng, (120, 110, 100), (205, 190, 170)) * rng.uniform(0.5, 1.1)
        for side in (-0.3, 0.3):
            normal = np.cross(a, b)
            normal /= max(float(np.linalg.norm(normal)), 1e-6)
            build.face(quad, tuple(colour), centre + side * normal)
    return build.build()


MESHES: dict[str, Callable[[Rng], Mesh]] = {
    'tyre': _tyre, 'barrel': _barrel, 'log_pile': _log_pile, 'boulder': _boulder, 'ball': _ball,
    'chair': _chair, 'table': _table, 'pallet': _pallet, 'debris': _debris}

# Boxes with a texture on every side: texture, then the range of length, width, height in metres.
BOXES: dict[str, tuple[str, tuple[float, float, float], tuple[float, float, float]]] = {
    'crate': ('planks', (0.5, 0.5, 0.5), (1.1, 1.1, 1.0)),
    'carton': ('cardboard', (0.35, 0.4, 0.3), (0.7, 0.9, 0.7)),
    'suitcase': ('plaid', (0.3, 0.5, 0.5), (0.4, 0.7, 0.8)),
    'tank': ('rust', (0.7, 0.7, 0.6), (1.2, 1.3, 1.1)),
    'refrigerator': ('enamel', (0.6, 0.6, 1.2), (0.75, 0.8, 1.8)),
    'mattress': ('quilt', (1.2, 0.9, 0.22), (1.9, 1.4, 0.35)),
    'sofa': ('upholstery', (0.85, 1.6, 0.45), (1.0, 2.2, 0.5))}

# Animals seen from the side: body length and height, leg and neck proportions, colours.
ANIMALS: dict[str, tuple[float, float, float, float, tuple[int, int, int], str]] = {
    'deer': (1.5, 0.46, 0.58, 0.42, (146, 98, 56), 'antlers'),
    'cow': (2.0, 0.62, 0.42, 0.12, (228, 222, 214), 'patches'),
    'dog': (0.8, 0.44, 0.44, 0.22, (70, 50, 36), 'none'),
    'boar': (1.2, 0.60, 0.30, 0.00, (62, 54, 48), 'none'),
    'sheep': (1.1, 0.62, 0.32, 0.14, (222, 216, 200), 'wool'),
    'zebra': (1.8, 0.56, 0.48, 0.32, (236, 232, 226), 'stripes')}

# Thin legs and coats like trunks: what the bundled model finds least of. Drives leave them out
# unless they are asked for by name.
HARD = ('deer', 'zebra')

SHAPES: tuple[str, ...] = (*BOXES, *MESHES, *ANIMALS)


@lru_cache(maxsize=64)
def animal_sprite(kind: str, seed: int) -> list[np.ndarray]:
    """Return an animal from the side as mip levels of a 224 x 288 sprite, uint8 RGBA."""
    _, bulk, leg, neck, coat, marking = ANIMALS[kind]
    rng = np.random.default_rng([seed, 91])
    h, w = 224, 288
    alpha = np.zeros((h, w), np.uint8)
    length, thick = 150, int(100 * bulk)
    leg_px = int(170 * leg)
    back = h - leg_px - thick // 2
    x0 = 60
    for x, lean in ((x0 + 14, -3), (x0 + 30, 6), (x0 + length - 26, -6), (x0 + length - 8, 5)):
        knee = (x + lean, h - leg_px // 2)
        cv2.line(alpha, (x, back + thick // 4), knee, 255, max(8, thick // 5), cv2.LINE_AA)
        cv2.line(alpha, knee, (x + lean // 2, h - 5), 255, max(6, thick // 8), cv2.LINE_AA)
    cv2.ellipse(alpha, (x0 + length // 2, back), (length // 2 + 12, thick // 2), 0, 0, 360,
                255, -1)
    cv2.ellipse(alpha, (x0 + length - 12, back - 4), (thick // 2, thick // 2), 0, 0, 360, 255, -1)
    head = (x0 + length + 36, int(back - 190 * neck - 6))
    cv2.line(alpha, (x0 + length - 4, back - 8), head, 255, max(18, int(thick * 0.42)),
             cv2.LINE_AA)
    cv2.ellipse(alpha, (head[0] + 12, head[1] + 4), (28, 14), 22, 0, 360, 255, -1, cv2.LINE_AA)
    cv2.line(alpha, (head[0] - 6, head[1] - 6), (head[0] - 16, head[1] - 22), 255, 8, cv2.LINE_AA)
    cv2.line(alpha, (x0 - 6, back - 8), (x0 - 24, back + 26), 255, 7, cv2.LINE_AA)
    if marking == 'antlers':
        for a, b in (((-2, -10), (-10, -52)), ((-8, -36), (10, -56)), ((-6, -26), (-26, -44))):
            cv2.line(alpha, (head[0] + a[0], head[1] + a[1]), (head[0] + b[0], head[1] + b[1]),
                     255, 4, cv2.LINE_AA)
    rgb = np.full((h, w, 3), coat, np.float32) * rng.uniform(0.8, 1.15)
    rows = np.linspace(1.12, 0.72, h)[:, None, None]
    rgb *= rows
    if marking == 'patches':
        rgb[noise_crop(rng, h, w, 1.6) > 0.25] = (52, 38, 30)
    elif marking == 'stripes':
        x = np.arange(w)[None, :] + 9 * noise_crop(rng, h, w, 1.6)
        rgb[np.sin(x * 0.5) > 0.1] = (26, 24, 24)
    elif marking == 'wool':
        rgb *= 1 + 0.14 * noise_crop(rng, h, w, 0.7)[..., None]
    rgb *= 1 + 0.10 * noise_crop(rng, h, w, 0.3)[..., None]
    shaded = np.clip(inflate(rgb, alpha, depth_px=max(12.0, thick / 3)), 0, 255)
    shaded *= alpha[..., None].astype(np.float32) / 255
    return mip_levels(np.dstack([shaded.astype(np.uint8), alpha]))


def make_obstacle(rng: Rng, s: float, d: float, shape: str | None = None) -> Item:
    """Draw an obstacle at road coordinates s, d; ``shape`` is one of SHAPES, drawn when None."""
    if shape is None:
        group = (BOXES, MESHES, ANIMALS)[rng.choice(3, p=(.34, .36, .30))]
        shape = str(rng.choice([name for name in group if name not in HARD]))
    if shape in BOXES:
        low, high = BOXES[shape][1:]
        length, width, height = (float(v) for v in rng.uniform(low, high))
        size = (length, width, height)
    elif shape in ANIMALS:
        length = ANIMALS[shape][0] * rng.uniform(0.85, 1.15)
        size = (0.35 * length, length, length * 1.05)
    elif shape in MESHES:
        extent = {'log_pile': (0.8, 2.0, 0.6), 'table': (0.9, 1.6, 0.75),
                  'pallet': (1.1, 1.2, 0.15), 'debris': (1.4, 1.4, 0.3),
                  'chair': (.5, .5, 1.0)}.get(shape, (0.8, 0.9, 0.7))
        size = extent
    else:
        raise ValueError(f'shape must be one of {SHAPES}, got {shape!r}')
    return Item('obstacle', s, d, int(rng.integers(1 << 20)), size,
                yaw=float(rng.uniform(-0.9, 0.9)), variant=shape)


def make_solid(rng: Rng, s: float, d: float) -> Item:
    """Draw one of the solids that training scenes hold, at road coordinates s, d."""
    return Item('obstacle', s, d, int(rng.integers(1 << 20)), (0.9, 0.9, 0.8),
                yaw=float(rng.uniform(-math.pi, math.pi)), variant=str(rng.choice(list(SOLIDS))))


_ALL_MESHES = MESHES | SOLIDS


@lru_cache(maxsize=128)
def _mesh(shape: str, seed: int) -> Mesh:
    return _ALL_MESHES[shape](np.random.default_rng([seed, 95]))


def paint_obstacle(canvas: Canvas, item: Item) -> None:
    """Paint one obstacle; its pixels get the label OBSTACLE."""
    view, light = canvas.view, canvas.light
    foot = view.local(item.s, item.d)
    if view.to_camera(foot)[2] < 2 * NEAR_M:
        return
    turn = yaw_matrix(item.yaw + math.atan(view.tangent(item.s)))
    shape = item.variant
    if shape in _ALL_MESHES:
        paint_mesh(canvas, _mesh(shape, item.seed), foot, turn, OBSTACLE)
    elif shape in ANIMALS:
        tint = light.ambient_rgb + light.sun_rgb * (0.6 - 0.3 * light.sun[2])
        canvas.sprite(foot, item.size[1] * 224 / 288 * 1.25, animal_sprite(shape, item.seed), tint,
                      OBSTACLE, mirrored=item.seed % 2 == 0, sink=0.01)
    else:
        length, width, height = item.size
        boxes = [((0.0, 0.0, 0.0), (width, length, height))]
        if shape == 'sofa':
            boxes = [((0.0, 0.0, length * 0.36), (width, length * 0.26, height * 1.9)),
                     ((-width * .46, 0.0, 0.0), (width * .12, length, height * 1.35)),
                     ((width * .46, 0.0, 0.0), (width * .12, length, height * 1.35)),
                     ((0.0, 0.0, 0.0), (width * 0.8, length * 0.9, height))]
        elif shape == 'carton' and item.seed % 2:
            boxes.append(((width * 0.08, height, 0.0), (width * 0.7, length * 0.7, height * 0.7)))
        mips = texture_mips(BOXES[shape][0], item.seed)
        for (x, y, z), (wide, deep, tall) in boxes:
            _paint_box(canvas, foot + turn @ np.array([x, y, z]), turn, (wide, deep, tall), mips)


def _paint_box(canvas: Canvas, foot: np.ndarray, turn: np.ndarray,
               size: tuple[float, float, float], mips: list[np.ndarray]) -> None:
    wide, deep, tall = size
    right, ahead, up = turn[:, 0] * wide, turn[:, 2] * deep, np.array([0.0, tall, 0.0])
    corner = foot - right / 2 - ahead / 2
    eye = np.array([0.0, canvas.view.pose.height, 0.0])
    faces = ((corner + up, right, -up, -turn[:, 2]),
             (corner + right + ahead + up, -right, -up, turn[:, 2]),
             (corner + ahead + up, -ahead, -up, -turn[:, 0]),
             (corner + right + up, ahead, -up, turn[:, 0]),
             (corner + up + ahead, right, -ahead, np.array([0.0, 1.0, 0.0])))
    for origin, across, down, normal in faces:
        if ((origin - eye) * normal).sum() < 0:
            canvas.plane(origin, across, down, mips, 1.0, canvas.light.shade(normal), OBSTACLE)
