# SPDX-License-Identifier: Apache-2.0
"""The synthetic world: reproducible, geometrically right, and consistent in its ground truth."""

from dataclasses import replace
import hashlib
from itertools import pairwise
import math
import subprocess
import sys
import time

from anomaly_seg_ros.classes import CITYSCAPES_CLASSES
from anomaly_seg_ros.synthetic import CLASSES_USED, random_scene, SyntheticDrive, WEATHERS
from anomaly_seg_ros.synthetic import obstacles, outliers
from anomaly_seg_ros.synthetic.camera import clip_near, NEAR_M, Pose, View
from anomaly_seg_ros.synthetic.drive import training_world
from anomaly_seg_ros.synthetic.obstacles import make_obstacle
from anomaly_seg_ros.synthetic.render import make_view, render
from anomaly_seg_ros.synthetic.solids import SOLIDS
from anomaly_seg_ros.synthetic.textures import noise_tile
from anomaly_seg_ros.synthetic.world import make_world, ROAD, SIDEWALK, SKY, World
import cv2
import numpy as np
import pytest

SIZE = (180, 320)


def digest(frame) -> str:
    parts = (frame.image_rgb, frame.labels, frame.anomaly_mask)
    return hashlib.sha256(b''.join(p.tobytes() for p in parts)).hexdigest()


@pytest.fixture(scope='module')
def drive() -> SyntheticDrive:
    return SyntheticDrive(11, frames=12, size_hw=SIZE)


def straight(items=(), weather='overcast') -> World:
    """Return a straight, otherwise empty urban road."""
    world = make_world(np.random.default_rng(5), 100.0, weather, ('urban', 'urban'))
    return replace(world, heading_rad=np.zeros_like(world.heading_rad), items=tuple(items),
                   decals=())


def level_view(world: World, s: float = 5.0, d: float = 0.0, size: tuple[int, int] = SIZE,
               height: float = 1.5) -> View:
    return make_view(world, Pose(s, d, height), size, 0.8, 0.45)


def test_random_access_gives_the_bits_of_iteration(drive):
    in_order = [digest(frame) for frame in drive]
    again = SyntheticDrive(11, frames=12, size_hw=SIZE)
    backwards = [digest(again[k]) for k in reversed(range(12))][::-1]
    assert backwards == in_order
    assert len(set(in_order)) == 12
    assert digest(again[-1]) == in_order[-1]


def test_another_process_gives_the_same_bits(drive):
    code = ('import sys; sys.path.insert(0, "test"); from test_synthetic import digest, SIZE\n'
            'from anomaly_seg_ros.synthetic import random_scene, SyntheticDrive\n'
            'print(digest(random_scene(77, SIZE)))\n'
            'print(digest(SyntheticDrive(11, frames=12, size_hw=SIZE)[7]))')
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True,
                         timeout=120)
    assert out.stdout.split()[-2:] == [digest(random_scene(77, SIZE)), digest(drive[7])]


def test_seeds_differ(drive):
    assert digest(SyntheticDrive(12, frames=12, size_hw=SIZE)[0]) != digest(drive[0])
    assert digest(random_scene(1, SIZE)) != digest(random_scene(2, SIZE))


def test_drive_is_a_data_set(drive):
    assert drive.name == 'synthetic_11' and len(drive) == len(drive.frame_ids) == 12
    frames = list(drive)
    assert [f.frame_id for f in frames] == drive.frame_ids
    assert [f.stamp_ns for f in frames] == [k * 100_000_000 for k in range(12)]
    for frame in frames:
        assert frame.image_rgb.shape == (*SIZE, 3) and frame.image_rgb.dtype == np.uint8
        assert frame.labels.shape == frame.anomaly_mask.shape == SIZE
        assert frame.labels.dtype == frame.anomaly_mask.dtype == np.uint8


@pytest.mark.parametrize('seed', [0, 2, 11])
def test_masks_and_labels_agree(seed):
    drive = SyntheticDrive(seed, frames=40, size_hw=(360, 640))
    seen = 0
    for index in (0, 19, 39):
        frame = drive[index]
        mask, labels = frame.anomaly_mask, frame.labels
        assert set(np.unique(mask)) <= {0, 1, 255}
        assert set(np.unique(labels)) <= {*CLASSES_USED, 255}
        # Unlabelled: obstacles, and far things, of a thousandth of the picture at the most.
        assert (labels[mask == 1] == 255).all()
        _, _, stats, _ = cv2.connectedComponentsWithStats(
            ((labels == 255) & (mask == 0)).astype(np.uint8), connectivity=8)
        assert (stats[1:, cv2.CC_STAT_AREA] < 0.001 * labels.size).all()
        # Void is the pixels that touch an obstacle and, unlabelled, obstacles far away.
        touching = cv2.dilate((mask == 1).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
        assert (mask[touching] != 0).all()
        assert (labels[(mask == 255) & ~touching] == 255).all()
        seen += int((mask == 1).any())
    assert seen >= 2


def test_drive_without_anomalies_has_none():
    drive = SyntheticDrive(11, frames=3, size_hw=SIZE, anomalies=False)
    for frame in drive:
        assert not frame.anomaly_mask.any() and (frame.labels == 255).mean() < 0.005
    assert drive.obstacles == ()


def test_training_scenes_have_no_anomaly():
    for seed in range(6):
        frame = random_scene(seed, SIZE)
        assert not frame.anomaly_mask.any()
        assert set(np.unique(frame.labels)) <= {*CLASSES_USED, 255}
        assert (frame.labels == 255).mean() < 0.005


def test_solids_stand_in_training_scenes_on_request():
    found = 0
    for seed in range(6):
        bare, frame = random_scene(seed, SIZE), random_scene(seed, SIZE, 3)
        solid = frame.anomaly_mask == 1
        found += solid.any()
        assert (frame.labels[solid] == 255).all()
        assert set(np.unique(frame.labels)) <= {*CLASSES_USED, 255}
        # Besides the solids and their shadows, and who would run into one, nothing differs.
        assert (frame.labels == bare.labels).mean() > 0.5
        assert digest(frame) == digest(random_scene(seed, SIZE, 3))
    assert found >= 4


def test_training_never_imports_the_obstacles_shapes():
    assert not {*outliers.SHAPES, *SOLIDS} & set(obstacles.SHAPES)
    assert not {*outliers.TEXTURES, outliers.SCRAMBLED} & set(obstacles.TEXTURES)
    drawn = {f.__code__ for f in (*outliers.SHAPES.values(), *outliers.TEXTURES.values(),
                                  *SOLIDS.values())}
    shown = {f.__code__ for f in (*obstacles.MESHES.values(), *obstacles.TEXTURES.values())}
    assert not drawn & shown


def test_drives_share_no_sprite_with_training():
    def sprites(world):
        return {(item.kind, item.seed) for item in world.items
                if item.kind in ('house', 'tree', 'person', 'hedge')}

    trained = set().union(*(sprites(training_world(seed)) for seed in range(100000, 100100, 5)))
    driven = set().union(*(sprites(SyntheticDrive(seed).world) for seed in (3, 999, 1950)))
    assert len(trained) > 300 and len(driven) > 100
    assert not trained & driven


def test_classes_used_are_cityscapes_train_ids():
    names = [CITYSCAPES_CLASSES[k] for k in CLASSES_USED]
    assert names == ['road', 'sidewalk', 'building', 'pole', 'traffic sign', 'vegetation',
                     'terrain', 'sky', 'person', 'car']


def test_ground_projects_by_the_pinhole_formula():
    world = straight()
    view = level_view(world)
    f, horizon = 0.8 * SIZE[1], 0.45 * SIZE[0]
    for distance, right in ((6.0, 0.0), (20.0, 2.5), (60.0, -4.0)):
        camera = view.to_camera(view.local(5.0 + distance, right))
        u, v = view.to_image(camera)
        assert u == pytest.approx(SIZE[1] / 2 + f * right / distance, abs=1e-9)
        assert v == pytest.approx(horizon + f * 1.5 / distance, abs=1e-9)


def test_pitch_yaw_and_roll_turn_the_image_the_documented_way():
    world = straight()
    ahead = np.array([0.0, 1.5, 30.0])
    f, u0, v0 = 0.8 * SIZE[1], SIZE[1] / 2, 0.45 * SIZE[0]

    def seen(**turn):
        view = make_view(world, Pose(5.0, 0.0, 1.5, **turn), SIZE, 0.8, 0.45)
        return view.to_image(view.to_camera(ahead))

    np.testing.assert_allclose(seen(), (u0, v0))
    np.testing.assert_allclose(seen(yaw=0.1), (u0 - f * math.tan(0.1), v0))
    np.testing.assert_allclose(seen(pitch=0.1), (u0, v0 + f * math.tan(0.1)))
    view = make_view(world, Pose(5.0, 0.0, 1.5, roll=0.1), SIZE, 0.8, 0.45)
    left, right = view.horizon_rows()
    # The camera turns clockwise, so the world turns counter-clockwise: lower on the left.
    assert left - right == pytest.approx(SIZE[1] * math.tan(0.1), rel=1e-6)


def test_road_labels_have_the_width_of_the_road():
    world = straight()
    size = (360, 640)
    view = level_view(world, size=size)
    _, labels, _ = render(world, view, 0.0, (0,))
    for row in (220, 260, 340):
        distance = 0.8 * size[1] * 1.5 / (row + 0.5 - 0.45 * size[0])
        edges = size[1] / 2 + np.array(world.kerbs_d) * 0.8 * size[1] / distance
        left, right = np.clip(edges, 0, size[1])
        assert (labels[row] == ROAD).sum() == pytest.approx(right - left, abs=3)
    assert set(np.unique(labels[300])) <= {ROAD, SIDEWALK}


@pytest.mark.parametrize('seed', range(6))
def test_sky_is_above_the_horizon_and_ground_below(seed):
    drive = SyntheticDrive(seed, frames=20, size_hw=SIZE, anomalies=False)
    view = make_view(drive.world, drive.pose(1.0), SIZE, drive._focal, drive._horizon)
    labels = drive[10].labels
    low, high = min(view.horizon_rows()), max(view.horizon_rows())
    assert 0.3 * SIZE[0] < low <= high < 0.6 * SIZE[0]
    rows = np.arange(SIZE[0])[:, None]
    assert not ((labels == SKY) & (rows > high + 5)).any()
    assert not (((labels == ROAD) | (labels == SIDEWALK)) & (rows < low - 2)).any()


def test_road_bends_where_its_heading_turns():
    world = straight()
    world = replace(world, heading_rad=np.clip(world.heading_s, 0, None) * 0.002)
    view = level_view(world, s=0.0)
    # x'' = 0.002 per metre: 0.5 * 0.002 * 50 ** 2 = 2.5 m at 50 m, to first order.
    assert view.local(50.0, 0.0)[0] == pytest.approx(2.5, rel=0.02)
    assert view.tangent(50.0) == pytest.approx(math.tan(0.1), rel=0.02)


def test_clipping_at_the_near_plane():
    square = np.array([(-1, 0, -1), (1, 0, -1), (1, 0, 3), (-1, 0, 3)], float)
    clipped = clip_near(square)
    assert clipped[:, 2].min() == pytest.approx(NEAR_M) and clipped[:, 2].max() == 3
    area = 2 * (3 - NEAR_M)
    assert cv2.contourArea(clipped[:, [0, 2]].astype(np.float32)) == pytest.approx(area, rel=1e-5)
    assert len(clip_near(square - (0, 0, 9))) == 0


@pytest.mark.parametrize('shape', obstacles.SHAPES)
def test_every_obstacle_shows_at_its_size(shape):
    item = make_obstacle(np.random.default_rng(4), 17.0, 0.0, shape)
    world = straight([item])
    size = (360, 640)
    image, _, mask = render(world, level_view(world, size=size), 0.0, (0,))
    empty = render(straight(), level_view(world, size=size), 0.0, (0,))[0]
    rows, cols = np.nonzero(mask == 1)
    per_m = 0.8 * size[1] / 12.0
    assert 0.1 * per_m < np.ptp(rows) + 1 < 2.4 * per_m
    assert 0.3 * per_m < np.ptp(cols) + 1 < 3.2 * per_m
    # It stands on the ground 12 m away, in the middle, and can be told from the road.
    assert rows.max() == pytest.approx(0.45 * size[0] + 1.5 * per_m, abs=0.25 * per_m)
    assert abs(cols.mean() - size[1] / 2) < 0.6 * per_m
    change = np.abs(image.astype(int) - empty)[mask == 1].mean()
    assert change > 8


def test_obstacles_approach():
    item = make_obstacle(np.random.default_rng(4), 40.0, 0.5, 'crate')
    world = straight([item])
    areas = []
    for s in (5.0, 15.0, 25.0, 32.0):
        mask = render(world, level_view(world, s=s, size=(360, 640)), 0.0, (0,))[2]
        areas.append(int((mask == 1).sum()))
    assert areas[0] > 0 and all(b > 1.5 * a for a, b in pairwise(areas))


def test_drive_steers_clear_of_obstacles():
    for seed in range(8):
        drive = SyntheticDrive(seed, frames=60)
        for k in range(60):
            pose = drive.pose(k / drive.rate_hz)
            for item in drive.obstacles:
                if abs(item.s - pose.s) < 0.5:
                    assert abs(item.d - pose.d) > 0.8 + item.size[1] / 2


def test_consecutive_frames_are_alike(drive):
    frames = [drive[k].image_rgb.astype(int) for k in (3, 4, 9)]
    near, far = (np.abs(frames[0] - f).mean() for f in frames[1:])
    assert near < far


@pytest.mark.parametrize('weather', WEATHERS)
def test_every_weather_is_well_exposed(weather):
    image = SyntheticDrive(5, frames=2, size_hw=SIZE, weather=weather)[0].image_rgb
    assert 45 < image.mean() < 190
    assert (image.min(2) == 255).mean() < 0.2 and (image.max(2) == 0).mean() < 0.2
    assert image.std() > 18


def test_fog_hides_the_distance():
    world = straight()
    size = (360, 640)
    row = round(0.45 * size[0] + 0.8 * size[1] * 1.5 / 30.0)  # the road 30 m away

    def contrast(fog_per_m):
        foggy = replace(world, light=replace(world.light, fog_per_m=fog_per_m))
        image = render(foggy, level_view(world, size=size), 0.0, (0,))[0]
        return image[row - 1:row + 2].mean((0, 2)).std()

    # Fog leaves exp(-0.08 * 30) = 9 % of the contrast; noise and exposure add some.
    assert contrast(0.08) < 0.5 * contrast(0.0)


def test_noise_tile_is_normalised_and_periodic():
    tile = noise_tile(0, 512, 1.0).astype(np.float64)
    assert tile.mean() == pytest.approx(0, abs=0.05) and tile.std() == pytest.approx(1, abs=0.05)
    inside = np.abs(np.diff(tile, axis=0)).mean()
    seam = np.abs(tile[0] - tile[-1]).mean()
    assert seam == pytest.approx(inside, rel=0.25)


def test_outliers_are_marked_where_the_image_changed():
    frame = random_scene(3, (288, 512))
    other = random_scene(4, (288, 512)).image_rgb
    image = frame.image_rgb.copy()
    marks = outliers.paste_outliers(np.random.default_rng(0), image, frame.labels, other, 4)
    assert (marks == outliers.OUTLIER).sum() > 50
    changed = np.abs(image.astype(int) - frame.image_rgb).max(2)
    assert (changed[marks == outliers.OUTLIER] > 6).mean() > 0.8
    # Elsewhere only shadows, which darken.
    rest = (image.astype(int) - frame.image_rgb)[marks == outliers.INLIER]
    assert (rest > 25).mean() < 0.002
    twin = frame.image_rgb.copy()
    again = outliers.paste_outliers(np.random.default_rng(0), twin, frame.labels, other, 4)
    np.testing.assert_array_equal(marks, again)
    np.testing.assert_array_equal(image, twin)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match='seed must be 0 or more, got -1'):
        SyntheticDrive(-1)
    with pytest.raises(ValueError, match='frames must be 1 or more, got 0'):
        SyntheticDrive(1, frames=0)
    with pytest.raises(ValueError, match='size_hw must be at least'):
        SyntheticDrive(1, size_hw=(10, 10))
    with pytest.raises(ValueError, match='rate_hz must be above 0'):
        SyntheticDrive(1, rate_hz=0.0)
    with pytest.raises(ValueError, match='weather must be one of'):
        SyntheticDrive(1, weather='snow')
    with pytest.raises(ValueError, match='shape must be one of'):
        make_obstacle(np.random.default_rng(0), 0.0, 0.0, 'dragon')
    with pytest.raises(ValueError, match='seed must be 0 or more'):
        random_scene(-2)
    with pytest.raises(IndexError, match='frame 60 of 60'):
        SyntheticDrive(1)[60]


def test_painting_is_fast_enough_for_a_demo():
    drive = SyntheticDrive(3, frames=8, size_hw=(360, 640))
    list(drive)  # fills the sprite caches
    started = time.process_time()
    list(drive)
    # About 0.08 s a frame on one core of the machine this was written on.
    assert (time.process_time() - started) / 8 < 1.0
