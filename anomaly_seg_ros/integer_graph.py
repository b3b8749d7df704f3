# SPDX-License-Identifier: Apache-2.0
"""
Rewrite a float graph so that the layers between its convolutions have integer kernels on CPUs.

ONNX Runtime computes a quantised network in one go, channels last, only while every layer has an
integer kernel. A layer without one costs more than it computes: its input becomes float, is
transposed, and its output the other way round. Three such layers are common in segmentation
networks, and each has an equal that consists of convolutions:

- batch normalisation behind a concatenation: one behind each of its parts, where that of a
  convolution then can be folded into it;
- batch normalisation behind anything else: a depthwise 1x1 convolution;
- transposed convolution: one convolution for each of the output rows 0, 1, ... s - 1 of every s,
  whose channels are those of s neighbouring pixels.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Shapes = Mapping[str, list[int]]


def split_normalisations(model: Any) -> None:
    """Put batch normalisations behind a concatenation before it, in place."""
    import onnx

    graph = model.graph
    constants, shapes = _constants(graph), _shapes(model)
    makers = {name: node for node in graph.node for name in node.output}
    users = _users(graph)
    nodes = []
    for node in graph.node:
        concat = makers.get(node.input[0]) if node.op_type == 'BatchNormalization' else None
        parameters = [constants.get(name) for name in node.input[1:]]
        if concat is None or concat.op_type != 'Concat' or users[node.input[0]] != 1 \
                or _attributes(concat)['axis'] not in (1, 1 - len(shapes.get(node.input[0], ()))) \
                or any(x is None for x in parameters) \
                or not all(name in shapes for name in concat.input):
            nodes.append(node)
            continue
        nodes.remove(concat)
        output, channel, parts = node.output[0], 0, []
        for index, name in enumerate(concat.input):
            channels = slice(channel, channel + shapes[name][1])
            channel = channels.stop
            part = f'{output}_part{index}'
            names = [_add(graph, f'{part}_{k}', x[channels])
                     for k, x in enumerate(parameters) if x is not None]
            normalisation = onnx.helper.make_node('BatchNormalization', [name, *names], [part],
                                                  name=part)
            normalisation.attribute.extend(node.attribute)
            nodes.append(normalisation)
            parts.append(part)
        nodes.append(onnx.helper.make_node('Concat', parts, [output], name=f'{output}_concat',
                                           axis=1))
    _replace_nodes(graph, nodes)


def normalisations_as_convolutions(model: Any) -> None:
    """Make batch normalisations depthwise 1x1 convolutions, in place."""
    graph = model.graph
    constants = _constants(graph)
    nodes = []
    for node in graph.node:
        new = _depthwise(graph, node, constants) if node.op_type == 'BatchNormalization' else None
        nodes += new or [node]
    _replace_nodes(graph, nodes)


def transposed_as_convolutions(model: Any, keep: Collection[str] = ()) -> None:
    """
    Make transposed convolutions convolutions, one a row phase, in place.

    Nodes whose names are in ``keep`` stay as they are, and so do those with settings for which
    there is no such form here: dilation, groups, an output that the stride does not divide.
    """
    graph = model.graph
    constants, shapes = _constants(graph), _shapes(model)
    nodes = []
    for node in graph.node:
        new = None
        if node.op_type == 'ConvTranspose' and node.name not in keep:
            new = _rows(graph, node, constants, shapes)
        nodes += new or [node]
    _replace_nodes(graph, nodes)


def _depthwise(graph: Any, node: Any, constants: Mapping[str, np.ndarray]) -> list[Any] | None:
    """Return batch normalisation as a depthwise 1x1 convolution."""
    import onnx

    if not all(name in constants for name in node.input[1:]):
        return None
    scale, bias, mean, variance = (constants[name].astype(np.float64) for name in node.input[1:])
    weight = scale / np.sqrt(variance + _attributes(node).get('epsilon', 1e-5))
    output = node.output[0]
    names = [_add(graph, f'{output}_weight', weight.reshape(-1, 1, 1, 1)),
             _add(graph, f'{output}_bias', bias - mean * weight)]
    return [onnx.helper.make_node('Conv', [node.input[0], *names], [output], name=node.name,
                                  group=len(weight), kernel_shape=[1, 1])]


def _rows(graph: Any, node: Any, constants: Mapping[str, np.ndarray],
          shapes: Shapes) -> list[Any] | None:
    """
    Return a transposed convolution as one convolution a row phase, and their rows interleaved.

    With stride s and padding p, output o gets x[i] w[k] for every o + p = s i + k. In phase a, o =
    s m + a, that is x[m + d] w[a + p - s d]: a convolution over the offsets d.
    """
    import onnx

    settings = _attributes(node)
    weight = constants.get(node.input[1])
    if weight is None or weight.ndim != 4 or settings.get('group', 1) != 1 \
            or any(x != 1 for x in settings.get('dilations', ())) \
            or settings.get('auto_pad', b'NOTSET') != b'NOTSET' \
            or not {node.input[0], node.output[0]} <= shapes.keys() \
            or shapes[node.input[0]][0] != 1:
        return None
    steps, pads = settings.get('strides', [1, 1]), settings.get('pads', [0] * 4)
    size, output_size = shapes[node.input[0]][2:], shapes[node.output[0]][2:]
    if any(out % step for out, step in zip(output_size, steps, strict=True)):
        return None
    classes = weight.shape[1]
    bias = np.zeros(classes) if len(node.input) < 3 else constants.get(node.input[2])
    if bias is None:
        return None
    height, width = (out // step for out, step in zip(output_size, steps, strict=True))
    columns = _taps(range(steps[1]), weight.shape[3], steps[1], pads[1], size[1], width)
    output, nodes, rows = node.output[0], [], []
    row_shape = _add(graph, f'{output}_row', [1, height, 1, output_size[1], classes], np.int64)
    whole_shape = _add(graph, f'{output}_whole', [1, *output_size, classes], np.int64)
    for row in range(steps[0]):
        lines = _taps([row], weight.shape[2], steps[0], pads[0], size[0], height)
        kernel = np.zeros((steps[1], classes, weight.shape[0], len(lines.kernels[0]),
                           len(columns.kernels[0])))
        for line, k in enumerate(lines.kernels[0]):
            for column, taps in enumerate(columns.kernels):
                for place, m in enumerate(taps):
                    if k is not None and m is not None:
                        kernel[column, :, :, line, place] = weight[:, :, k, m].T
        name = f'{output}_row{row}'
        parameters = [_add(graph, f'{name}_weight', kernel.reshape(-1, *kernel.shape[2:])),
                      _add(graph, f'{name}_bias', np.tile(bias, steps[1]))]
        nodes += [
            onnx.helper.make_node('Conv', [node.input[0], *parameters], [name], name=name,
                                  kernel_shape=kernel.shape[3:],
                                  pads=[lines.before, columns.before, lines.after, columns.after]),
            onnx.helper.make_node('Transpose', [name], [f'{name}_last'], name=f'{name}_last',
                                  perm=[0, 2, 3, 1]),
            onnx.helper.make_node('Reshape', [f'{name}_last', row_shape], [f'{name}_pixels'],
                                  name=f'{name}_pixels')]
        rows.append(f'{name}_pixels')
    return [*nodes,
            onnx.helper.make_node('Concat', rows, [f'{output}_rows'], name=f'{output}_rows',
                                  axis=2),
            onnx.helper.make_node('Reshape', [f'{output}_rows', whole_shape], [f'{output}_pixels'],
                                  name=f'{output}_pixels'),
            onnx.helper.make_node('Transpose', [f'{output}_pixels'], [output], name=node.name,
                                  perm=[0, 3, 1, 2])]


@dataclass(frozen=True)
class _Taps:
    """
    One axis of a transposed convolution, as convolutions over the input.

    Attributes
    ----------
    kernels
        For each phase the kernel's index at each offset, None where there is none.
    before, after
        Padding of the input.

    """

    kernels: list[list[int | None]]
    before: int
    after: int


def _taps(phases: Iterable[int], kernel: int, step: int, pad: int, size: int,
          count: int) -> _Taps:
    """Return which taps of ``kernel`` make output m of ``count`` in each phase, see ``_rows``."""
    found = [{(phase + pad - k) // step: k for k in range(kernel) if (phase + pad - k) % step == 0}
             for phase in phases]
    offsets = [offset for taps in found for offset in taps]
    first = min([0, *offsets])
    last = max([first, size - count, *offsets])
    return _Taps([[taps.get(offset) for offset in range(first, last + 1)] for taps in found],
                 -first, count - size + last)


def _attributes(node: Any) -> dict[str, Any]:
    import onnx

    return {x.name: onnx.helper.get_attribute_value(x) for x in node.attribute}


def _constants(graph: Any) -> dict[str, np.ndarray]:
    import onnx

    constants = {x.name: onnx.numpy_helper.to_array(x) for x in graph.initializer}
    for node in graph.node:
        if node.op_type == 'Constant' and node.attribute[0].name == 'value':
            constants[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)
    return constants


def _shapes(model: Any) -> dict[str, list[int]]:
    """Return the shapes that are known in full."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(model).graph
    shapes = {x.name: [d.dim_value for d in x.type.tensor_type.shape.dim]
              for x in (*graph.input, *graph.value_info, *graph.output)}
    return {name: shape for name, shape in shapes.items() if all(shape)}


def _users(graph: Any) -> dict[str, int]:
    """Return how often each tensor is used, as input or as output of the graph."""
    users: dict[str, int] = {}
    for name in (*(x for node in graph.node for x in node.input), *(x.name for x in graph.output)):
        users[name] = users.get(name, 0) + 1
    return users


def _add(graph: Any, name: str, values: Any, dtype: type = np.float32) -> str:
    import onnx

    graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values, dtype), name))
    return name


def _replace_nodes(graph: Any, nodes: list[Any]) -> None:
    """Give the graph these nodes, without the constants and shapes that nobody uses any more."""
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    users = _users(graph)
    initializers = [x for x in graph.initializer if x.name in users]
    del graph.initializer[:]
    graph.initializer.extend(initializers)
