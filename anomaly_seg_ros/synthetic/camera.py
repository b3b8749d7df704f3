# SPDX-License-Identifier: Apache-2.0
"""
The camera over the road, and the coordinates everything is placed in.

Road coordinates: ``s`` metres along the centre line, ``d`` metres to its right, ``y`` metres above
the ground. Local coordinates of one frame: X right, Y up, Z ahead of the camera's foot, metres; a
point of the road frame lies at Z = s - s_camera and X = d - d_camera + bend(Z), where bend(Z) is
how far the centre line has turned right by then. Curved roads are thus sheared, not rotated, which
keeps drawing order simple and is exact to first order in the heading.
"""

from dataclasses import dataclass
import math

import numpy as np

NEAR_M = 0.35
FAR_M = 420.0
_TABLE_STEP_M = 2.0


@dataclass(frozen=True)
class Pose:
    """
    Where the camera is and how it looks at one moment.

    ``s``, ``d``, ``height`` in metres; ``yaw`` (right positive), ``pitch`` (up positive), ``roll``
    (clockwise positive) in radians against the road's tangent and the horizon.
    """

    s: float
    d: float
    height: float
    yaw: float = 0.0
    pitch: float = 0.0
    roll: float = 0.0


class View:
    """
    A pinhole camera at a pose over a road of given heading.

    Parameters
    ----------
    pose
        The camera's pose.
    size_hw
        Image height and width in pixels.
    focal_px
        Focal length in pixels.
    centre_v
        Row of the principal point; the horizon of a level camera.
    heading_s, heading_rad
        Samples of the centre line's heading against ``s``, increasing, right positive.

    """

    def __init__(self, pose: Pose, size_hw: tuple[int, int], focal_px: float, centre_v: float,
                 heading_s: np.ndarray, heading_rad: np.ndarray) -> None:
        self.pose = pose
        self.size_hw = size_hw
        self.focal_px = focal_px
        self.centre_uv = (size_hw[1] / 2.0, centre_v)
        cy, sy = math.cos(pose.yaw), math.sin(pose.yaw)
        cp, sp = math.cos(pose.pitch), math.sin(pose.pitch)
        cr, sr = math.cos(pose.roll), math.sin(pose.roll)
        # Rows: camera x (right), y (down), z (forward) in local X, Y, Z.
        yaw = np.array([[cy, 0, -sy], [0, -1, 0], [sy, 0, cy]])
        pitch = np.array([[1, 0, 0], [0, cp, sp], [0, -sp, cp]])
        roll = np.array([[cr, sr, 0], [-sr, cr, 0], [0, 0, 1]])
        self.rotation = roll @ pitch @ yaw
        self.bend_z = np.arange(-20.0, FAR_M + _TABLE_STEP_M, _TABLE_STEP_M)
        own = np.interp(pose.s, heading_s, heading_rad)
        slope = np.tan(np.interp(pose.s + self.bend_z, heading_s, heading_rad) - own)
        steps = 0.5 * (slope[1:] + slope[:-1]) * _TABLE_STEP_M
        bend = np.concatenate([[0.0], np.cumsum(steps)])
        self.bend = bend - np.interp(0.0, self.bend_z, bend)
        self.slope = slope

    def local(self, s: float, d: float, y: float = 0.0) -> np.ndarray:
        """Return the local X, Y, Z of a point given in road coordinates."""
        z = s - self.pose.s
        return np.array([d - self.pose.d + np.interp(z, self.bend_z, self.bend), y, z])

    def tangent(self, s: float) -> float:
        """Return the slope dX/dZ of the road at ``s``, relative to the camera's place."""
        return float(np.interp(s - self.pose.s, self.bend_z, self.slope))

    def to_camera(self, points: np.ndarray) -> np.ndarray:
        """Rotate local points (..., 3) into the camera frame (x right, y down, z forward)."""
        return (points - (0.0, self.pose.height, 0.0)) @ self.rotation.T

    def to_image(self, camera: np.ndarray) -> np.ndarray:
        """Project camera-frame points (..., 3) with z > 0 to pixels (..., 2): u right, v down."""
        return camera[..., :2] / camera[..., 2:] * self.focal_px + self.centre_uv

    def project(self, points: np.ndarray) -> np.ndarray:
        """Project local points (n, 3) of one polygon, clipped at the near plane: pixels (m, 2)."""
        camera = clip_near(self.to_camera(points))
        return self.to_image(camera) if len(camera) else np.zeros((0, 2))

    def rays(self, row0: int = 0) -> tuple[np.ndarray, ...]:
        """
        Return the local X, Y, Z components of every pixel's ray from ``row0`` down.

        Three float32 arrays (H - row0, W); the ray of the optical axis has length 1.
        """
        h, w = self.size_hw
        x = ((np.arange(w) + 0.5 - self.centre_uv[0]) / self.focal_px)[None, :]
        y = ((np.arange(row0, h) + 0.5 - self.centre_uv[1]) / self.focal_px)[:, None]
        r = self.rotation
        return tuple((x * r[0, k] + (y * r[1, k] + r[2, k])).astype(np.float32)
                     for k in range(3))

    def horizon_rows(self) -> tuple[float, float]:
        """Return the horizon's row at the left and at the right image border, in pixels."""
        r, rows = self.rotation, []
        for u in (0.0, float(self.size_hw[1])):
            x = (u - self.centre_uv[0]) / self.focal_px
            rows.append(-(x * r[0, 1] + r[2, 1]) / r[1, 1] * self.focal_px + self.centre_uv[1])
        return rows[0], rows[1]


def clip_near(camera: np.ndarray) -> np.ndarray:
    """Clip a polygon (n, 3) in the camera frame at z = NEAR_M (Sutherland and Hodgman 1974)."""
    ahead = camera[:, 2] >= NEAR_M
    if ahead.all():
        return camera
    if not ahead.any():
        return np.zeros((0, 3))
    kept: list[np.ndarray] = []
    for k in range(len(camera)):
        a, b = camera[k - 1], camera[k]
        if ahead[k - 1] != ahead[k]:
            kept.append(a + (b - a) * ((NEAR_M - a[2]) / (b[2] - a[2])))
        if ahead[k]:
            kept.append(b)
    return np.array(kept)
