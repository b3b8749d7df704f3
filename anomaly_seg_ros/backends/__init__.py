# SPDX-License-Identifier: Apache-2.0
"""Open a model file on a device.

A backend is a context manager that holds a device and a session; ``run`` takes the network's
input and gives labels and score at the network's own output size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.model_file import ModelCard, ModelFile


@dataclass(frozen=True)
class NetworkOutput:
    """What the network says about one frame.

    Attributes
    ----------
    labels
        uint8 (h, w), class ids.
    anomaly
        float32 (h, w), higher is more anomalous.

    """

    labels: np.ndarray
    anomaly: np.ndarray


class Backend(Protocol):
    """A model opened on a device; not safe for use by two threads at once."""

    name: str
    card: ModelCard

    def run(self, network_input: np.ndarray) -> NetworkOutput:
        """Run one frame: float32 (1, 3, h, w), or uint8 (H, W, 3) for a ``device`` model.

        The arrays returned stay valid until the next call.
        """
        ...

    def describe(self) -> Mapping[str, str]:
        """Tell what runs where, for reports and diagnostics."""
        ...

    def close(self) -> None:
        """Free the device."""
        ...

    def __enter__(self) -> 'Backend':
        """Return the backend itself."""
        ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        """Close."""
        ...


def _onnxruntime_cpu(model: ModelFile, **options: Any) -> Backend:
    from anomaly_seg_ros.backends.onnxruntime import OnnxRuntimeBackend
    return OnnxRuntimeBackend(model, provider='cpu', **options)


BACKENDS: dict[str, Callable[..., Backend]] = {
    'cpu': _onnxruntime_cpu,
}


def open_backend(model: ModelFile, name: str = 'cpu', **options: Any) -> Backend:
    """Open ``model`` on the backend called ``name``; an unknown name lists the choices.

    Raises
    ------
    UserError
        If the backend is unknown, not available, or the graph and the card disagree.

    """
    if name not in BACKENDS:
        raise UserError(f'unknown backend {name!r}; choose one of {", ".join(sorted(BACKENDS))}')
    return BACKENDS[name](model, **options)
