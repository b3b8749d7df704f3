# SPDX-License-Identifier: Apache-2.0
"""
Open a model file on a device.

A backend is a context manager that holds a device and a session; ``run`` takes the network's
input and gives labels and score at the network's own output size. A new one is a file with a class
and a line in ``BACKENDS``.
"""

import logging
from typing import Any

from anomaly_seg_ros.backends.base import Backend
from anomaly_seg_ros.backends.onnxruntime import OnnxRuntimeCpu
from anomaly_seg_ros.backends.onnxruntime_gpu import OnnxRuntimeCuda, OnnxRuntimeTensorrt
from anomaly_seg_ros.backends.openvino import OpenvinoBackend
from anomaly_seg_ros.backends.tensorrt import TensorrtBackend
from anomaly_seg_ros.backends.torch import TorchBackend
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.model_file import ModelFile
from anomaly_seg_ros.ports import NetworkOutput

__all__ = ['available_backends', 'Backend', 'BACKENDS', 'NetworkOutput', 'open_backend']

BACKENDS: dict[str, type[Backend]] = {
    'cpu': OnnxRuntimeCpu,
    'cuda': OnnxRuntimeCuda,
    'onnxruntime-tensorrt': OnnxRuntimeTensorrt,
    'openvino': OpenvinoBackend,
    'tensorrt': TensorrtBackend,
    'torch': TorchBackend,
}

# What "auto" tries, fastest first. ONNX Runtime's TensorRT provider is left out, because it builds
# for minutes when it is first opened; "torch" because it needs the weights.
AUTO_ORDER = ('tensorrt', 'cuda', 'openvino', 'cpu')


def open_backend(model: ModelFile, name: str = 'cpu', **options: Any) -> Backend:
    """
    Open ``model`` on the backend called ``name``; an unknown name lists the choices.

    ``auto`` takes the fastest that is available and opens, in the order of ``AUTO_ORDER``, and
    logs which it is and why not a faster one: as a warning where that is here but failed to open.

    Parameters
    ----------
    model
        A loaded model file.
    name
        A key of ``BACKENDS``, or ``auto``.
    options
        Of the backend's class; ``threads`` is understood by all.

    Raises
    ------
    UserError
        If the backend is unknown, not available, gives less than was asked for, or the graph and
        the card disagree.

    """
    if name == 'auto' and model.path.suffix == '.engine':
        name = 'tensorrt'
    if name == 'auto':
        return _open_fastest(model, options)
    if name not in BACKENDS:
        raise UserError(f'unknown backend {name!r}; choose one of '
                        f'{", ".join(["auto", *sorted(BACKENDS)])}')
    if model.path.suffix == '.engine' and name != 'tensorrt':
        raise UserError(f'{model.path}: a TensorRT engine runs on the backend tensorrt only, not '
                        f'on {name}. Give the .onnx that it was built from, or choose --backend '
                        'tensorrt.')
    return BACKENDS[name](model, **options)


def available_backends(model: ModelFile) -> dict[str, str | None]:
    """Return for every backend None where it can run ``model`` here, else the reason."""
    return {name: backend.unavailable(model) for name, backend in BACKENDS.items()}


def _open_fastest(model: ModelFile, options: dict[str, Any]) -> Backend:
    log = logging.getLogger(__name__)
    reasons: list[str] = []
    level = logging.INFO
    for name in AUTO_ORDER:
        reason = BACKENDS[name].unavailable(model)
        if reason is None:
            try:
                backend = BACKENDS[name](model, **options)
            except UserError as error:
                reason, level = str(error), logging.WARNING
            else:
                log.log(level, 'backend auto: %s%s', name, f' (not {"; not ".join(reasons)})'
                        if reasons else '')
                return backend
        reasons.append(f'{name}: {reason}')
    raise UserError(f'{model.path}: no backend can run it here: {"; ".join(reasons)}')
