# SPDX-License-Identifier: Apache-2.0
"""Small polygon models: boxes, lofted vehicles, and how they are lit and painted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
import math

from anomaly_seg_ros.synthetic.camera import NEAR_M
from anomaly_seg_ros.synthetic.canvas import Canvas
import cv2
import numpy as np

_CORNERS = 12

Rings = Sequence[tuple[np.ndarray, float, np.ndarray, np.ndarray]]
ColourAt = Callable[[int, int], Sequence[float] | np.ndarray]


@dataclass(frozen=True)
class Mesh:
    """
    Flat faces of one thing, in its own frame: x right, y up, z ahead, metres.

    ``faces`` (f, 12, 3): corners, the last one repeated to fill; ``normals`` (f, 3) unit, outward;
    ``colours`` (f, 3) RGB 0 to 255; ``bias`` (f,) metres by which a face counts as nearer, for
    windows and the like on top of other faces; ``gloss`` (f,) 0 to 1, share of mirrored sky;
    ``areas`` (f,) square metres;
    ``lamps``: (x, y, z, radius, r, g, b) of lights that shine when it is dark.
    """

    faces: np.ndarray
    normals: np.ndarray
    colours: np.ndarray
    bias: np.ndarray
    gloss: np.ndarray
    areas: np.ndarray
    lamps: tuple[tuple[float, ...], ...] = ()


class MeshBuilder:
    """Collects faces, then turns their normals outward."""

    def __init__(self) -> None:
        self._faces: list[np.ndarray] = []
        self._centres: list[np.ndarray] = []
        self._colours: list[tuple[float, ...]] = []
        self._bias: list[float] = []
        self._gloss: list[float] = []
        self._lamps: list[tuple[float, ...]] = []

    def face(self, corners: np.ndarray, colour: Sequence[float] | np.ndarray, centre: np.ndarray,
             bias: float = 0.0, gloss: float = 0.0) -> None:
        """Add a convex face of at most 12 corners (n, 3) to a body around ``centre``."""
        corners = np.asarray(corners, np.float64)
        padded = np.concatenate([corners, np.repeat(corners[-1:], _CORNERS - len(corners), 0)])
        self._faces.append(padded)
        self._centres.append(np.asarray(centre, np.float64))
        self._colours.append(tuple(float(c) for c in colour))
        self._bias.append(bias)
        self._gloss.append(gloss)

    def box(self, low: tuple[float, float, float], high: tuple[float, float, float],
            colour: tuple[float, ...], bias: float = 0.0, gloss: float = 0.0) -> None:
        """Add an axis-aligned box."""
        x0, y0, z0 = low
        x1, y1, z1 = high
        centre = np.array([(x0 + x1) / 2, (y0 + y1) / 2, (z0 + z1) / 2])
        for face in ([(x0, y0, z0), (x0, y1, z0), (x1, y1, z0), (x1, y0, z0)],
                     [(x0, y0, z1), (x1, y0, z1), (x1, y1, z1), (x0, y1, z1)],
                     [(x0, y0, z0), (x0, y0, z1), (x0, y1, z1), (x0, y1, z0)],
                     [(x1, y0, z0), (x1, y1, z0), (x1, y1, z1), (x1, y0, z1)],
                     [(x0, y1, z0), (x0, y1, z1), (x1, y1, z1), (x1, y1, z0)]):
            self.face(np.array(face), colour, centre, bias, gloss)

    def tube(self, rings: Rings, sides: int, colour_at: ColourAt) -> None:
        """
        Add a tube, open at its ends.

        ``rings`` are (centre, radius, axis u, axis v); ``colour_at`` gives the colour of the face
        behind a ring on a side.
        """
        angles = np.arange(sides + 1) * (2 * math.pi / sides)
        loops = [c + r * (np.cos(angles)[:, None] * u + np.sin(angles)[:, None] * v)
                 for c, r, u, v in rings]
        for k in range(len(loops) - 1):
            middle = (rings[k][0] + rings[k + 1][0]) / 2
            for j in range(sides):
                quad = np.array([loops[k][j], loops[k][j + 1], loops[k + 1][j + 1],
                                 loops[k + 1][j]])
                self.face(quad, colour_at(k, j), middle)

    def disc(self, centre: tuple[float, float, float], radius: float, side: float,
             colour: tuple[float, ...], bias: float = 0.0) -> None:
        """Add a 12-sided disc facing along x towards ``side``."""
        angles = np.arange(12) * (math.pi / 6)
        corners = np.stack([np.full(12, centre[0]), centre[1] + radius * np.sin(angles),
                            centre[2] + radius * np.cos(angles)], 1)
        self.face(corners, colour, np.array(centre) - (side, 0, 0), bias)

    def lamp(self, x: float, y: float, z: float, radius: float,
             colour: tuple[float, float, float]) -> None:
        """Add a light that shines when it is dark."""
        self._lamps.append((x, y, z, radius, *colour))

    def build(self) -> Mesh:
        """Return the mesh."""
        faces, centres = np.array(self._faces), np.array(self._centres)
        normals = np.cross(faces, np.roll(faces, -1, axis=1)).sum(1)  # Newell's method
        areas = np.linalg.norm(normals, axis=1) / 2
        normals /= np.maximum(2 * areas[:, None], 1e-9)
        inward = ((faces.mean(1) - centres) * normals).sum(1) < 0
        normals[inward] *= -1
        return Mesh(faces, normals, np.array(self._colours), np.array(self._bias),
                    np.array(self._gloss), areas, tuple(self._lamps))


def yaw_matrix(yaw: float) -> np.ndarray:
    """Return the rotation about the vertical that turns z ahead by ``yaw`` to the right."""
    c, s = math.cos(yaw), math.sin(yaw)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def paint_mesh(canvas: Canvas, mesh: Mesh, foot: np.ndarray, rotation: np.ndarray,
               label: int) -> None:
    """Paint a mesh standing at local point ``foot`` (3,), turned by ``rotation`` (3, 3)."""
    view, light = canvas.view, canvas.light
    world = mesh.faces @ rotation.T + foot
    normals = mesh.normals @ rotation.T
    eye = np.array([0.0, view.pose.height, 0.0])
    # Faces that turn away, or that would not fill a pixel, are left out.
    middle = float(view.to_camera(foot)[2])
    if middle < -8.0:
        return
    smallest = 0.8 * (max(middle, 1.0) / view.focal_px) ** 2
    keep = (((world[:, 0] - eye) * normals).sum(1) < 0) & (mesh.areas > smallest)
    if not keep.any():
        return
    world, normals, bias = world[keep], normals[keep], mesh.bias[keep]
    camera = view.to_camera(world)
    nearest, depth = camera[..., 2].min(1), camera[..., 2].mean(1)
    colours = mesh.colours[keep] * light.shade(normals)
    if mesh.gloss.any():
        rays = world.mean(1) - eye
        mirrored = rays - 2 * (rays * normals).sum(1, keepdims=True) * normals
        up = mirrored[:, 1] / np.maximum(np.linalg.norm(mirrored, axis=1), 1e-9)
        blend = np.clip(up * 2.5, 0, 1)[:, None]
        sky = 255 * (light.horizon_rgb * (1 - blend) + light.zenith_rgb * blend)
        sky = np.where(up[:, None] < 0, 55 * light.ambient_rgb, sky)
        share = mesh.gloss[keep, None]
        colours = colours * (1 - share) + sky * share
    distance = max(middle, NEAR_M)
    order = np.argsort(bias - depth)
    whole = nearest[order] > NEAR_M
    if whole.all():
        canvas.polygons(view.to_image(camera[order]), colours[order], label, distance)
    else:
        for k in order:
            canvas.polygon(view.project(world[k]), colours[k], label, distance)
    if light.lamps:
        for x, y, z, radius, *colour in mesh.lamps:
            point = rotation @ np.array([x, y, z]) + foot
            if (rotation @ np.array([0, 0, math.copysign(1, z)]))[2] < 0:
                canvas.lamp(point, radius, (colour[0], colour[1], colour[2]))


def shadow_polygon(canvas: Canvas, foot: np.ndarray, rotation: np.ndarray,
                   half: tuple[float, float], height: float) -> np.ndarray | None:
    """
    Return the image (n, 2) of the shadow a box casts on the ground, None without sun.

    ``half`` are the box's half extents along its x and z, ``height`` its height, metres.
    """
    sun = canvas.light.sun
    if canvas.light.sun_rgb.max() < 0.15 or sun[1] < 0.05:
        return None
    x, z = half
    base = np.array([(-x, 0, -z), (x, 0, -z), (x, 0, z), (-x, 0, z)]) @ rotation.T + foot
    offset = np.array([-sun[0], 0, -sun[2]]) / sun[1] * min(height, 14 * sun[1])
    ground = np.concatenate([base, base + offset])
    ground[:, 1] = 0.0
    hull = cv2.convexHull(ground[:, [0, 2]].astype(np.float32)).reshape(-1, 2)
    corners = np.stack([hull[:, 0], np.zeros(len(hull)), hull[:, 1]], 1).astype(np.float64)
    uv = canvas.view.project(corners)
    return uv if len(uv) >= 3 else None


CAR_PAINTS = ((196, 198, 202), (232, 232, 230), (38, 40, 44), (84, 88, 94), (150, 26, 30),
              (30, 58, 118), (58, 84, 70), (176, 150, 110), (120, 126, 132), (28, 92, 132),
              (204, 150, 40), (74, 34, 42))

# Stations along the length: z, belt height, half width, roof height (= belt: no cabin), metres.
_PROFILES = {
    'sedan': ((0.0, .66, .76, .66), (.14, .95, .86, .95), (.85, .99, .90, .99),
              (1.5, .97, .90, 1.43), (2.7, .95, .90, 1.46), (3.5, .95, .90, .95),
              (4.25, .80, .87, .80), (4.5, .56, .74, .56)),
    'hatch': ((0.0, .60, .76, .60), (.1, .95, .86, .97), (.5, .97, .88, 1.46),
              (1.2, .96, .88, 1.52), (2.35, .95, .88, 1.50), (3.1, .96, .88, .96),
              (3.75, .84, .86, .84), (4.0, .58, .74, .58)),
    'suv': ((0.0, .70, .80, .70), (.1, 1.1, .92, 1.12), (.45, 1.12, .95, 1.66),
            (1.4, 1.1, .95, 1.74), (2.7, 1.08, .95, 1.70), (3.45, 1.08, .95, 1.08),
            (4.35, .98, .92, .98), (4.6, .68, .8, .68)),
    'van': ((0.0, .60, .88, .60), (.06, 1.2, .94, 1.24), (.2, 1.2, .97, 2.05),
            (2.0, 1.2, .97, 2.12), (3.7, 1.18, .97, 2.05), (4.4, 1.16, .96, 1.16),
            (5.0, .96, .93, .96), (5.2, .6, .84, .6)),
}
_GLASS = (34, 40, 46)


def _inset(quad: np.ndarray, share: float, rise: float = 0.0) -> np.ndarray:
    centre = quad.mean(0)
    inner = centre + (quad - centre) * share
    inner[:, 1] += rise
    return inner


@lru_cache(maxsize=256)
def vehicle(kind: str, seed: int) -> tuple[Mesh, tuple[float, float, float]]:
    """
    Return a vehicle's mesh and its half width, half length and height in metres.

    ``kind``: 'sedan', 'hatch', 'suv' or 'van'. Ahead (+z) is its front; the
    origin is on the ground under its middle.
    """
    rng = np.random.default_rng([seed, 61])
    paint = np.array(CAR_PAINTS[rng.integers(len(CAR_PAINTS))]) * rng.uniform(0.85, 1.12)
    build = MeshBuilder()
    stations = np.array(_PROFILES[kind])
    length = stations[-1, 0]
    stations[:, 0] -= length / 2
    sill, tumble = (0.30, 0.80) if kind == 'suv' else (0.22, 0.80)
    if kind == 'van':
        tumble = 0.92
    centre = np.array([0.0, 0.8, 0.0])
    for a, b in pairwise(stations):
        roof_w = [s[2] * (tumble if s[3] > s[1] + 0.02 else 1.0) for s in (a, b)]
        for side in (-1.0, 1.0):
            low = np.array([(side * a[2], sill, a[0]), (side * b[2], sill, b[0]),
                            (side * b[2], b[1], b[0]), (side * a[2], a[1], a[0])])
            build.face(low, paint, centre, 0.0, 0.12)
            skirt = low.copy()
            skirt[2:, 1] = sill + 0.12
            build.face(skirt, paint * 0.4, centre, 0.02)
            if max(a[3] - a[1], b[3] - b[1]) > 0.03:
                high = np.array([low[3], low[2], (side * roof_w[1], b[3], b[0]),
                                 (side * roof_w[0], a[3], a[0])])
                build.face(high, paint * 0.8, centre, 0.0, 0.12)
                if kind != 'van' or a[0] > 0.8:
                    build.face(_inset(high, 0.80), _GLASS, centre, 0.05, 0.32)
        top = np.array([(-roof_w[0], a[3], a[0]), (roof_w[0], a[3], a[0]),
                        (roof_w[1], b[3], b[0]), (-roof_w[1], b[3], b[0])])
        build.face(top, paint, centre, 0.0, 0.18)
        if abs(b[3] - a[3]) > 0.28 and max(a[3], b[3]) > 1.3:
            build.face(_inset(top, 0.86), _GLASS, centre, 0.06, 0.42)
    for end, sign in ((stations[0], -1.0), (stations[-1], 1.0)):
        w, y, z = end[2], end[1], end[0]
        build.face(np.array([(-w, sill, z), (w, sill, z), (w, y, z), (-w, y, z)]), paint * 0.92,
                   centre, 0.0, 0.10)
        build.face(np.array([(-w, sill, z), (w, sill, z), (w, sill + .16, z),
                             (-w, sill + .16, z)]), (38, 38, 40), centre, 0.04)
        plate = sill + 0.22 if sign > 0 else sill + 0.3
        build.face(np.array([(-.26, plate, z), (.26, plate, z), (.26, plate + .11, z),
                             (-.26, plate + .11, z)]), (225, 225, 215), centre, 0.06)
        inner = stations[1] if sign < 0 else stations[-2]
        for side in (-1.0, 1.0):
            x0, x1 = side * w * 0.55, side * (w + inner[2]) / 2 * 1.0
            y0, y1 = (y - .02, inner[1] - .1) if sign < 0 else (y - .1, y + .08)
            lamp = np.array([(x0, y0, z + sign * .02), (x1, y0, z), (x1, y1, (z + inner[0]) / 2),
                             (x0, y1, (z + inner[0]) / 2 + sign * .02)])
            colour = (170, 22, 20) if sign < 0 else (236, 236, 226)
            build.face(lamp, colour, centre, 0.12, 0.05)
            build.lamp((x0 + x1) / 2, y, z, 0.30 if sign > 0 else 0.16,
                       (255., 240., 205.) if sign > 0 else (255., 36., 24.))
    build.box((-0.7, 0.13, -length / 2 + 0.15), (0.7, sill + 0.05, length / 2 - 0.15),
              (14, 14, 15), -9.0)
    radius = 0.36 if kind == 'suv' else 0.32
    for side in (-1.0, 1.0):
        for z in (stations[0, 0] + length * 0.19, stations[-1, 0] - length * 0.19):
            x = side * (stations[3, 2] + 0.01)
            build.disc((x, radius + .03, z), radius * 1.16, side, (16, 16, 17), 0.05)
            build.disc((x + side * .01, radius, z), radius, side, (30, 30, 32), 0.07)
            build.disc((x + side * .02, radius, z), radius * 0.6, side, (128, 130, 134), 0.09)
    half_w = float(stations[:, 2].max())
    return build.build(), (half_w, length / 2, float(stations[:, 3].max()))
