# SPDX-License-Identifier: Apache-2.0
"""The pipeline against float64 arithmetic and against PyTorch with OpenCV."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from anomaly_seg_ros.backends import Backend, open_backend
from anomaly_seg_ros.model_file import load_model_file, write_model_file
from anomaly_seg_ros.obstacles import ObstacleSettings
from anomaly_seg_ros.pipeline import BadOutput, Pipeline, resize_output, STAGES
from anomaly_seg_ros.resize import Resizer
from cards import card, identity_graph, identity_model
import cv2
from hypothesis import given, strategies as st
import numpy as np
import pytest
from test_preprocess import bilinear


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[Backend]:
    """Yield a backend whose logits are its input of 24x40 pixels."""
    with open_backend(identity_model(tmp_path / 'm.onnx'), 'cpu', threads=1) as opened:
        yield opened


def noise(size_hw: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Return a random RGB frame."""
    return np.random.default_rng(seed).integers(0, 256, (*size_hw, 3), dtype=np.uint8)


@pytest.mark.parametrize('size_hw', [(48, 80), (96, 160), (24, 40), (24, 80), (72, 120)])
def test_equals_float64(backend: Backend, size_hw: tuple[int, int]) -> None:
    """
    Labels, score and mask are those of the same steps in float64.

    At these sizes the downscaled frame is exact but for its rounding, so the only difference is
    that of float32 arithmetic.
    """
    frame = noise(size_hw)
    if size_hw == (72, 120):  # thirds are not exact in OpenCV's fixed point: a constant frame is
        frame[:] = (40, 90, 10)
    detection = Pipeline(backend, ObstacleSettings(-0.6, 1))(frame)

    network_input = np.floor(bilinear(frame, (24, 40)) + 0.5) / 255
    score = bilinear(-network_input.max(-1)[..., None], size_hw)[..., 0]
    rows, columns = ((np.arange(new) * 2 + 1) * old // (2 * new)
                     for new, old in zip(size_hw, (24, 40), strict=True))
    assert detection.anomaly.dtype == np.float32
    np.testing.assert_allclose(detection.anomaly, score, atol=1e-6)
    np.testing.assert_array_equal(detection.labels, network_input.argmax(-1)[rows][:, columns])
    sure = np.abs(score + 0.6) > 1e-6
    np.testing.assert_array_equal(detection.mask[sure] == 255, score[sure] >= -0.6)
    assert sum(o.area_px for o in detection.obstacles) == (detection.mask == 255).sum()
    assert tuple(detection.stages_ms) == STAGES
    assert all(ms > 0 for ms in detection.stages_ms.values())


@pytest.mark.parametrize('axis', [0, 1])
def test_the_score_lies_on_the_image_to_the_pixel(backend: Backend, axis: int) -> None:
    """A ramp of one grey level a pixel comes back in place: a shift of 0.1 px would show."""
    size_hw = (192, 240)
    ramp = np.arange(size_hw[axis], dtype=np.uint8)
    frame = np.broadcast_to(ramp[:, None, None] if axis == 0 else ramp[None, :, None],
                            (*size_hw, 3)).copy()
    detection = Pipeline(backend)(frame)
    shift = -detection.anomaly.astype(np.float64) * 255 - frame[..., 0]
    inner = shift[16:-16, 16:-16]
    assert abs(inner.mean()) < 0.55  # halves are rounded up: 0.5 levels at a scale of 6 and 8
    assert np.ptp(inner) < 1.01


def test_an_obstacle_is_where_it_is_in_the_image(backend: Backend) -> None:
    """A dark square that fills whole network pixels keeps its centre to 0.01 px."""
    frame = np.full((192, 320, 3), 200, np.uint8)
    frame[64:96, 200:240] = 20
    detection = Pipeline(backend, ObstacleSettings(-110 / 255, 10))(frame)
    (obstacle,) = detection.obstacles
    assert obstacle.centroid_xy == pytest.approx((219.5, 79.5), abs=0.01)
    assert (obstacle.x, obstacle.y, obstacle.width, obstacle.height) == (200, 64, 40, 32)
    assert obstacle.peak_score == pytest.approx(-20 / 255, abs=1e-6)


def test_channel_orders_agree(backend: Backend) -> None:
    """The same picture as RGB and as BGR gives the same answer."""
    pipeline = Pipeline(backend)
    frame = noise((48, 80))
    rgb = pipeline(frame).copy()
    bgr = pipeline(frame[..., ::-1], 'bgr')
    np.testing.assert_array_equal(rgb.labels, bgr.labels)
    np.testing.assert_array_equal(rgb.anomaly, bgr.anomaly)


def test_frames_of_changing_size_leave_no_traces(backend: Backend) -> None:
    """Each answer has its frame's size and equals that of a fresh pipeline."""
    pipeline = Pipeline(backend)
    for seed, size_hw in enumerate([(48, 80), (24, 40), (100, 60), (48, 80), (30, 200)]):
        got = pipeline(noise(size_hw, seed))
        fresh = Pipeline(backend)(noise(size_hw, seed))
        for name in ('labels', 'anomaly', 'mask'):
            assert getattr(got, name).shape == size_hw
            np.testing.assert_array_equal(getattr(got, name), getattr(fresh, name))
        assert got.obstacles == fresh.obstacles


def test_copy_survives_the_next_frame(backend: Backend) -> None:
    """The pipeline overwrites its arrays, a copy keeps them."""
    pipeline = Pipeline(backend)
    kept = pipeline(noise((48, 80), 1)).copy()
    before = kept.anomaly.copy()
    pipeline(noise((48, 80), 2))
    np.testing.assert_array_equal(kept.anomaly, before)


def test_steady_state_makes_no_frame_sized_arrays(backend: Backend) -> None:
    """The same buffers come back at every call."""
    pipeline = Pipeline(backend)
    first = pipeline(noise((48, 80), 1))
    second = pipeline(noise((48, 80), 2))
    for name in ('labels', 'anomaly', 'mask'):
        assert getattr(first, name) is getattr(second, name)


def test_maps_go_where_they_are_wanted(backend: Backend) -> None:
    """Into the arrays given, the others into the pipeline's own; with the same values."""
    pipeline = Pipeline(backend)
    own = pipeline(noise((48, 80), 1)).copy()
    given = {'labels': np.full((48, 80), 77, np.uint8), 'mask': np.full((48, 80), 77, np.uint8)}
    got = pipeline(noise((48, 80), 1), out=given)
    for name in ('labels', 'anomaly', 'mask'):
        np.testing.assert_array_equal(getattr(got, name), getattr(own, name))
        if name in given:
            assert np.shares_memory(getattr(got, name), given[name])
    other = pipeline(noise((48, 80), 2))
    assert not np.shares_memory(other.labels, given['labels'])
    np.testing.assert_array_equal(given['labels'], own.labels)


def test_settings_may_change_between_frames(backend: Backend) -> None:
    """The card gives the first threshold; a new one acts on the next frame."""
    pipeline = Pipeline(backend)
    assert pipeline.settings.threshold == -0.5
    frame = np.full((48, 80, 3), 51, np.uint8)  # score -0.2
    assert pipeline(frame).mask.all()
    pipeline.settings = replace(pipeline.settings, threshold=-0.1)
    assert not pipeline(frame).mask.any()


def test_region_uses_the_labels_of_the_same_frame(backend: Backend) -> None:
    """A dark patch inside the red (class 0, drivable) half stays, one in the blue half goes."""
    frame = np.zeros((96, 160, 3), np.uint8)
    frame[:, :80, 0] = frame[:, 80:, 2] = 200
    frame[32:48, 24:40] = frame[32:48, 120:136] = (0, 8, 0)
    pipeline = Pipeline(backend, ObstacleSettings(-0.3, 10, 'drivable'))
    assert [round(o.centroid_xy[0]) for o in pipeline(frame).obstacles] == [32]
    pipeline.settings = ObstacleSettings(-0.3, 10)
    assert sorted(round(o.centroid_xy[0]) for o in pipeline(frame).obstacles) == [32, 128]


@pytest.mark.parametrize('dark_pixels', [1, 48 * 80])
def test_a_score_that_is_not_finite_is_refused(dark_pixels: int, tmp_path: Path) -> None:
    """One NaN among finite scores is enough, and the next good frame is answered again."""
    graph = identity_graph((48, 80))
    graph.graph.node[-1].op_type = 'Log'  # of a negative number where the frame is black
    write_model_file(tmp_path / 'm.onnx', graph.SerializeToString(),
                     card((48, 80), mean=(0.1, 0.1, 0.1)))
    frame = np.full((48, 80, 3), 200, np.uint8)
    black = frame.copy()
    black.reshape(-1, 3)[:dark_pixels] = 0
    with open_backend(load_model_file(tmp_path / 'm.onnx'), 'cpu') as backend:
        pipeline = Pipeline(backend)
        before = pipeline(frame).anomaly.copy()
        with pytest.raises(BadOutput, match=r'max_logit.*not finite'):
            pipeline(black)
        np.testing.assert_array_equal(pipeline(frame).anomaly, before)


def test_warm_up_leaves_no_state(backend: Backend) -> None:
    """After it the first frame is answered as ever."""
    pipeline = Pipeline(backend)
    pipeline.warm_up((48, 80))
    frame = noise((48, 80))
    np.testing.assert_array_equal(pipeline(frame).anomaly, Pipeline(backend)(frame).anomaly)


def test_refuses_what_is_no_image(backend: Backend) -> None:
    """The error is the caller's, and the pipeline goes on."""
    pipeline = Pipeline(backend)
    with pytest.raises(ValueError, match=r'uint8 \(H, W, 3\)'):
        pipeline(np.zeros((48, 80), np.uint8))
    pipeline(noise((48, 80)))


def test_equals_pytorch_and_opencv(tiny_model: Path) -> None:
    """
    What a user would write with torch gives the same score, labels and mask.

    At this scale of 3 no label lies half-way between two network pixels.
    """
    from anomaly_seg_ros.networks.erfnet import ERFNet
    import torch
    import torch.nn.functional as F

    network = ERFNet(19).eval()
    network.load_state_dict(torch.load(tiny_model.parent / 'weights.pth', weights_only=True))
    frame = cv2.resize(noise((12, 24), 5), (384, 192), interpolation=cv2.INTER_CUBIC)

    small = Resizer((64, 128), 'antialiased')(frame)
    tensor = torch.from_numpy(small).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        logits = network(tensor)
        score = -F.interpolate(logits.amax(1)[None], (192, 384), mode='bilinear')[0, 0]
        labels = F.interpolate(logits.argmax(1)[None].float(), (192, 384), mode='nearest-exact')
    score = score.numpy()

    model = load_model_file(tiny_model)
    threshold = float(np.quantile(score, 0.9))
    with open_backend(model, 'cpu') as backend:
        detection = Pipeline(backend, ObstacleSettings(threshold, 1))(frame)
    np.testing.assert_allclose(detection.anomaly, score, atol=1e-5)
    assert (detection.labels == labels[0, 0].numpy()).mean() > 0.9999
    sure = np.abs(score - threshold) > 1e-5
    np.testing.assert_array_equal(detection.mask[sure] == 255, score[sure] >= threshold)


SIZES_HW = st.tuples(st.integers(1, 80), st.integers(1, 80))


@given(SIZES_HW, SIZES_HW, st.booleans())
def test_labels_are_resized_as_opencv_does(old_hw: tuple[int, int], new_hw: tuple[int, int],
                                           into: bool) -> None:
    """One axis after the other gives INTER_NEAREST_EXACT of both, larger and smaller."""
    labels = np.random.default_rng(3).integers(0, 256, old_hw, dtype=np.uint8)
    out = np.empty(new_hw, np.uint8) if into else None
    got, _ = resize_output(labels, labels.astype(np.float32), new_hw, out)
    expected = cv2.resize(labels, new_hw[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    np.testing.assert_array_equal(got, expected.reshape(new_hw))
    assert got.shape == new_hw and (out is None or old_hw == new_hw or got is out)
