# SPDX-License-Identifier: Apache-2.0
"""
A stand-in for ``cuda.bindings.runtime`` on machines without a GPU.

It has the names that the package uses and no others (a test compares them with the real module):
device memory is host memory, a stream runs everything at once, and a graph records calls.
"""

from collections import Counter
from collections.abc import Callable
import ctypes
from enum import IntEnum
from importlib.machinery import ModuleSpec
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class cudaStreamCaptureMode(IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


OK = cudaError_t.cudaSuccess


class FakeCuda:
    """State of the pretended GPU; its public methods that begin with ``cuda`` are the module."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.memory: dict[int, Any] = {}
        self.capacity = 1 << 40
        self.devices, self.device = 1, 0
        self.recording: list[Callable[[], None]] | None = None
        self.gpu = SimpleNamespace(name=b'Fake GPU\0\0', major=8, minor=7, totalGlobalMem=1 << 33)

    def enqueue(self, work: Callable[[], None]) -> None:
        """Do something in stream order: now, or as part of the graph that is being recorded."""
        if self.recording is None:
            work()
        else:
            self.recording.append(work)

    def _allocate(self, size: int) -> tuple[Any, ...]:
        if size + sum(map(ctypes.sizeof, self.memory.values())) > self.capacity:
            return cudaError_t.cudaErrorMemoryAllocation, None
        buffer = (ctypes.c_uint8 * size)()
        self.memory[ctypes.addressof(buffer)] = buffer
        return OK, ctypes.addressof(buffer)

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return OK, self.devices

    def cudaSetDevice(self, device: int) -> tuple[Any, ...]:
        self.device = device
        return (OK,)

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, ...]:
        return OK, self.gpu

    def cudaGetErrorString(self, error: int) -> tuple[Any, ...]:
        return OK, b'out of memory' if error == 2 else b'invalid argument'

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        self.calls['cudaMalloc'] += 1
        return self._allocate(size)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[Any, ...]:
        return self._allocate(size)

    def cudaFree(self, devPtr: int) -> tuple[Any, ...]:
        del self.memory[devPtr]
        return (OK,)

    def cudaFreeHost(self, ptr: int) -> tuple[Any, ...]:
        del self.memory[ptr]
        return (OK,)

    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: int,
                        stream: int) -> tuple[Any, ...]:
        self.calls['cudaMemcpyAsync'] += 1
        self.enqueue(lambda: ctypes.memmove(dst, src, count) and None)
        return (OK,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        return OK, 77

    def cudaStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        self.calls['cudaStreamDestroy'] += 1
        return (OK,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        return (OK,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[Any, ...]:
        self.recording = []
        return (OK,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        self.calls['capture'] += 1
        recorded, self.recording = self.recording, None
        return OK, recorded

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any, ...]:
        return OK, list(graph)

    def cudaGraphLaunch(self, graphExec: Any, stream: int) -> tuple[Any, ...]:
        self.calls['cudaGraphLaunch'] += 1
        for work in graphExec:
            work()
        return (OK,)

    def cudaGraphExecDestroy(self, graphExec: Any) -> tuple[Any, ...]:
        return (OK,)

    def cudaGraphDestroy(self, graph: Any) -> tuple[Any, ...]:
        return (OK,)


def module(name: str, **contents: Any) -> ModuleType:
    """Return a module that ``find_spec`` finds once it is in ``sys.modules``."""
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    vars(made).update(contents)
    return made


def install(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Make ``cuda.bindings.runtime`` importable for one test, and return its state."""
    fake = FakeCuda()
    functions = {name: getattr(fake, name) for name in dir(fake) if name.startswith('cuda')}
    runtime = module('cuda.bindings.runtime', cudaMemcpyKind=cudaMemcpyKind,
                     cudaError_t=cudaError_t, cudaStreamCaptureMode=cudaStreamCaptureMode,
                     cudaStreamNonBlocking=1, cudaHostAllocDefault=0, **functions)
    bindings = module('cuda.bindings', runtime=runtime)
    for made in (module('cuda', bindings=bindings), bindings, runtime):
        monkeypatch.setitem(sys.modules, made.__name__, made)
    return fake
