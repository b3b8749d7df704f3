# SPDX-License-Identifier: Apache-2.0
"""Paint one moment of a synthetic world: sky, ground, everything on it, air, and the camera."""

from functools import lru_cache
import math

from anomaly_seg_ros.synthetic import world as w_
from anomaly_seg_ros.synthetic.camera import FAR_M, Pose, View
from anomaly_seg_ros.synthetic.canvas import Canvas, OBSTACLE
from anomaly_seg_ros.synthetic.meshes import paint_mesh, shadow_polygon, vehicle, yaw_matrix
from anomaly_seg_ros.synthetic.obstacles import paint_obstacle
from anomaly_seg_ros.synthetic.textures import (
    foliage_sprite, hedge_mips, house_mips, noise_tile, person_sprite)
from anomaly_seg_ros.synthetic.world import Item, World
import cv2
import numpy as np

UP = np.array([0.0, 1.0, 0.0])
# Distance from which things are drawn, metres; thin ones would be under a pixel or two before.
_SEEN_TO_M = {'house': 260.0, 'tree': 260.0, 'lamp': 95.0, 'sign': 95.0,
              'delineator': 70.0, 'person': 110.0}
# Thin and small things keep their label up to here; beyond, they are a few pixels of a frame.
_LABELLED_TO_M = {'lamp': 40.0, 'sign': 45.0, 'delineator': 30.0, 'person': 45.0,
                  'obstacle': 40.0}
# Label, while painting, of obstacles further away than that; void in the mask.
_FAR_OBSTACLE = 253
_TURN = np.arange(12) * (math.pi / 6)
_CIRCLE = np.stack([np.cos(_TURN), np.zeros(12), np.sin(_TURN)], 1)
_SQUIRCLE = np.sign(_CIRCLE) * np.abs(_CIRCLE) ** 0.5


def render(world: World, view: View, time_s: float, noise_seed: tuple[int, ...]
           ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Paint the world as the camera sees it.

    Parameters
    ----------
    world
        The road and everything along it.
    view
        The camera at its pose.
    time_s
        Time, which moves vehicles and people.
    noise_seed
        Seeds sensor noise, rain and exposure, and nothing else.

    Returns
    -------
    tuple
        Image uint8 RGB (H, W, 3); labels uint8 (H, W), train ids, 255 on obstacles, on small
        things far away and where no class fits; mask uint8 (H, W): 0 in-distribution, 1 obstacle,
        255 void, which is the pixel around an obstacle and obstacles over 40 m away.

    """
    canvas = Canvas(view, world.light)
    _paint_sky(canvas, world)
    _paint_ground(canvas, world, time_s)
    for _, item in sorted(_visible(world, view, time_s), key=lambda pair: -pair[0]):
        limit = _LABELLED_TO_M.get(item.kind)
        if limit is None or item.at(time_s) - view.pose.s <= limit:
            _PAINTERS[item.kind](canvas, world, item, time_s)
            continue
        # Too far to be outlined by hand: painted, but left without a label.
        before = canvas.labels.copy()
        _PAINTERS[item.kind](canvas, world, item, time_s)
        canvas.labels[canvas.labels != before] = (
            _FAR_OBSTACLE if item.kind == 'obstacle' else 255)
    image = _photograph(canvas, np.random.default_rng([*noise_seed, 71]))
    far = canvas.labels == _FAR_OBSTACLE
    obstacle = (canvas.labels == OBSTACLE).astype(np.uint8)
    mask = obstacle
    if obstacle.any():
        grown = cv2.dilate(obstacle, np.ones((3, 3), np.uint8))
        mask = np.where(grown > obstacle, np.uint8(255), obstacle)
        canvas.labels[obstacle > 0] = 255
    canvas.labels[far] = 255
    mask[far] = 255
    _unlabel_specks(canvas.labels)
    return image, canvas.labels, mask


def _unlabel_specks(labels: np.ndarray) -> None:
    """
    Take the label off far things of a few pixels, which nobody would outline by hand.

    Works on components of poles, signs, people and cars smaller than 0.015 % of the picture.
    """
    smallest = labels.size * 0.00015
    for thing in (w_.POLE, w_.SIGN, w_.PERSON, w_.CAR):
        _, index, stats, _ = cv2.connectedComponentsWithStats(
            (labels == thing).view(np.uint8), connectivity=8)
        small = stats[:, cv2.CC_STAT_AREA] < smallest
        small[0] = False
        if small.any():
            labels[small[index]] = 255


def _visible(world: World, view: View, time_s: float) -> list[tuple[float, Item]]:
    """Return (distance of the far end, item) for what can be in view."""
    here = view.pose.s
    found = []
    for item in world.items:
        near = item.at(time_s) - here
        far = near + item.size[0]
        if far > -6 and near < _SEEN_TO_M.get(item.kind, 170.0):
            found.append((far, item))
    return found


def _sky_colour(canvas: Canvas, rays: tuple[np.ndarray, ...]) -> np.ndarray:
    """Return the sky along rays, uint8 RGB: gradient, glow about the sun, clouds."""
    light = canvas.light
    x, y, z = rays
    inverse = 1 / np.sqrt(x * x + y * y + z * z)
    up = np.clip(y * inverse, 0.0, 1.0)
    blend = np.minimum(np.sqrt(up) * np.float32(1.25), 1)
    sun = light.sun.astype(np.float32)
    toward = np.clip((x * sun[0] + y * sun[1] + z * sun[2]) * inverse, 0, 1)
    wide = toward * toward
    wide *= wide
    wide *= wide  # power 8
    tight = wide ** np.float32(11)
    glow = np.float32(0.4) * wide + np.float32(0.9) * tight + 2.0 * (toward > 0.9993)
    glow *= np.float32(1 - 0.8 * light.cloud_cover)
    plane = inverse / (np.maximum(up, 0) + np.float32(0.06)) * np.float32(70)
    cloud = cv2.remap(noise_tile(4 + light.cloud_seed % 4, 512, 1.65),
                      x * plane + np.float32(light.cloud_seed % 511),
                      z * plane + np.float32(light.cloud_seed % 379),
                      cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    cover = np.clip((cloud + np.float32(2.2 * light.cloud_cover - 1.0)) * np.float32(0.9), 0, 1)
    cover *= np.clip(up * 9, 0.12, 1) * np.float32(0.9)
    mix = np.clip(np.float32(0.9) - np.float32(0.28) * cloud, 0, 1)
    planes = []
    for c in range(3):
        low, high = light.horizon_rgb[c], light.zenith_rgb[c]
        sky = blend * np.float32(high - low) + np.float32(low)
        sky += glow * np.float32(light.sun_rgb[c])
        bright = light.ambient_rgb[c] * 1.12 + 0.42 * light.sun_rgb[c]
        shadow = light.ambient_rgb[c] * 0.92 + 0.08 * light.sun_rgb[c]
        sky += (mix * np.float32(bright - shadow) + np.float32(shadow) - sky) * cover
        planes.append(np.clip(sky * np.float32(255), 0, 255).astype(np.uint8))
    return cv2.merge(planes)


def _paint_sky(canvas: Canvas, world: World) -> None:
    view = canvas.view
    h, w = view.size_hw
    left, right = view.horizon_rows()
    # Down to where the ground begins, FAR_M away.
    gap = view.pose.height * view.focal_px / FAR_M
    bottom = int(np.clip(max(left, right) + gap + 3, 1, h))
    # The sky is smooth: half the resolution is enough.
    small = View(view.pose, ((bottom + 1) // 2, (w + 1) // 2), view.focal_px / 2,
                 view.centre_uv[1] / 2, world.heading_s, world.heading_rad)
    sky = _sky_colour(canvas, small.rays())
    sky = cv2.resize(sky, (w, bottom), interpolation=cv2.INTER_LINEAR)
    canvas.rgb[:bottom] = sky
    canvas.labels[:bottom] = w_.SKY
    # Hazy tree line or roofs far away, by compass direction.
    heading = float(np.interp(view.pose.s, world.heading_s, world.heading_rad))
    cols = np.arange(0, w + 8, 4)
    azimuth = np.arctan((cols - view.centre_uv[0]) / view.focal_px) + view.pose.yaw + heading
    place = np.mod(azimuth / (2 * math.pi) * len(world.skyline) * 4, len(world.skyline))
    lift = np.interp(place, np.arange(len(world.skyline) + 1),
                     np.append(world.skyline, world.skyline[0]))
    horizon = left + (right - left) * cols / w
    top = horizon - lift * view.focal_px
    ridge = np.concatenate([np.stack([cols, top], 1),
                            np.stack([cols[::-1], horizon[::-1] + 4], 1)])
    haze = 1 - math.exp(-world.light.fog_per_m * 500)
    forest = np.array((66, 86, 60)) * (world.light.ambient_rgb + 0.4 * world.light.sun_rgb)
    colour = forest * (1 - haze) + 255 * world.light.horizon_rgb * haze
    points = np.round(ridge * 16).astype(np.int32)
    cv2.fillPoly(canvas.rgb, [points], tuple(float(c) for c in colour), cv2.LINE_AA, 4)
    if haze < 0.93:
        cv2.fillPoly(canvas.labels, [points], world.skyline_label, cv2.LINE_8, 4)


def _paint_ground(canvas: Canvas, world: World, time_s: float) -> None:
    view, ground, light = canvas.view, world.ground, canvas.light
    h = view.size_hw[0]
    row0 = int(np.clip(math.floor(min(view.horizon_rows())), 0, h))
    if row0 >= h - 1:
        return
    x, y, z = view.rays(row0)
    reach = np.float32(view.pose.height) / np.maximum(-y, np.float32(view.pose.height / 2000))
    dist = z * reach
    below = (y < 0) & (dist > 0.2) & (dist < FAR_M)
    np.clip(dist, 0.2, FAR_M, out=dist)
    across = x * reach
    table = np.stack([view.bend, view.slope]).astype(np.float32)
    step = float(view.bend_z[1] - view.bend_z[0])
    place = (dist - np.float32(view.bend_z[0])) / np.float32(step)
    zero = np.zeros_like(place)
    bend = cv2.remap(table[:1], place, zero, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    slope = cv2.remap(table[1:], place, zero, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    d = across - bend + np.float32(view.pose.d)
    s = dist + np.float32(view.pose.s)
    along_px = dist * dist / np.float32(view.focal_px * view.pose.height)
    across_px = dist / np.float32(view.focal_px) + np.abs(slope) * along_px
    map_d = (d + np.float32(w_.PROFILE_HALF_M)) / np.float32(w_.PROFILE_STEP_M) - np.float32(0.5)
    np.clip(map_d, 0, ground.labels.size - 1, out=map_d)
    level = cv2.log(across_px / np.float32(w_.PROFILE_STEP_M)) * np.float32(1 / math.log(2))
    np.clip(level, 0, w_.PROFILE_LEVELS - 1, out=level)

    def look_up(tables: np.ndarray) -> np.ndarray:
        # One table row per level: the look-up interpolates between levels as well.
        return cv2.remap(tables, map_d, level, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)

    strength = cv2.split(look_up(ground.noise))
    marks = cv2.split(look_up(ground.marks))
    grain = np.ones_like(dist)
    for k, (scale, beta) in enumerate(((55.0, 0.25), (9.0, 1.0), (1.1, 1.3))):
        stretch = 0.6 if k else 1.0
        sampled = _wrapped(noise_tile(k, 512, beta), d, s, scale, scale * stretch)
        fade = along_px * np.float32(scale * stretch / 3)
        fade *= fade
        fade += 1
        sampled *= strength[k]
        sampled /= fade
        grain += sampled
    width = np.maximum(along_px, np.float32(0.02))

    def pulse(period: float, on: float) -> np.ndarray:
        # Share of the pixel's footprint covered by a pulse train along s.
        soft = _modulo(s, period)
        soft -= period / 2
        np.abs(soft, out=soft)
        soft -= on / 2 + 0.5 * width
        soft /= -width
        np.clip(soft, 0, 1, out=soft)
        mean = np.clip(width / np.float32(period) - np.float32(0.5), 0, 1)
        soft += (np.float32(on / period) - soft) * mean
        return soft

    paint = marks[0] * pulse(ground.dash_period_m, ground.dash_length_m)
    for at in ground.crossings_s:
        if -4 < at - view.pose.s < 120:
            zebra = np.clip((np.float32(1.7) - np.abs(s - np.float32(at))) / width
                            + np.float32(0.5), 0, 1)
            paint = np.maximum(paint * (1 - zebra), marks[2] * zebra)
    paint *= np.clip(grain * np.float32(0.9), 0.4, 1)
    grain *= 1 - marks[1] * pulse(ground.slab_m, 0.04)
    grain *= 1 - paint
    labels = ground.labels[map_d.astype(np.int32)]

    sunlit, contact = _ground_shadow(canvas, world, time_s, row0)
    mirror = _mirror_share(labels, s, d, dist, light.wet) if light.wet > 0 else None
    # Channel by channel: arrays of whole planes are what numpy and OpenCV are fast at.
    planes = list(cv2.split(look_up(ground.colour)))
    for c, plane in enumerate(planes):
        plane *= grain
        plane += paint * np.float32(ground.mark_rgb[c])
        dark = float(light.ambient_rgb[c])
        plane *= sunlit * np.float32(light.sun_rgb[c] * max(light.sun[1], 0.0)) + np.float32(dark)
        plane *= contact
        if mirror is not None:
            plane += mirror * np.float32(255 * light.horizon_rgb[c])
    colour = np.clip(cv2.merge(planes), 0, 255).astype(np.uint8)
    cv2.copyTo(colour, below.astype(np.uint8), canvas.rgb[row0:])
    cv2.copyTo(labels, below.astype(np.uint8), canvas.labels[row0:])
    cv2.copyTo(dist, below.astype(np.uint8), canvas.depth_m[row0:])
    for at, outline, decal in world.decals:
        if 1.0 < at - view.pose.s < 60:
            points = np.array([view.local(p[0], p[1]) for p in outline])
            uv = view.project(points)
            if len(uv) >= 3:
                _darken(canvas, uv, decal)


def _darken(canvas: Canvas, uv: np.ndarray, factor: float) -> None:
    h, w = canvas.view.size_hw
    u0, v0 = np.maximum(uv.min(0), 0).astype(int)
    u1, v1 = np.minimum(uv.max(0) + 2, (w, h)).astype(int)
    if u0 >= u1 or v0 >= v1:
        return
    mask = np.full((v1 - v0, u1 - u0), 255, np.uint8)
    cv2.fillConvexPoly(mask, np.round((uv - (u0, v0)) * 16).astype(np.int32), 255 * factor,
                       cv2.LINE_AA, 4)
    area = canvas.rgb[v0:v1, u0:u1]
    canvas.rgb[v0:v1, u0:u1] = cv2.multiply(area, cv2.cvtColor(mask, cv2.COLOR_GRAY2RGB),
                                            scale=1 / 255)


def _footprint(item: Item) -> tuple[float, float, float] | None:
    """Return half width, half length and height of what casts a shadow, metres."""
    if item.kind == 'vehicle':
        return vehicle(item.variant, item.seed)[1]
    if item.kind == 'person':
        return 0.22, 0.22, item.size[2]
    if item.kind == 'obstacle':
        return item.size[1] / 2, item.size[0] / 2, item.size[2]
    if item.kind in ('lamp', 'sign'):
        return 0.07, 0.07, item.size[2]
    return None


def _ground_shadow(canvas: Canvas, world: World, time_s: float, row0: int
                   ) -> tuple[np.ndarray, np.ndarray]:
    """Return the sunlit share and the contact-shadow factor of ground pixels, float32, 0 to 1."""
    view, light = canvas.view, canvas.light
    h, w = view.size_hw
    # Half resolution: shadows are soft.
    shape = ((h - row0 + 1) // 2, (w + 1) // 2)
    sun = np.full(shape, 255, np.uint8)
    contact = np.full(shape, 255, np.uint8)

    def fill(image: np.ndarray, uv: np.ndarray, value: float) -> None:
        points = np.clip((uv - (0, row0)) / 2, -4000, 4000)
        cv2.fillConvexPoly(image, np.round(points * 16).astype(np.int32), value, cv2.LINE_AA, 4)

    for _, item in _visible(world, view, time_s):
        s = item.at(time_s)
        if s - view.pose.s > (100 if item.kind == 'house' else 55):
            continue
        if item.kind == 'house':
            side = math.copysign(1, item.d)
            foot = view.local(s + item.size[0] / 2, item.d + side * item.size[1] / 2)
            uv = shadow_polygon(canvas, foot, np.eye(3), (item.size[1] / 2, item.size[0] / 2),
                                item.size[2])
            if uv is not None:
                fill(sun, uv, 0)
        elif item.kind == 'tree':
            if light.sun_rgb.max() < 0.15 or light.sun[1] < 0.05:
                continue
            tall = item.size[2]
            lift = min(tall * 0.6, 12 * light.sun[1]) / light.sun[1]
            centre = view.local(s, item.d) - lift * light.sun * (1, 0, 1)
            centre[1] = 0.0
            uv = view.project(centre + _CIRCLE * tall * 0.32)
            if len(uv) >= 3:
                fill(sun, uv, 70)
        elif (extent := _footprint(item)) is not None:
            half_w, half_l, height = extent
            foot = view.local(s, item.d)
            turn = yaw_matrix(item.yaw + math.atan(view.tangent(s)))
            uv = shadow_polygon(canvas, foot, turn, (half_w, half_l), height * 0.9)
            if uv is not None:
                fill(sun, uv, 0)
            if item.kind not in ('vehicle', 'obstacle'):
                continue
            for grow, value in ((1.25, 200), (1.05, 140), (0.88, 90)):
                ring = (_SQUIRCLE * (half_w * grow, 0, half_l * grow)) @ turn.T + foot
                uv = view.project(ring)
                if len(uv) >= 3:
                    fill(contact, uv, value)
    sigma = max(w / 900, 0.5)
    out = []
    for image in (sun, contact):
        soft = cv2.GaussianBlur(image, (0, 0), sigma)
        out.append(cv2.resize(soft, (w, h - row0)).astype(np.float32) * np.float32(1 / 255))
    return out[0], out[1]


def _mirror_share(labels: np.ndarray, s: np.ndarray, d: np.ndarray,
                  dist: np.ndarray, wet: float) -> np.ndarray:
    """Return the share of sky light that wet ground mirrors, float32, 0 to 1."""
    puddle = _wrapped(noise_tile(3, 512, 1.5), d, s, 14.0, 9.0)
    share = np.clip(dist / np.float32(45), 0.06, 0.55)
    share *= np.clip(puddle, -1, 1.4) * np.float32(0.35) + np.float32(0.45)
    share *= np.float32(wet)
    share[labels > w_.SIDEWALK] = 0
    return share


def _wrapped(tile: np.ndarray, d: np.ndarray, s: np.ndarray,
             per_m_d: float, per_m_s: float) -> np.ndarray:
    """Sample a periodic tile at ``per_m_*`` texels per metre of d and s."""
    size = tile.shape[0]
    return cv2.remap(tile, _modulo(d * np.float32(per_m_d), size),
                     _modulo(s * np.float32(per_m_s), size), cv2.INTER_LINEAR,
                     borderMode=cv2.BORDER_WRAP)


def _modulo(x: np.ndarray, period: float) -> np.ndarray:
    # Twenty times as fast as np.mod.
    return x - np.floor(x * np.float32(1 / period)) * np.float32(period)


def _tint(canvas: Canvas, normal: np.ndarray) -> np.ndarray:
    return canvas.light.shade(normal)


def _paint_house(canvas: Canvas, world: World, item: Item, time_s: float) -> None:
    view, lamps = canvas.view, canvas.light.lamps
    side = math.copysign(1, item.d)
    length, depth, height = item.size
    near = view.local(item.s, item.d)
    far = view.local(item.s + length, item.d)
    back = np.array([side * depth, 0, 0])
    up = np.array([0, height, 0])
    along = far - near
    front_normal = np.array([-side * along[2], 0, side * along[0]]) / np.linalg.norm(along)
    gable = item.variant == 'gable'
    roof = np.array((128, 66, 50)) if item.seed % 3 else np.array((88, 88, 94))
    ridge_up = np.array([0, depth * 0.34, 0])
    if gable:
        top_a, top_b = near + up, far + up
        ridge_a, ridge_b = top_a + back / 2 + ridge_up, top_b + back / 2 + ridge_up
        normal = np.cross(along, ridge_a - top_a)
        normal *= math.copysign(1, normal[1]) / np.linalg.norm(normal)
        eave = -back * 0.05 - np.array([0, 0.2, 0])
        canvas.solid(np.array([top_a + eave, top_b + eave, ridge_b, ridge_a]),
                     roof * _tint(canvas, normal), w_.BUILDING)
    # The end wall faces the camera while the house is ahead.
    front, end = house_mips(item.seed, gable, lamps)
    light = _tint(canvas, np.array([0.0, 0.0, -1.0])) * (1.25 if lamps else 1.0)
    if near[2] > 0.5:
        inner, outer = near + up, near + up + back
        if gable:
            canvas.solid(np.array([inner, outer, inner + back / 2 + ridge_up]),
                         np.array((176, 164, 148)) * light, w_.BUILDING)
        origin, across = (inner, back) if side > 0 else (outer, -back)
        canvas.plane(origin, across, -up, end, 1.0, light, w_.BUILDING)
    light = _tint(canvas, front_normal) * (1.25 if lamps else 1.0)
    origin, across = (far + up, -along) if side > 0 else (near + up, along)
    canvas.plane(origin, across, -up, front, 1.0, light, w_.BUILDING)


def _paint_hedge(canvas: Canvas, world: World, item: Item, time_s: float) -> None:
    view = canvas.view
    side = math.copysign(1, item.d)
    mips = hedge_mips(item.seed)
    up = np.array([0, item.size[2], 0])
    # In pieces, so that long strips follow the curve.
    pieces = max(1, round(item.size[0] / 12))
    length = item.size[0] / pieces
    for k in reversed(range(pieces)):
        if item.s + (k + 1) * length < view.pose.s - 1 or item.s + k * length > view.pose.s + 150:
            continue
        near = view.local(item.s + k * length, item.d)
        far = view.local(item.s + (k + 1) * length, item.d)
        along = far - near
        normal = np.array([-side * along[2], 0, side * along[0]]) / np.linalg.norm(along)
        thick = np.array([side * item.size[1], 0, 0])
        if k == 0 and near[2] > 0.5:
            origin, across = (near + up, thick) if side > 0 else (near + up + thick, -thick)
            canvas.plane(origin, across, -up, mips, 0.15,
                         _tint(canvas, np.array([0., 0, -1])), w_.VEGETATION)
        origin, across = (far + up, -along) if side > 0 else (near + up, along)
        canvas.plane(origin, across, -up, mips, length / 4, _tint(canvas, normal),
                     w_.VEGETATION)


def _paint_tree(canvas: Canvas, world: World, item: Item, time_s: float) -> None:
    mips = foliage_sprite(item.variant, item.seed)
    light = canvas.light
    tint = light.ambient_rgb * 1.02 + light.sun_rgb * (0.72 - 0.25 * light.sun[2])
    canvas.sprite(canvas.view.local(item.s, item.d), item.size[2], mips, tint, w_.VEGETATION,
                  mirrored=light.sun[0] > 0, sink=0.01, ragged=True)


def _paint_person(canvas: Canvas, world: World, item: Item, time_s: float) -> None:
    crossing = item.variant == 'crossing'
    steps = time_s * 1.8 * 8 * 0.5 + item.seed
    mips = person_sprite(item.seed, int(steps) % 8 if item.speed or crossing else 0, crossing)
    light = canvas.light
    tint = light.ambient_rgb + light.sun_rgb * (0.6 - 0.3 * light.sun[2])
    d = item.d + 1.2 * time_s * (1 if item.seed % 2 else -1) if crossing else item.d
    canvas.sprite(canvas.view.local(item.at(time_s), d), item.size[2], mips, tint, w_.PERSON,
                  mirrored=crossing and item.seed % 2 == 0, sink=0.01)


def _paint_vehicle(canvas: Canvas, world: World, item: Item, time_s: float) -> None:
    view = canvas.view
    s = item.at(time_s)
    mesh, _ = vehicle(item.variant, item.seed)
    turn = yaw_matrix(item.yaw + math.atan(view.tangent(s)))
    paint_mesh(canvas, mesh, view.local(s, item.d), turn, w_.CAR)


def _post(canvas: Canvas, foot: np.ndarray, height: float, width: float,
          colour: tuple[int, int, int], label: int) -> None:
    """Paint an upright post of ``width`` metres, lighter on its left."""
    half = width / 2
    light = _tint(canvas, np.array([0.0, 0.0, -1.0]))
    for x0, x1, factor in ((-half, half, 0.72), (-half, 0.0, 1.05)):
        corners = foot + np.array([(x0, 0, 0), (x1, 0, 0), (x1, height, 0), (x0, height, 0)])
        canvas.solid(corners, np.array(colour) * light * factor, label)


def _paint_lamp(canvas: Canvas, world: World, item: Item, time_s: float) -> None:
    view = canvas.view
    foot = view.local(item.s, item.d)
    if foot[2] < 0.6:
        return
    side = -math.copysign(1, item.d)
    height = item.size[2]
    grey = (92, 96, 100)
    _post(canvas, foot, height, 0.18, grey, w_.POLE)
    light = _tint(canvas, UP)
    arm = foot + np.array([(0, height, 0), (side * 1.5, height + .25, 0),
                           (side * 1.5, height + .13, 0), (0, height - .16, 0)])
    canvas.solid(arm, np.array(grey) * light * 0.8, w_.POLE)
    head = foot + np.array([(side * 1.2, height + .08, 0), (side * 2.0, height + .2, 0),
                            (side * 2.0, height + .33, 0), (side * 1.2, height + .3, 0)])
    lit = canvas.light.lamps
    canvas.solid(head, (255, 226, 160) if lit else np.array((120, 122, 124)) * light, w_.POLE)
    if lit:
        canvas.lamp(foot + (side * 1.6, height + .1, 0), 0.5, (255., 206., 130.))


def _paint_sign(canvas: Canvas, world: World, item: Item, time_s: float) -> None:
    view = canvas.view
    foot = view.local(item.s, item.d)
    if foot[2] < 0.6:
        return
    height = item.size[2]
    _post(canvas, foot, height, 0.11, (124, 126, 128), w_.POLE)
    kind = item.seed % 5
    light = np.minimum(_tint(canvas, np.array([0.0, 0.3, -0.954])) + 0.12, 1.1)
    centre = foot + (0, height + 0.1, -0.04)
    circle = np.arange(12) * (math.pi / 6) + math.pi / 12

    def ring(radius: float, angles: np.ndarray) -> np.ndarray:
        return centre + radius * np.stack([np.sin(angles), np.cos(angles), 0 * angles], 1)

    def bar(half_w: float, half_h: float) -> np.ndarray:
        return centre + np.array([(-half_w, -half_h, 0), (half_w, -half_h, 0),
                                  (half_w, half_h, 0), (-half_w, half_h, 0)])

    red, white, blue, black = (np.array(c) for c in ((196, 26, 32), (236, 236, 232),
                                                     (24, 82, 170), (28, 28, 30)))
    if kind == 0:  # speed limit
        canvas.solid(ring(0.42, circle), red * light, w_.SIGN)
        canvas.solid(ring(0.32, circle), white * light, w_.SIGN)
        for offset in (-0.11, 0.11):
            canvas.solid(bar(0.06, 0.15) + (offset, 0, 0), black * light, w_.SIGN)
    elif kind == 1:  # warning
        angles = np.arange(3) * (2 * math.pi / 3)
        canvas.solid(ring(0.55, angles), red * light, w_.SIGN)
        canvas.solid(ring(0.36, angles), white * light, w_.SIGN)
        canvas.solid(bar(0.04, 0.12), black * light, w_.SIGN)
    elif kind == 2:  # no entry
        canvas.solid(ring(0.42, circle), red * light, w_.SIGN)
        canvas.solid(bar(0.28, 0.08), white * light, w_.SIGN)
    elif kind == 3:  # parking, direction
        canvas.solid(bar(0.40, 0.40), blue * light, w_.SIGN)
        canvas.solid(bar(0.07, 0.26) + (-0.08, 0, 0), white * light, w_.SIGN)
        canvas.solid(bar(0.12, 0.12) + (0.05, 0.13, 0), white * light, w_.SIGN)
    else:  # crossing
        canvas.solid(bar(0.42, 0.42), blue * light, w_.SIGN)
        canvas.solid(ring(0.34, np.arange(3) * (2 * math.pi / 3)), white * light, w_.SIGN)


def _paint_delineator(canvas: Canvas, world: World, item: Item, time_s: float) -> None:
    foot = canvas.view.local(item.s, item.d)
    if foot[2] < 0.6:
        return
    _post(canvas, foot, 1.0, 0.13, (226, 226, 222), w_.POLE)
    light = _tint(canvas, np.array([0.0, 0.0, -1.0]))
    band = foot + np.array([(-.068, .68, -.01), (.068, .74, -.01), (.068, .92, -.01),
                            (-.068, .86, -.01)])
    canvas.solid(band, np.array((30, 30, 32)) * light, w_.POLE)


def _paint_obstacle_item(canvas: Canvas, world: World, item: Item, time_s: float) -> None:
    paint_obstacle(canvas, item)


_PAINTERS = {
    'house': _paint_house, 'hedge': _paint_hedge, 'tree': _paint_tree, 'person': _paint_person,
    'vehicle': _paint_vehicle, 'lamp': _paint_lamp, 'sign': _paint_sign,
    'delineator': _paint_delineator, 'obstacle': _paint_obstacle_item}


@lru_cache(maxsize=8)
def _vignette(height: int, width: int) -> np.ndarray:
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    fall = 1 - 0.20 * (0.55 * x * x + 0.45 * y * y) ** 1.3
    return np.ascontiguousarray(np.repeat(fall[..., None], 3, 2))


def _photograph(canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Put the air between the things and the camera, and the camera's own traits."""
    light, view = canvas.light, canvas.view
    h, w = view.size_hw
    haze = np.exp(np.arange(0, 512, dtype=np.float32) * np.float32(-light.fog_per_m))
    index = np.minimum(canvas.depth_m, 511)
    through = cv2.remap(haze[None], index, np.zeros_like(index), cv2.INTER_LINEAR)
    fog = tuple(float(c) for c in 255 * light.horizon_rgb)
    planes = []
    for c, plane in enumerate(cv2.split(canvas.rgb)):
        clear = plane.astype(np.float32)
        clear -= np.float32(fog[c])
        clear *= through
        clear += np.float32(fog[c])
        planes.append(clear)
    image = cv2.merge(planes)
    if canvas.lamps:
        _bloom(canvas, image)
    if light.rain > 0:
        _rain(image, light.rain, rng)
    sigma = float(rng.uniform(0.35, 0.6)) * max(w / 1280, 0.7)
    image = cv2.GaussianBlur(image, (3, 3), sigma)
    mean = float(image[::8, ::8].mean())
    target = 104 if light.lamps and light.rain == 0 and light.fog_per_m < 0.01 else 122
    gain = (target / max(mean, 1.0)) ** 0.65 * float(rng.normal(1.0, 0.012))
    image *= _vignette(h, w)
    image *= np.float32(gain)
    tile = noise_tile(8 + int(rng.integers(4)), 512, 0.0)
    size = 2.0 + (2.2 if light.lamps else 0.0)
    offset = int(rng.integers(0, 512))
    grain = np.take(np.take(tile, np.arange(offset, offset + h) % 512, 0),
                    np.arange(3 * offset, 3 * offset + w) % 512, 1)
    colour = np.roll(grain, int(rng.integers(1, w)), 1)
    grain, colour = grain * np.float32(size), colour * np.float32(size)
    image += cv2.merge([grain, (grain + colour) * np.float32(0.7), colour])
    np.clip(image, 0, 255, out=image)
    tone = np.arange(256, dtype=np.float32) / 255
    tone = tone + 0.10 * np.sin((tone - 0.5) * 2 * math.pi) * 0.6  # gentle contrast curve
    return cv2.LUT(image.astype(np.uint8), np.clip(tone * 255, 0, 255).astype(np.uint8))


def _bloom(canvas: Canvas, image: np.ndarray) -> None:
    h, w = canvas.view.size_hw
    scale = 4
    glow = np.zeros((h // scale + 1, w // scale + 1, 3), np.float32)
    wet = canvas.light.wet
    for lamp in canvas.lamps:
        u, v = lamp.u, lamp.v
        if not (-60 < u < w + 60 and -60 < v < h + 60):
            continue
        # Hidden lamps do not shine: something nearer was painted over them.
        if 0 <= u < w and 0 <= v < h and 0 < canvas.depth_m[int(v), int(u)] < lamp.depth_m - 3:
            continue
        size = max(lamp.radius_px / scale, 0.35)
        power = min(1.0, lamp.radius_px / 3 + 0.25)
        colour = tuple(c * power for c in lamp.colour)
        cv2.circle(glow, (round(u / scale * 16), round(v / scale * 16)), round(size * 16), colour,
                   -1, cv2.LINE_8, 4)
        low = lamp.mirrored_v
        if wet and 0 <= u < w and low < h and canvas.labels[int(low), int(u)] <= w_.SIDEWALK:
            # Wet ground shows it again, drawn out along the line of sight.
            cv2.ellipse(glow, (round(u / scale * 16), round(low / scale * 16)),
                        (round(size * 16), round(size * 110)), 0, 0, 360,
                        tuple(0.2 * wet * c for c in colour), -1, cv2.LINE_8, 4)
    wide = cv2.GaussianBlur(glow, (0, 0), w / 1280 * 7)
    tight = cv2.GaussianBlur(glow, (0, 0), w / 1280 * 1.6)
    both = 0.9 * wide * 2.0 + 0.6 * tight
    image += cv2.resize(both, (glow.shape[1] * scale, glow.shape[0] * scale))[:h, :w]


def _rain(image: np.ndarray, amount: float, rng: np.random.Generator) -> None:
    h, w = image.shape[:2]
    veil = np.zeros((h, w), np.uint8)
    for _ in range(int(260 * amount)):
        u, v = int(rng.integers(0, w)), int(rng.integers(-20, h))
        length = int(rng.uniform(0.015, 0.05) * h)
        cv2.line(veil, (u, v), (u + length // 8, v + length), int(rng.integers(10, 38)), 1,
                 cv2.LINE_AA)
    image += cv2.cvtColor(veil, cv2.COLOR_GRAY2RGB)


def make_view(world: World, pose: Pose, size_hw: tuple[int, int], focal: float,
              horizon: float) -> View:
    """Return a camera; ``focal`` in image widths, ``horizon`` in image heights from the top."""
    return View(pose, size_hw, focal * size_hw[1], horizon * size_hw[0], world.heading_s,
                world.heading_rad)
