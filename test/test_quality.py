# SPDX-License-Identifier: Apache-2.0
"""Input-quality flags: each fault is seen, ordinary frames raise none."""

from pathlib import Path
import time

from anomaly_seg_ros.quality import FLAGS, QualityChecker
import cv2
import numpy as np
import pytest


def scene(seed: int = 0, size_hw: tuple[int, int] = (720, 1280)) -> np.ndarray:
    """Return a frame with edges and sensor noise, uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    height, width = size_hw
    frame = np.full((height, width, 3), 110, np.float32)
    for _ in range(300):
        x, y = rng.integers(0, width), rng.integers(0, height)
        colour = tuple(float(v) for v in rng.integers(20, 235, 3))
        cv2.rectangle(frame, (int(x), int(y)), (int(x + width // 12), int(y + height // 9)),
                      colour, cv2.FILLED)
    frame += rng.normal(0, 3, frame.shape)
    return np.clip(frame, 0, 255).astype(np.uint8)


@pytest.mark.parametrize('size_hw', [(64, 128), (480, 640), (720, 1280), (1024, 2048)])
def test_ordinary_frames_raise_no_flag(size_hw: tuple[int, int]) -> None:
    check = QualityChecker()
    for seed in range(5):
        assert check(scene(seed, size_hw)) == ()


def test_black() -> None:
    rng = np.random.default_rng(0)
    dark = rng.integers(0, 12, (720, 1280, 3), dtype=np.uint8)
    assert QualityChecker()(dark) == ('black',)
    night = (scene() * 0.3).astype(np.uint8)
    assert 'black' not in QualityChecker()(night)


def test_over_exposed() -> None:
    bright = np.clip(scene().astype(np.int16) + 190, 0, 255).astype(np.uint8)
    assert QualityChecker()(bright) == ('over_exposed',)
    half = scene()
    half[:300] = 255  # a white sky is no fault
    assert QualityChecker()(half) == ()


@pytest.mark.parametrize('blur', [
    lambda image: cv2.GaussianBlur(image, (0, 0), 6),
    lambda image: cv2.blur(image, (41, 1)),
    lambda image: cv2.blur(image, (1, 41))])
def test_blurred(blur: object) -> None:
    assert QualityChecker()(blur(scene())) == ('blurred',)


@pytest.mark.parametrize('part', [0.15, 0.5, 0.9])
@pytest.mark.parametrize('fill', [0, 128, 255])
def test_half_transmitted(part: float, fill: int) -> None:
    frame = scene()
    frame[round(frame.shape[0] * (1 - part)):] = fill
    assert 'half_transmitted' in QualityChecker()(frame)


def test_one_flat_line_at_the_bottom_is_no_fault() -> None:
    frame = scene()
    frame[-8:] = 0
    assert QualityChecker()(frame) == ()


def test_frozen_from_the_third_repeat_until_the_picture_moves() -> None:
    check = QualityChecker()
    frame = scene()
    assert [check(frame) for _ in range(6)] == [(), (), (), *3 * [('frozen',)]]
    assert check(scene(1)) == ()
    assert check(frame) == ()


def test_frozen_is_not_said_of_noise_alone() -> None:
    check = QualityChecker()
    rng = np.random.default_rng(0)
    frame = scene()
    for _ in range(6):
        noisy = frame + rng.integers(0, 2, frame.shape, dtype=np.uint8)
        assert check(noisy) == ()


def test_change_of_size_is_no_freeze_and_no_error() -> None:
    check = QualityChecker()
    for size_hw in ((720, 1280), (1, 1), (3, 5), (2000, 31), (720, 1280)):
        flags = check(scene(0, size_hw))
        assert set(flags) <= set(FLAGS)
        assert 'frozen' not in flags


def test_mono_views_and_padded_rows() -> None:
    padded = np.zeros((720, 1300, 3), np.uint8)
    padded[:, :1280] = scene()
    padded.flags.writeable = False
    assert QualityChecker()(padded[:, :1280]) == ()


def test_costs_less_than_a_millisecond() -> None:
    check = QualityChecker()
    frame = scene(0, (1024, 2048))
    times = []
    for _ in range(30):
        began = time.perf_counter()
        check(frame)
        times.append(time.perf_counter() - began)
    assert min(times) < 1e-3


def test_real_street_images_raise_no_flag(real_data: Path) -> None:
    """None of the ordinary images, and nearly all of them once blurred or cut off."""
    paths = sorted((real_data / 'anomaly').glob('*/images/*'))[::7]
    assert len(paths) >= 10
    blurred = 0
    for path in paths:
        image = cv2.imread(str(path))
        assert QualityChecker()(image) == (), path
        blurred += 'blurred' in QualityChecker()(cv2.GaussianBlur(image, (0, 0), 5))
        image[-image.shape[0] // 3:] = 128
        assert 'half_transmitted' in QualityChecker()(image), path
    assert blurred >= 0.85 * len(paths)
