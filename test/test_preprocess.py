# SPDX-License-Identifier: Apache-2.0
"""Preprocessing against bilinear interpolation written out in float64."""

from anomaly_seg_ros.preprocess import check_image, Preprocessor
from cards import card
import numpy as np
import pytest

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def bilinear(image: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Resize with half-pixel centres and the border repeated, in float64, unrounded."""
    result = image.astype(np.float64)
    for axis, new in enumerate(size_hw):
        old = image.shape[axis]
        place = (np.arange(new) + 0.5) * old / new - 0.5
        first = np.floor(place).astype(int)
        weight = (place - first).reshape([-1 if a == axis else 1 for a in range(3)])
        result = (result.take(np.clip(first, 0, old - 1), axis) * (1 - weight)
                  + result.take(np.clip(first + 1, 0, old - 1), axis) * weight)
    return result


@pytest.mark.parametrize('frame_hw', [(48, 80), (24, 40), (17, 31), (90, 160), (123, 77)])
@pytest.mark.parametrize(('frame_order', 'network_order'),
                         [('rgb', 'rgb'), ('bgr', 'rgb'), ('rgb', 'bgr')])
def test_equals_float64(frame_hw: tuple[int, int], frame_order: str, network_order: str) -> None:
    """Within one grey level: OpenCV rounds the resized image to uint8, halves up."""
    image = np.random.default_rng(1).integers(0, 256, (*frame_hw, 3), dtype=np.uint8)
    preprocess = Preprocessor(card(channel_order=network_order, mean=MEAN, std=STD))
    got = preprocess(image, frame_order)
    assert got.dtype == np.float32
    assert got.shape == (1, 3, 24, 40)

    resized = bilinear(image, (24, 40))
    if frame_order != network_order:
        resized = resized[..., ::-1]
    expected = (resized / 255 - MEAN) / STD
    levels = (got[0].transpose(1, 2, 0) - expected) * np.array(STD) * 255
    assert np.abs(levels).max() <= 1.0
    assert np.abs(levels).mean() < 0.3
    # Halves are common where the scale is a small integer: 1 in 4 at a scale of 2.
    assert -0.02 < levels.mean() < (0.13 if frame_hw == (48, 80) else 0.05)


def test_halving_rounds_halves_up() -> None:
    """At a scale of 2 the result is exactly floor(mean of four + 1/2), on every machine."""
    image = np.random.default_rng(5).integers(0, 256, (48, 80, 3), dtype=np.uint8)
    expected = np.floor(bilinear(image, (24, 40)) + 0.5) / 255
    got = Preprocessor(card())(image)[0].transpose(1, 2, 0)
    np.testing.assert_array_equal(got, expected.astype(np.float32))


def test_exact_without_resizing() -> None:
    """At the network's own size nothing is rounded: equal to float64 to the last float32 bit."""
    image = np.random.default_rng(2).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    got = Preprocessor(card(mean=MEAN, std=STD))(image)
    expected = ((image / 255.0 - MEAN) / STD).transpose(2, 0, 1)[None]
    np.testing.assert_array_equal(got, expected.astype(np.float32))


def test_buffers_are_reused_without_traces_of_the_frame_before() -> None:
    """The array is the same one at every call and holds the latest frame only."""
    rng = np.random.default_rng(3)
    frames = [rng.integers(0, 256, (*size, 3), dtype=np.uint8)
              for size in ((48, 80), (24, 40), (100, 90))]
    preprocess = Preprocessor(card())
    first = preprocess(frames[0])
    for frame in frames:
        again = preprocess(frame)
        assert again is first
        np.testing.assert_array_equal(again, Preprocessor(card())(frame))


def test_takes_views_and_leaves_the_frame_alone() -> None:
    """Cropped, flipped and read-only frames work; the frame is not written to."""
    image = np.random.default_rng(4).integers(0, 256, (60, 100, 3), dtype=np.uint8)
    image.setflags(write=False)
    before = image.copy()
    preprocess = Preprocessor(card())
    for view in (image[5:29, 10:50], image[::-1], image[:, :, ::-1], image[::2, ::2]):
        np.testing.assert_array_equal(preprocess(view).copy(), preprocess(view.copy()))
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize('bad', [
    np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.float32),
    np.zeros((0, 4, 3), np.uint8), np.zeros((1, 4, 4, 3), np.uint8), [[1, 2, 3]]])
def test_refuses_anything_but_images(bad: np.ndarray) -> None:
    """The error tells what was expected and what came."""
    with pytest.raises(ValueError, match=r'uint8 \(H, W, 3\)'):
        check_image(bad, 'rgb')


def test_refuses_an_unknown_channel_order() -> None:
    """Only rgb and bgr exist here."""
    with pytest.raises(ValueError, match='channel_order'):
        check_image(np.zeros((4, 4, 3), np.uint8), 'yuv')
