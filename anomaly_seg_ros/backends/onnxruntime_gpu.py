# SPDX-License-Identifier: Apache-2.0
"""
ONNX Runtime on an NVIDIA GPU: its CUDA and its TensorRT provider.

Inputs and outputs are bound to fixed device memory, so that the whole graph is captured once as a
CUDA graph and replayed. Needs onnxruntime-gpu with the CUDA and cuDNN it was built for.
"""

from collections.abc import Mapping
from importlib.util import find_spec
import os
from pathlib import Path

from anomaly_seg_ros.backends.base import Backend
from anomaly_seg_ros.backends.onnxruntime import installed_twice, open_session, session_options
from anomaly_seg_ros.cuda import CudaBuffers, describe_gpu, missing_cuda, select_gpu
from anomaly_seg_ros.engine import refuse_cpu_int8
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.model_file import ModelFile
from anomaly_seg_ros.ports import check_input, input_port, NetworkOutput, output_ports
import numpy as np

_CUDA = 'CUDAExecutionProvider'
_TENSORRT = 'TensorrtExecutionProvider'
_FATAL = 4


class OnnxRuntimeCuda(Backend):
    """ONNX Runtime's CUDA provider. TF32 is off, unless it was asked for."""

    name = 'cuda'
    _provider = _CUDA

    @classmethod
    def unavailable(cls, model: ModelFile) -> str | None:
        """Tell whether this onnxruntime has the provider and there is a GPU."""
        if find_spec('onnxruntime') is None:
            return 'onnxruntime-gpu is not installed'
        import onnxruntime

        if cls._provider not in onnxruntime.get_available_providers():
            missing = f'onnxruntime {onnxruntime.__version__} has no {cls._provider}'
            twice = installed_twice()
            return f'{missing}; {twice}' if twice else missing
        return missing_cuda()

    def __init__(self, model: ModelFile, threads: int = 0, device: int = 0, tf32: bool = False,
                 cuda_graph: bool = True, cache: Path | None = None) -> None:
        """
        Open ``model``.

        Parameters
        ----------
        model
            A model file.
        threads
            CPU threads; a GPU needs one, which 0 means.
        device
            Index of the CUDA device.
        tf32
            Let float32 convolutions compute with 10-bit mantissas. Faster, and no longer float32.
        cuda_graph
            Capture the graph once and replay it: less time on the CPU at each frame.
        cache
            Folder for what the TensorRT provider builds; by default in the user's cache.

        """
        import onnxruntime

        reason = self.unavailable(model)
        if reason is not None:
            raise UserError(f'backend {self.name}: {reason}. It needs the extra "cuda" and an '
                            'NVIDIA GPU; or choose --backend cpu.')
        # cuDNN's heuristics try plans that do not exist, and ONNX Runtime logs each of them as an
        # error, dozens for a model; what does fail is raised.
        onnxruntime.set_default_logger_severity(_FATAL)
        if hasattr(onnxruntime, 'preload_dlls'):
            onnxruntime.preload_dlls()  # CUDA and cuDNN from pip's nvidia packages
        self.card = model.card
        self._input, self._outputs = input_port(model.card), output_ports(model.card)
        if self._provider == _TENSORRT:
            refuse_cpu_int8(model)
        select_gpu(device)
        self._gpu = describe_gpu(device)
        self._buffers = CudaBuffers([self._input, *self._outputs], device)
        self.input_buffer = self._buffers.host['image']
        try:
            self._open(model, threads, device, tf32, cuda_graph, cache)
        except BaseException:
            self.close()
            raise

    def _open(self, model: ModelFile, threads: int, device: int, tf32: bool, cuda_graph: bool,
              cache: Path | None) -> None:
        common = {'device_id': str(device), 'user_compute_stream': str(self._buffers.stream)}
        cuda = {**common, 'use_tf32': str(int(tf32)), 'enable_cuda_graph': str(int(
            cuda_graph and self._provider == _CUDA)),
            # In float16 a third faster than the exhaustive search, which tries cuDNN's older
            # kernels only; as fast in float32 (docs/backends.md).
            'cudnn_conv_algo_search': 'HEURISTIC'}
        providers = [(_CUDA, cuda)]
        if self._provider == _TENSORRT:
            providers.insert(0, (_TENSORRT, {
                **common, **tensorrt_options(model, cache or cache_folder(), cuda_graph)}))
        options = session_options(threads or 1)
        options.add_session_config_entry('session.record_ep_graph_assignment_info', '1')
        self._session = open_session(model, options, providers)
        self._placement = placement(self._session)
        if self._placement and self._provider not in self._placement:
            raise UserError(f'{model.path}: {self._provider} took none of the operators, all run '
                            f'on {", ".join(self._placement)}. Choose --backend cuda, or install '
                            'the TensorRT that this onnxruntime was built for.')
        self._binding = self._session.io_binding()
        bind = self._binding.bind_input
        for port in (self._input, *self._outputs):
            bind(port.name, 'cuda', device, np.dtype(port.dtype), port.shape,
                 self._buffers.address[port.name])
            bind = self._binding.bind_output

    def run(self, network_input: np.ndarray) -> NetworkOutput:
        """Run one frame; the arrays returned are pinned and overwritten by the next call."""
        check_input(network_input, self._input)
        buffers = self._buffers
        buffers.use()
        if network_input is not self.input_buffer:
            np.copyto(buffers.host['image'], network_input)
        buffers.upload('image')
        self._session.run_with_iobinding(self._binding)
        for port in self._outputs:
            buffers.download(port.name)
        buffers.synchronize()
        return NetworkOutput(buffers.host['labels'][0], buffers.host['anomaly'][0])

    def describe(self) -> Mapping[str, str]:
        """Tell library, version, GPU, and how many nodes run on which provider."""
        import onnxruntime

        return {'backend': f'onnxruntime {self.name}', 'version': onnxruntime.__version__,
                'device': self._gpu.name,
                'provider': ', '.join(f'{name} ({count} nodes)' if count else name for name, count
                                      in (self._placement or {self._provider: 0}).items())}

    def close(self) -> None:
        """Free session and memory; the backend cannot run afterwards."""
        self._binding = self._session = None
        self.input_buffer = None
        self._buffers.close()


class OnnxRuntimeTensorrt(OnnxRuntimeCuda):
    """ONNX Runtime's TensorRT provider; engines are kept in the user's cache folder."""

    name = 'onnxruntime-tensorrt'
    _provider = _TENSORRT


def tensorrt_options(model: ModelFile, cache: Path, cuda_graph: bool) -> dict[str, str]:
    """
    Return the options of the TensorRT provider for a model of this precision.

    Each model has a folder of its own: the provider tells engines apart by names of tensors only.
    """
    if not model.sha256:
        raise ValueError(f'{model.path}: a model without its SHA-256 has no engine cache')
    folder = cache / model.sha256[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'{folder}: the engine cache cannot be made ({error.strerror}). Free disk '
                        'space or set XDG_CACHE_HOME to a writable folder.') from error
    return {'trt_fp16_enable': str(int(model.card.precision == 'fp16')),
            'trt_int8_enable': str(int(model.card.precision == 'int8')),
            'trt_engine_cache_enable': '1', 'trt_engine_cache_path': str(folder),
            'trt_timing_cache_enable': '1', 'trt_timing_cache_path': str(folder),
            'trt_cuda_graph_enable': str(int(cuda_graph))}


def cache_folder() -> Path:
    """Return the user's cache folder for built engines."""
    base = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    return Path(base) / 'anomaly_seg_ros'


def placement(session: object) -> dict[str, int]:
    """Return how many nodes each provider runs; empty where onnxruntime is too old to tell."""
    if not hasattr(session, 'get_provider_graph_assignment_info'):
        return {}
    counts: dict[str, int] = {}
    for part in session.get_provider_graph_assignment_info():
        counts[part.ep_name] = counts.get(part.ep_name, 0) + len(part.get_nodes())
    return counts
