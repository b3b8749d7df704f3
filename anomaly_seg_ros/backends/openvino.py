# SPDX-License-Identifier: Apache-2.0
"""OpenVINO: on recent Intel CPUs the fastest, and the lightest on the CPU."""

from collections.abc import Mapping
from importlib.util import find_spec
import os
from typing import Any

from anomaly_seg_ros.backends.base import Backend
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.model_file import ModelFile
from anomaly_seg_ros.ports import (
    check_input, check_ports, input_port, NetworkOutput, output_ports, Port)
import numpy as np

PRECISIONS = ('f32', 'speed')
_DTYPES = {'f32': 'float32', 'f16': 'float16', 'u8': 'uint8', 'i64': 'int64', 'i32': 'int32'}


class OpenvinoBackend(Backend):
    """
    A model compiled by OpenVINO.

    OpenVINO computes in bfloat16 on CPUs that can, whatever the model says. ``precision='f32'``,
    the default here, forbids that, so that the numbers are the model's; ``'speed'`` allows it.
    """

    name = 'openvino'

    @classmethod
    def unavailable(cls, model: ModelFile) -> str | None:
        """Tell whether openvino is installed."""
        return None if find_spec('openvino') else 'openvino is not installed'

    def __init__(self, model: ModelFile, threads: int = 0, precision: str = 'f32',
                 device: str = 'CPU') -> None:
        """
        Compile ``model``.

        Parameters
        ----------
        model
            A model file; its bytes are used, not what now lies at its path.
        threads
            CPU threads; 0 takes as many as this process may use cores.
        precision
            ``f32``: float32 arithmetic. ``speed``: OpenVINO's own choice.
        device
            ``CPU``, ``GPU`` or another device name of OpenVINO.

        """
        if precision not in PRECISIONS:
            raise ValueError(f'precision must be one of {PRECISIONS}, got {precision!r}')
        reason = self.unavailable(model)
        if reason is not None:
            raise UserError(f'backend openvino: {reason}. Install the extra "openvino", or choose '
                            '--backend cpu.')
        import openvino

        self.card = model.card
        self._threads = threads or len(os.sched_getaffinity(0))
        self._version = openvino.__version__
        config: dict[str, Any] = {'PERFORMANCE_HINT': 'LATENCY'}
        if device == 'CPU':
            config['INFERENCE_NUM_THREADS'] = self._threads
        if precision == 'f32':
            config['INFERENCE_PRECISION_HINT'] = 'f32'
        try:
            core = openvino.Core()
            graph = core.read_model(model.data)
            _replace_argmax(graph)
            _replace_image_pooling(graph)
            compiled = core.compile_model(graph, device, config)
        except RuntimeError as error:
            raise UserError(f'{model.path}: OpenVINO {self._version} cannot compile it for '
                            f'{device}: {" ".join(str(error).split())}. Choose another device, or '
                            '--backend cpu.') from error
        # A list, or a single name; the first GPU also goes by GPU.0.
        found = compiled.get_property('EXECUTION_DEVICES')
        devices = [found] if isinstance(found, str) else list(found)
        self._devices = ', '.join(devices)
        if device != 'AUTO' and any(device not in (name, name.split('.')[0]) for name in devices):
            raise UserError(f'{model.path}: asked for OpenVINO on {device}, it chose '
                            f'{self._devices}. Install the driver of {device}.')
        self._precision = str(compiled.get_property('INFERENCE_PRECISION_HINT').to_string())
        expected = {port.name for port in (input_port(model.card), *output_ports(model.card))}
        check_ports(model, *([_as_port(x, expected) for x in ports]
                             for ports in (compiled.inputs, compiled.outputs)))
        self._input = input_port(model.card)
        self._request = compiled.create_infer_request()
        self._outputs = [port.empty() for port in output_ports(model.card)]
        for port, array in zip(output_ports(model.card), self._outputs, strict=True):
            self._request.set_tensor(port.name, openvino.Tensor(array, shared_memory=True))
        self._tensor = openvino.Tensor

    def run(self, network_input: np.ndarray) -> NetworkOutput:
        """Run one frame; the arrays returned are overwritten by the next call."""
        check_input(network_input, self._input)
        # A tensor with shared memory does not keep its array alive.
        contiguous = np.ascontiguousarray(network_input)
        self._request.set_tensor('image', self._tensor(contiguous, shared_memory=True))
        self._request.infer()
        labels, anomaly = self._outputs
        return NetworkOutput(labels[0], anomaly[0])

    def describe(self) -> Mapping[str, str]:
        """Tell library, version, device, arithmetic and threads."""
        return {'backend': 'openvino', 'version': self._version, 'device': self._devices,
                'arithmetic': self._precision, 'threads': str(self._threads)}

    def close(self) -> None:
        """Free the compiled model; the backend cannot run afterwards."""
        self._request = None


def _as_port(tensor: Any, expected: set[str]) -> Port:
    """Describe an input or output; where casts are folded into it, it goes by several names."""
    names = tensor.get_names()
    element = tensor.get_element_type()
    return Port(next(iter(sorted(names & expected or names)), ''),
                _DTYPES.get(element.to_string(), str(element)), tuple(tensor.get_shape()))


def _replace_argmax(graph: Any) -> None:
    """
    Find the class of largest logit by comparing all with the maximum, in place of TopK.

    OpenVINO has no ArgMax and sorts: on a CPU 17 ms for 19 logits of 512x1024, this takes 4. Of
    equal maxima the first wins, as in ONNX.
    """
    from openvino import opset13 as ops

    for node in graph.get_ordered_ops():
        if node.get_type_name() != 'TopK' or node.output(0).get_target_inputs():
            continue
        logits, count = node.input_value(0), node.input_value(1).get_node()
        axis, mode = node.get_attributes()['axis'], node.get_attributes()['mode']
        classes = logits.get_partial_shape()[axis].get_length()
        # 256: up to there the ranks are exact in bfloat16.
        if mode != 'max' or classes > 256 or count.get_type_name() != 'Constant' \
                or count.data.item() != 1:
            continue
        shape = [1] * len(logits.get_partial_shape())
        shape[axis] = classes
        rank = np.arange(classes, 0, -1, dtype=np.float32).reshape(shape)
        highest = _maximum(logits, axis)
        ranked = ops.select(ops.greater_equal(logits, highest), rank, np.float32(1))
        first = ops.reduce_max(ranked, [axis], keep_dims=True)
        index = ops.convert(ops.subtract(np.float32(classes), first),
                            node.output(1).get_element_type().to_string())
        for user in node.output(1).get_target_inputs():
            user.replace_source_output(index.output(0))


def _maximum(logits: Any, axis: int) -> Any:
    """Return the maximum along ``axis``, which is kept: the score's own where it has taken it."""
    from openvino import opset13 as ops

    for user in logits.get_target_inputs():
        node = user.get_node()
        if node.get_type_name() != 'ReduceMax':
            continue
        axes = node.input_value(1).get_node()
        if axes.get_type_name() == 'Constant' and \
                [x % len(logits.get_partial_shape()) for x in axes.data.ravel()] == [axis]:
            return node.output(0) if node.get_attributes()['keep_dims'] \
                else ops.unsqueeze(node.output(0), [axis])
    return ops.reduce_max(logits, [axis], keep_dims=True)


def _replace_image_pooling(graph: Any) -> None:
    """
    Take the maximum of 2x2 pixels of the image itself as that of four images of every other pixel.

    OpenVINO's pooling first spreads the three channels over sixteen: 3 ms of ERFNet's 85 in int8,
    this takes 1. The maximum is the same to the bit.
    """
    from openvino import opset13 as ops

    for node in graph.get_ordered_ops():
        if node.get_type_name() != 'MaxPool' \
                or node.input_value(0).get_node().get_type_name() != 'Parameter':
            continue
        shape, attributes = node.input_value(0).get_partial_shape(), node.get_attributes()
        plain = {'kernel': [2, 2], 'strides': [2, 2], 'pads_begin': [0, 0], 'pads_end': [0, 0]}
        if any(list(attributes[name]) != value for name, value in plain.items()) \
                or shape.is_dynamic or any(shape[axis].get_length() % 2 for axis in (2, 3)):
            continue
        every_other = [
            ops.strided_slice(node.input_value(0), [0, 0, row, column], [0, 0, 0, 0],
                              [1, 1, 2, 2], begin_mask=[1, 1, 0, 0], end_mask=[1, 1, 1, 1])
            for row in (0, 1) for column in (0, 1)]
        highest = ops.maximum(ops.maximum(*every_other[:2]), ops.maximum(*every_other[2:]))
        for user in node.output(0).get_target_inputs():
            user.replace_source_output(highest.output(0))
