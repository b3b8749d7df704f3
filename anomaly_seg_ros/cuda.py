# SPDX-License-Identifier: Apache-2.0
"""
CUDA memory and one stream for a model's inputs and outputs, through NVIDIA's own cuda-bindings.

Host memory is pinned, so that copies run at the bus's full rate and asynchronously.
"""

from collections.abc import Callable, Sequence
import ctypes
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.ports import Port
import numpy as np


@dataclass(frozen=True)
class Gpu:
    """A CUDA device: its name, compute capability such as ``9.0``, and memory in bytes."""

    name: str
    compute_capability: str
    memory_bytes: int


def missing_cuda() -> str | None:
    """Tell why CUDA cannot be used here, or None where it can."""
    if find_spec('cuda') is None or find_spec('cuda.bindings') is None:
        return 'cuda-bindings is not installed (pip install cuda-bindings)'
    from cuda.bindings import runtime

    error, count = runtime.cudaGetDeviceCount()
    if int(error) != 0:
        return f'no CUDA GPU can be used ({error.name})'
    return None if count else 'no CUDA GPU'


def select_gpu(device: int) -> None:
    """
    Make a CUDA device the calling thread's: what is built, loaded or allocated next is on it.

    Raises
    ------
    UserError
        If there is no device with this index.

    """
    from cuda.bindings import runtime

    count = checked(runtime.cudaGetDeviceCount())
    if not 0 <= device < count:
        raise UserError(f'there is no CUDA device {device}: this machine has {count}, counted '
                        'from 0. Choose one of them.')
    checked(runtime.cudaSetDevice(device))


def describe_gpu(device: int = 0) -> Gpu:
    """Return what the CUDA device with this index is."""
    from cuda.bindings import runtime

    properties = checked(runtime.cudaGetDeviceProperties(device))
    return Gpu(properties.name.rstrip(b'\0').decode(), f'{properties.major}.{properties.minor}',
               int(properties.totalGlobalMem))


def checked(result: tuple[Any, ...]) -> Any:
    """Return the value of a call of the CUDA runtime, which gives (error, value...)."""
    error, *values = result
    if int(error) != 0:
        from cuda.bindings import runtime

        text = runtime.cudaGetErrorString(error)[1].decode()
        remedy = ('Free GPU memory (other processes, smaller input) and try again.'
                  if 'MemoryAllocation' in error.name else
                  'See "nvidia-smi" and the kernel log for the state of the GPU.')
        raise UserError(f'CUDA: {error.name}: {text}. {remedy}')
    return values[0] if len(values) == 1 else values


class CudaBuffers:
    """
    Pinned host arrays and device memory for the inputs and outputs of one model, on one stream.

    Attributes
    ----------
    host
        Pinned numpy array of each port, by name.
    address
        Device address of each port, by name.
    stream
        Address of the stream, which is not the default one.

    """

    def __init__(self, ports: Sequence[Port], device: int = 0) -> None:
        """Allocate everything once."""
        from cuda.bindings import runtime

        self._cuda = runtime
        self._device = device
        self._pinned: list[int] = []
        self._graph: Any = None
        self.host: dict[str, np.ndarray] = {}
        self.address: dict[str, int] = {}
        select_gpu(device)
        self._stream = checked(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking))
        self.stream = int(self._stream)
        try:
            for port in ports:
                self._allocate(port)
        except UserError:
            self.close()
            raise

    def _allocate(self, port: Port) -> None:
        like = port.empty()
        flags = self._cuda.cudaHostAllocDefault
        pinned = int(checked(self._cuda.cudaHostAlloc(like.nbytes, flags)))
        self._pinned.append(pinned)
        memory = memoryview((ctypes.c_uint8 * like.nbytes).from_address(pinned))
        self.host[port.name] = np.frombuffer(memory, like.dtype).reshape(like.shape)
        self.address[port.name] = int(checked(self._cuda.cudaMalloc(like.nbytes)))

    def upload(self, name: str) -> None:
        """Copy a port's host array to the device, in the stream's order."""
        array = self.host[name]
        checked(self._cuda.cudaMemcpyAsync(
            self.address[name], array.ctypes.data, array.nbytes,
            self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice, self._stream))

    def download(self, name: str) -> None:
        """Copy a port's device memory to its host array, in the stream's order."""
        array = self.host[name]
        checked(self._cuda.cudaMemcpyAsync(
            array.ctypes.data, self.address[name], array.nbytes,
            self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost, self._stream))

    def synchronize(self) -> None:
        """Wait until the stream has done everything."""
        checked(self._cuda.cudaStreamSynchronize(self._stream))

    def use(self) -> None:
        """Make the device current in the calling thread."""
        checked(self._cuda.cudaSetDevice(self._device))

    def capture(self, enqueue: Callable[[], None]) -> None:
        """Record what ``enqueue`` puts on the stream as the CUDA graph that ``replay`` runs."""
        self.forget_graph()
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        checked(self._cuda.cudaStreamBeginCapture(self._stream, mode))
        try:
            enqueue()
        finally:
            recorded = self._cuda.cudaStreamEndCapture(self._stream)
        graph = checked(recorded)
        self._graph = checked(self._cuda.cudaGraphInstantiate(graph, 0))
        checked(self._cuda.cudaGraphDestroy(graph))

    @property
    def captured(self) -> bool:
        """Whether there is a graph to replay."""
        return self._graph is not None

    def replay(self) -> None:
        """Put the captured graph on the stream."""
        checked(self._cuda.cudaGraphLaunch(self._graph, self._stream))

    def forget_graph(self) -> None:
        """Drop the captured graph."""
        if self._graph is not None:
            checked(self._cuda.cudaGraphExecDestroy(self._graph))
            self._graph = None

    def close(self) -> None:
        """Free everything; the host arrays must not be used afterwards."""
        self.forget_graph()
        for address in self.address.values():
            self._cuda.cudaFree(address)
        for address in self._pinned:
            self._cuda.cudaFreeHost(address)
        self.host, self.address, self._pinned = {}, {}, []
        if self.stream:
            self._cuda.cudaStreamDestroy(self._stream)
            self.stream = 0
