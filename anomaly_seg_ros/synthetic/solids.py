# SPDX-License-Identifier: Apache-2.0
"""
Solid things of no kind, placed in training scenes to teach what being unknown looks like.

Like the flat cut-outs of ``outliers.py`` this is outlier exposure (Hendrycks et al., ICLR 2019),
but lit, shaded and standing on the ground as everything else in the scene. They share no shape
with the obstacles of test drives (``obstacles.py``), which training never sees.
"""

from collections.abc import Callable
import math

from anomaly_seg_ros.synthetic.meshes import Mesh, MeshBuilder
import numpy as np

Rng = np.random.Generator
Colours = Callable[[int, int], np.ndarray]


def _colours(rng: Rng) -> Colours:
    """Return the colour of the face with a ring and a side: one, two or many, some greyish."""
    palette = rng.uniform(10, 240, (3, 3))
    if rng.random() < 0.5:  # greyish or brownish
        palette = palette.mean(1, keepdims=True) * rng.uniform((.9, .85, .7), (1.15, 1.0, 1.0))
    kind = rng.integers(4)
    jitter = rng.uniform(0.9, 1.1, (16, 16))

    def colour(ring: int, side: int) -> np.ndarray:
        index = (0, ring % 2, side % 2, (ring * 7 + side * 3) % 3)[kind]
        return np.clip(palette[index] * jitter[ring % 16, side % 16], 0, 255)
    return colour


def _loft(build: MeshBuilder, rings: list[tuple[np.ndarray, float]], axes: np.ndarray,
          sides: int, colours: Colours) -> None:
    """Add a body through rings (centre, radius), which lie in the plane of ``axes`` (2, 3)."""
    build.tube([(centre, radius, *axes) for centre, radius in rings], sides, colours)
    body = np.mean([centre for centre, _ in rings], axis=0)
    angles = np.arange(sides) * (2 * math.pi / sides)
    rim = np.cos(angles)[:, None] * axes[0] + np.sin(angles)[:, None] * axes[1]
    for k in (0, len(rings) - 1):
        centre, radius = rings[k]
        build.face(centre + radius * rim, colours(k + 1, 0), body)


def _upright(rng: Rng) -> np.ndarray:
    turn = rng.uniform(0, math.pi)
    return np.array([[math.cos(turn), 0, math.sin(turn)], [-math.sin(turn), 0, math.cos(turn)]])


def _prism(rng: Rng) -> Mesh:
    build, sides = MeshBuilder(), int(rng.choice([3, 5, 6, 7]))
    radius, length = rng.uniform(0.2, 0.7), rng.uniform(0.2, 1.5)
    cuts = np.sort(rng.uniform(0, 1, int(rng.integers(0, 4))))
    places = np.concatenate([[0.0], cuts, [1.0]]) * length
    if rng.random() < 0.5:
        rings = [(np.array([0.0, y, 0.0]), radius) for y in places]
        _loft(build, rings, _upright(rng), sides, _colours(rng))
    else:  # lying
        rings = [(np.array([x - length / 2, radius, 0.0]), radius) for x in places]
        turn = rng.uniform(0, math.pi)
        axes = np.array([[0, math.cos(turn), math.sin(turn)], [0, -math.sin(turn),
                                                               math.cos(turn)]])
        _loft(build, rings, axes, sides, _colours(rng))
    return build.build()


def _spire(rng: Rng) -> Mesh:
    build, sides = MeshBuilder(), int(rng.integers(3, 12))
    height, base = rng.uniform(0.3, 1.6), rng.uniform(0.2, 0.8)
    profile = [(0.0, base), (rng.uniform(0.2, 0.7), base * rng.uniform(0.3, 1.5)),
               (1.0, base * rng.uniform(0.02, 0.4))]
    lean = rng.normal(0, 0.15, 2)
    rings = [(np.array([lean[0] * y, height * y, lean[1] * y]), r) for y, r in profile]
    _loft(build, rings, _upright(rng), sides, _colours(rng))
    return build.build()


def _stack(rng: Rng) -> Mesh:
    build, bottom, radius = MeshBuilder(), 0.0, rng.uniform(0.3, 0.7)
    colours = _colours(rng)
    for _ in range(int(rng.integers(2, 5))):
        height = rng.uniform(0.08, 0.45)
        x, z = rng.normal(0, 0.12, 2)
        rings = [(np.array([x, y, z]), radius) for y in (bottom, bottom + height)]
        _loft(build, rings, _upright(rng), int(rng.choice([3, 5, 6, 8])), colours)
        bottom += height
        radius *= rng.uniform(0.5, 1.05)
    return build.build()


def _bars(rng: Rng) -> Mesh:
    """Return thin bars in all directions, which one sees through."""
    build, colours = MeshBuilder(), _colours(rng)
    reach, thick = rng.uniform(0.4, 1.0), rng.uniform(0.02, 0.07)
    for _ in range(int(rng.integers(4, 11))):
        ends = rng.uniform(-reach, reach, (2, 3)) * (1, 0.6, 1)
        ends[:, 1] += 0.6 * reach
        along = ends[1] - ends[0]
        along /= max(float(np.linalg.norm(along)), 1e-6)
        first = np.cross(along, rng.normal(0, 1, 3))
        first /= max(float(np.linalg.norm(first)), 1e-6)
        axes = np.stack([first, np.cross(along, first)])
        _loft(build, [(ends[0], thick), (ends[1], thick)], axes, 4, colours)
    return build.build()


def _worm(rng: Rng) -> Mesh:
    """Return a bent tube of changing thickness."""
    build, colours = MeshBuilder(), _colours(rng)
    count, radius, length = int(rng.integers(5, 9)), rng.uniform(0.08, 0.4), rng.uniform(0.5, 2.0)
    bend, rise = rng.normal(0, 0.5), rng.uniform(0, 0.8)
    rings = []
    for k in range(count):
        t = k / (count - 1) - 0.5
        thick = radius * rng.uniform(0.6, 1.2) * (1 - 1.6 * abs(t) ** 2)
        rings.append((np.array([t * length, radius + rise * (0.25 - t * t), bend * (t * t)]),
                      thick))
    axes = np.array([[0, 1.0, 0], [0, 0, 1.0]])
    _loft(build, rings, axes, int(rng.integers(5, 10)), colours)
    return build.build()


# Name -> mesh; disjoint from the shapes of ``obstacles.py``.
SOLIDS: dict[str, Callable[[Rng], Mesh]] = {
    'prism': _prism, 'spire': _spire, 'stack': _stack, 'bars': _bars, 'worm': _worm}
