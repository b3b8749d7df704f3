# SPDX-License-Identifier: Apache-2.0
"""Colour, label and depth images, and the shapes that are painted into all three at once."""

from dataclasses import dataclass, field

from anomaly_seg_ros.synthetic.camera import clip_near, NEAR_M, View
import cv2
import numpy as np

Colour = tuple[float, float, float]

# Label of obstacle pixels while a frame is being painted; becomes mask 1, label 255.
OBSTACLE = 254
_SHIFT = 4
_FAR_PX = 12000.0


@dataclass(frozen=True)
class Lighting:
    """
    Light, sky and air of a scene; colours are RGB factors, 1 = white paper in full light.

    ``sun`` is the unit vector towards the sun in local coordinates (X right, Y up, Z ahead).
    """

    sun: np.ndarray
    sun_rgb: np.ndarray
    ambient_rgb: np.ndarray
    zenith_rgb: np.ndarray
    horizon_rgb: np.ndarray
    cloud_cover: float
    cloud_seed: int
    fog_per_m: float
    wet: float
    rain: float
    lamps: bool

    def shade(self, normal: np.ndarray) -> np.ndarray:
        """Return RGB light factors (..., 3) on surfaces with unit normals (..., 3)."""
        facing = np.maximum(normal @ self.sun, 0.0)[..., None]
        sky = 0.72 + 0.28 * normal[..., 1:2]
        return self.sun_rgb * facing + self.ambient_rgb * sky


@dataclass(frozen=True)
class Lamp:
    """A light source in the image: pixels, metres away, RGB 0 to 255, row of its reflection."""

    u: float
    v: float
    depth_m: float
    radius_px: float
    colour: Colour
    mirrored_v: float


@dataclass
class Canvas:
    """One frame being painted, farthest things first."""

    view: View
    light: Lighting
    rgb: np.ndarray = field(init=False)
    labels: np.ndarray = field(init=False)
    depth_m: np.ndarray = field(init=False)
    lamps: list['Lamp'] = field(init=False)

    def __post_init__(self) -> None:
        """Allocate the images: black, unlabelled, infinitely near."""
        h, w = self.view.size_hw
        self.rgb = np.zeros((h, w, 3), np.uint8)
        self.labels = np.full((h, w), 255, np.uint8)
        self.depth_m = np.zeros((h, w), np.float32)
        self.lamps = []

    def polygon(self, uv: np.ndarray, colour: np.ndarray | Colour, label: int | None,
                depth_m: float = 0.0) -> None:
        """Fill the convex polygon ``uv`` (n, 2); ``label`` None paints colour alone."""
        if len(uv) < 3:
            return
        h, w = self.view.size_hw
        low, high = uv.min(0), uv.max(0)
        if high[0] < 0 or high[1] < 0 or low[0] > w or low[1] > h:
            return
        if low.min() < -_FAR_PX or high.max() > _FAR_PX:
            uv = np.clip(uv, -_FAR_PX, _FAR_PX)
        points = np.rint(uv * (1 << _SHIFT) - (1 << _SHIFT) / 2).astype(np.int32)
        r, g, b = (min(max(float(c), 0.0), 255.0) for c in colour)
        cv2.fillConvexPoly(self.rgb, points, (r, g, b), cv2.LINE_AA, _SHIFT)
        if label is not None:
            cv2.fillConvexPoly(self.labels, points, float(label), cv2.LINE_8, _SHIFT)
            cv2.fillConvexPoly(self.depth_m, points, float(depth_m), cv2.LINE_8, _SHIFT)

    def polygons(self, uv: np.ndarray, colours: np.ndarray, label: int, depth_m: float) -> None:
        """Fill convex polygons ``uv`` (k, n, 2) in order; ``colours`` (k, 3)."""
        h, w = self.view.size_hw
        low, high = uv.min((0, 1)), uv.max((0, 1))
        if high[0] < 0 or high[1] < 0 or low[0] > w or low[1] > h:
            return
        points = np.clip(uv, -_FAR_PX, _FAR_PX) * (1 << _SHIFT) - (1 << _SHIFT) / 2
        fixed = np.rint(points).astype(np.int32)
        for corners, colour in zip(fixed, np.clip(colours, 0, 255).tolist(), strict=True):
            cv2.fillConvexPoly(self.rgb, corners, colour, cv2.LINE_AA, _SHIFT)
            cv2.fillConvexPoly(self.labels, corners, label, cv2.LINE_8, _SHIFT)
            cv2.fillConvexPoly(self.depth_m, corners, depth_m, cv2.LINE_8, _SHIFT)

    def solid(self, points: np.ndarray, colour: np.ndarray | Colour, label: int | None) -> None:
        """Fill a flat convex polygon of local points (n, 3), clipped at the near plane."""
        camera = clip_near(self.view.to_camera(points))
        if len(camera) >= 3:
            self.polygon(self.view.to_image(camera), colour, label, float(camera[:, 2].mean()))

    def plane(self, origin: np.ndarray, across: np.ndarray, down: np.ndarray,
              mips: list[np.ndarray], repeat: float, tint: np.ndarray, label: int) -> None:
        """
        Paint a textured parallelogram.

        Parameters
        ----------
        origin, across, down
            Local point of the texture's top left corner, and the vectors to its top right and
            bottom left corners, metres.
        mips
            Texture and its halvings, uint8 RGB.
        repeat
            How often the texture repeats along ``across``.
        tint
            RGB light factors (3,).
        label
            Train id, or OBSTACLE.

        """
        corners = np.array([origin, origin + across, origin + across + down, origin + down])
        uv = self.view.project(corners)
        if len(uv) < 3:
            return
        h, w = self.view.size_hw
        u0, v0 = np.maximum(np.floor(uv.min(0)), 0).astype(int)
        u1, v1 = np.minimum(np.ceil(uv.max(0)) + 1, (w, h)).astype(int)
        if u0 >= u1 or v0 >= v1:
            return
        rotation, focal = self.view.rotation, self.view.focal_px
        frame = np.stack([across, down, origin - (0.0, self.view.pose.height, 0.0)], 1)
        camera = np.array([[focal, 0, self.view.centre_uv[0] - u0 - 0.5],
                           [0, focal, self.view.centre_uv[1] - v0 - 0.5],
                           [0, 0, 1]]) @ rotation @ frame
        if abs(np.linalg.det(camera)) < 1e-6:
            return
        span = max(np.ptp(np.clip(uv[:, 1], -h, 2 * h)), 1.0)
        level = int(np.clip(np.floor(np.log2(mips[0].shape[0] / span)), 0, len(mips) - 1))
        texture = mips[level]
        th, tw = texture.shape[:2]
        scale = np.array([[tw * repeat, 0, -0.5], [0, th, -0.5], [0, 0, 1]])
        inverse = np.linalg.inv(camera)
        patch = cv2.warpPerspective(
            texture, scale @ inverse, (int(u1 - u0), int(v1 - v0)),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE if repeat == 1.0 else cv2.BORDER_WRAP)
        mask = np.zeros((v1 - v0, u1 - u0), np.uint8)
        points = np.round((np.clip(uv, -_FAR_PX, _FAR_PX) - (u0, v0) - 0.5)
                          * (1 << _SHIFT)).astype(np.int32)
        cv2.fillConvexPoly(mask, points, 255, cv2.LINE_8, _SHIFT)
        inside = mask > 0
        table = np.clip(np.arange(256)[:, None] * tint, 0, 255).astype(np.uint8)
        patch = cv2.LUT(patch, np.ascontiguousarray(table[None]))
        area = (slice(v0, v1), slice(u0, u1))
        cv2.copyTo(patch, mask, self.rgb[area])
        self.labels[area][inside] = label
        # 1 / depth is linear over the image of a plane.
        cols = np.arange(u1 - u0, dtype=np.float32)[None, :]
        rows = np.arange(v1 - v0, dtype=np.float32)[:, None]
        a, b, c = inverse[2]
        inv_depth = np.maximum(a * cols + b * rows + c, 1e-4)
        cv2.copyTo((1.0 / inv_depth).astype(np.float32), mask, self.depth_m[area])

    def sprite(self, foot: np.ndarray, height_m: float, mips: list[np.ndarray],
               tint: np.ndarray, label: int, mirrored: bool = False, sink: float = 0.0,
               ragged: bool = False) -> None:
        """
        Paint an upright sprite whose bottom centre stands at local point ``foot`` (3,).

        ``mips`` are premultiplied uint8 RGBA, ``tint`` RGB light factors (3,), ``sink`` the
        fraction of the sprite below ``foot``. Pixels with alpha of at least 50 % get ``label``;
        for a ``ragged`` sprite, such as foliage, its outline is smoothed first, as a person
        labelling it would.
        """
        camera = self.view.to_camera(foot)
        z = float(camera[2])
        if z < 2 * NEAR_M:
            return
        u, v = self.view.to_image(camera)
        full_h, full_w = mips[0].shape[:2]
        height = height_m * self.view.focal_px / z
        width = height * full_w / full_h
        v += sink * height
        h, w = self.view.size_hw
        u0, u1 = max(int(u - width / 2), 0), min(int(u + width / 2) + 2, w)
        v0, v1 = max(int(v - height), 0), min(int(v) + 2, h)
        if u0 >= u1 or v0 >= v1 or height < 1.5:
            return
        level = int(np.clip(np.floor(np.log2(full_h / height) + 0.3), 0, len(mips) - 1))
        source = mips[level]
        sh, sw = source.shape[:2]
        kx, ky = sw / width, sh / height
        matrix = np.array([[kx, 0, (u0 + 0.5 - (u - width / 2)) * kx - 0.5],
                           [0, ky, (v0 + 0.5 - (v - height)) * ky - 0.5]])
        if mirrored:
            matrix[0] = [-kx, 0, sw - 1 - matrix[0, 2]]
        patch = cv2.warpAffine(source, matrix, (u1 - u0, v1 - v0),
                               flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                               borderMode=cv2.BORDER_CONSTANT)
        table = np.full((256, 4), 0, np.float64)
        table[:, :3] = np.arange(256)[:, None] * tint
        table[:, 3] = np.arange(256)
        patch = cv2.LUT(patch, np.clip(table, 0, 255).astype(np.uint8)[None])
        area = (slice(v0, v1), slice(u0, u1))
        alpha = patch[..., 3]
        keep = cv2.cvtColor(255 - alpha, cv2.COLOR_GRAY2RGB)
        under = cv2.multiply(self.rgb[area], keep, scale=1 / 255.0)
        self.rgb[area] = cv2.add(under, np.ascontiguousarray(patch[..., :3]))
        if ragged:
            reach = max(3, round(height / 45))
            alpha = cv2.blur(alpha, (reach, reach))
        solid = alpha > 127
        self.labels[area][solid] = label
        self.depth_m[area][solid] = z

    def lamp(self, point: np.ndarray, radius_m: float, colour: Colour) -> None:
        """Remember a light source at a local point, to be bloomed over the finished frame."""
        camera = self.view.to_camera(point)
        if camera[2] > 1.0:
            u, v = self.view.to_image(camera)
            below = self.view.to_image(self.view.to_camera(point * (1.0, -1.0, 1.0)))
            radius = radius_m * self.view.focal_px / camera[2]
            self.lamps.append(Lamp(float(u), float(v), float(camera[2]), float(radius), colour,
                                   float(below[1])))
