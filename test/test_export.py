# SPDX-License-Identifier: Apache-2.0
"""Export: what is kept agrees with PyTorch in every precision and variant."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from anomaly_seg_ros import export
from anomaly_seg_ros.backends import open_backend
from anomaly_seg_ros.datasets.frame import Frame
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.export import export_model, ExportRequest
from anomaly_seg_ros.files import sha256_file
from anomaly_seg_ros.fused import fuse
from anomaly_seg_ros.graph_variants import check_half, half_body
from anomaly_seg_ros.model_file import load_model_file
from anomaly_seg_ros.parity import compare, Difference, LIMITS, Limits
from anomaly_seg_ros.pipeline import Pipeline
from anomaly_seg_ros.ports import NetworkOutput
from anomaly_seg_ros.resize import Resizer
import cv2
import numpy as np
import onnx
from onnx import numpy_helper
import pytest
import small_network
from small_network import frames, small_model, small_weights  # noqa: F401
import torch
import torch.nn.functional as F


def request(weights: Path, **changes: Any) -> ExportRequest:
    """Return a request for the small network at 32x64."""
    values = {'network': 'small', 'weights': weights, 'input_size_hw': (32, 64)}
    return ExportRequest(**{**values, **changes})


def reuse_graph(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let export_model take this model's graph, which it made itself before, for its own."""
    monkeypatch.setattr(export, 'to_onnx', lambda module, example: model.read_bytes())


def expected(frame: np.ndarray, size_hw: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Do the whole way in PyTorch and cv2: labels and max_logit score at ``size_hw``."""
    small = Resizer((32, 64), 'antialiased')(frame)[..., ::-1]
    normalised = (small / 255.0 - small_network.MEAN) / small_network.STD
    with torch.inference_mode():
        logits = small_network.build()(torch.from_numpy(normalised.transpose(2, 0, 1)[None])
                                       .float())
        score = -F.interpolate(logits.amax(1)[None], size_hw, mode='bilinear')[0, 0]
    labels = cv2.resize(logits[0].argmax(0).byte().numpy(), size_hw[::-1],
                        interpolation=cv2.INTER_NEAREST_EXACT)
    return labels, score.numpy()


@pytest.mark.parametrize(('changes', 'score_limit', 'label_limit'), [
    ({}, 1e-5, 0),
    ({'input_variant': 'device', 'frame_size_hw': (45, 76), 'precision': 'fp16'}, 5e-3, 2e-3),
    pytest.param({'precision': 'fp16'}, 5e-3, 2e-3, marks=pytest.mark.slow),
    pytest.param({'input_variant': 'device', 'frame_size_hw': (45, 76)}, 1e-5, 0,
                 marks=pytest.mark.slow),
    pytest.param({'input_variant': 'device', 'frame_size_hw': (64, 128),
                  'frame_channel_order': 'bgr'}, 1e-5, 0, marks=pytest.mark.slow)])
def test_the_file_answers_as_pytorch(changes: dict[str, Any], score_limit: float,
                                     label_limit: float, small_weights: Path,  # noqa: F811
                                     tmp_path: Path) -> None:
    """Through the pipeline, from RGB and from BGR frames, at the camera's resolution."""
    size_hw = changes.get('frame_size_hw', (45, 76))
    card = export_model(request(small_weights, **changes), tmp_path / 'm.onnx', frames())
    model = load_model_file(tmp_path / 'm.onnx')
    assert model.card == card
    assert card.precision == changes.get('precision', 'fp32')
    assert card.weights_sha256 == sha256_file(small_weights)
    frame = frames(3, size_hw)[2]
    labels, score = expected(frame, size_hw)
    with open_backend(model, 'cpu') as backend:
        pipeline = Pipeline(backend)
        for image, order in ((frame, 'rgb'), (frame[..., ::-1], 'bgr')):
            detection = pipeline(image, order)
            assert np.abs(detection.anomaly - score).max() <= score_limit
            assert (detection.labels != labels).mean() <= label_limit
    assert card.parity['frames'] == 2
    assert card.parity['max_score_error'] <= score_limit
    if card.precision == 'fp16':
        assert 0 < card.parity['float16']['max_score_error'] <= score_limit
        assert 0 < card.parity['float16']['largest_activation'] < 100
        stored = {x.data_type for x in onnx.load(tmp_path / 'm.onnx').graph.initializer}
        assert onnx.TensorProto.FLOAT16 in stored


def test_device_equals_host_to_the_bit_of_its_input(
        small_model: Path, small_weights: Path, tmp_path: Path) -> None:  # noqa: F811
    """
    At an awkward scale both variants differ by float32 rounding only, everywhere.

    And the device model refuses frames of another size, naming both and the remedy.
    """
    size_hw = (107, 181)
    export_model(request(small_weights, input_variant='device', frame_size_hw=size_hw),
                 tmp_path / 'm.onnx', frames())
    image = np.random.default_rng(5).integers(0, 256, (*size_hw, 3), dtype=np.uint8)
    answers = []
    for path in (small_model, tmp_path / 'm.onnx'):
        with open_backend(load_model_file(path), 'cpu') as backend:
            pipeline = Pipeline(backend)
            answers.append(pipeline(image).copy())
            swapped = pipeline(image[..., ::-1], 'bgr')
            np.testing.assert_array_equal(swapped.anomaly, answers[-1].anomaly)
    np.testing.assert_array_equal(answers[0].labels, answers[1].labels)
    np.testing.assert_allclose(answers[0].anomaly, answers[1].anomaly, atol=3e-6)
    with open_backend(load_model_file(tmp_path / 'm.onnx'), 'cpu') as backend, \
            pytest.raises(ValueError, match=r'frames of 107x181, got 48x76.*--frame-size'):
        Pipeline(backend)(np.zeros((48, 76, 3), np.uint8))


def test_the_provisional_threshold_is_the_99th_percentile(
        small_model: Path, small_weights: Path, tmp_path: Path,  # noqa: F811
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one given, a hundredth of the check pixels lie above, and the card says so."""
    card = load_model_file(small_model).card
    with open_backend(load_model_file(small_model), 'cpu') as backend:
        scores = np.stack([backend.run(export.Preprocessor(card)(x)).anomaly.copy()
                           for x in frames()])
    assert (scores >= card.threshold).mean() == pytest.approx(0.01, abs=0.002)
    assert card.threshold_source.startswith('provisional')
    assert (scores < card.score_range[0]).mean() == pytest.approx(0.01, abs=0.002)
    reuse_graph(small_model, monkeypatch)
    given = export_model(request(small_weights, threshold=0.25, score_range=(-2.0, 1.0)),
                         tmp_path / 'm.onnx', frames())
    assert (given.threshold, given.threshold_source) == (0.25, 'given at export')
    assert given.score_range == (-2.0, 1.0)


def test_a_graph_that_drifts_is_not_kept(
        small_model: Path, small_weights: Path, tmp_path: Path,  # noqa: F811
        monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight changed by a hundredth: refused with figures, and the older file stays."""
    model = onnx.load(small_model)
    tensor = next(x for x in model.graph.initializer if len(x.dims) == 4)
    values = numpy_helper.to_array(tensor).copy()
    values.flat[0] += 1e-2
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    monkeypatch.setattr(export, 'to_onnx', lambda module, example: model.SerializeToString())
    (tmp_path / 'm.onnx').write_bytes(b'older')
    with pytest.raises(UserError, match=r'does not agree with float32 PyTorch: .*limit 1e-04'):
        export_model(request(small_weights), tmp_path / 'm.onnx', frames())
    assert (tmp_path / 'm.onnx').read_bytes() == b'older'
    assert sorted(x.name for x in tmp_path.iterdir()) == ['m.onnx', 'weights']


@pytest.mark.parametrize(('gain', 'message'), [
    (2000.0, r"float16 overflows: layer '.*' gives infinity or NaN.*--precision fp32"),
    (1.0, 'float16 PyTorch does not agree')])
def test_float16_that_overflows_or_drifts_is_not_kept(
        gain: float, message: str, small_weights: Path, tmp_path: Path,  # noqa: F811
        monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime's CPU would never notice: it computes float16 graphs in float32."""
    torch.save(small_network.build(gain).state_dict(), small_weights)
    if gain == 1.0:
        monkeypatch.setitem(LIMITS, 'fp16', replace(LIMITS['fp16'], mean_score=1e-7))
    with pytest.raises(UserError, match=message):
        export_model(request(small_weights, precision='fp16'), tmp_path / 'm.onnx', frames())
    assert not (tmp_path / 'm.onnx').exists()


def labelled_frames(count: int = 3) -> list[Frame]:
    """Return frames whose truth is mostly what the small network says."""
    made = []
    for index, image in enumerate(frames(count)):
        labels, score = expected(image, image.shape[:2])
        mask = (score > np.quantile(score, 0.9)).astype(np.uint8)
        made.append(Frame(str(index), image, mask, labels))
    return made


def test_float16_is_checked_on_fewer_frames_where_it_is_slow(
        small_weights: Path) -> None:  # noqa: F811
    """Once its time is over, but on two at the least; the outputs are those of the module."""
    module = fuse(small_network.load('small', small_weights).transformed(half_body), 'max_logit',
                  1.0)
    inputs = [torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(k))
              for k in range(4)]
    for seconds, count in ((0.0, 2), (60.0, 4)):
        largest, outputs = check_half(module, inputs, seconds)
        assert len(outputs) == count and largest > 0
        with torch.inference_mode():
            torch.testing.assert_close(outputs[1][1], module(inputs[1])[1])


def test_int8_is_gated_by_the_metrics(
        small_model: Path, small_weights: Path, tmp_path: Path,  # noqa: F811
        monkeypatch: pytest.MonkeyPatch) -> None:
    """The card holds AP and mIoU before and after; a larger drop than allowed leaves no file."""
    reuse_graph(small_model, monkeypatch)
    gate = labelled_frames()
    card = export_model(request(small_weights, precision='int8', maximum_drop=0.2),
                        tmp_path / 'm.onnx', frames(), gate)
    assert card.parity['int8']['calibration_frames'] == 2
    drop = card.parity['drop']
    assert drop['float32'] == pytest.approx({'average_precision': 1.0, 'miou': 1.0}, abs=0.05)
    assert all(drop['int8'][name] > drop['float32'][name] - 0.2 for name in drop['float32'])
    assert drop['int8'] != drop['float32']
    graph = onnx.load(tmp_path / 'm.onnx').graph
    int8 = [x for x in graph.initializer if x.data_type == onnx.TensorProto.INT8]
    assert sum(len(x.dims) == 4 for x in int8) == 1  # the one that makes the logits stays float
    with pytest.raises(UserError, match=r'int8 costs too much: average_precision 0\.\d+ -> 0\.'):
        export_model(request(small_weights, precision='int8', maximum_drop=1e-6),
                     tmp_path / 'n.onnx', frames(), gate)
    assert not (tmp_path / 'n.onnx').exists()


def test_int8_is_calibrated_on_frames_from_the_whole_sequence(
        small_model: Path, small_weights: Path, tmp_path: Path,  # noqa: F811
        monkeypatch: pytest.MonkeyPatch) -> None:
    """On 64, from the first to the last, and checked on 20 of these; of an iterator the first."""
    reuse_graph(small_model, monkeypatch)
    used: list[list[int]] = []

    def quantize(graph: bytes, card: Any, frames: list[np.ndarray], target: str) -> Any:
        used.append([int(frame[0, 0, 0]) for frame in frames])
        return graph, {}
    monkeypatch.setattr(export, 'quantize', quantize)
    drive = [np.full((32, 64, 3), value, np.uint8) for value in range(190)]
    int8 = request(small_weights, precision='int8', maximum_drop=1.0)
    for given in (drive, iter(drive)):
        card = export_model(int8, tmp_path / 'm.onnx', given, labelled_frames())
        assert card.parity['frames'] == 20
    assert used == [list(range(0, 190, 3)), list(range(64))]


def test_frames_are_spread_evenly() -> None:
    """First and last are among them, steps differ by one at the most; few are all taken."""
    assert export.spread(5, 20) == [0, 1, 2, 3, 4]
    assert export.spread(0, 20) == []
    for count in (21, 64, 100, 9999):
        chosen = export.spread(count, 20)
        steps = np.diff(chosen)
        assert (len(chosen), chosen[0], chosen[-1]) == (20, 0, count - 1)
        assert steps.min() >= 1 and np.ptp(steps) <= 1


@pytest.mark.parametrize(('changes', 'message'), [
    ({'network': 'resnet'}, "unknown network 'resnet'.*erfnet"),
    ({'score': 'sum'}, "unknown score 'sum'.*max_logit"),
    ({'precision': 'fp8'}, "unknown precision 'fp8'.*fp16"),
    ({'input_variant': 'gpu'}, "unknown input variant 'gpu'"),
    ({'input_variant': 'device'}, '--frame-size'),
    ({'input_size_hw': (33, 64)}, 'divisible by 2, got 33x64; the nearest possible is 32x64'),
    ({'input_size_hw': (51200, 64)}, '51200x64: height and width must be 1 to 16384'),
    ({'input_variant': 'device', 'frame_size_hw': (32, 16385)}, '32x16385: height and width'),
    ({'precision': 'int8'}, '--gate-dataset'),
    ({'temperature': float('nan')}, 'temperature must be positive, got nan'),
    ({'weights': Path('nowhere.pth')}, 'nowhere.pth')])
def test_what_cannot_be_exported_is_refused(changes: dict[str, Any], message: str,
                                            small_weights: Path,  # noqa: F811
                                            tmp_path: Path) -> None:
    """The error lists the choices, and no file is left."""
    with pytest.raises((UserError, OSError), match=message):
        export_model(request(**{'weights': small_weights, **changes}), tmp_path / 'm.onnx',
                     frames())
    assert not (tmp_path / 'm.onnx').exists()


def test_a_checkpoint_of_too_many_classes_is_refused(
        small_weights: Path, tmp_path: Path,  # noqa: F811
        monkeypatch: pytest.MonkeyPatch) -> None:
    """A label is one byte, of which 255 means unlabelled."""
    many = replace(small_network.load('small', small_weights),
                   classes=tuple(f'c{i}' for i in range(300)))
    monkeypatch.setitem(small_network.NETWORKS, 'small', lambda *arguments: many)
    with pytest.raises(UserError, match=r'small\.pth: .*classes must be 1 to 255 names, got 300'):
        export_model(request(small_weights), tmp_path / 'm.onnx', frames())


def test_no_frames_are_refused(small_weights: Path, tmp_path: Path) -> None:  # noqa: F811
    """Nothing can be compared on nothing."""
    with pytest.raises(UserError, match='at least one image'):
        export_model(request(small_weights), tmp_path / 'm.onnx', [])


def test_compare_measures_what_it_says() -> None:
    """Errors, mismatch and range of two made-up answers."""
    zero = NetworkOutput(np.zeros((2, 5), np.uint8), np.zeros((2, 5), np.float32))
    labels = zero.labels.copy()
    labels[0, 0] = 1
    other = NetworkOutput(labels, np.linspace(-3, 6, 10, dtype=np.float32).reshape(2, 5))
    assert compare([other, zero], [zero, zero]) == Difference(6.0, 1.35, 0.05, 0.0, 2)
    assert compare([zero], [other]).score_range == 9.0


def test_limits_are_relative_to_the_range() -> None:
    """An error of 0.05 passes where scores span 10, and fails where they span 1."""
    limits = Limits(1e-2, 1.0, 1.0)
    Difference(0.05, 0.0, 0.0, 10.0, 1).check(limits, 'a', 'b')
    with pytest.raises(UserError, match=r'a does not agree with b: largest score error 5\.00e-02'):
        Difference(0.05, 0.0, 0.0, 0.5, 1).check(limits, 'a', 'b')


@pytest.mark.slow
def test_erfnet_in_float16_on_real_frames(real_data: Path, tmp_path: Path) -> None:
    """With real weights and real frames float16 stays within its limits."""
    paths = sorted((real_data / 'anomaly/road_anomaly_21/images').iterdir())[:4]
    images = [cv2.imread(str(path))[..., ::-1].copy() for path in paths]
    card = export_model(
        ExportRequest('erfnet', real_data / 'weights/erfnet_cityscapes_20ch.pth',
                      precision='fp16', input_size_hw=(256, 512)), tmp_path / 'm.onnx', images)
    assert card.parity['float16']['label_mismatch'] < 4e-3
    assert card.parity['float16']['mean_score_error'] < 2e-2
