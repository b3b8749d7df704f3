# SPDX-License-Identifier: Apache-2.0
"""Quantisation to int8: graphs that quantise well, what stays in float, and for whom."""

from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
import tempfile
import tracemalloc
from typing import Any

from anomaly_seg_ros.backends import open_backend
from anomaly_seg_ros.backends.onnxruntime import adds_int8_exactly
from anomaly_seg_ros.classes import CITYSCAPES_CLASSES
from anomaly_seg_ros.datasets.frame import Frame
from anomaly_seg_ros.engine import refuse_cpu_int8
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.integer_graph import (
    normalisations_as_convolutions, split_normalisations, transposed_as_convolutions)
from anomaly_seg_ros.metrics.pixel import PixelCurve
from anomaly_seg_ros.model_file import ModelFile
from anomaly_seg_ros.pipeline import Pipeline
from anomaly_seg_ros.quantize import _metrics, check_drop, quantize, TARGETS
import cards
import numpy as np
import onnx
from onnx import helper, numpy_helper, TensorProto
import onnxruntime
import pytest

SIZE_HW = (24, 40)


def model_of(nodes: list[Any], constants: dict[str, np.ndarray], channels: int = 3,
             outputs: tuple[str, ...] = ('y',), size_hw: tuple[int, int] = SIZE_HW) -> Any:
    """Return an ONNX model from ``image`` (1, channels, H, W) to ``outputs``."""
    graph = helper.make_graph(
        nodes, 'test',
        [helper.make_tensor_value_info('image', TensorProto.FLOAT, [1, channels, *size_hw])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def answer(model: Any, image: np.ndarray, output: str = 'y') -> np.ndarray:
    """Run a model on ONNX Runtime."""
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(),
                                           providers=['CPUExecutionProvider'])
    result: np.ndarray = session.run([output], {'image': image})[0]
    return result


def operators(model: Any) -> set[str]:
    """Return the kinds of operators of a model."""
    return {node.op_type for node in model.graph.node}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Return float32 noise."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def normalisation(channels: int, name: str) -> dict[str, np.ndarray]:
    """Return scale, bias, mean and variance."""
    return {f'{name}_scale': normal(channels, seed=1), f'{name}_bias': normal(channels, seed=2),
            f'{name}_mean': normal(channels, seed=3),
            f'{name}_variance': normal(channels, seed=4) ** 2 + np.float32(.1)}


@pytest.mark.parametrize('bias', [True, False])
def test_transposed_convolutions_become_convolutions(bias: bool) -> None:
    """For every kernel, stride and padding; those whose output does not divide stay."""
    rewritten = kept = 0
    for kernel, stride, pad, extra in product((1, 2, 3, 4, 5), (1, 2, 3), (0, 1, 2), (0, 1)):
        outputs = [(x - 1) * stride - 2 * pad + kernel + extra for x in (5, 7)]
        if extra >= stride or min(outputs) < 1:
            continue
        constants = {'w': normal(3, 4, kernel, kernel), 'b': normal(4)}
        model = model_of([helper.make_node(
            'ConvTranspose', ['image', 'w', 'b'][:2 + bias], ['y'], name='up',
            strides=[stride] * 2, pads=[pad] * 4, output_padding=[extra] * 2)], constants,
            size_hw=(5, 7))
        image = normal(1, 3, 5, 7)
        expected = answer(model, image)
        assert expected.shape == (1, 4, *outputs)
        transposed_as_convolutions(model)
        if any(x % stride for x in outputs):
            assert operators(model) == {'ConvTranspose'}
            kept += 1
            continue
        assert 'ConvTranspose' not in operators(model)
        np.testing.assert_allclose(answer(model, image), expected, atol=2e-6 * kernel ** 2 * 3)
        rewritten += 1
    assert rewritten >= 30 and kept >= 10


@pytest.mark.parametrize('settings', [{'group': 3}, {'dilations': [2, 2]}, {'keep': True}])
def test_other_transposed_convolutions_stay(settings: dict[str, Any]) -> None:
    """Groups, dilation, and those that make the logits."""
    settings = dict(settings)
    keep = ('up',) if settings.pop('keep', False) else ()
    model = model_of([helper.make_node('ConvTranspose', ['image', 'w'], ['y'], name='up',
                                       strides=[1, 1], **settings)],
                     {'w': normal(3, 4, 3, 3)})
    before = model.SerializeToString()
    transposed_as_convolutions(model, keep)
    assert operators(model) == {'ConvTranspose'}
    image = normal(1, 3, *SIZE_HW)
    np.testing.assert_array_equal(answer(model, image), answer(onnx.load_from_string(before),
                                                               image))


def downsampling() -> tuple[list[Any], dict[str, np.ndarray]]:
    """Return the block that begins ERFNet: convolution beside pooling, normalised together."""
    constants = {'w': normal(5, 3, 3, 3), **normalisation(8, 'n')}
    return [helper.make_node('Conv', ['image', 'w'], ['a'], name='conv', strides=[2, 2],
                             pads=[1] * 4),
            helper.make_node('MaxPool', ['image'], ['b'], kernel_shape=[2, 2], strides=[2, 2]),
            helper.make_node('Concat', ['a', 'b'], ['c'], axis=1),
            helper.make_node('BatchNormalization', ['c', 'n_scale', 'n_bias', 'n_mean',
                                                    'n_variance'], ['y'], epsilon=1e-3)
            ], constants


def test_normalisation_goes_before_the_concatenation() -> None:
    """With each part's own channels; a concatenation that others use as well stays as it is."""
    nodes, constants = downsampling()
    image = normal(1, 3, *SIZE_HW)
    for outputs, behind_concat in ((('y',), False), (('y', 'c'), True)):
        model = model_of(nodes, constants, outputs=outputs)
        expected = answer(model, image)
        split_normalisations(model)
        kinds = [node.op_type for node in model.graph.node]
        assert (kinds.index('Concat') < kinds.index('BatchNormalization')) == behind_concat
        np.testing.assert_allclose(answer(model, image), expected, atol=1e-5)
        normalisations_as_convolutions(model)
        assert operators(model) == {'Conv', 'MaxPool', 'Concat'}
        np.testing.assert_allclose(answer(model, image), expected, atol=1e-5)


def frames() -> list[np.ndarray]:
    """Return frames uint8 (H, W, 3)."""
    return list(np.random.default_rng(5).integers(0, 256, (4, *SIZE_HW, 3), dtype=np.uint8))


def network(gain: float = 1.0, attention: bool = False) -> Any:
    """
    Return a network whose first level concatenates features with some ``gain`` times larger.

    The next layer makes them equal again. With ``attention`` a matrix product is added to the
    features, instead of a convolution.
    """
    constants: dict[str, np.ndarray] = {
        'w1': normal(4, 3, 3, 3), 'w2': normal(4, 3, 1, 1) * np.float32(gain),
        'w3': normal(8, 8, 3, 3) / 8, 'w4': normal(8, 8, 3, 3, seed=1) / 8,
        'w5': normal(8, 8, 1, 1), 'w6': normal(1, 8, 1, 1), 'm': normal(40, 40) / 8,
        'axes': np.array([1])}
    constants['w3'][:, 4:] /= np.float32(gain)
    other = helper.make_node('MatMul', ['f_relu', 'm'], ['g']) if attention else \
        helper.make_node('Conv', ['f_relu', 'w4'], ['g'], pads=[1] * 4)
    return model_of([
        helper.make_node('Conv', ['image', 'w1'], ['a'], pads=[1] * 4),
        helper.make_node('Conv', ['image', 'w2'], ['b']),
        helper.make_node('Concat', ['a', 'b'], ['c'], axis=1),
        helper.make_node('Relu', ['c'], ['c_relu']),
        helper.make_node('Conv', ['c_relu', 'w3'], ['f'], pads=[1] * 4),
        helper.make_node('Relu', ['f'], ['f_relu']), other,
        helper.make_node('Add', ['f_relu', 'g'], ['h']),
        helper.make_node('Relu', ['h'], ['h_relu']),
        helper.make_node('Conv', ['h_relu', 'w5'], ['k']),
        helper.make_node('Conv', ['k', 'w6'], ['logits']),
        helper.make_node('Squeeze', ['logits', 'axes'], ['anomaly'])], constants,
        outputs=('anomaly',))


def quantised(model: Any, target: str = 'onnxruntime') -> tuple[Any, dict[str, Any]]:
    """Quantise a network and check that its score moves by less than 2 % of its range."""
    card = cards.card(SIZE_HW)
    graph, report = quantize(model.SerializeToString(), card, frames(), target)
    result = onnx.load_from_string(graph)
    for frame in frames():
        image = np.ascontiguousarray(frame.transpose(2, 0, 1)[None]).astype(np.float32) / 255
        expected = answer(model, image, 'anomaly')
        moved = np.abs(answer(result, image, 'anomaly') - expected).mean()
        assert 0 < moved < 0.02 * np.ptp(expected)
    return result, report


def integer_convolutions(model: Any) -> int:
    """Return how many convolutions have quantised weights."""
    constants = {x.name for x in model.graph.initializer}
    return sum(node.op_type == 'Conv' and node.input[1] not in constants
               for node in model.graph.node)


@pytest.mark.parametrize('target', TARGETS)
def test_activations_are_of_the_kind_that_the_target_computes(target: str) -> None:
    """Of uint8 with zero points on CPUs, of int8 without on TensorRT; the logits stay in float."""
    model, report = quantised(network(), target)
    constants = {x.name: numpy_helper.to_array(x) for x in model.graph.initializer}
    zeros = [constants[node.input[2]] for node in model.graph.node
             if node.op_type == 'QuantizeLinear']
    assert {x.dtype.name for x in zeros} == ({'int8'} if target == 'tensorrt' else {'uint8'})
    if target == 'tensorrt':
        assert not any(x.any() for x in zeros)
    assert integer_convolutions(model) == 5  # of 6
    assert report == {'target': target, 'calibration_frames': 4, 'parts': 3, 'parts_in_float': {}}


@pytest.mark.parametrize('target', TARGETS)
def test_tensorrt_gets_biases_in_float(target: str) -> None:
    """It dequantises int8 only; ONNX Runtime wants a bias in int32."""
    model = network()
    for name in ('f', 'k'):
        node = next(node for node in model.graph.node if node.output[0] == name)
        node.input.append(f'bias_{name}')
        model.graph.initializer.append(numpy_helper.from_array(normal(8), f'bias_{name}'))
    result, _ = quantised(model, target)
    constants = {x.name: x.data_type for x in result.graph.initializer}
    kinds = {constants[node.input[0]] for node in result.graph.node
             if node.op_type == 'DequantizeLinear' and node.input[0] in constants}
    assert kinds == ({TensorProto.INT8} if target == 'tensorrt' else
                     {TensorProto.INT8, TensorProto.INT32})


def test_a_network_for_onnxruntime_stays_in_integers_between_its_convolutions() -> None:
    """No layer is left that would convert to float and back, but the last one."""
    model, _ = quantised(network())
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as name:
        options.optimized_model_filepath = f'{name}/optimised.onnx'
        onnxruntime.InferenceSession(model.SerializeToString(), options,
                                     providers=['CPUExecutionProvider'])
        kinds = Counter(node.op_type for node in onnx.load(f'{name}/optimised.onnx').graph.node)
    assert kinds['QLinearConv'] == 5 and kinds['QLinearAdd'] == kinds['QLinearConcat'] == 1
    assert kinds['Relu'] == 0 and kinds['QuantizeLinear'] == kinds['DequantizeLinear'] == 1


@pytest.mark.parametrize(('target', 'kinds'), [
    ('openvino', {'Conv': 2, 'ConvTranspose': 1}), ('tensorrt', {'Conv': 2}),
    ('onnxruntime', {'Conv': 4})])
def test_transposed_convolutions_for_each_target(target: str, kinds: dict[str, int]) -> None:
    """In integers for OpenVINO; for ONNX Runtime convolutions take their place."""
    model = model_of([
        helper.make_node('Conv', ['image', 'w1'], ['a'], pads=[1] * 4, strides=[2, 2]),
        helper.make_node('Relu', ['a'], ['a_relu']),
        helper.make_node('ConvTranspose', ['a_relu', 'w2', 'b2'], ['b'], pads=[1] * 4,
                         strides=[2, 2], output_padding=[1, 1]),
        helper.make_node('Relu', ['b'], ['b_relu']),
        helper.make_node('Conv', ['b_relu', 'w3'], ['c']),
        helper.make_node('Conv', ['c', 'w4'], ['logits']),
        helper.make_node('Squeeze', ['logits', 'axes'], ['anomaly'])],
        {'w1': normal(8, 3, 3, 3), 'w2': normal(8, 4, 3, 3) / 4, 'b2': normal(4),
         'w3': normal(8, 4, 1, 1), 'w4': normal(1, 8, 1, 1), 'axes': np.array([1])},
        outputs=('anomaly',))
    result, _ = quantised(model, target)
    constants = {x.name for x in result.graph.initializer}
    found = Counter(node.op_type for node in result.graph.node
                    if node.op_type in ('Conv', 'ConvTranspose')
                    and node.input[1] not in constants)
    assert found == kinds
    if target == 'openvino' and find_spec('openvino'):
        import openvino
        image = normal(1, 3, *SIZE_HW)
        compiled = openvino.compile_model(openvino.Core().read_model(result.SerializeToString()),
                                          'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
        expected = answer(result, image, 'anomaly')
        assert np.abs(compiled(image)[0] - expected).mean() < 0.01 * np.ptp(expected)


def test_what_integers_would_spoil_stays_in_float() -> None:
    """Small features on one scale with large ones lose their digits; what follows does not."""
    model, report = quantised(network(gain=2000.0))
    assert report['parts'] == 3 and len(report['parts_in_float']) == 2
    assert all(moved > 0 for moved in report['parts_in_float'].values())
    assert integer_convolutions(model) == 1


def test_what_attention_makes_is_added_in_float() -> None:
    """Where one side of an addition is not a convolution's, integers would only lose digits."""
    model, _ = quantised(network(attention=True))
    makers = {name: node.op_type for node in model.graph.node for name in node.output}
    add, = (node for node in model.graph.node if node.op_type == 'Add')
    assert [makers[name] for name in add.input].count('MatMul') == 1
    assert integer_convolutions(model) == 4


def test_a_network_that_cannot_be_quantised_is_refused() -> None:
    """One whose only convolution makes the logits."""
    model = model_of([helper.make_node('Conv', ['image', 'w'], ['logits']),
                      helper.make_node('Squeeze', ['logits', 'axes'], ['anomaly'])],
                     {'w': normal(1, 3, 1, 1), 'axes': np.array([1])}, outputs=('anomaly',))
    with pytest.raises(UserError, match='no convolution that can be computed in integers'):
        quantize(model.SerializeToString(), cards.card(SIZE_HW), frames())


def test_the_gate_holds_each_score_once(tmp_path: Path) -> None:
    """Average precision and mean IoU are those of all scores at once, in less memory."""
    model = cards.identity_model(tmp_path / 'm.onnx')
    rng = np.random.default_rng(6)
    dataset = []
    for index in range(30):
        mask = np.zeros((200, 300), np.uint8)
        mask[20:30, 40:60] = 1
        mask[:5] = 255
        dataset.append(Frame(str(index), rng.integers(0, 256, (200, 300, 3), np.uint8), mask,
                             rng.integers(0, 3, (200, 300), dtype=np.uint8)))
    tracemalloc.start()
    metrics = _metrics(model, dataset)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.6 * 4 * 200 * 300 * 30
    with open_backend(model) as backend:
        pipeline = Pipeline(backend)
        scores = np.stack([pipeline(frame.image_rgb).anomaly.copy() for frame in dataset])
    masks = np.stack([frame.anomaly_mask for frame in dataset])
    assert metrics['average_precision'] == PixelCurve.of(
        scores[masks == 1], scores[masks == 0]).average_precision()
    assert 0 < metrics['miou'] < 1


class Gate(list[Frame]):
    """A data set with labels of Cityscapes' classes."""

    name, class_set = 'gate', 'cityscapes'


def test_the_gate_compares_labels_by_the_names_of_classes(tmp_path: Path) -> None:
    """As an evaluation does; labels of other classes are left out."""
    names = CITYSCAPES_CLASSES
    rng = np.random.default_rng(8)
    frames = [Frame(str(i), rng.integers(0, 256, (*SIZE_HW, 3), np.uint8), None,
                    rng.integers(16, 19, SIZE_HW, dtype=np.uint8)) for i in range(2)]
    palette = ((0, 0, 0),) * len(names)
    straight = cards.identity_model(tmp_path / 'a.onnx', SIZE_HW, classes=names, palette=palette)
    turned = replace(straight, card=replace(straight.card, classes=names[::-1]))
    expected = _metrics(straight, Gate(
        replace(f, labels=18 - f.labels) for f in frames))['miou']
    assert _metrics(turned, Gate(frames))['miou'] == expected > 0
    other = cards.identity_model(tmp_path / 'b.onnx', SIZE_HW)
    assert _metrics(other, Gate(frames)) == {}


def test_a_score_that_is_not_finite_in_the_gate_is_said(tmp_path: Path) -> None:
    """Which frame, and that no file comes of it."""
    graph = cards.identity_graph(SIZE_HW)
    graph.graph.node[-1].op_type = 'Log'
    black = Gate([Frame('night', np.zeros((*SIZE_HW, 3), np.uint8), None,
                        np.zeros(SIZE_HW, np.uint8))])
    data = graph.SerializeToString()
    with pytest.raises(UserError, match=r'frame night of the int8 gate: score .* not finite'):
        check_drop(data, data, cards.card(SIZE_HW), black, 0.02)


@pytest.mark.parametrize(('target', 'refused'), [('onnxruntime', True), ('tensorrt', False),
                                                 (None, False)])
def test_tensorrt_refuses_what_is_made_for_cpus(target: str | None, refused: bool) -> None:
    """Before anything is built, with the remedy; a file from elsewhere it must judge itself."""
    parity = {} if target is None else {'int8': {'target': target}}
    model = ModelFile(Path('m.onnx'), '', cards.card(precision='int8', parity=parity), b'')
    if refused:
        with pytest.raises(UserError, match=r'm\.onnx: this int8 file is made for onnxruntime.*'
                                            '--int8-for tensorrt'):
            refuse_cpu_int8(model)
    else:
        refuse_cpu_int8(model)


@pytest.mark.parametrize(('text', 'exact'), [
    ('flags\t\t: fpu sse avx2 avx512f\n', False),
    ('flags\t\t: fpu avx2 avx512_vnni\n', True), ('flags : avx2 avx_vnni\n', True),
    ('Features : fp asimd\n', True), (None, False)])
def test_processors_that_overflow_are_known(tmp_path: Path, text: str | None,
                                            exact: bool) -> None:
    """By their flags; what cannot be read counts as one that does."""
    if text is not None:
        (tmp_path / 'cpuinfo').write_text(text)
    assert adds_int8_exactly(tmp_path / 'cpuinfo') is exact
