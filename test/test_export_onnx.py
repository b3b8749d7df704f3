# SPDX-License-Identifier: Apache-2.0
"""Heads fused into graphs of other makers, against the formulas in float64."""

from collections.abc import Callable
import hashlib
from pathlib import Path
from typing import Any

from anomaly_seg_ros import export_onnx as module
from anomaly_seg_ros.backends import onnxruntime as backend_module
from anomaly_seg_ros.backends import open_backend
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.export_onnx import (
    _precision, _rename, export_onnx, OnnxExportRequest, reference_answer)
from anomaly_seg_ros.files import sha256_file
from anomaly_seg_ros.model_file import load_model_file
from anomaly_seg_ros.pipeline import Pipeline
from anomaly_seg_ros.ports import NetworkOutput
from anomaly_seg_ros.preprocess import Preprocessor
import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
import pytest
from scipy import special, stats

CLASSES = ('road', 'car', 'sky', 'pole')
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def network(path: Path, *, opset: int = 17, channels: int = 4, stride: int = 4,
            size: tuple[Any, Any] = (32, 48), dtype: type = np.float32, gain: float = 1.0) -> Path:
    """Write a convolution of ``stride`` with random weights, and a second output beside it."""
    rng = np.random.default_rng(0)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    weights = [numpy_helper.from_array(array.astype(dtype), name) for name, array in (
        ('w', rng.standard_normal((channels, 3, 5, 5)) * gain / 4),
        ('b', rng.standard_normal(channels) * gain), ('v', rng.standard_normal((2, 3, 1, 1))))]
    nodes = [helper.make_node('Conv', ['pixels', 'w', 'b'], ['logits'], strides=[stride] * 2,
                              pads=[2] * 4),
             helper.make_node('Conv', ['pixels', 'v'], ['depth'])]
    graph = helper.make_graph(
        nodes, 'net', [helper.make_tensor_value_info('pixels', kind, [1, 3, *size])],
        [helper.make_tensor_value_info(name, kind, [1, None, None, None])
         for name in ('logits', 'depth')], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', opset)], ir_version=8)
    onnx.save(model, path)
    return path


def frames(count: int = 2) -> list[np.ndarray]:
    """Return random RGB frames."""
    return list(np.random.default_rng(1).integers(0, 256, (count, 40, 60, 3), dtype=np.uint8))


def request(weights: Path, **changes: Any) -> OnnxExportRequest:
    """Return a request for the network above."""
    return OnnxExportRequest(**{**{'weights': weights, 'logits': 'logits', 'mean': MEAN,
                                   'std': STD, 'classes': CLASSES}, **changes})


def formula(name: str, logits: np.ndarray, temperature: float) -> np.ndarray:
    """Return a score of logits (C, h, w) by scipy, in float64."""
    f = logits.astype(np.float64) / temperature
    p = special.softmax(f, 0)
    return {'max_logit': lambda: -f.max(0), 'msp': lambda: 1 - p.max(0),
            'entropy': lambda: stats.entropy(p, axis=0),
            'energy': lambda: -temperature * special.logsumexp(f, 0)}[name]()


@pytest.mark.parametrize('score', ['max_logit', 'msp', 'entropy', 'energy'])
@pytest.mark.parametrize(('opset', 'temperature'), [(13, 1.0), (17, 2.5), (18, 1.0), (20, 0.7)])
def test_scores_equal_the_formulas(score: str, opset: int, temperature: float,
                                   tmp_path: Path) -> None:
    """The file's answers are scipy's on the logits of onnx's own reference implementation."""
    weights = network(tmp_path / 'net.onnx', opset=opset)
    card = export_onnx(request(weights, score=score, temperature=temperature),
                       tmp_path / 'model.onnx', frames())
    model = load_model_file(tmp_path / 'model.onnx')
    assert model.card == card
    assert card.output_size_hw == (8, 12)
    assert card.drivable == (0,)
    image = Preprocessor(card)(frames()[1])
    (logits,) = ReferenceEvaluator(str(weights)).run(['logits'], {'pixels': image})
    with open_backend(model, 'cpu') as backend:
        answer = backend.run(image)
    np.testing.assert_allclose(answer.anomaly, formula(score, logits[0], temperature),
                               rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(answer.labels, logits[0].argmax(0))
    assert onnx.load(tmp_path / 'model.onnx').opset_import[0].version == opset
    assert [x.name for x in onnx.load(tmp_path / 'model.onnx').graph.output] == [
        'labels', 'anomaly']


@pytest.mark.parametrize('score', ['msp', 'entropy'])
def test_sure_pixels_keep_their_digits(score: str, tmp_path: Path) -> None:
    """Where one class wins by 27 the score is about 1e-12, not 0, and its relative error small."""
    weights = network(tmp_path / 'net.onnx', gain=12)
    card = export_onnx(request(weights, score=score), tmp_path / 'model.onnx', frames())
    image = Preprocessor(card)(frames()[0])
    (logits,) = ReferenceEvaluator(str(weights)).run(['logits'], {'pixels': image})
    expected = reference_answer(logits[0], score, 1.0).anomaly
    sure = (expected < 1e-7) & (expected > 1e-12)
    assert sure.any()
    with open_backend(load_model_file(tmp_path / 'model.onnx'), 'cpu') as backend:
        got = backend.run(image).anomaly
    np.testing.assert_allclose(got[sure], expected[sure], rtol=1e-3)


def test_reference_is_scipys() -> None:
    """The gate's own float64 formulas are right."""
    logits = np.random.default_rng(2).standard_normal((5, 6, 7)) * 4
    for score in ('max_logit', 'msp', 'entropy', 'energy'):
        np.testing.assert_allclose(reference_answer(logits, score, 1.3).anomaly,
                                   formula(score, logits, 1.3), rtol=1e-12, atol=1e-13)


def test_open_sizes_void_and_upsampling(tmp_path: Path) -> None:
    """Open sizes are closed, the void channel takes no part, logits grow to the input's size."""
    weights = network(tmp_path / 'net.onnx', channels=5, stride=2, size=('h', 'w'))
    card = export_onnx(request(weights, void_index=2, upsample=True, input_size_hw=(24, 40)),
                       tmp_path / 'model.onnx', frames())
    assert (card.input_size_hw, card.output_size_hw) == ((24, 40), (24, 40))
    image = Preprocessor(card)(frames()[0])
    (logits,) = ReferenceEvaluator(str(weights)).run(['logits'], {'pixels': image})
    import torch
    known = torch.from_numpy(np.delete(logits, 2, 1))
    large = torch.nn.functional.interpolate(known, (24, 40), mode='bilinear')[0].numpy()
    with open_backend(load_model_file(tmp_path / 'model.onnx'), 'cpu') as backend:
        answer = backend.run(image)
    np.testing.assert_allclose(answer.anomaly, -large.max(0), atol=1e-5)
    assert (answer.labels == large.argmax(0)).mean() > 0.999


def rewrite(path: Path, change: Callable[[Any], object]) -> Path:
    """Change the graph of an ONNX file."""
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize('names', [
    {'logits': 'labels', 'depth': 'anomaly'}, {'logits': 'anomaly', 'depth': 'image'},
    {'pixels': 'labels', 'depth': 'anomaly_seg_2'}, {'logits': 'labels_1', 'depth': 'labels'}])
def test_tensors_may_have_the_names_of_ours(names: dict[str, str], tmp_path: Path) -> None:
    """The answer is the same; errors speak of the names that the user knows."""
    weights = network(tmp_path / 'net.onnx')
    export_onnx(request(weights), tmp_path / 'expected.onnx', frames())
    rewrite(weights, lambda graph: _rename(graph, names))
    logits = names.get('logits', 'logits')
    card = export_onnx(request(weights, logits=logits), tmp_path / 'model.onnx', frames())
    answers = []
    for name in ('expected', 'model'):
        with open_backend(load_model_file(tmp_path / f'{name}.onnx'), 'cpu') as backend:
            answers.append(backend.run(Preprocessor(card)(frames()[0]).copy()).anomaly.copy())
    np.testing.assert_array_equal(*answers)
    with pytest.raises(UserError, match=f"outputs {logits}, {names['depth']} or"):
        export_onnx(request(weights, logits=None), tmp_path / 'x.onnx', frames())


def test_branches_see_the_renamed_tensors(tmp_path: Path) -> None:
    """The bodies of If take the image by its new name, and keep theirs apart from ours."""
    def into_branches(graph: Any) -> None:
        branches = {}
        for name in ('then_branch', 'else_branch'):
            inner = f'labels_{name}' if name == 'then_branch' else 'labels'
            node = onnx.NodeProto.FromString(graph.node[0].SerializeToString())
            node.output[0] = inner
            branches[name] = helper.make_graph(
                [node], name, [], [helper.make_tensor_value_info(inner, 1, None)])
        graph.initializer.append(numpy_helper.from_array(np.array(False), 'condition'))
        graph.node[0].CopyFrom(helper.make_node('If', ['condition'], ['logits'], **branches))

    weights = network(tmp_path / 'net.onnx')
    expected = export_onnx(request(weights), tmp_path / 'model.onnx', frames())
    card = export_onnx(request(rewrite(weights, into_branches)), tmp_path / 'model.onnx', frames())
    assert card.threshold == expected.threshold


@pytest.mark.parametrize(('operator', 'precision'), [
    ('DynamicQuantizeLinear', 'int8'), ('ConvInteger', 'int8'), ('QLinearConv', 'int8'),
    ('MatMulInteger', 'int8'), ('Constant', 'fp16'), ('Relu', 'fp32')])
def test_the_precision_is_seen_in_the_operators(operator: str, precision: str,
                                                tmp_path: Path) -> None:
    """Integers of every kind; float16 also where constants are nodes."""
    graph = onnx.load(network(tmp_path / 'net.onnx')).graph
    half = numpy_helper.from_array(np.ones(1, np.float16))
    graph.node.append(helper.make_node(operator, [], ['x'], **(
        {'value': half} if operator == 'Constant' else {})))
    assert _precision(graph) == precision


def test_weights_beside_the_file_are_part_of_the_digest(tmp_path: Path) -> None:
    """It is that of the file and the data after it."""
    model = onnx.load(network(tmp_path / 'net.onnx'))
    onnx.save(model, tmp_path / 'large.onnx', save_as_external_data=True, size_threshold=0,
              location='large.data')
    card = export_onnx(request(tmp_path / 'large.onnx'), tmp_path / 'model.onnx', frames())
    data = (tmp_path / 'large.onnx').read_bytes() + (tmp_path / 'large.data').read_bytes()
    assert card.weights_sha256 == hashlib.sha256(data).hexdigest()
    card = export_onnx(request(tmp_path / 'net.onnx'), tmp_path / 'model.onnx', frames())
    assert card.weights_sha256 == sha256_file(tmp_path / 'net.onnx')


def test_channels_last_with_open_sizes_are_refused(tmp_path: Path) -> None:
    """As TensorFlow exports; the remedy is said, and not that of an other size."""
    def channels_last(graph: Any) -> None:
        graph.input[0].CopyFrom(helper.make_tensor_value_info('nhwc', 1, [None, None, None, 3]))
        graph.node.insert(0, helper.make_node('Transpose', ['nhwc'], ['pixels'],
                                              perm=[0, 3, 1, 2]))
    weights = rewrite(network(tmp_path / 'net.onnx'), channels_last)
    for size_hw in (None, (32, 48)):
        with pytest.raises(UserError, match='channels first'):
            export_onnx(request(weights, input_size_hw=size_hw), tmp_path / 'm.onnx', frames())


def test_half_precision_graph(tmp_path: Path) -> None:
    """A float16 graph gets a cast before and its score in float32 behind; the card says fp16."""
    weights = network(tmp_path / 'net.onnx', dtype=np.float16)
    card = export_onnx(request(weights), tmp_path / 'model.onnx', frames())
    assert card.precision == 'fp16'
    with open_backend(load_model_file(tmp_path / 'model.onnx'), 'cpu') as backend:
        detection = Pipeline(backend)(frames()[0])
    assert detection.anomaly.shape == (40, 60)


def quantised_network(path: Path) -> Path:
    """Write the network above with image, weights and logits through QuantizeLinear."""
    def quantise(graph: Any) -> None:
        for name, scale in (('pixels', 0.05), ('w', 0.01), ('logits', 0.1)):
            kind, zero = (np.uint8, 128) if name != 'w' else (np.int8, 0)
            graph.initializer.extend([
                numpy_helper.from_array(np.array(scale, np.float32), f'{name}_scale'),
                numpy_helper.from_array(np.array(zero, kind), f'{name}_zero')])
        convolution, depth = graph.node
        convolution.input[0], convolution.input[1], convolution.output[0] = 'pixels_d', 'w_d', 'c'
        nodes = [helper.make_node(kind, [x, f'{name}_scale', f'{name}_zero'], [y])
                 for name, first, last in (('pixels', 'pixels', 'pixels_d'), ('w', 'w', 'w_d'),
                                           ('logits', 'c', 'logits'))
                 for kind, x, y in (('QuantizeLinear', first, f'{name}_q'),
                                    ('DequantizeLinear', f'{name}_q', last))]
        ordered = [*nodes[:4], convolution, *nodes[4:], depth]
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in ordered]
        del graph.node[:]
        graph.node.extend(copies)
    return rewrite(network(path), quantise)


def moved(answer: NetworkOutput) -> NetworkOutput:
    """Return the answer with a score that is off by a thousandth of its range."""
    return NetworkOutput(answer.labels, answer.anomaly + max(1e-3, 1e-3 * np.ptp(answer.anomaly)))


@pytest.mark.parametrize('score', ['max_logit', 'msp', 'entropy', 'energy'])
def test_a_quantised_graph_is_compared_too(score: str, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """It is within the limits of float32; a head that is not is refused, the reference named."""
    weights = quantised_network(tmp_path / 'net.onnx')
    card = export_onnx(request(weights, score=score), tmp_path / 'model.onnx', frames())
    assert card.precision == 'int8'
    assert card.parity['max_score_error'] < 1e-5
    monkeypatch.setattr(module, 'reference_answer', lambda *x: moved(reference_answer(*x)))
    with pytest.raises(UserError, match='exported graph does not agree with the given graph, '
                                        r'score in float64: .*limit 1e-04'):
        export_onnx(request(weights, score=score), tmp_path / 'other.onnx', frames())
    assert not (tmp_path / 'other.onnx').exists()


def test_file_and_reference_add_integers_in_one_way(tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """On processors whose own way overflows both take the exact one."""
    seen = []
    add = backend_module.use_exact_int8

    def note(options: Any) -> None:
        add(options)
        seen.append(options.get_session_config_entry('session.x64quantprecision'))
    monkeypatch.setattr(backend_module, 'adds_int8_exactly', lambda path: False)
    monkeypatch.setattr(backend_module, 'use_exact_int8', note)
    export_onnx(request(quantised_network(tmp_path / 'net.onnx')), tmp_path / 'model.onnx',
                frames())
    assert seen == ['1', '1']


def test_the_only_output_is_found_by_itself(tmp_path: Path) -> None:
    """Without --logits the single output is taken; its unused neighbour is dropped."""
    weights = network(tmp_path / 'net.onnx')
    model = onnx.load(weights)
    del model.graph.output[1]
    onnx.save(model, weights)
    export_onnx(request(weights, logits=None), tmp_path / 'model.onnx', frames())
    names = {x.name for x in onnx.load(tmp_path / 'model.onnx').graph.initializer}
    assert 'w' in names
    assert 'v' not in names


@pytest.mark.parametrize(('make', 'change', 'message'), [
    ({'opset': 12}, {}, 'opset 12, expected 13'),
    ({}, {'logits': 'scores'}, "no tensor 'scores'.*logits, depth"),
    ({}, {'logits': None}, 'more than one output'),
    ({}, {'logits': 'depth'}, r'depth.*expected float logits \(1, 4'),
    ({}, {'classes': ('a', 'b')}, r'expected float logits \(1, 2'),
    ({}, {'input_size_hw': (64, 64)}, 'made for inputs of 32x48'),
    ({'size': ('h', 'w')}, {}, '--input-size'),
    ({}, {'score': 'rba'}, 'energy, entropy, max_logit, msp'),
    ({}, {'temperature': 0.0}, 'temperature'),
    ({'channels': 5}, {'void_index': 5}, '--void-index must be 0 to 4'),
    ({}, {'std': (0.0, 1.0, 1.0)}, 'std positive'),
    ({'size': ('h', 'w')}, {'input_size_hw': (32, 16385)}, 'from 1 to 16384')])
def test_what_does_not_fit_is_refused(make: dict[str, Any], change: dict[str, Any], message: str,
                                      tmp_path: Path) -> None:
    """The error says what was expected, and no file is left."""
    weights = network(tmp_path / 'net.onnx', **make)
    with pytest.raises(UserError, match=message):
        export_onnx(request(weights, **change), tmp_path / 'model.onnx', frames())
    assert sorted(x.name for x in tmp_path.iterdir()) == ['net.onnx']


def test_damaged_and_missing_graphs_are_refused(tmp_path: Path) -> None:
    """The file is named."""
    with pytest.raises(UserError, match=r'none\.onnx: no such file'):
        export_onnx(request(tmp_path / 'none.onnx'), tmp_path / 'model.onnx', frames())
    data = network(tmp_path / 'net.onnx').read_bytes()
    (tmp_path / 'net.onnx').write_bytes(data[:len(data) // 2])
    with pytest.raises(UserError, match=r'net\.onnx: not a readable ONNX file'):
        export_onnx(request(tmp_path / 'net.onnx'), tmp_path / 'model.onnx', frames())
    assert not (tmp_path / 'model.onnx').exists()


def test_a_score_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    """Infinite logits leave no file."""
    weights = network(tmp_path / 'net.onnx')
    model = onnx.load(weights)
    model.graph.initializer[1].CopyFrom(
        numpy_helper.from_array(np.full(4, -np.inf, np.float32), 'b'))
    onnx.save(model, weights)
    with pytest.raises(UserError, match='not finite'):
        export_onnx(request(weights), tmp_path / 'model.onnx', frames())
    assert not (tmp_path / 'model.onnx').exists()
