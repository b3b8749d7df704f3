# SPDX-License-Identifier: Apache-2.0
"""Drives through synthetic worlds, and single scenes of many worlds for training."""

from dataclasses import replace
import math
from pathlib import Path

from anomaly_seg_ros.datasets.frame import Frame
from anomaly_seg_ros.datasets.source import FrameSource
from anomaly_seg_ros.synthetic.camera import Pose
from anomaly_seg_ros.synthetic.obstacles import make_obstacle, make_solid
from anomaly_seg_ros.synthetic.render import make_view, render
from anomaly_seg_ros.synthetic.world import Item, make_world, World
import numpy as np

# Banks of house fronts, trees and people: drives use up to a thousand, training those above.
_TEST_BANKS = 50
_TRAINING_BANKS = 2000
# Drives take place in suburbs and, unless asked otherwise, in milder weather; training sees towns,
# parks, open country, dusk and fog too.
_WEATHERS = ('clear', 'golden', 'overcast', 'rain')


class SyntheticDrive(FrameSource):
    """
    A drive through a synthetic world, as a data set of frames.

    Frame i is a function of the seed, the size, and i alone: reading frames in any order gives the
    same bits as reading all of them. Labels are Cityscapes train ids, 255 on obstacles and where
    no class fits. Masks are 0 in-distribution, 1 obstacle, 255 void (the pixels next to one).

    Parameters
    ----------
    seed
        Any integer from 0. Worlds of drives share no house front, tree or person with training.
    frames
        How many frames.
    size_hw
        Height and width in pixels; the width is best 16 / 9 of the height.
    anomalies
        Whether obstacles lie on and beside the road; without, masks are all 0.
    rate_hz
        Frames per second of the drive's time.
    weather
        One of ``world.WEATHERS``; one of the milder ones, drawn from the seed, when None.

    Raises
    ------
    ValueError
        For a negative seed, fewer than one frame, a size under 64 x 64, or a rate not above 0.

    """

    class_set = 'cityscapes'

    def __init__(self, seed: int, frames: int = 60, size_hw: tuple[int, int] = (720, 1280),
                 anomalies: bool = True, rate_hz: float = 10.0,
                 weather: str | None = None) -> None:
        if seed < 0:
            raise ValueError(f'seed must be 0 or more, got {seed}')
        if frames < 1:
            raise ValueError(f'frames must be 1 or more, got {frames}')
        if min(size_hw) < 64:
            raise ValueError(f'size_hw must be at least 64 x 64, got {size_hw}')
        if not rate_hz > 0:
            raise ValueError(f'rate_hz must be above 0, got {rate_hz}')
        self.name = f'synthetic_{seed}'
        # No folder: the drive is a function of its seed.
        self.root = Path(self.name)
        self.seed = seed
        self.size_hw = (int(size_hw[0]), int(size_hw[1]))
        self.anomalies = anomalies
        self.rate_hz = self._rate_hz = rate_hz
        self._frame_ids = [f'{k:06d}' for k in range(frames)]
        rng = np.random.default_rng([seed, 1])
        self._speed = float(rng.uniform(6.5, 10.5))
        length = frames / rate_hz * self._speed + 200.0
        weather = weather or str(rng.choice(_WEATHERS))
        self.world = make_world(rng, length, weather, ('suburb', 'suburb'),
                                bank=_TEST_BANKS + seed % 1000, speed_mps=self._speed,
                                parking_share=1.0)
        # One width of road whatever the number of lanes: drive in the rightmost.
        self._lane = max(self.world.lanes)
        self._height, self._focal = float(rng.uniform(1.35, 1.65)), float(rng.uniform(0.75, 0.9))
        self._horizon = float(rng.uniform(0.43, 0.5))
        self._phases = rng.uniform(0, 2 * math.pi, 8)
        self._duration = frames / rate_hz
        self.world = _with_people_and_signs(np.random.default_rng([seed, 5]), self.world, length,
                                            _TEST_BANKS + seed % 1000)
        self.obstacles: tuple[Item, ...] = ()
        if anomalies:
            self.obstacles = _place_obstacles(np.random.default_rng([seed, 2]), self.world, length)
            self.world = _with_obstacles(self.world, self.obstacles, self._duration)
        times = np.arange(0.0, self._duration, 0.2)
        poses = [self.pose(float(t)) for t in times]
        self.world = replace(self.world, items=tuple(
            item for item in self.world.items
            if not any(_collides(item, pose, float(t))
                       for pose, t in zip(poses, times, strict=True))))

    @property
    def frame_ids(self) -> list[str]:
        """Names of the frames in order."""
        return list(self._frame_ids)

    def __len__(self) -> int:
        """Return the number of frames."""
        return len(self._frame_ids)

    def pose(self, time_s: float) -> Pose:
        """Return the camera's pose at a time."""
        s = 5.0 + self._speed * time_s
        d = self._path(s)
        ahead = (self._path(s + 1.0) - self._path(s - 1.0)) / 2.0
        wave = np.sin(self._phases + time_s * np.array((0.9, 1.7, 5.1, 9.7, 1.1, 7.3, 2.3, 0.6)))
        return Pose(s, d + 0.08 * float(wave[0]), self._height + 0.012 * float(wave[3]),
                    math.atan(ahead) + 0.006 * float(wave[1]) + 0.004 * float(wave[7]),
                    0.0035 * float(wave[2]) + 0.002 * float(wave[3]),
                    0.006 * float(wave[4]) + 0.0015 * float(wave[5]))

    def _path(self, s: float) -> float:
        """Return where across the road the camera drives, giving way to obstacles."""
        d = self._lane
        for item in self.obstacles:
            gap = item.d - self._lane
            need = 1.5 + item.size[1] / 2
            if abs(gap) < need:
                away = -1.0 if gap >= 0 else 1.0
                d += away * (need - abs(gap)) * math.exp(-((s - item.s) / 9.0) ** 2)
        return d

    def __getitem__(self, index: int) -> Frame:
        """Paint frame ``index``; negative indices count from the end."""
        if not -len(self) <= index < len(self):
            raise IndexError(f'frame {index} of {len(self)}')
        index %= len(self)
        time_s = index / self._rate_hz
        view = make_view(self.world, self.pose(time_s), self.size_hw, self._focal, self._horizon)
        image, labels, mask = render(self.world, view, time_s, (self.seed, index))
        return Frame(self._frame_ids[index], image, mask, labels, round(time_s * 1e9))


def _with_people_and_signs(rng: np.random.Generator, world: World, length_m: float,
                           bank: int) -> World:
    """
    Add a person and, where there is none, a sign to every 15 m: a drive shows all classes.

    The people walk where no parked car hides them: before the cars, or at the kerb.
    """
    added = []
    for start in np.arange(10.0, length_m, 15.0):
        side = 1.0 if rng.random() < 0.5 else -1.0
        kerb = world.kerbs_d[1] if side > 0 else -world.kerbs_d[0]
        lane = max(world.lanes) + world.lane_width_m / 2
        edge = lane if kerb - lane > 1 else kerb + rng.uniform(0.5, 1.2)
        added.append(Item('person', float(start + rng.uniform(0, 15)), side * edge,
                          int(bank * 1000 + rng.integers(40)),
                          (0, 0, float(rng.uniform(1.5, 1.9))),
                          speed=float(rng.choice((-1, 1)) * rng.uniform(0.9, 1.6))))
        sign = Item('sign', float(start + rng.uniform(0, 15)),
                    side * (kerb + rng.uniform(0.4, 0.8)), int(rng.integers(1000)),
                    (0, 0, float(rng.uniform(2.2, 2.8))))
        if not any(item.kind == 'sign' and 0 <= item.s - start < 15 for item in world.items):
            added.append(sign)
    return replace(world, items=world.items + tuple(added))


def _place_obstacles(rng: np.random.Generator, world: World, length_m: float
                     ) -> tuple[Item, ...]:
    low, high = world.kerbs_d
    items = []
    s = rng.uniform(16, 24)
    while s < length_m - 60:
        place = rng.random()
        if place < 0.7:
            d = rng.uniform(low + 1.0, high - 1.0)
        elif place < 0.85:
            d = high + rng.uniform(-0.6, 1.4)
        else:
            d = low + rng.uniform(-1.4, 0.6)
        items.append(make_obstacle(rng, float(s), float(d)))
        s += rng.uniform(6, 13)
    return tuple(items)


def _with_obstacles(world: World, obstacles: tuple[Item, ...], duration_s: float) -> World:
    """Add obstacles, and take away the vehicles and people that would run into one."""
    def free(item: Item) -> bool:
        if item.kind not in ('vehicle', 'person', 'sign', 'lamp', 'tree', 'delineator'):
            return True
        reach = 6.0 if item.kind == 'vehicle' else 0.8
        start, end = sorted((item.s, item.at(duration_s)))
        return not any(start - reach < o.s < end + reach and abs(o.d - item.d)
                       < (1.1 if item.kind == 'vehicle' else 0.5) + o.size[1] / 2
                       for o in obstacles)

    kept = tuple(item for item in world.items if free(item))
    return replace(world, items=kept + obstacles)


def _collides(item: Item, pose: Pose, time_s: float) -> bool:
    """Tell whether the camera would be in, or within a metre of, a vehicle or person."""
    ahead = item.at(time_s) - pose.s
    return (item.kind == 'vehicle' and abs(ahead) < 7 and abs(item.d - pose.d) < 2.1) or (
        item.kind == 'person' and abs(ahead) < 1.5 and abs(item.d - pose.d) < 1.2)


def random_scene(seed: int, size_hw: tuple[int, int] = (352, 640), solids: int = 0) -> Frame:
    """
    Paint one moment of a world of its own, for training; it never holds an obstacle.

    ``solids`` things of no kind stand on and beside the road, masked as obstacles are.

    Every second scene is a street like those of drives, the others are of all kinds. The camera's
    height, tilt, focal length and place in the road vary more than in a drive, and more people
    are about. The result is a function of the arguments alone.
    """
    if seed < 0:
        raise ValueError(f'seed must be 0 or more, got {seed}')
    rng = np.random.default_rng([seed, 3])
    world = training_world(seed, rng)
    low, high = world.kerbs_d
    d = rng.uniform(low + 1.5, high - 1.5) if rng.random() < 0.4 else (
        max(world.lanes) + rng.normal(0, 0.6))
    pose = Pose(float(rng.uniform(2, 40)), float(d), float(rng.uniform(1.2, 1.9)),
                float(rng.normal(0, 0.05)), float(rng.normal(0, 0.015)),
                float(rng.normal(0, 0.010)))
    time_s = float(rng.uniform(0, 2))
    world = replace(world, items=tuple(item for item in world.items
                                       if not _collides(item, pose, time_s)))
    if solids:
        things = np.random.default_rng([seed, 6])
        placed = tuple(make_solid(things, pose.s + 2.5 * 16 ** float(things.random()),
                                  float(things.uniform(low - 1.5, high + 1.5)))
                       for _ in range(solids))
        world = _with_obstacles(world, placed, 2.0)
    view = make_view(world, pose, size_hw, float(rng.uniform(0.68, 0.98)),
                     float(rng.uniform(0.40, 0.54)))
    image, labels, mask = render(world, view, time_s, (seed,))
    return Frame(f'{seed:09d}', image, mask, labels)


def training_world(seed: int, rng: np.random.Generator | None = None) -> World:
    """Draw the world of ``random_scene(seed)``, from ``rng`` if the caller goes on drawing."""
    if rng is None:
        rng = np.random.default_rng([seed, 3])
    bank = _TRAINING_BANKS + seed // 25 % 1000
    if seed % 2:
        world = make_world(rng, 190.0, str(rng.choice(_WEATHERS)), ('suburb', 'suburb'), bank,
                           parking_share=0.9, people=3.0)
        return _with_people_and_signs(rng, world, 60.0, bank)
    return make_world(rng, 190.0, bank=bank, people=2.0)
