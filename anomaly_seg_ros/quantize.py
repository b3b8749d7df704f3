# SPDX-License-Identifier: Apache-2.0
"""
Static int8 quantisation of an exported graph, kept only if the metrics hold.

Weights and activations of the convolutions, and of what lies between them, pass through
QuantizeLinear and DequantizeLinear nodes (QDQ). For CPUs activations are uint8, with zero points,
so that the range of a ReLU's output is used whole; for TensorRT they are int8 and symmetric, which
is all that it takes. The ranges are measured on frames of the user's camera.

Two things stay in float: the convolutions that make the logits, whose digits are the anomaly
score; and parts of the network that alone, in integers, move the score too far. They are found by
trying. In ERFNet they are the first two of its levels, which concatenate colours between 0 and 1
with features between -20 and 20: on one scale of 256 steps little is left of the colours.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
import logging
from pathlib import Path
import tempfile
from typing import Any, TYPE_CHECKING

from anomaly_seg_ros.classes import label_ids
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.integer_graph import (
    normalisations_as_convolutions, split_normalisations, transposed_as_convolutions)
from anomaly_seg_ros.metrics.pixel import (
    NegativeCounts, PixelCurve, PositiveScores, split_scores)
from anomaly_seg_ros.metrics.segmentation import ConfusionMatrix
from anomaly_seg_ros.model_file import ModelCard, ModelFile, seal_model
from anomaly_seg_ros.preprocess import Preprocessor
import numpy as np

if TYPE_CHECKING:
    from anomaly_seg_ros.datasets.frame import Frame

# Activations beyond this percentile are clipped. With plain minima and maxima single outliers take
# the range, and ERFNet's scores are 2.5 times further from those in float.
PERCENTILE = 99.99
# A part stays in float that alone moves the score by more than this share of its range (from the
# 1st to the 99.9th percentile), as a mean over pixels, on this many frames.
TOLERANCE = 0.01
TRIAL_FRAMES = 2
# What a file is best for, and the convolutions that it computes in integers.
TARGETS = {'onnxruntime': ('Conv',), 'openvino': ('Conv', 'ConvTranspose'), 'tensorrt': ('Conv',)}
# Operators that ONNX Runtime's CPU kernels compute in integers when their inputs are integers.
BETWEEN = ('Relu', 'Add', 'MaxPool', 'Concat', 'Transpose', 'Reshape')


def quantize(graph: bytes, card: ModelCard, frames: Sequence[np.ndarray],
             target: str = 'onnxruntime') -> tuple[bytes, dict[str, Any]]:
    """
    Return the int8 version of a float32 ``host`` graph, and what of it stayed in float.

    Parameters
    ----------
    graph
        Serialised ONNX model.
    card
        Its card; tells how frames become inputs.
    frames
        Images uint8 (H, W, 3), RGB, that show what the camera sees.
    target
        One of ``TARGETS``: what the file is best for. TensorRT runs no other, the others run all.

    """
    import onnx

    preprocess = Preprocessor(card)
    trial = [preprocess(frame).copy() for frame in frames[::-(-len(frames) // TRIAL_FRAMES)]]
    expected = [_score(graph, x) for x in trial]
    low, high = np.quantile(np.concatenate(expected), (0.01, 0.999))
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / 'float.onnx'
        model = _prepared(graph, path, target)
        onnx.save(model, path)
        ranges = _ranges(path, (*TARGETS[target], *BETWEEN),
                         (preprocess(frame) for frame in frames))
    build = _builder(model, ranges, target)
    parts = _parts(model.graph, TARGETS[target], () if target == 'tensorrt' else BETWEEN)
    names: list[str] = []
    in_float: dict[str, float] = {}
    for part in parts:
        moved = float(np.mean([np.abs(_score(build(part), x) - y).mean()
                               for x, y in zip(trial, expected, strict=True)]))
        if moved > TOLERANCE * (high - low):
            in_float[part[0]] = moved
        else:
            names += part
    if not names:
        raise UserError('int8: there is no convolution that can be computed in integers without '
                        'moving the score too far; use fp16 or fp32. No file was written.')
    logging.getLogger(__name__).info('int8: %d of %d parts stay in float', len(in_float),
                                     len(parts))
    return build(names), {'target': target, 'calibration_frames': len(frames),
                          'parts': len(parts), 'parts_in_float': in_float}


def _prepared(graph: bytes, path: Path, target: str) -> Any:
    """Return the graph with constants folded, every node named, and layers that quantise well."""
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    model = onnx.load_from_string(graph)
    if target != 'tensorrt':
        split_normalisations(model)
    onnx.save(model, path)
    # Folds batch normalisation into the convolutions, which otherwise keeps them in float.
    quant_pre_process(path, path, skip_symbolic_shape=True)
    model = onnx.load(path)
    for index, node in enumerate(model.graph.node):
        node.name = f'{index}_{node.op_type}_{node.output[0]}'
    if target != 'tensorrt':
        normalisations_as_convolutions(model)
    if target == 'onnxruntime':  # OpenVINO is good at transposed convolutions
        transposed_as_convolutions(model, keep=_last(model.graph))
    return onnx.shape_inference.infer_shapes(model)


def _ranges(path: Path, kinds: Sequence[str], inputs: Iterator[np.ndarray]) -> Any:
    """Return the range, over the inputs, of each tensor that operators of ``kinds`` touch."""
    from onnxruntime import quantization

    class One(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, image: np.ndarray) -> None:
            self.left: list[np.ndarray] = [image]

        def get_next(self) -> dict[str, np.ndarray] | None:
            return {'image': self.left.pop()} if self.left else None

    calibrator = quantization.create_calibrator(
        path, list(kinds), augmented_model_path=str(path.with_name('augmented.onnx')),
        calibrate_method=quantization.CalibrationMethod.Percentile,
        extra_options={'percentile': PERCENTILE, 'symmetric': False})
    with redirect_stdout(StringIO()):  # it prints each frame
        for image in inputs:  # one at a time: all outputs of all layers are in memory
            calibrator.collect_data(One(image))
        return calibrator.compute_data()


def _builder(model: Any, ranges: Any, target: str) -> Callable[[Collection[str]], bytes]:
    """Return a function that gives the graph with the nodes named in integers."""
    from onnxruntime import quantization

    cpu = target != 'tensorrt'
    kind = quantization.QuantType

    def build(names: Collection[str]) -> bytes:
        copy = type(model)()
        copy.CopyFrom(model)
        quantizer = quantization.QDQQuantizer(
            copy, per_channel=True, reduce_range=False, weight_qType=kind.QInt8,
            activation_qType=kind.QUInt8 if cpu else kind.QInt8, tensors_range=ranges,
            nodes_to_quantize=list(names), nodes_to_exclude=[],
            op_types_to_quantize=[*TARGETS[target], *BETWEEN],
            # TensorRT takes a bias in float only; that of ONNX Runtime would be int32.
            extra_options={'ActivationSymmetric': not cpu, 'QuantizeBias': cpu})
        quantizer.quantize_model()
        quantizer.model.topological_sort()
        data: bytes = quantizer.model.model.SerializeToString()
        return data
    return build


def _parts(graph: Any, convolutions: Collection[str],
           between: Collection[str]) -> list[list[str]]:
    """
    Return the names of what can be computed in integers, part by part.

    These are ``convolutions`` and the operators of ``between`` all of whose inputs are made by
    such; a part ends where branches join. Adding in integers what attention layers made in float
    would only lose digits.
    """
    constants = {x.name for x in graph.initializer}
    last = _last(graph)
    made: set[str] = set()
    parts: list[list[str]] = [[]]
    for node in graph.node:
        inputs = {name for name in node.input if name} - constants
        if node.op_type in convolutions:
            wanted = node.name not in last and node.input[1] in constants
        else:
            wanted = node.op_type in between and bool(inputs) and inputs <= made
        if wanted:
            parts[-1].append(node.name)
            made.update(node.output)
        if node.op_type in ('Add', 'Concat'):
            parts.append([])
    return [part for part in parts if part]


def _last(graph: Any) -> set[str]:
    """Return the names of the convolutions from which no other leads to the outputs."""
    makers = {name: node for node in graph.node for name in node.output}
    waiting = [output.name for output in graph.output]
    seen: set[str] = set()
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        node = makers.get(name)
        if node is None or name in seen:
            continue
        seen.add(name)
        if node.op_type in ('Conv', 'ConvTranspose'):
            found.add(node.name)
        else:
            waiting += node.input
    return found


def _score(graph: bytes, network_input: np.ndarray) -> np.ndarray:
    """Return the score that a graph gives, as one row."""
    from anomaly_seg_ros.backends.onnxruntime import use_exact_int8
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    use_exact_int8(options)
    session = onnxruntime.InferenceSession(graph, options, providers=['CPUExecutionProvider'])
    score: np.ndarray = session.run(['anomaly'], {'image': network_input})[0].ravel()
    return score


def check_drop(reference: bytes, graph: bytes, card: ModelCard, dataset: 'Sequence[Frame]',
               maximum_drop: float) -> dict[str, Any]:
    """
    Return average precision and mean IoU of both graphs on a data set, for the card.

    Raises
    ------
    UserError
        If one of them falls by more than ``maximum_drop``, a score is not finite, or the data set
        has neither anomaly masks nor labels of the model's classes.

    """
    before, after = (_metrics(ModelFile(Path(name), '', card, seal_model(data, card)), dataset)
                     for name, data in (('float32 graph', reference), ('int8 graph', graph)))
    if not before:
        raise UserError('the data set of the int8 gate has neither anomaly masks nor labels of '
                        "the model's classes; give one with ground truth")
    drop = {name: before[name] - after[name] for name in before}
    if any(value > maximum_drop for value in drop.values()):
        figures = ', '.join(f'{name} {before[name]:.4f} -> {after[name]:.4f}' for name in before)
        raise UserError(f'int8 costs too much: {figures} (at most {maximum_drop:g} is allowed). '
                        'Calibrate on more varied frames (of a folder 64 are taken, evenly '
                        'spread), raise --maximum-drop, or use fp16. No file was written.')
    return {'dataset': getattr(dataset, 'name', ''), 'frames': len(dataset), 'float32': before,
            'int8': after, 'maximum_drop': maximum_drop}


def _metrics(model: ModelFile, dataset: 'Sequence[Frame]') -> dict[str, float]:
    """Return what of average_precision and miou the data set's ground truth allows."""
    from anomaly_seg_ros.backends import open_backend
    from anomaly_seg_ros.pipeline import BadOutput, Pipeline

    positives, negatives = PositiveScores(), []
    confusion = ConfusionMatrix(model.card.classes)
    labelled = False
    try:
        ids = label_ids(model.card.classes, getattr(dataset, 'class_set', None))
    except UserError:
        ids = None  # labels of other classes say nothing
    with open_backend(model, 'cpu') as backend:
        pipeline = Pipeline(backend)
        for frame in _frames(dataset):
            try:
                detection = pipeline(frame.image_rgb)
            except BadOutput as error:
                raise UserError(f'{model.path}: frame {frame.frame_id} of the int8 gate: {error}. '
                                'Export another score, or fp32.') from error
            if frame.anomaly_mask is not None:
                split = split_scores(detection.anomaly, frame.anomaly_mask, frame.frame_id)
                positives.update(split.positives)
                negatives.append(split.negatives)
            if frame.labels is not None and ids is not None:
                labelled = True
                confusion.update(detection.labels, ids[frame.labels], frame.frame_id)
    metrics: dict[str, float] = {}
    if negatives:
        counts = NegativeCounts(positives.result()[0])
        while negatives:  # each frame is let go when it is counted
            counts.update(negatives.pop())
        curve = PixelCurve.from_counts(positives, counts)
        if curve.undefined is None:
            metrics['average_precision'] = curve.average_precision()
    if labelled:
        miou = confusion.result().miou
        if miou is not None:
            metrics['miou'] = miou
    return metrics


def _frames(dataset: 'Sequence[Frame]') -> 'Iterator[Frame]':
    return (dataset[index] for index in range(len(dataset)))
