# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime on the CPU, and what its other execution providers share with it."""

from collections.abc import Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
import os
from pathlib import Path
from typing import Any

from anomaly_seg_ros.backends.base import Backend
from anomaly_seg_ros.backends.onnxruntime_pool import give_back, use_pool
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.model_file import ModelFile
from anomaly_seg_ros.ports import (
    check_input, check_ports, input_port, NetworkOutput, output_ports, Port)
import numpy as np

# Constants that are larger are computed in each run: where each block of a network has one, they
# would take more memory than everything else, and reading them as long as making them.
_LARGEST_CONSTANT_BYTES = 64 << 20
_CPU_INFO = Path('/proc/cpuinfo')
_DTYPES = {'tensor(float)': 'float32', 'tensor(float16)': 'float16', 'tensor(uint8)': 'uint8',
           'tensor(int64)': 'int64', 'tensor(int32)': 'int32', 'tensor(double)': 'float64'}


class OnnxRuntimeCpu(Backend):
    """ONNX Runtime's own CPU kernels. Outputs are written into the same arrays at every call."""

    name = 'cpu'

    @classmethod
    def unavailable(cls, model: ModelFile) -> str | None:
        """Tell whether onnxruntime is installed."""
        return None if find_spec('onnxruntime') else 'onnxruntime is not installed'

    def __init__(self, model: ModelFile, threads: int = 0, spinning: bool = False) -> None:
        """
        Open ``model``.

        Parameters
        ----------
        model
            A model file; its bytes are used, not what now lies at its path.
        threads
            Intra-op threads; 0 takes as many as this process may use cores.
        spinning
            Let idle worker threads spin. A little faster alone, much slower beside others.

        """
        self.card = model.card
        self._threads = threads or len(os.sched_getaffinity(0))
        options = session_options(self._threads)
        options.add_session_config_entry('session.intra_op.allow_spinning', str(int(spinning)))
        use_pool(options)
        if model.card.precision == 'int8':
            use_exact_int8(options)
        self._session = open_session(model, options, [('CPUExecutionProvider', {})])
        self._input = input_port(model.card)
        self._binding = self._session.io_binding()
        self._outputs = []
        for port in output_ports(model.card):
            array = port.empty()
            self._binding.bind_output(port.name, 'cpu', 0, array.dtype, array.shape,
                                      array.ctypes.data)
            self._outputs.append(array)

    def run(self, network_input: np.ndarray) -> NetworkOutput:
        """Run one frame; the arrays returned are overwritten by the next call."""
        check_input(network_input, self._input)
        self._binding.bind_cpu_input('image', np.ascontiguousarray(network_input))
        self._session.run_with_iobinding(self._binding)
        labels, anomaly = self._outputs
        return NetworkOutput(labels[0], anomaly[0])

    def describe(self) -> Mapping[str, str]:
        """Tell library, version, provider and threads."""
        import onnxruntime

        return {'backend': 'onnxruntime cpu', 'version': onnxruntime.__version__,
                'provider': self._session.get_providers()[0], 'threads': str(self._threads)}

    def close(self) -> None:
        """Free the session; the backend cannot run afterwards."""
        self._binding = self._session = None
        give_back()


def use_exact_int8(options: Any) -> None:
    """Let a session that computes in integers do so exactly on this processor."""
    if not adds_int8_exactly(_CPU_INFO):
        options.add_session_config_entry('session.x64quantprecision', '1')


def adds_int8_exactly(cpu_info: Path) -> bool:
    """
    Tell whether the processor adds products of uint8 and int8 in 32 bits.

    x86 without VNNI adds pairs of them in 16 bits, where they overflow in silence. ONNX Runtime
    then has another way, exact and at half the speed.
    """
    try:
        text = cpu_info.read_text(encoding='utf-8')
    except OSError:
        return False
    flags = {flag for line in text.splitlines() if line.startswith('flags')
             for flag in line.split()}
    return not flags or bool(flags & {'avx_vnni', 'avx512_vnni', 'amx_int8'})


def session_options(threads: int) -> Any:
    """Return session options with full graph optimisation and quiet logs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    options.add_session_config_entry('optimization.constant_folding_max_output_size_in_bytes',
                                     str(_LARGEST_CONSTANT_BYTES))
    return options


def installed_twice() -> str | None:
    """Tell the way out where the packages for CPU and for GPU lie in one another's files."""
    if not all(any(metadata.distributions(name=package))
               for package in ('onnxruntime', 'onnxruntime-gpu')):
        return None
    return ('onnxruntime and onnxruntime-gpu are both installed and share a folder, where one '
            'overwrites the other: "pip uninstall onnxruntime onnxruntime-gpu", then '
            '"pip install \'onnxruntime-gpu[cuda,cudnn]\'"')


def open_session(model: ModelFile, options: Any,
                 providers: Sequence[tuple[str, Mapping[str, str]]]) -> Any:
    """
    Return an InferenceSession whose every node runs on the providers asked for.

    Raises
    ------
    UserError
        If a provider is not in this build of onnxruntime or could not be loaded, if it left nodes
        to the CPU, or if graph and card disagree.

    """
    import onnxruntime

    version = onnxruntime.__version__
    wanted = providers[0][0]
    have = onnxruntime.get_available_providers()
    if wanted not in have:
        remedy = installed_twice() or ('Install the matching one: pip install onnxruntime-gpu '
                                       '(and uninstall onnxruntime)')
        raise UserError(f'onnxruntime {version} has no {wanted}, only {", ".join(have)}. '
                        f'{remedy}, or choose --backend cpu.')
    if wanted != 'CPUExecutionProvider':
        # Without this, operators that the provider lacks run on the CPU in silence.
        options.add_session_config_entry('session.disable_cpu_ep_fallback', '1')
    try:
        session = onnxruntime.InferenceSession(model.data, options, providers=list(providers),
                                               enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        text = ' '.join(str(error).split())
        if 'CPU EP' in text and wanted != 'CPUExecutionProvider':
            raise UserError(f'{model.path}: {wanted} cannot run every operator of this graph, and '
                            'running the rest on the CPU was not asked for. Choose --backend '
                            'cpu, export the model again, or update onnxruntime-gpu (this is '
                            f'{version}; operators of opset 20 need 1.25). onnxruntime says: '
                            f'{text}') from error
        remedy = ('Export the model again with this version' if wanted == 'CPUExecutionProvider'
                  else f'Install what {wanted} needs')
        raise UserError(f'{model.path}: onnxruntime {version} cannot open it on {wanted}: {text}. '
                        f'{remedy}, or choose --backend cpu.') from error
    if session.get_providers()[0] != wanted:
        raise UserError(f'{model.path}: asked for {wanted}, onnxruntime fell back to '
                        f'{", ".join(session.get_providers())}: the libraries of {wanted} could '
                        'not be loaded. Install the CUDA, cuDNN and TensorRT versions that '
                        f'onnxruntime {version} was built for.')
    check_ports(model, *([Port(x.name, _DTYPES.get(x.type, x.type), tuple(x.shape)) for x in ports]
                         for ports in (session.get_inputs(), session.get_outputs())))
    return session
