# SPDX-License-Identifier: Apache-2.0
"""Temperature and threshold against scipy and against their definitions."""

from dataclasses import replace
import hashlib
import logging
from pathlib import Path
import sys
from typing import Any

from anomaly_seg_ros import calibration
from anomaly_seg_ros.backends import open_backend
from anomaly_seg_ros.backends.onnxruntime_gpu import tensorrt_options
from anomaly_seg_ros.calibration import (
    _bare_graph, _Drawn, _LabelledPixels, _planes, best_f1, calibrate, CalibrationRequest,
    check_logits, minimise_nll, negative_log_likelihood, WeightedScores, with_temperature)
from anomaly_seg_ros.cli import cli
from anomaly_seg_ros.datasets import open_dataset
from anomaly_seg_ros.datasets.frame import Frame
from anomaly_seg_ros.datasets.source import FrameSource
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.export import export_model, ExportRequest
from anomaly_seg_ros.export_onnx import (
    append_head, export_onnx, OnnxExportRequest, reference_answer)
from anomaly_seg_ros.metrics.pixel import PixelCurve
from anomaly_seg_ros.model_file import load_model_file, ModelFile, write_model_file
from anomaly_seg_ros.networks import NETWORKS
from anomaly_seg_ros.pipeline import Pipeline
from anomaly_seg_ros.preprocess import Preprocessor
import cards
from click.testing import CliRunner
import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
from scipy.optimize import minimize_scalar
import small_network
from small_network import small_model  # noqa: F401
import test_export_onnx as onnx_networks
import torch


class Labelled(FrameSource):
    """Noise frames with the labels that a hotter softmax would draw."""

    name = 'labelled'
    root = Path('memory')

    def __init__(self, count: int = 3) -> None:
        rng = np.random.default_rng(5)
        self._frames = []
        for index in range(count):
            coarse = rng.integers(0, 256, (12, 20, 3), dtype=np.uint8)
            image = cv2.resize(coarse, (160, 96), interpolation=cv2.INTER_CUBIC)
            labels = rng.integers(0, 19, (96, 160), dtype=np.uint8)
            labels[:10] = 255
            self._frames.append(Frame(str(index), image, None, labels))

    @property
    def frame_ids(self) -> list[str]:
        """Names of the frames."""
        return [frame.frame_id for frame in self._frames]

    def __getitem__(self, index: int) -> Frame:
        """Return a frame."""
        return self._frames[index]


@pytest.mark.parametrize('true_temperature', [0.4, 1.0, 3.0])
def test_fitted_temperature_is_scipys(true_temperature: float) -> None:
    """Labels drawn from softmax(f / T) give T back, and the same optimum as scipy's."""
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 4, (20000, 7))
    p = np.exp(logits / true_temperature
               - np.max(logits / true_temperature, 1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    labels = (p.cumsum(1) > rng.random((len(p), 1))).argmax(1)
    fitted = minimise_nll(logits, labels)
    best = minimize_scalar(lambda t: negative_log_likelihood(logits, labels, t),
                           bounds=(0.05, 20), method='bounded', options={'xatol': 1e-8})
    assert fitted == pytest.approx(best.x, rel=1e-4)
    assert fitted == pytest.approx(true_temperature, rel=0.05)


def test_likelihood_is_the_definition() -> None:
    """Against -log(softmax) written out."""
    logits = np.array([[1.0, 2.0, 3.0], [0.0, -1.0, 5.0]])
    p = np.exp(logits / 2) / np.exp(logits / 2).sum(1, keepdims=True)
    assert negative_log_likelihood(logits, np.array([2, 0]), 2.0) == pytest.approx(
        -np.log([p[0, 2], p[1, 0]]).mean(), rel=1e-12)


def planes_model(path: Path) -> ModelFile:
    """Write a model whose head works on planes (1, C, h, w), as heads for any ONNX graph do."""
    graph = cards.identity_graph((64, 128))
    del graph.graph.node[:]
    graph.graph.node.append(onnx.helper.make_node('Mul', ['image', 'image'], ['logits']))
    card = cards.card((64, 128))
    append_head(graph, 'logits', OnnxExportRequest(path, classes=card.classes, score='max_logit'),
                (64, 128), (64, 128))
    write_model_file(path, graph.SerializeToString(), card)
    return load_model_file(path)


@pytest.mark.parametrize('kind', ['sub-pixel rows', 'rows', 'planes'])
@pytest.mark.parametrize('score', ['msp', 'entropy', 'energy', 'max_logit'])
def test_score_at_another_temperature_is_the_formula(
        tiny_model: Path, small_model: Path, tmp_path: Path,  # noqa: F811
        score: str, kind: str) -> None:
    """The rebuilt head gives the float64 score of logits / T, and the labels do not change."""
    model = planes_model(tmp_path / 'planes.onnx') if kind == 'planes' else \
        load_model_file(small_model if kind == 'rows' else tiny_model)
    network_input = np.random.default_rng(2).random(
        (1, 3, *model.card.input_size_hw), np.float32)
    with open_backend(model) as backend:
        before = backend.run(network_input)
    # max_logit at T = 1 is the exported model's score, so its logits can be read off a rebuilt
    # head; the logits themselves come from the graph before the head.
    bare, names = _bare_graph(model)
    assert isinstance(names, str) == (kind == 'planes')
    assert isinstance(names, str) or len(names) == (1 if kind == 'rows' else 2)
    logits = _planes(onnxruntime.InferenceSession(bare.SerializeToString()).run(
        None, {'image': network_input}), before.labels.shape)
    np.testing.assert_allclose(-logits.max(0), before.anomaly, rtol=1e-6)
    hotter = with_temperature(replace(model, card=replace(model.card, score=score)), 2.5)
    with open_backend(hotter) as backend:
        after = backend.run(network_input)
    expected = reference_answer(logits, score, 2.5)
    np.testing.assert_allclose(after.anomaly, expected.anomaly, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(after.labels, before.labels)


@pytest.mark.parametrize('score', ['msp', 'entropy'])
def test_calibrated_again_the_score_is_still_the_formula(score: str, tmp_path: Path) -> None:
    """Twice, on a graph with a void channel and another head beside the logits."""
    weights = onnx_networks.network(tmp_path / 'net.onnx', channels=5)
    request = onnx_networks.request(weights, score=score, void_index=2)
    image = onnx_networks.frames()[0]
    card = export_onnx(request, tmp_path / '1.onnx', [image])
    for before, after, temperature in (('1', '2', 2.0), ('2', '3', 0.5)):
        card = calibrate(tmp_path / f'{before}.onnx', Labelled(), tmp_path / f'{after}.onnx',
                         CalibrationRequest(temperature))
        assert card.parity == {}  # it was that of the score before
    onnx.checker.check_model(onnx.load(tmp_path / '3.onnx'))
    network_input = Preprocessor(card)(image)
    (logits,) = onnxruntime.InferenceSession(weights).run(['logits'], {'pixels': network_input})
    expected = reference_answer(np.delete(logits[0], 2, 0), score, 0.5)
    with open_backend(load_model_file(tmp_path / '3.onnx')) as backend:
        answer = backend.run(network_input)
    np.testing.assert_allclose(answer.anomaly, expected.anomaly, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(answer.labels, expected.labels)


@pytest.mark.parametrize('score', ['msp', 'energy'])
def test_an_ensemble_keeps_its_temperature(score: str, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch,
                                           caplog: pytest.LogCaptureFixture) -> None:
    """It has probabilities where others have logits: its score must stay, or no file be made."""
    monkeypatch.setitem(NETWORKS, 'small', small_network.load)
    weights = [tmp_path / f'{gain}.pth' for gain in (1.0, 1.5)]
    for path in weights:
        torch.save(small_network.build(float(path.stem)).state_dict(), path)
    model = tmp_path / 'ensemble.onnx'
    export_model(ExportRequest('small', weights, score, (32, 64)), model, small_network.frames())
    with pytest.raises(UserError, match=r'no logits to divide.*--temperature keep'):
        calibrate(model, Labelled(), tmp_path / 'out.onnx', CalibrationRequest(1.0))
    assert not (tmp_path / 'out.onnx').exists()
    with caplog.at_level(logging.WARNING):
        card = calibrate(model, Labelled(), tmp_path / 'out.onnx')
    assert 'the temperature stays 1: ' in caplog.text and 'no logits' in caplog.text
    assert card.temperature == 1 and card.parity == load_model_file(model).card.parity
    image = np.random.default_rng(2).random((1, 3, 32, 64), np.float32)
    answers = []
    for path in (model, tmp_path / 'out.onnx'):
        with open_backend(load_model_file(path)) as backend:
            answers.append(backend.run(image).anomaly)
    np.testing.assert_array_equal(*answers)


def test_mask_networks_have_no_logits(tmp_path: Path) -> None:
    """The energy of their class scores alone looks like one of logits, but only at T = 1."""
    model = planes_model(tmp_path / 'planes.onnx')
    image = Labelled()[0].image_rgb
    check_logits(model, image)
    for network in ('eomt', 'mask2former_swin_tiny'):
        with pytest.raises(UserError, match=r'masks and classes.*--temperature'):
            check_logits(replace(model, card=replace(model.card, network=network)), image)


def test_half_precision_graphs_have_logits(tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding in the body is no other score."""
    monkeypatch.setitem(NETWORKS, 'small', small_network.load)
    torch.save(small_network.build().state_dict(), tmp_path / 'small.pth')
    export_model(ExportRequest('small', tmp_path / 'small.pth', 'energy', (32, 64),
                               precision='fp16'), tmp_path / 'm.onnx', small_network.frames())
    check_logits(load_model_file(tmp_path / 'm.onnx'), Labelled()[0].image_rgb)


def test_threshold_keeps_the_false_positive_rate(tiny_model: Path, small_benchmark: Path,
                                                 tmp_path: Path) -> None:
    """At most the asked share of in-distribution pixels is flagged, and nearly that many."""
    source = open_dataset('road_anomaly_21', small_benchmark)
    card = calibrate(tiny_model, source, tmp_path / 'out.onnx',
                     CalibrationRequest(criterion='fpr', rate=0.05))
    written = load_model_file(tmp_path / 'out.onnx')
    assert written.card.threshold == card.threshold
    assert written.card.threshold_source.startswith('calibrated: 0.05')
    flagged = total = 0
    with open_backend(written) as backend:
        pipeline = Pipeline(backend)
        for frame in source:
            known = frame.anomaly_mask == 0
            flagged += int((pipeline(frame.image_rgb).anomaly[known] >= card.threshold).sum())
            total += int(known.sum())
    assert 0.045 < flagged / total <= 0.05


def test_onnx_is_needed_for_another_temperature_only(
        tiny_model: Path, small_benchmark: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """A vehicle, which has no onnx, sets its threshold by the command of the README."""
    monkeypatch.setitem(sys.modules, 'onnx', None)
    arguments = ['calibrate', tiny_model, '--dataset', 'road_anomaly_21', '--root',
                 small_benchmark, '--output', tmp_path / 'out.onnx']
    result = CliRunner().invoke(cli, [*map(str, arguments), '--temperature', '2'])
    assert isinstance(result.exception, UserError)
    assert 'this needs onnx' in str(result.exception)
    assert '--temperature keep' in str(result.exception)
    assert not (tmp_path / 'out.onnx').exists()
    assert CliRunner().invoke(cli, [*map(str, arguments)]).exit_code == 0
    assert load_model_file(tmp_path / 'out.onnx').card.threshold_source.startswith('calibrated')


def test_rates_where_none_is_given(tiny_model: Path, small_benchmark: Path,
                                   tmp_path: Path) -> None:
    """One in a hundred false positives, 95 of a hundred anomalous pixels found."""
    source = open_dataset('road_anomaly_21', small_benchmark)
    for criterion, said in (('fpr', '0.01 of the in-dist'), ('tpr', '0.95 of the anomalous')):
        card = calibrate(tiny_model, source, tmp_path / 'out.onnx',
                         CalibrationRequest(criterion=criterion))
        assert said in card.threshold_source
    with pytest.raises(ValueError, match='best-f1 takes no rate'):
        CalibrationRequest(criterion='best-f1', rate=0.05)


def test_threshold_by_recall_and_by_f1(tiny_model: Path, small_benchmark: Path,
                                       tmp_path: Path) -> None:
    """At least the asked share of anomalous pixels is found; best F1 is the evaluator's."""
    from anomaly_seg_ros.evaluate import evaluate
    source = open_dataset('road_anomaly_21', small_benchmark)
    card = calibrate(tiny_model, source, tmp_path / 'a.onnx',
                     CalibrationRequest(criterion='tpr', rate=0.9))
    with open_backend(load_model_file(tiny_model)) as backend:
        pipeline = Pipeline(backend)
        scores = np.concatenate([pipeline(f.image_rgb).anomaly[f.anomaly_mask == 1].copy()
                                 for f in source])
    assert (scores >= card.threshold).mean() >= 0.9
    assert (scores >= np.nextafter(np.float32(card.threshold), np.float32(np.inf))).mean() \
        == pytest.approx(0.9, abs=0.01)
    card = calibrate(tiny_model, source, tmp_path / 'b.onnx',
                     CalibrationRequest(criterion='best-f1'))
    assert card.threshold == pytest.approx(
        evaluate(tiny_model, source, tmp_path / 'o')['pixel']['best_f1_threshold'])


def test_drawn_pixels_count_for_those_they_were_drawn_from() -> None:
    """Each score given twice or five times is the same as a weight of two or five."""
    rng = np.random.default_rng(4)
    many, few = (rng.normal(0, 1, 300).round(1).astype(np.float32) for _ in range(2))
    anomalous = rng.normal(1, 1, 200).round(1).astype(np.float32)
    negatives = WeightedScores.of([_Drawn(many, 5 * many.size), _Drawn(few, 2 * few.size)])
    positives = WeightedScores.of([_Drawn(anomalous, anomalous.size), _Drawn(few[:0], 0)])
    whole = np.concatenate([many.repeat(5), few.repeat(2)])
    assert best_f1(positives, negatives) == pytest.approx(
        PixelCurve.of(anomalous, whole).best_f1(), rel=1e-12)
    for rate in (0.001, 0.05, 0.5, 0.99):
        threshold = negatives.lowest_with_at_most(rate)
        assert (whole >= threshold).mean() <= rate
        assert (whole >= np.nextafter(np.float32(threshold), -np.float32(np.inf))).mean() > rate
        threshold = positives.highest_with_at_least(rate)
        assert (anomalous >= threshold).mean() >= rate
        assert (anomalous > np.float32(threshold)).mean() < rate


def test_a_threshold_from_few_pixels_is_that_of_all(
        tiny_model: Path, small_benchmark: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames hold ten times more in-distribution pixels than anomalous ones."""
    monkeypatch.setattr(calibration, 'PIXELS_PER_FRAME', 1000)
    source = open_dataset('road_anomaly_21', small_benchmark)
    card = calibrate(tiny_model, source, tmp_path / 'few.onnx',
                     CalibrationRequest(criterion='best-f1'))
    scores, masks = [], []
    with open_backend(load_model_file(tiny_model)) as backend:
        pipeline = Pipeline(backend)
        for frame in source:
            scores.append(pipeline(frame.image_rgb).anomaly.ravel().copy())
            masks.append(frame.anomaly_mask.ravel())
    all_scores, mask = np.concatenate(scores), np.concatenate(masks)
    curve = PixelCurve.of(all_scores[mask == 1], all_scores[mask == 0])
    called = all_scores >= card.threshold
    tp, fp = (int(np.count_nonzero(called & (mask == code))) for code in (1, 0))
    assert 2 * tp / (tp + fp + curve.positives) > 0.97 * curve.best_f1()[0]
    assert f'best F1 ({curve.best_f1()[0]:.1f}' in card.threshold_source


def test_temperature_is_fitted_and_lowers_the_likelihood(tiny_model: Path,
                                                         tmp_path: Path) -> None:
    """On labels of no meaning the fitted softmax is flatter, and its calibration error lower."""
    card = calibrate(tiny_model, Labelled(), tmp_path / 'out.onnx',
                     CalibrationRequest(temperature='fit'))
    figures = card.provenance['calibration']['temperature_fit']
    assert figures['nll_after'] < figures['nll_before']
    assert figures['ece_after'] < figures['ece_before']
    assert card.temperature > 1


def test_pixels_of_the_fit_are_few_and_drawn_evenly(tiny_model: Path, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pixel of each frame has the same chance, and a draw gives nearly the same fit."""
    drawn = _LabelledPixels(3000)
    sizes = (500, 4000, 20, 9000, 6480)
    for number, count in enumerate(sizes):
        labels = np.full((100, 200), 255, np.uint8)
        labels.ravel()[:count] = number
        logits = np.full((3, 100, 200), 10 * number, np.float32)
        logits[1] += np.arange(20000).reshape(100, 200) % 10
        drawn.offer(logits, labels)
    assert drawn.logits.shape == (3000, 3) and len(drawn.labels) == 3000
    np.testing.assert_array_equal(drawn.logits[:, 0], 10 * drawn.labels)
    np.testing.assert_allclose(np.bincount(drawn.labels) / 3000, np.array(sizes) / 20000,
                               atol=0.02)
    np.testing.assert_allclose((drawn.logits[:, 1] - drawn.logits[:, 0]).mean(), 4.5, atol=0.2)

    whole = calibrate(tiny_model, Labelled(), tmp_path / 'whole.onnx',
                      CalibrationRequest(temperature='fit'))
    monkeypatch.setattr(calibration, 'FIT_PIXELS', 5000)
    few = calibrate(tiny_model, Labelled(), tmp_path / 'few.onnx',
                    CalibrationRequest(temperature='fit'))
    assert few.temperature != whole.temperature
    figures = [card.provenance['calibration']['temperature_fit'] for card in (few, whole)]
    assert figures[0]['nll_after'] == pytest.approx(figures[1]['nll_after'], rel=0.01)


def test_a_fit_that_ends_at_a_limit_is_said(tiny_model: Path, tmp_path: Path,
                                            caplog: pytest.LogCaptureFixture) -> None:
    """Labels that are the network's own answers want a softmax as sharp as there is."""
    source = Labelled(1)
    with open_backend(load_model_file(tiny_model)) as backend:
        own = Pipeline(backend)(source[0].image_rgb).labels.copy()
    source._frames = [replace(source[0], labels=own)]
    with caplog.at_level(logging.WARNING):
        card = calibrate(tiny_model, source, tmp_path / 'out.onnx',
                         CalibrationRequest(temperature='fit'))
    assert 'is the limit' in caplog.text
    assert card.temperature == pytest.approx(0.05)


def test_labels_of_other_classes_fit_no_temperature(tiny_model: Path, tmp_path: Path) -> None:
    """By default the temperature is kept, a fit is refused; an other order is by name."""
    source = Labelled()
    source.class_set = 'cityscapes'
    other = cards.identity_model(tmp_path / 'other.onnx', score='energy').path
    card = calibrate(other, source, tmp_path / 'out.onnx')
    assert card.temperature == 1 and 'temperature_fit' not in card.provenance['calibration']
    with pytest.raises(UserError, match=r'19 classes(.|\n)*--temperature keep'):
        calibrate(other, source, tmp_path / 'x.onnx', CalibrationRequest(temperature='fit'))

    model = load_model_file(tiny_model)
    turned = replace(model.card, classes=model.card.classes[::-1])
    write_model_file(tmp_path / 'turned.onnx', model.data, turned)
    by_name = calibrate(tmp_path / 'turned.onnx', source, tmp_path / 'out.onnx',
                        CalibrationRequest(temperature='fit'))
    for frame in source:
        frame.labels[frame.labels < 19] = 18 - frame.labels[frame.labels < 19]
    source.class_set = None
    by_id = calibrate(tiny_model, source, tmp_path / 'out.onnx',
                      CalibrationRequest(temperature='fit'))
    assert by_name.temperature == by_id.temperature


def test_a_model_of_another_temperature_has_a_digest_of_its_own(tmp_path: Path) -> None:
    """What a backend builds and keeps for one model is not taken for another's."""
    model = planes_model(tmp_path / 'planes.onnx')
    model = replace(model, card=replace(model.card, score='energy'))
    hotter, hottest = (with_temperature(model, value) for value in (2.0, 3.0))
    assert hotter.sha256 == hashlib.sha256(hotter.data).hexdigest()
    folders = {tensorrt_options(each, tmp_path, True)['trt_engine_cache_path']
               for each in (model, hotter, hottest)}
    assert len(folders) == 3
    with pytest.raises(ValueError, match='no engine cache'):
        tensorrt_options(replace(model, sha256=''), tmp_path, True)


def test_an_engine_takes_no_other_temperature(tiny_model: Path, tmp_path: Path) -> None:
    """It would be called stale, and building it again would not help."""
    with pytest.raises(UserError, match='Calibrate with --backend cpu, then build the engine'):
        calibrate(tiny_model, Labelled(1), tmp_path / 'x.onnx',
                  CalibrationRequest(temperature='fit'), backend='tensorrt')


def test_the_figures_before_are_those_of_the_cards_temperature(tiny_model: Path,
                                                               tmp_path: Path) -> None:
    """A second fit on the same frames changes nothing, and says so; threads are as asked."""
    seen: list[int] = []

    class Session(onnxruntime.InferenceSession):  # type: ignore[misc]
        def __init__(self, model: bytes, options: Any = None, **others: Any) -> None:
            seen.append(options.intra_op_num_threads)
            super().__init__(model, options, **others)

    calibrate(tiny_model, Labelled(), tmp_path / 'first.onnx', CalibrationRequest('fit'))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, 'InferenceSession', Session)
        card = calibrate(tmp_path / 'first.onnx', Labelled(), tmp_path / 'second.onnx',
                         CalibrationRequest('fit'), threads=1)
    figures = card.provenance['calibration']['temperature_fit']
    assert figures['nll_before'] == pytest.approx(figures['nll_after'], rel=1e-6)
    assert set(seen) == {1}


def test_a_frame_a_device_model_does_not_take_is_named(small_benchmark: Path,
                                                       tmp_path: Path) -> None:
    """No traceback, and no file."""
    with pytest.raises(UserError, match=r'frame 1: .*96x160, got 80x128'):
        calibrate(cards.device_model(tmp_path / 'm.onnx', (96, 160)).path,
                  open_dataset('road_anomaly_21', small_benchmark), tmp_path / 'out.onnx')
    assert not (tmp_path / 'out.onnx').exists()


def test_what_the_frames_lack_is_said(tiny_model: Path, small_benchmark: Path,
                                      tmp_path: Path) -> None:
    """No labels for a temperature, no anomalies for a recall: no file, and the way out."""
    source = open_dataset('road_anomaly_21', small_benchmark)
    with pytest.raises(UserError, match='no labels'):
        calibrate(tiny_model, source, tmp_path / 'x.onnx', CalibrationRequest(temperature='fit'))
    with pytest.raises(UserError, match='--criterion fpr'):
        calibrate(tiny_model, Labelled(), tmp_path / 'x.onnx',
                  CalibrationRequest(temperature='keep', criterion='tpr', rate=0.95))
    assert not (tmp_path / 'x.onnx').exists()
