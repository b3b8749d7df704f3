# SPDX-License-Identifier: Apache-2.0
"""TensorRT 10 and 11 without onnxruntime between: the fastest on NVIDIA GPUs."""

from collections.abc import Mapping
import logging
from pathlib import Path
from typing import Any

from anomaly_seg_ros.backends.base import Backend
from anomaly_seg_ros.cuda import CudaBuffers, describe_gpu, select_gpu
from anomaly_seg_ros.engine import (
    build_command, build_engine, check_engine, engine_path, EngineSettings, load_engine,
    make_logger, missing_tensorrt)
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.model_file import ModelFile
from anomaly_seg_ros.ports import check_input, check_ports, input_port, NetworkOutput, Port
import numpy as np

_DTYPES = {'FLOAT': 'float32', 'HALF': 'float16', 'UINT8': 'uint8', 'INT32': 'int32',
           'INT64': 'int64'}


class TensorrtBackend(Backend):
    """An engine made by ``anomaly-seg build-engine`` from the model file."""

    name = 'tensorrt'

    @classmethod
    def unavailable(cls, model: ModelFile) -> str | None:
        """Tell whether TensorRT, a GPU and a fitting engine for the first one are here."""
        reason = missing_tensorrt()
        if reason is not None:
            return reason
        import tensorrt

        try:
            check_engine(load_engine(engine_path(model)), model, tensorrt.__version__,
                         describe_gpu())
        except UserError as error:
            return str(error)
        return None

    def __init__(self, model: ModelFile, threads: int = 0, engine: Path | None = None,
                 build: bool = False, device: int = 0, cuda_graph: bool = True) -> None:
        """
        Load the engine of ``model``.

        Parameters
        ----------
        model
            The model file that the engine was built from, or the engine itself.
        threads
            Not used: the GPU does the work.
        engine
            The engine; by default ``model.engine`` beside ``model.onnx``.
        build
            Build the engine where it is missing or stale, which takes minutes.
        device
            Index of the CUDA device.
        cuda_graph
            Capture a frame's copies and kernels as one CUDA graph and replay it.

        """
        reason = missing_tensorrt()
        if reason is not None:
            raise UserError(f'backend tensorrt: {reason}. Install the extra "tensorrt" on a '
                            'machine with an NVIDIA GPU, or choose --backend cpu.')
        import tensorrt as trt

        self.card = model.card
        path = engine or engine_path(model)
        select_gpu(device)
        gpu = describe_gpu(device)
        try:
            loaded = load_engine(path)
            check_engine(loaded, model, trt.__version__, gpu)
        except UserError as error:
            if not build or path == model.path:  # an engine has no graph to build from
                raise
            logging.getLogger(__name__).warning(
                'building %s now, this takes minutes (%s); to do it beforehand: %s', path, error,
                build_command(model.path, path))
            loaded = build_engine(model, path, EngineSettings(device=device))
        self._layers = loaded.layer_precisions
        self._gpu, self._version = gpu.name, trt.__version__
        self._input = input_port(model.card)
        self._runner = EngineRunner(loaded.data, path, device, cuda_graph)
        try:
            check_ports(model, self._runner.inputs, self._runner.outputs)
            self._runner.prepare(tuple(int(str(n)) for n in self._input.shape))
        except UserError:
            self.close()
            raise
        self.input_buffer = self._runner.input_buffer

    def run(self, network_input: np.ndarray) -> NetworkOutput:
        """Run one frame; the arrays returned are pinned and overwritten by the next call."""
        check_input(network_input, self._input)
        outputs = self._runner.run(network_input)
        return NetworkOutput(outputs['labels'][0], outputs['anomaly'][0])

    def describe(self) -> Mapping[str, str]:
        """Tell version, GPU and in how many layers which precision is used."""
        return {'backend': 'tensorrt', 'version': self._version, 'device': self._gpu,
                'arithmetic': ', '.join(f'{count} layers {name}'
                                        for name, count in sorted(self._layers.items()))}

    def close(self) -> None:
        """Free engine and memory; the backend cannot run afterwards."""
        self.input_buffer = None
        self._runner.close()


class EngineRunner:
    """
    Any engine with one input of one shape, its buffers and its CUDA graph.

    Attributes
    ----------
    inputs, outputs
        Ports of the engine.

    """

    def __init__(self, plan: bytes, path: Path, device: int = 0, cuda_graph: bool = True) -> None:
        """Load the plan; ``path`` is for messages."""
        import tensorrt as trt

        select_gpu(device)
        self._path, self._device, self._cuda_graph = path, device, cuda_graph
        self._log = make_logger(trt)
        self._runtime = trt.Runtime(self._log)
        self._engine: Any = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise UserError(f'{path}: TensorRT {trt.__version__} cannot load this engine: '
                            f'{self._log.text()}. Build it again.')
        self._context: Any = self._engine.create_execution_context()
        if self._context is None:
            raise UserError(f'{path}: no memory to run this engine: {self._log.text()}. Close '
                            'other programs on the GPU.')
        self._buffers: CudaBuffers | None = None
        self.inputs: list[Port] = []
        self.outputs: list[Port] = []
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            dtype = self._engine.get_tensor_dtype(name).name
            shape = tuple(self._engine.get_tensor_shape(name))
            port = Port(name, _DTYPES.get(dtype, dtype), shape)
            is_input = self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            (self.inputs if is_input else self.outputs).append(port)
        if len(self.inputs) != 1:
            raise UserError(f'{path}: expected an engine with one input, got '
                            f'{", ".join(map(str, self.inputs)) or "none"}')

    @property
    def input_buffer(self) -> np.ndarray | None:
        """The pinned array that is copied to the GPU, once ``prepare`` was called."""
        return self._buffers.host[self.inputs[0].name] if self._buffers else None

    def prepare(self, shape: tuple[int, ...]) -> CudaBuffers:
        """
        Allocate for inputs of this shape, which is the engine's, and capture the graph.

        Raises
        ------
        UserError
            If the engine has another shape, or memory runs out.

        """
        image = self.inputs[0]
        if not self._context.set_input_shape(image.name, shape):
            raise UserError(f'{self._path}: built for inputs {image.shape}, got {shape}. Build it '
                            'again from the model.')
        ports = [Port(image.name, image.dtype, shape)] + [
            Port(port.name, port.dtype, tuple(self._context.get_tensor_shape(port.name)))
            for port in self.outputs]
        self._buffers = buffers = CudaBuffers(ports, self._device)
        for port in ports:
            if not self._context.set_tensor_address(port.name, buffers.address[port.name]):
                raise UserError(f'{self._path}: TensorRT refuses the memory of {port.name}: '
                                f'{self._log.text()}')
        # The first run sets up lazily what must not happen while a graph is recorded.
        self._enqueue(buffers)
        buffers.synchronize()
        if self._cuda_graph:
            buffers.capture(lambda: self._enqueue(buffers))
        return buffers

    def run(self, array: np.ndarray) -> dict[str, np.ndarray]:
        """Run one input; the arrays returned are overwritten by the next call."""
        buffers = self._buffers or self.prepare(array.shape)
        buffers.use()
        host = buffers.host[self.inputs[0].name]
        if array is not host:
            np.copyto(host, array)
        if buffers.captured:
            buffers.replay()
        else:
            self._enqueue(buffers)
        buffers.synchronize()
        return {port.name: buffers.host[port.name] for port in self.outputs}

    def _enqueue(self, buffers: CudaBuffers) -> None:
        buffers.upload(self.inputs[0].name)
        if not self._context.execute_async_v3(buffers.stream):
            raise UserError(f'{self._path}: TensorRT could not run: {self._log.text()}. See '
                            '"nvidia-smi" for the state of the GPU.')
        for port in self.outputs:
            buffers.download(port.name)

    def close(self) -> None:
        """Free everything; the runner cannot run afterwards."""
        if self._buffers is not None:
            self._buffers.close()
        self._buffers = None
        self._context = self._engine = self._runtime = None
