# SPDX-License-Identifier: Apache-2.0
"""
A stand-in for ``tensorrt`` on machines without a GPU.

It has the names that the package uses and no others (a test compares them with the real bindings
of TensorRT 10 and 11). A "plan" is JSON; an "engine" computes the identity network of ``cards``.
"""

from collections.abc import Sequence
import ctypes
from dataclasses import dataclass, field
from enum import Enum, IntEnum
import json
import sys
from typing import Any

from fake_cuda import FakeCuda, module
import numpy as np
import pytest


class Severity(IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2


class ILogger:
    INTERNAL_ERROR, ERROR = Severity.INTERNAL_ERROR, Severity.ERROR


class IProgressMonitor:
    pass


class NetworkDefinitionCreationFlag(IntEnum):
    STRONGLY_TYPED = 1


class BuilderFlag(Enum):
    TF32 = 'TF32'


class MemoryPoolType(Enum):
    WORKSPACE = 'WORKSPACE'


class HardwareCompatibilityLevel(Enum):
    NONE = 'NONE'
    AMPERE_PLUS = 'AMPERE_PLUS'
    SAME_COMPUTE_CAPABILITY = 'SAME_COMPUTE_CAPABILITY'


class ProfilingVerbosity(Enum):
    DETAILED = 'DETAILED'


class LayerInformationFormat(Enum):
    JSON = 'JSON'


class TensorIOMode(Enum):
    INPUT = 'INPUT'
    OUTPUT = 'OUTPUT'


class DataType(Enum):
    FLOAT = 1
    UINT8 = 2


@dataclass
class State:
    """What the pretended TensorRT does, and what it was told."""

    cuda: FakeCuda
    build_error: str | None = None
    load_error: str | None = None
    refuse_graph: str | None = None
    no_context: bool = False
    layer_format: str | None = None
    more_layers: tuple[dict[str, Any], ...] = ()
    seen: dict[str, Any] = field(default_factory=dict)


def make(state: State) -> dict[str, Any]:
    """Return the module's classes, bound to ``state``."""
    class INetworkDefinition:
        def __init__(self) -> None:
            self.model: Any = None

    class IHostMemory(bytes):
        pass

    class ITimingCache:
        def serialize(self) -> IHostMemory:
            return IHostMemory(b'timing cache, longer')

    class IBuilderConfig:
        progress_monitor: Any = None
        profiling_verbosity: Any = None
        hardware_compatibility_level: Any = None
        builder_optimization_level = 3

        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            state.seen['workspace'] = pool_size

        def clear_flag(self, flag: Any) -> None:
            state.seen['cleared'] = flag

        def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache | None:
            good = serialized_timing_cache.startswith(b'timing cache')
            return ITimingCache() if good or not serialized_timing_cache else None

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            state.seen['timing_cache'] = not ignore_mismatch
            return True

    class Builder:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def create_network(self, flags: int = 0) -> INetworkDefinition:
            state.seen['flags'] = flags
            return INetworkDefinition()

        def create_builder_config(self) -> IBuilderConfig:
            return IBuilderConfig()

        def build_serialized_network(self, network: Any, config: Any) -> IHostMemory | None:
            state.seen['config'] = config
            state.seen['built on'] = state.cuda.device
            if state.build_error is not None:
                self.logger.log(Severity.ERROR, state.build_error)
                return None
            monitor = config.progress_monitor
            if monitor is not None:
                monitor.phase_start('Building Engine', None, 2)
                for step in range(2):
                    assert monitor.step_complete('Building Engine', step)
                monitor.phase_finish('Building Engine')
            graph = network.model.graph
            half = any(x.data_type == 10 for x in graph.initializer)
            kind = state.layer_format or ('Half' if half else 'Row major linear FP32')
            ports = {value.name: [[d.dim_value for d in value.type.tensor_type.shape.dim],
                                  value.type.tensor_type.elem_type, mode]
                     for mode, values in (('INPUT', graph.input), ('OUTPUT', graph.output))
                     for value in values}
            layers = [{'Name': 'conv', 'LayerType': 'CaskConvolution',
                       'Inputs': [{'Name': 'x', 'Format/Datatype': kind}]},
                      {'Name': 'cast', 'LayerType': 'Reformat',
                       'Inputs': [{'Name': 'y', 'Format/Datatype': 'Row major linear FP32'}]},
                      *state.more_layers]
            return IHostMemory(json.dumps({'ports': ports, 'layers': layers}).encode())

    class ParserError:
        def __str__(self) -> str:
            return str(state.refuse_graph)

    class OnnxParser:
        def __init__(self, network: INetworkDefinition, logger: Any) -> None:
            self.network = network
            self.num_errors = 1

        def parse(self, model: bytes, path: str | None = None) -> bool:
            import onnx
            self.network.model = state.seen['parsed'] = onnx.load_from_string(model)
            return state.refuse_graph is None

        def get_error(self, index: int) -> ParserError:
            return ParserError()

    class EngineInspector:
        def __init__(self, plan: Any) -> None:
            self.plan = plan

        def get_engine_information(self, how: Any) -> str:
            return json.dumps({'Layers': self.plan['layers'],
                               'Bindings': list(self.plan['ports'])})

    class IExecutionContext:
        def __init__(self, engine: 'ICudaEngine') -> None:
            self.engine = engine
            self.shape: tuple[int, ...] = ()
            self.addresses: dict[str, int] = {}

        def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
            self.shape = tuple(shape)
            return self.shape == self.engine.get_tensor_shape(name)

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return self.shape if name == 'image' else (1, *self.shape[2:])

        def set_tensor_address(self, name: str, memory: int) -> bool:
            self.addresses[name] = memory
            return True

        def execute_async_v3(self, stream_handle: int) -> bool:
            assert stream_handle == 77
            state.seen['executed'] = state.seen.get('executed', 0) + 1
            state.cuda.enqueue(lambda: self._compute(dict(self.addresses), self.shape))
            return state.seen.get('run_error') is None

        def _compute(self, addresses: dict[str, int], shape: tuple[int, ...]) -> None:
            def array(name: str, dims: Sequence[int], dtype: type) -> np.ndarray:
                count = int(np.prod(dims))
                memory = (ctypes.c_uint8 * (count * np.dtype(dtype).itemsize)).from_address(
                    addresses[name])
                return np.frombuffer(memory, dtype).reshape(dims)
            image = array('image', shape, np.float32)
            array('labels', shape[2:], np.uint8)[:] = image[0].argmax(0)
            array('anomaly', shape[2:], np.float32)[:] = -image[0].max(0)

    class ICudaEngine:
        def __init__(self, plan: Any) -> None:
            self.plan = plan
            self.num_io_tensors = len(plan['ports'])

        def create_execution_context(self) -> IExecutionContext | None:
            return None if state.no_context else IExecutionContext(self)

        def create_engine_inspector(self) -> EngineInspector:
            return EngineInspector(self.plan)

        def get_tensor_name(self, index: int) -> str:
            return list(self.plan['ports'])[index]

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return tuple(self.plan['ports'][name][0])

        def get_tensor_dtype(self, name: str) -> DataType:
            return DataType(self.plan['ports'][name][1])

        def get_tensor_mode(self, name: str) -> TensorIOMode:
            return TensorIOMode(self.plan['ports'][name][2])

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
            state.seen['loaded on'] = state.cuda.device
            if state.load_error is not None:
                self.logger.log(Severity.ERROR, state.load_error)
                return None
            return ICudaEngine(json.loads(serialized_engine))

    return {name: value for name, value in locals().items() if isinstance(value, type)}


ENUMS = (NetworkDefinitionCreationFlag, BuilderFlag, MemoryPoolType, HardwareCompatibilityLevel,
         ProfilingVerbosity, LayerInformationFormat, TensorIOMode, DataType)


def install(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda, version: str = '10.16.1.11') -> State:
    """Make ``tensorrt`` importable for one test, and return its state."""
    state = State(cuda)
    contents = {**make(state), **{enum.__name__: enum for enum in ENUMS}}
    monkeypatch.setitem(sys.modules, 'tensorrt', module(
        'tensorrt', __version__=version, ILogger=ILogger, IProgressMonitor=IProgressMonitor,
        **contents))
    return state
