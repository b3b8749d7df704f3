# SPDX-License-Identifier: Apache-2.0
"""Tiny real models, with faults on demand, and frames for the tests of the node."""

from collections.abc import Callable
from pathlib import Path
import subprocess
import sys
import time

from anomaly_seg_ros.classes import CITYSCAPES_CLASSES, CITYSCAPES_PALETTE
from anomaly_seg_ros.images import message_array
from anomaly_seg_ros.model_file import ModelCard, write_model_file
from anomaly_seg_ros.ros.client import NodeClient, NodeRun
import numpy as np
import pytest
from rclpy.task import Future

INPUT_HW = (64, 128)
# A frame whose upper left corner has this green value makes the network misbehave.
NAN, RAISE, STALL = 251, 252, 253


def write_tiny_model(path: Path, *, gain: float = 1.0, stall_iterations: int = 1,
                     stall: int = STALL, **card: object) -> Path:
    """
    Write a model whose score is the mean of the channels times ``gain``, 0 to ``gain``.

    Its labels are the red channel in 19 steps. The corner values above make it give NaN, raise
    in ONNX Runtime, or take ``stall_iterations`` at the green value ``stall``: real faults of a
    real network, without a hook in the code.
    """
    pytest.importorskip('onnx', reason='needs onnx: pip install ".[export]"')
    from onnx import helper, numpy_helper, TensorProto
    height, width = INPUT_HW

    def constant(name: str, value: object, dtype: type) -> object:
        return numpy_helper.from_array(np.array(value, dtype), name)

    node = helper.make_node
    body = helper.make_graph(
        [node('Identity', ['go'], ['go_on']), node('Sin', ['x'], ['y'])], 'body',
        [helper.make_tensor_value_info('i', TensorProto.INT64, []),
         helper.make_tensor_value_info('go', TensorProto.BOOL, []),
         helper.make_tensor_value_info('x', TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info('go_on', TensorProto.BOOL, []),
         helper.make_tensor_value_info('y', TensorProto.FLOAT, [1])])
    nodes = [
        node('ReduceMean', ['image', 'channel_axis'], ['mean'], keepdims=0),
        node('Mul', ['mean', 'gain'], ['score']),
        node('Slice', ['image', 'corner_from', 'corner_to', 'corner_axes'], ['corner4']),
        node('Reshape', ['corner4', 'one'], ['corner']),
        node('Mul', ['corner', 'c255'], ['corner255']),
        node('Round', ['corner255'], ['code']),
        node('Equal', ['code', 'code_nan'], ['is_nan']),
        node('Where', ['is_nan', 'nan', 'zero'], ['nan_term']),
        node('Equal', ['code', 'code_raise'], ['is_raise']),
        node('Where', ['is_raise', 'index_bad', 'index_good'], ['index']),
        node('Gather', ['zero', 'index'], ['raise_term']),
        node('Equal', ['code', 'code_stall'], ['is_stall']),
        node('Where', ['is_stall', 'trips', 'no_trips'], ['trip_count']),
        node('Reshape', ['trip_count', 'scalar'], ['trip_scalar']),
        node('Loop', ['trip_scalar', 'true', 'zero'], ['stall_term'], body=body),
        node('Add', ['score', 'nan_term'], ['sum1']),
        node('Add', ['sum1', 'raise_term'], ['sum2']),
        node('Add', ['sum2', 'stall_term'], ['anomaly']),
        node('Gather', ['image', 'red'], ['red_plane'], axis=1),
        node('Mul', ['red_plane', 'steps'], ['scaled']),
        node('Floor', ['scaled'], ['floored']),
        node('Cast', ['floored'], ['labels'], to=TensorProto.UINT8)]
    initializers = [
        constant('channel_axis', [1], np.int64), constant('gain', [gain], np.float32),
        constant('corner_from', [0, 1, 0, 0], np.int64),
        constant('corner_to', [1, 2, 1, 1], np.int64),
        constant('corner_axes', [0, 1, 2, 3], np.int64), constant('one', [1], np.int64),
        constant('c255', [255], np.float32), constant('nan', [np.nan], np.float32),
        constant('code_nan', [NAN], np.float32), constant('code_raise', [RAISE], np.float32),
        constant('code_stall', [stall], np.float32), constant('zero', [0], np.float32),
        constant('index_bad', [7], np.int64), constant('index_good', [0], np.int64),
        constant('trips', [stall_iterations], np.int64), constant('no_trips', [0], np.int64),
        constant('scalar', np.zeros(0), np.int64), constant('true', True, np.bool_),
        constant('red', 0, np.int64), constant('steps', [18.999], np.float32)]
    graph = helper.make_graph(
        nodes, 'tiny',
        [helper.make_tensor_value_info('image', TensorProto.FLOAT, [1, 3, height, width])],
        [helper.make_tensor_value_info('labels', TensorProto.UINT8, [1, height, width]),
         helper.make_tensor_value_info('anomaly', TensorProto.FLOAT, [1, height, width])],
        initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)])
    model.ir_version = 9
    values: dict[str, object] = {
        'name': 'tiny', 'network': 'test', 'classes': CITYSCAPES_CLASSES,
        'palette': CITYSCAPES_PALETTE, 'drivable': (0,), 'input_size_hw': INPUT_HW,
        'output_size_hw': INPUT_HW, 'score': 'max_logit', 'threshold': 0.6 * gain,
        'threshold_source': 'set by the test', 'score_range': (0.0, gain)}
    write_model_file(path, model.SerializeToString(), ModelCard(**(values | card)))
    return path


def make_frame(index: int, size_hw: tuple[int, int] = (96, 160),
               corner: int | None = None) -> np.ndarray:
    """
    Return a frame uint8 (H, W, 3), RGB, different for each index, with bright blobs.

    ``corner`` sets the green value of its upper left corner, see ``NAN`` and its like.
    """
    rng = np.random.default_rng(index)
    height, width = size_hw
    frame = rng.integers(40, 120, (height, width, 3), dtype=np.uint8)
    for _ in range(3):
        y, x = rng.integers(height // 3, height - height // 8), rng.integers(0, width * 3 // 4)
        frame[y:y + height // 8, x:x + width // 6] = rng.integers(200, 245, 3)
    frame[:height // 8, :width // 8] = (90, 60 if corner is None else corner, 90)
    return frame


class Driver:
    """
    A node under test with what the tests need: stamps, services, waiting with a limit.

    ``run`` is an entered NodeRun. Every frame gets a stamp of its own, ten milliseconds after the
    one before.
    """

    def __init__(self, run: NodeRun) -> None:
        self.run = run
        self.client = run.client
        self._next_ns = time.time_ns()
        self._services: dict[str, object] = {}

    def next_stamp(self) -> int:
        """Return a new stamp."""
        self._next_ns += 10_000_000
        return self._next_ns

    def send(self, frame: np.ndarray) -> int:
        """Publish a frame as rgb8 and return its stamp."""
        stamp_ns = self.next_stamp()
        self.client.send(frame, stamp_ns)
        return stamp_ns

    def wait(self, condition: Callable[[], object], timeout_s: float = 10.0,
             what: str = 'condition') -> None:
        """Handle messages until ``condition`` holds; fail with the diagnostics otherwise."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            self.client.spin(0.02)
            self.run.check()
            if time.monotonic() > deadline:
                raise AssertionError(f'no {what} within {timeout_s} s: '
                                     f'{self.client.diagnostics}\n{self.run.log_text()[-3000:]}')

    def answer(self, frame: np.ndarray, timeout_s: float = 10.0) -> dict[str, object]:
        """Send a frame and return the messages of its answer."""
        stamp_ns = self.send(frame)
        self.wait(lambda: stamp_ns in self.client.complete(), timeout_s, 'answer')
        return self.client.take(stamp_ns)

    def check_answer(self, pipeline: object, frame: np.ndarray, timeout_s: float = 10.0) -> None:
        """Send a frame and compare its answer with the pipeline's, to the last bit."""
        messages = self.answer(frame, timeout_s)
        expected = pipeline(frame)
        for name, array in (('labels', expected.labels), ('anomaly', expected.anomaly),
                            ('obstacle_mask', expected.mask)):
            if name in messages:
                np.testing.assert_array_equal(message_array(messages[name]), array, name)

    def settle(self, seconds: float) -> None:
        """Handle messages for a while."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.client.spin(min(left, 0.05))

    def fresh(self, reports: int = 2) -> dict[str, str]:
        """Return diagnostics that were made after now."""
        wanted = self.client.reports + reports
        self.wait(lambda: self.client.reports >= wanted, 10.0, 'diagnostics')
        return self.client.diagnostics

    def ask(self, name: str, kind: type, request: object) -> Future:
        """Call a service of the node and return the future of its reply."""
        if name not in self._services:
            self._services[name] = self.client.node.create_client(kind, f'/anomaly_seg/{name}')
        service = self._services[name]
        self.wait(service.service_is_ready, 10.0, f'service {name}')
        return service.call_async(request)

    def call(self, name: str, kind: type, request: object, timeout_s: float = 20.0) -> object:
        """Call a service of the node and return its reply."""
        future = self.ask(name, kind, request)
        self.wait(future.done, timeout_s, f'reply of {name}')
        return future.result()

    def ask_for_parameters(self, **values: object) -> Future:
        """Ask to set parameters atomically and return the future of the reply."""
        from rcl_interfaces.srv import SetParametersAtomically
        from rclpy.parameter import Parameter
        request = SetParametersAtomically.Request(parameters=[
            Parameter(name, value=value).to_parameter_msg() for name, value in values.items()])
        return self.ask('set_parameters_atomically', SetParametersAtomically, request)

    def set_parameters(self, **values: object) -> str:
        """Set parameters atomically; return the reason of a refusal, '' on success."""
        future = self.ask_for_parameters(**values)
        self.wait(future.done, 20.0, f'reply to {values}')
        result = future.result().result
        assert result.successful == (not result.reason)
        return str(result.reason)

    def get_parameter(self, name: str) -> object:
        """Return a parameter's value."""
        from rcl_interfaces.srv import GetParameters
        from rclpy.parameter import parameter_value_to_python
        reply = self.call('get_parameters', GetParameters, GetParameters.Request(names=[name]))
        return parameter_value_to_python(reply.values[0])

    def change_state(self, transition: str) -> bool:
        """Ask for a lifecycle transition by its name."""
        from lifecycle_msgs.msg import Transition
        from lifecycle_msgs.srv import ChangeState
        request = ChangeState.Request(transition=Transition(label=transition))
        return bool(self.call('change_state', ChangeState, request).success)

    def state(self) -> str:
        """Return the lifecycle state."""
        from lifecycle_msgs.srv import GetState
        reply = self.call('get_state', GetState, GetState.Request())
        return str(reply.current_state.label)


def publish_forever(domain_id: int, rate_hz: float, log: Path) -> None:
    """Publish frames until killed; each stamp is written to ``log`` before its frame goes out."""
    client = NodeClient(domain_id, (), reliable=False)
    with open(log, 'a', encoding='utf-8', buffering=1) as stream:
        index = 0
        while True:
            stamp_ns = time.time_ns()
            stream.write(f'{stamp_ns}\n')
            client.send(make_frame(index % 7), stamp_ns)
            index += 1
            time.sleep(1 / rate_hz)


def subscribe_forever(domain_id: int) -> None:
    """Receive the labels until killed."""
    client = NodeClient(domain_id, ('labels',), reliable=True)
    while True:
        client.spin(1.0)


def start_helper(function: Callable[..., None], *arguments: object) -> subprocess.Popen:
    """Run one of the functions above in a process of its own."""
    code = (f'import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); '
            'import pathlib, ros_helpers; from pathlib import PosixPath; '
            f'ros_helpers.{function.__name__}(*{arguments!r})')
    return subprocess.Popen([sys.executable, '-c', code])
