# SPDX-License-Identifier: Apache-2.0
"""Small ONNX models with cards for tests: no PyTorch, and outputs that are easy to predict."""

from pathlib import Path
from typing import Any

from anomaly_seg_ros.model_file import load_model_file, ModelCard, ModelFile, write_model_file
import numpy as np
import onnx
from onnx import helper, numpy_helper, TensorProto


def card(size_hw: tuple[int, int] = (24, 40), **changes: Any) -> ModelCard:
    """Return a card of a model with three classes that runs at ``size_hw``."""
    values: dict[str, Any] = {
        'name': 'test', 'network': 'identity', 'classes': ('road', 'car', 'sky'),
        'palette': ((128, 64, 128), (0, 0, 142), (70, 130, 180)), 'drivable': (0,),
        'input_size_hw': size_hw, 'output_size_hw': size_hw, 'score': 'max_logit',
        'threshold': -0.5, 'threshold_source': 'given', 'score_range': (-1.0, 0.0)}
    return ModelCard(**{**values, **changes})


def identity_graph(size_hw: tuple[int, int] = (24, 40)) -> onnx.ModelProto:
    """Return a graph whose logits are its input: labels = argmax, anomaly = -max over channels."""
    shape = (1, *size_hw)
    nodes = [helper.make_node('ArgMax', ['image'], ['index'], axis=1, keepdims=0),
             helper.make_node('Cast', ['index'], ['labels'], to=TensorProto.UINT8),
             helper.make_node('ReduceMax', ['image', 'axes'], ['largest'], keepdims=0),
             helper.make_node('Neg', ['largest'], ['anomaly'])]
    graph = helper.make_graph(
        nodes, 'identity',
        [helper.make_tensor_value_info('image', TensorProto.FLOAT, (1, 3, *size_hw))],
        [helper.make_tensor_value_info('labels', TensorProto.UINT8, shape),
         helper.make_tensor_value_info('anomaly', TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.array([1], np.int64), 'axes')])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid('', 20)], ir_version=9)


def identity_model(path: Path, size_hw: tuple[int, int] = (24, 40), **changes: Any) -> ModelFile:
    """Write the identity graph with its card to ``path`` and load it."""
    write_model_file(path, identity_graph(size_hw).SerializeToString(), card(size_hw, **changes))
    return load_model_file(path)


def device_model(path: Path, size_hw: tuple[int, int] = (24, 40)) -> ModelFile:
    """Write the identity graph as one that takes whole frames of ``size_hw``, and load it."""
    model = identity_graph(size_hw)
    graph = model.graph
    for node in graph.node:
        if node.input[0] == 'image':
            node.input[0] = 'planes'
    for node in (helper.make_node('Unsqueeze', ['chw', 'batch'], ['planes']),
                 helper.make_node('Transpose', ['float'], ['chw'], perm=[2, 0, 1]),
                 helper.make_node('Cast', ['image'], ['float'], to=TensorProto.FLOAT)):
        graph.node.insert(0, node)
    graph.input[0].CopyFrom(
        helper.make_tensor_value_info('image', TensorProto.UINT8, (*size_hw, 3)))
    graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), 'batch'))
    write_model_file(path, model.SerializeToString(),
                     card(size_hw, input_variant='device', frame_size_hw=size_hw))
    return load_model_file(path)
