# SPDX-License-Identifier: Apache-2.0
"""Resizing against Pillow, and against sums of whole numbers written out."""

from anomaly_seg_ros.graph_variants import _blur, on_device
from anomaly_seg_ros.images import decode_compressed
from anomaly_seg_ros.preprocess import Preprocessor
from anomaly_seg_ros.resize import bilinear_taps, nearest_taps, Resizer, Smoothing, smoothing
from cards import card
import cv2
from hypothesis import given, settings, strategies as st
import numpy as np
from PIL import Image
import pytest

SIZES = st.tuples(st.integers(1, 400), st.integers(1, 400))


def noise(hw: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*hw, 3), np.uint8)


def pillow(image: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Return what training scripts see: Pillow's bilinear filter, which antialiases."""
    return np.asarray(Image.fromarray(image).resize(size_hw[::-1], Image.Resampling.BILINEAR))


def rms(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.sqrt(np.mean((first.astype(float) - second) ** 2)))


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES)
def test_bilinear_taps_are_opencvs(old_hw: tuple[int, int], new_hw: tuple[int, int]) -> None:
    """Blending by the taps and rounding half up gives INTER_LINEAR_EXACT to the bit."""
    image = np.random.default_rng(6).integers(0, 256, old_hw, dtype=np.uint8)
    planes = image.astype(np.float32)
    for axis in (0, 1):
        first, second, weight = bilinear_taps(old_hw[axis], new_hw[axis])
        weight = weight[:, None] if axis == 0 else weight
        planes = planes.take(first, axis) * (1 - weight) + planes.take(second, axis) * weight
    expected_image = cv2.resize(image, new_hw[::-1], interpolation=cv2.INTER_LINEAR_EXACT)
    np.testing.assert_array_equal(np.floor(planes + 0.5), expected_image.reshape(new_hw))


@given(st.integers(1, 300), st.integers(1, 3000))
def test_nearest_taps_are_opencvs(old: int, new: int) -> None:
    """Within half a source pixel of the place, the rule of INTER_NEAREST_EXACT."""
    place = (np.arange(new) + 0.5) * old / new - 0.5
    assert np.abs(nearest_taps(old, new) - place).max() <= 0.5 + 1e-3


def test_halving_is_pillows_filter() -> None:
    """At a scale of 2 Pillow weighs (1, 3, 3, 1) / 8; two roundings here move a value by 1."""
    image = noise((64, 96))
    got = Resizer((32, 48), 'antialiased')(image).astype(int)
    wanted = pillow(image, (32, 48)).astype(int)
    # Pillow weighs what is inside the image more at its border, OpenCV repeats the border.
    assert np.abs(got - wanted)[1:-1, 1:-1].max() <= 1


@pytest.mark.parametrize(('frame_hw', 'size_hw', 'share'), [
    ((540, 960), (256, 512), 0.12), ((360, 640), (256, 512), 0.85),
    ((512, 1024), (192, 336), 0.12), ((540, 961), (128, 256), 0.12),
    ((512, 1024), (132, 260), 0.12), ((1024, 2048), (128, 256), 0.12)])
def test_noise_becomes_what_pillow_makes_of_it(frame_hw: tuple[int, int],
                                               size_hw: tuple[int, int], share: float) -> None:
    """
    Noise aliases most: antialiased is several times closer to Pillow than bilinear.

    Down to a scale of 1.4 and less, where bilinear itself skips little, the gain is small.
    """
    image = noise(frame_hw)
    wanted = pillow(image, size_hw)
    bilinear = rms(Resizer(size_hw, 'bilinear')(image), wanted)
    assert rms(Resizer(size_hw, 'antialiased')(image), wanted) < share * bilinear


def test_no_antialiasing_where_nothing_shrinks() -> None:
    """Enlarging, and the frame's own size, are the same in both ways."""
    image = noise((30, 40))
    for size_hw in ((30, 40), (60, 80), (31, 90)):
        np.testing.assert_array_equal(Resizer(size_hw, 'antialiased')(image),
                                      Resizer(size_hw, 'bilinear')(image))
    assert Resizer((30, 40), 'antialiased')(image) is image


def test_one_axis_alone() -> None:
    """An axis that keeps its size is not blurred."""
    image = noise((40, 80))
    plan = smoothing((40, 80), (40, 40), 'antialiased')
    assert plan.size_wh == (3, 1)
    assert [kernel.tolist() for kernel in plan.kernels()] == [[64, 128, 64], [256]]
    got = Resizer((40, 40), 'antialiased')(image).astype(int)
    assert np.abs(got - pillow(image, (40, 40)))[:, 1:-1].max() <= 1


@settings(max_examples=60, deadline=None)
@given(SIZES, st.floats(1.0, 6.0), st.floats(1.0, 6.0), st.integers(0, 2 ** 32 - 1))
def test_the_graphs_blur_is_opencvs(frame_hw: tuple[int, int], scale_y: float, scale_x: float,
                                    seed: int) -> None:
    """The blur of a device graph gives the bits of the one on the CPU, at the border too."""
    torch = pytest.importorskip('torch')
    size_hw = (max(1, round(frame_hw[0] / scale_y)), max(1, round(frame_hw[1] / scale_x)))
    plan = smoothing(frame_hw, size_hw, 'antialiased')
    plan = Smoothing(0, plan.size_wh, plan.sigma_wh)
    image = noise(frame_hw, seed)
    wanted = cv2.GaussianBlur(image, plan.size_wh, plan.sigma_wh[0], sigmaY=plan.sigma_wh[1],
                              borderType=cv2.BORDER_REPLICATE)
    along_x, along_y = (kernel.tolist() for kernel in plan.kernels())
    assert sum(along_x) == sum(along_y) == 256
    got = _blur(torch.from_numpy(image).permute(2, 0, 1).float(), along_x, along_y)
    np.testing.assert_array_equal(got.permute(1, 2, 0).numpy(), wanted.reshape(image.shape))


@pytest.mark.parametrize('frame_hw', [(24, 40), (30, 50), (48, 80), (61, 99), (96, 160),
                                      (192, 320), (200, 330), (12, 160)])
@pytest.mark.parametrize('resize', ['antialiased', 'bilinear'])
def test_a_device_graph_sees_what_a_host_graph_sees(frame_hw: tuple[int, int],
                                                    resize: str) -> None:
    """To the last grey level, at scales with halvings, with a blur, and with neither."""
    torch = pytest.importorskip('torch')

    class Red(torch.nn.Module):
        def forward(self, image):
            return torch.zeros(1, 24, 40, dtype=torch.uint8), image[:, 0]

    host = card(resize=resize)
    device = card(resize=resize, input_variant='device', frame_size_hw=frame_hw,
                  output_size_hw=frame_hw)
    image = noise(frame_hw)
    seen = []
    graph = on_device(Red(), device, (24, 40))
    graph.fused.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    graph(torch.from_numpy(image))
    np.testing.assert_allclose(seen[0].numpy(), Preprocessor(host)(image), atol=1e-6)


def test_buffers_are_reused_without_traces_of_the_frame_before() -> None:
    """Frames of changing size give what a new resizer gives."""
    resizer = Resizer((20, 40), 'antialiased')
    for seed, hw in enumerate([(160, 320), (40, 80), (75, 99), (20, 40), (300, 600), (10, 10)]):
        image = noise(hw, seed)
        np.testing.assert_array_equal(resizer(image), Resizer((20, 40), 'antialiased')(image))


def test_a_reduced_jpeg_is_smoothed_as_the_whole_one() -> None:
    """Nothing is left to interpolate then, but the network shall see what it sees otherwise."""
    picture = cv2.GaussianBlur(noise((512, 768)), (0, 0), 0.8)
    encoded = cv2.imencode('.jpg', picture, [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
    size_hw = (256, 384)
    whole = Resizer(size_hw, 'antialiased')(decode_compressed(encoded, 'jpeg').array)
    half = decode_compressed(encoded, 'jpeg', size_hw).array
    assert half.shape[:2] == size_hw
    sharp = Resizer(size_hw, 'antialiased')(half)
    np.testing.assert_array_equal(sharp, half)
    smooth = Resizer(size_hw, 'antialiased')(half, reduced=True)
    assert rms(smooth, whole) < 0.6 * rms(sharp, whole)
    np.testing.assert_array_equal(Resizer(size_hw, 'bilinear')(half, reduced=True), half)
