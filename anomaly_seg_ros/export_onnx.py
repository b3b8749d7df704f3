# SPDX-License-Identifier: Apache-2.0
"""
Bring your own network: fuse labels and score into any ONNX graph that gives logits.

The head is written with operators that mean the same in every opset from 13 on, so that the user's
graph stays as it is. Its score is compared with the formula in float64 before a file is kept.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
import time
from typing import Any

from anomaly_seg_ros import __version__
from anomaly_seg_ros.classes import CITYSCAPES_CLASSES
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.export import (
    check_frames, check_graph, MAX_CHECK_FRAMES, some_frames, threshold_and_range)
from anomaly_seg_ros.files import atomic_write_bytes, sha256_file
from anomaly_seg_ros.model_file import ModelCard, seal_model
from anomaly_seg_ros.networks.class_sets import class_palette, drivable_classes
from anomaly_seg_ros.parity import LIMITS
from anomaly_seg_ros.ports import NetworkOutput
from anomaly_seg_ros.preprocess import Preprocessor
import numpy as np

MIN_OPSET = 13
SCORES = ('energy', 'entropy', 'max_logit', 'msp')
# With those called QLinear..., operators that compute in integers.
INTEGER_OPERATORS = ('QuantizeLinear', 'DynamicQuantizeLinear', 'ConvInteger', 'MatMulInteger',
                     'QGemm')
_REFERENCE = 'the given graph, score in float64'
_AXES_AS_INPUT = 18  # ReduceMax takes its axes as an input from this opset on


@dataclass(frozen=True)
class OnnxExportRequest:
    """
    What to fuse into which graph.

    Attributes
    ----------
    weights
        The ONNX file. Its input is float (1, 3, H, W); sizes and batch may be open.
    logits
        Name of the tensor (an output or one inside) with logits (1, C, h, w) of any stride; None
        takes the only output.
    mean, std
        Normalisation that the network expects of values in [0, 1], by channel.
    resize
        How frames are scaled, see ``ModelCard``.
    channel_order
        ``rgb`` or ``bgr``.
    classes
        Names of the classes, in the order of the channels, without void.
    void_index
        Channel that means "void" and is dropped.
    drivable
        Class ids a vehicle may drive on; None finds them by their names.
    input_size_hw
        Height and width to run at; needed where the graph leaves them open.
    score, temperature
        One of ``SCORES``, and what divides the logits.
    upsample
        Interpolate the logits bilinearly to the input's size first: finer labels, slower.
    threshold, score_range, name
        As in ``ExportRequest``.
    licence
        Terms of the weights.

    """

    weights: Path
    logits: str | None = None
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    resize: str = 'antialiased'
    channel_order: str = 'rgb'
    classes: tuple[str, ...] = CITYSCAPES_CLASSES
    void_index: int | None = None
    drivable: tuple[int, ...] | None = None
    input_size_hw: tuple[int, int] | None = None
    score: str = 'max_logit'
    temperature: float = 1.0
    upsample: bool = False
    threshold: float | None = None
    score_range: tuple[float, float] | None = None
    name: str | None = None
    licence: str = 'as the weights given'


def export_onnx(request: OnnxExportRequest, output: Path | str,
                frames: Iterable[np.ndarray] | None = None) -> ModelCard:
    """
    Fuse a score into an ONNX graph, write the model file and return its card.

    Parameters
    ----------
    request
        The graph and what its input and logits mean.
    output
        The ``.onnx`` to write; written only after the comparison has passed.
    frames
        Images uint8 (H, W, 3), RGB, of which 20 are compared, see ``some_frames``; default: frames
        of the synthetic world.

    Raises
    ------
    UserError
        If the graph cannot be read or is not as the request says, or the fused score differs from
        the formula in float64 by more than the limits: those of float32 for int8 graphs too.

    """
    import onnx

    if request.score not in SCORES:
        raise UserError(f'score {request.score!r} cannot be fused into an ONNX graph; choose one '
                        f'of {", ".join(SCORES)}')
    if not (np.isfinite(request.temperature) and request.temperature > 0):
        raise UserError(f'temperature must be positive, got {request.temperature}')
    model = _load(request.weights)
    renamed = _free_names(model.graph)
    size_hw = _fix_input(model, request)
    logits = _choose_logits(model, request, renamed)
    card = _draft_card(request, model, size_hw)
    images = some_frames(check_frames() if frames is None else frames, MAX_CHECK_FRAMES)
    if not images:
        raise UserError('no frames to check the export on; give at least one image')
    inputs = [Preprocessor(card)(image).copy() for image in images]
    raw = _run_logits(model, logits, inputs, request, size_hw)
    reference = [reference_answer(x, request.score, request.temperature) for x in raw]
    card = replace(card, output_size_hw=reference[0].labels.shape,
                   **threshold_and_range(request.threshold, request.score_range, reference))
    append_head(model, logits, request, size_hw, reference[0].labels.shape)
    try:
        onnx.checker.check_model(model)
        graph = model.SerializeToString()
    except (onnx.checker.ValidationError, ValueError) as error:
        raise UserError(f'{request.weights}: the graph with its head is not valid ONNX: '
                        f'{" ".join(str(error).split())[:400]}. No file was written.') from error
    # An int8 graph computes its logits here and in the reference in the same integers; only what
    # comes behind them differs, and that is float32.
    limits = LIMITS.get(card.precision, LIMITS['fp32'])
    difference = check_graph(graph, card, inputs, reference, limits, _REFERENCE)
    card = replace(card, parity={'reference': _REFERENCE, 'backend': 'onnxruntime cpu',
                                 **difference.as_card()})
    atomic_write_bytes(output, seal_model(graph, card))
    return card


def reference_answer(logits: np.ndarray, score: str, temperature: float) -> NetworkOutput:
    """
    Return labels and score of logits (C, h, w), computed in float64.

    The formulas of ``anomaly_seg_ros.scores``: f = logits / T, p = softmax(f); max_logit
    ``-max f``, msp ``1 - max p``, entropy ``-sum p ln p``, energy ``-T ln sum exp f``.
    """
    f = logits.astype(np.float64) / temperature
    top = f.max(0)
    weights = np.exp(f - top)
    total = weights.sum(0)
    values: dict[str, Callable[[], np.ndarray]] = {
        'max_logit': lambda: -top,
        'msp': lambda: (np.sort(weights, 0)[:-1].sum(0)) / total,
        'entropy': lambda: np.log(total) - (weights * (f - top)).sum(0) / total,
        'energy': lambda: -temperature * (top + np.log(total))}
    return NetworkOutput(logits.argmax(0).astype(np.uint8), values[score]())


def _load(path: Path) -> Any:
    import onnx

    if not path.is_file():
        raise UserError(f'{path}: no such file. Give the ONNX file of a network.')
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except Exception as error:  # onnx and protobuf raise many kinds for damaged files
        raise UserError(f'{path}: not a readable ONNX file ({type(error).__name__}: '
                        f'{" ".join(str(error).split())[:300]}). Export it again.') from error
    opset = _opset(model)
    if opset < MIN_OPSET:
        raise UserError(f'{path}: opset {opset}, expected {MIN_OPSET} or newer. Export it again, '
                        'or convert it with onnx.version_converter.')
    return model


def _opset(model: Any) -> int:
    return int(next((x.version for x in model.opset_import if x.domain in ('', 'ai.onnx')), 0))


def _fix_input(model: Any, request: OnnxExportRequest) -> tuple[int, int]:
    """Give the graph's one input its size and the name ``image``; float16 ones a cast."""
    import onnx

    graph = model.graph
    constants = {x.name for x in graph.initializer}
    inputs = [x for x in graph.input if x.name not in constants]
    if len(inputs) != 1:
        raise UserError(f'{request.weights}: expected one input, got '
                        f'{", ".join(x.name for x in inputs) or "none"}. Export the network with '
                        'the image as its only input.')
    image = inputs[0]
    tensor = image.type.tensor_type
    shape = [d.dim_value if d.HasField('dim_value') else None for d in tensor.shape.dim]
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    # 3 at the end where the second is open: channels last, as TensorFlow has them.
    if len(shape) != 4 or shape[0] not in (1, None) or shape[1] not in (3, None) \
            or (shape[1] is None and shape[3] == 3) \
            or tensor.elem_type not in floats:
        kind = onnx.TensorProto.DataType.Name(tensor.elem_type)
        raise UserError(f'{request.weights}: expected a float input (1, 3, H, W), got {kind} '
                        f'{tuple(shape)}. Export the network with channels first and batch 1.')
    size = request.input_size_hw or (shape[2], shape[3])
    if None in size:
        raise UserError(f'{request.weights}: the graph leaves its input size open; give '
                        '--input-size HxW')
    if any(own not in (None, wanted) for own, wanted in zip(shape[2:], size, strict=True)):
        raise UserError(f'{request.weights}: the graph is made for inputs of {shape[2]}x{shape[3]}'
                        f', got --input-size {size[0]}x{size[1]}. Leave the option out.')
    height, width = int(str(size[0])), int(str(size[1]))
    half = tensor.elem_type == onnx.TensorProto.FLOAT16
    inner = '_image_float16' if half else 'image'
    _rename(graph, {image.name: inner})
    if half:
        graph.node.insert(0, onnx.helper.make_node('Cast', ['image'], [inner],
                                                   to=onnx.TensorProto.FLOAT16))
    image.CopyFrom(onnx.helper.make_tensor_value_info('image', onnx.TensorProto.FLOAT,
                                                      [1, 3, height, width]))
    del graph.value_info[:]  # recorded for other sizes
    return height, width


def _free_names(graph: Any) -> dict[str, str]:
    """Rename what is called as the model file's ports will be; return the names before and now."""
    taken = _names(graph)
    names: dict[str, str] = {}
    for name in ('image', 'labels', 'anomaly'):
        if name in taken:
            candidates = (f'{name}_{number}' for number in count(1))
            names[name] = next(new for new in candidates if new not in taken)
    _rename(graph, names)
    return names


def _rename(graph: Any, names: Mapping[str, str]) -> None:
    """Rename tensors, in the bodies of If, Loop and Scan too."""
    for part in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
        part.name = names.get(part.name, part.name)
    for node in graph.node:
        for ports in (node.input, node.output):
            for index, name in enumerate(ports):
                ports[index] = names.get(name, name)
        for body in _bodies(node):
            _rename(body, names)


def _names(graph: Any) -> set[str]:
    """Return the names of all tensors, also of those in the bodies of If, Loop and Scan."""
    names = {x.name for x in (*graph.input, *graph.output, *graph.initializer, *graph.value_info)}
    for node in graph.node:
        names.update(node.input, node.output, *map(_names, _bodies(node)))
    return names


def _bodies(node: Any) -> list[Any]:
    return [body for attribute in node.attribute for body in
            [*attribute.graphs, *([attribute.g] if attribute.HasField('g') else [])]]


def _choose_logits(model: Any, request: OnnxExportRequest, renamed: Mapping[str, str]) -> str:
    before = {new: old for old, new in renamed.items()}
    outputs = [before.get(x.name, x.name) for x in model.graph.output]
    name = request.logits or (outputs[0] if len(outputs) == 1 else None)
    tensors = {x for node in model.graph.node for x in node.output}
    if name is None or renamed.get(name, name) not in tensors:
        wrong = f'no tensor {name!r}' if name else 'more than one output'
        raise UserError(f'{request.weights}: {wrong}; say which tensor holds the logits: '
                        f'--logits NAME, one of the outputs {", ".join(outputs)} or a tensor '
                        'inside')
    return renamed.get(name, name)


def _draft_card(request: OnnxExportRequest, model: Any, size_hw: tuple[int, int]) -> ModelCard:
    import onnx

    classes = request.classes
    drivable = drivable_classes(classes) if request.drivable is None else request.drivable
    try:
        return ModelCard(
            name=request.name or f'{request.weights.stem}_{request.score}', network='onnx',
            classes=classes, palette=class_palette(classes), drivable=drivable,
            input_size_hw=size_hw, output_size_hw=size_hw, score=request.score, threshold=0.0,
            threshold_source='', score_range=(0.0, 1.0), void_index=request.void_index,
            resize=request.resize, channel_order=request.channel_order, mean=request.mean,
            std=request.std, temperature=request.temperature, precision=_precision(model.graph),
            weights_source=request.weights.name, weights_sha256=_digest(request.weights),
            licence=request.licence,
            provenance={'anomaly_seg_ros': __version__, 'onnx': onnx.__version__,
                        'opset': _opset(model), 'producer': f'{model.producer_name} '
                        f'{model.producer_version}'.strip(),
                        'exported': time.strftime('%Y-%m-%d')})
    except ValueError as error:
        raise UserError(f'these values do not make a model card: {error}') from error


def _precision(graph: Any) -> str:
    """Tell in which arithmetic a graph computes: any integers, any float16, else float32."""
    import onnx

    if any(node.op_type in INTEGER_OPERATORS or node.op_type.startswith('QLinear')
           for node in graph.node):
        return 'int8'
    constants = [*graph.initializer, *(attribute.t for node in graph.node
                                       if node.op_type == 'Constant'
                                       for attribute in node.attribute)]
    half = any(x.data_type == onnx.TensorProto.FLOAT16 for x in constants)
    return 'fp16' if half else 'fp32'


def _digest(path: Path) -> str:
    """Return the SHA-256 of the file, or of it and the files of its external data after it."""
    import onnx

    tensors = onnx.load(path, load_external_data=False).graph.initializer
    files = sorted({entry.value for x in tensors for entry in x.external_data
                    if entry.key == 'location'})
    return sha256_file(path, *(path.parent / name for name in files))


def _run_logits(model: Any, logits: str, inputs: Sequence[np.ndarray],
                request: OnnxExportRequest, size_hw: tuple[int, int]) -> list[np.ndarray]:
    """Run the graph as it was given, up to the logits, and return them (C, h, w) without void."""
    from anomaly_seg_ros.backends.onnxruntime import use_exact_int8
    import onnx
    import onnxruntime

    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.output[:]
    bare.graph.output.append(onnx.helper.make_empty_tensor_value_info(logits))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    use_exact_int8(options)
    try:
        session = onnxruntime.InferenceSession(bare.SerializeToString(), options,
                                               providers=['CPUExecutionProvider'])
        outputs = [session.run([logits], {'image': x})[0] for x in inputs]
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise UserError(f'{request.weights}: ONNX Runtime {onnxruntime.__version__} cannot run '
                        f'this graph at {size_hw[0]}x{size_hw[1]}: '
                        f'{" ".join(str(error).split())[:300]}') from error
    channels = len(request.classes) + (request.void_index is not None)
    shape = outputs[0].shape
    if len(shape) != 4 or shape[:2] != (1, channels) or outputs[0].dtype.kind != 'f':
        raise UserError(f'{request.weights}: {logits!r} is {outputs[0].dtype} {shape}, expected '
                        f'float logits (1, {channels}, h, w) for these classes. Give the right '
                        '--logits, --classes and --void-index.')
    if request.void_index is not None and not 0 <= request.void_index < channels:
        raise UserError(f'--void-index must be 0 to {channels - 1}, got {request.void_index}')
    if request.upsample:
        import cv2
        outputs = [np.stack([cv2.resize(plane.astype(np.float32), size_hw[::-1])
                             for plane in x[0]])[None] for x in outputs]
    keep = [i for i in range(channels) if i != request.void_index]
    return [np.asarray(x[0][keep]) for x in outputs]


def append_head(model: Any, logits: str | Sequence[str], request: OnnxExportRequest,
                size_hw: tuple[int, int], output_hw: tuple[int, ...]) -> None:
    """
    Add labels and anomaly behind the logits and make them the only outputs.

    Parameters
    ----------
    model
        The graph.
    logits
        The tensor that holds them, (1, C, h, w); or r tensors (P, C), the pixels of every r-th
        row of the output.
    request
        Score, temperature, classes, void and upsampling.
    size_hw, output_hw
        Size of the network's input, and of the answer.

    """
    from onnx import helper, numpy_helper, TensorProto

    graph, opset = model.graph, _opset(model)
    taken = _names(graph)

    def new_name(stem: str, first: int) -> str:
        # An older head may have left part of itself: the graph may be one of this function's.
        names = (f'{stem}_{number}' for number in count(first))
        name = next(name for name in names if name not in taken)
        taken.add(name)
        return name

    def add(operator: str, *inputs: str, **attributes: Any) -> str:
        name = new_name('anomaly_seg', len(graph.node))
        graph.node.append(helper.make_node(operator, inputs, [name], **attributes))
        return name

    def constant(value: Any, dtype: Any = np.float32) -> str:
        name = new_name('anomaly_seg_constant', len(graph.initializer))
        graph.initializer.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def largest(x: str, keepdims: int) -> str:
        if opset < _AXES_AS_INPUT:
            return add('ReduceMax', x, axes=[1], keepdims=keepdims)
        return add('ReduceMax', x, constant([1], np.int64), keepdims=keepdims)

    def total(x: str) -> str:
        return add('ReduceSum', x, constant([1], np.int64), keepdims=0)

    divide = request.temperature != 1.0
    temperature = constant(request.temperature)

    def head(name: str) -> tuple[str, str]:
        x = add('Cast', name, to=TensorProto.FLOAT)
        if request.void_index is not None:
            keep = [i for i in range(len(request.classes) + 1) if i != request.void_index]
            x = add('Gather', x, constant(keep, np.int64), axis=1)
        if request.upsample:
            sizes = constant([1, len(request.classes), *size_hw], np.int64)
            x = add('Resize', x, '', '', sizes, mode='linear',
                    coordinate_transformation_mode='half_pixel')
        labels = add('Cast', add('ArgMax', x, axis=1, keepdims=0), to=TensorProto.UINT8)
        if request.score == 'max_logit':
            top = largest(x, 0)
            score = add('Neg', add('Div', top, temperature) if divide else top)
        else:
            shifted = add('Sub', x, largest(x, 1))
            if divide:
                shifted = add('Div', shifted, temperature)
            weights = add('Exp', shifted)
            if request.score == 'energy':
                sums = add('Mul', add('Log', total(weights)), temperature)
                score = add('Neg', add('Add', largest(x, 0), sums))
            else:
                # The sum without one maximum, not (sum of all) - 1: keeps sure pixels' digits.
                below = add('Min', add('Mul', shifted, constant(-1e38)), constant(1.0))
                rest = total(add('Mul', weights, below))
                ties = add('Round', add('Sub', add('Sub', total(weights), constant(1.0)), rest))
                rest = add('Add', rest, ties)
                everything = add('Add', rest, constant(1.0))
                if request.score == 'msp':
                    score = add('Div', rest, everything)
                else:
                    # ln(1 + rest) to the last digit also where 1 + rest is rounded: Kahan's log1p.
                    rounded = add('Sub', everything, constant(1.0))
                    exact = add('Div', add('Mul', rest, add('Log', everything)), rounded)
                    log = add('Where', add('Equal', rounded, constant(0.0)), rest, exact)
                    mean = add('Div', total(add('Mul', weights, shifted)), everything)
                    score = add('Sub', log, mean)
        return labels, score

    def join(parts: Sequence[str]) -> str:
        if isinstance(logits, str):
            return parts[0]
        height, width = output_hw
        shape = constant([height // len(parts), 1, width], np.int64)
        rows = add('Concat', *(add('Reshape', part, shape) for part in parts), axis=1)
        return add('Reshape', rows, constant([1, height, width], np.int64))

    answers = [head(name) for name in ([logits] if isinstance(logits, str) else logits)]
    for output, parts in zip(('labels', 'anomaly'), zip(*answers, strict=True), strict=True):
        graph.node.append(helper.make_node('Identity', [join(parts)], [output]))
    del graph.output[:]
    shape = [1, *output_hw]
    graph.output.extend([
        helper.make_tensor_value_info('labels', TensorProto.UINT8, shape),
        helper.make_tensor_value_info('anomaly', TensorProto.FLOAT, shape)])
    drop_unused(graph)


def drop_unused(graph: Any) -> None:
    """Remove nodes and constants that no output needs (other heads of the network)."""
    needed = {x.name for x in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            needed |= set(node.input) | _inner_inputs(node)
            kept.append(type(node).FromString(node.SerializeToString()))
    del graph.node[:]
    graph.node.extend(reversed(kept))
    constants = [type(x).FromString(x.SerializeToString()) for x in graph.initializer
                 if x.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(constants)


def _inner_inputs(node: Any) -> set[str]:
    """Return what the bodies of If, Loop and Scan take from outside."""
    names: set[str] = set()
    for body in _bodies(node):
        for inner in body.node:
            names |= set(inner.input) | _inner_inputs(inner)
    return names
