# SPDX-License-Identifier: Apache-2.0
"""A model with its device, opened and warm, as the worker holds it."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
import os
from pathlib import Path
import threading
from typing import Any

from anomaly_seg_ros.backends import Backend, open_backend
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.model_file import load_model_file, ModelCard, ModelFile
from anomaly_seg_ros.pipeline import BadOutput, Pipeline
from anomaly_seg_ros.resources import resource
from anomaly_seg_ros.ros.parameters import NodeParameters
import cv2

BUNDLED_MODEL = 'models/demo.onnx'
_MEANWHILE_S = 0.002


@dataclass(frozen=True)
class LoadedModel:
    """
    A warm pipeline and its backend.

    Attributes
    ----------
    pipeline, backend
        Closed together by ``close``.
    path
        The model file.
    requested
        The parameter ``model`` that named it.
    about
        Model and backend in words, for diagnostics.

    """

    pipeline: Pipeline
    backend: Backend
    path: Path
    requested: str
    about: Mapping[str, str]

    @property
    def card(self) -> ModelCard:
        """The model's card."""
        return self.pipeline.card

    def close(self) -> None:
        """Free the device."""
        self.backend.close()


def read_model(path: str) -> ModelFile:
    """
    Read the model file at ``path``, or the bundled one when ``path`` is empty.

    Raises
    ------
    UserError
        If it is missing, damaged or no model.

    """
    if not path:
        return load_model_file(resource(BUNDLED_MODEL))
    try:
        # A launch argument model:=~/net.onnx arrives as it is: the shell expands only words that
        # begin so.
        whole = Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f'{path}: {error} Give the whole path.') from error
    return load_model_file(whole)


def read_model_meanwhile(path: str, meanwhile: Callable[[], None],
                         go_on: Callable[[], bool]) -> ModelFile:
    """
    Read a model file on a thread of its own and call ``meanwhile`` again and again until it is.

    A large file, or storage that hangs, then does not stop what the caller's thread has to do.

    Raises
    ------
    UserError
        As ``read_model``, and if ``go_on`` says no before the file is read.

    """
    reading: Future[ModelFile] = Future()

    def read() -> None:
        try:
            reading.set_result(read_model(path))
        except BaseException as error:
            reading.set_exception(error)

    threading.Thread(target=read, name='anomaly_seg model reader', daemon=True).start()
    while not wait([reading], _MEANWHILE_S).done:
        if not go_on():
            raise UserError(f'{path}: the node ends before it is read')
        meanwhile()
    return reading.result()


def open_model(model: ModelFile, parameters: NodeParameters,
               frame_size_hw: tuple[int, int] | None = None) -> LoadedModel:
    """
    Open a model as the parameters say, check the settings against its card and warm it up.

    Parameters
    ----------
    model
        A model file that has been read.
    parameters
        The node's parameters.
    frame_size_hw
        Size of the camera's frames, if known already.

    Raises
    ------
    UserError
        If the backend cannot open it, the settings do not fit, or it gives no finite score.

    """
    cv2.setNumThreads(parameters.image_threads or len(os.sched_getaffinity(0)))
    settings = parameters.obstacle_settings(model.card)
    backend = open_backend(model, parameters.backend, **_options(parameters))
    try:
        pipeline = Pipeline(backend, settings)
        size_hw = frame_size_hw or (
            parameters.warm_up_size_hw if any(parameters.warm_up_size_hw) else None)
        pipeline.warm_up(size_hw)  # type: ignore[arg-type]
    except BadOutput as error:
        backend.close()
        raise UserError(f'{model.path}: {error} (a grey frame at warm-up). Export the model '
                        'again.') from error
    except BaseException:
        backend.close()
        raise
    return LoadedModel(pipeline, backend, model.path, parameters.model, _describe(model, backend))


def _describe(model: ModelFile, backend: Backend) -> dict[str, str]:
    card = model.card
    return {
        'name': card.name, 'path': str(model.path), 'sha256': model.sha256,
        'network': card.network, 'score': card.score, 'precision': card.precision,
        'input_size': f'{card.input_size_hw[0]}x{card.input_size_hw[1]}', **backend.describe()}


def _options(parameters: NodeParameters) -> dict[str, Any]:
    """Return what the chosen backend understands of the parameters."""
    if parameters.backend == 'auto' and (parameters.device or parameters.build_engine):
        raise UserError('backend auto looks at GPU 0 only and builds no engine: name the backend '
                        'to use device or build_engine')
    options: dict[str, Any] = {'threads': parameters.threads}
    if parameters.backend == 'cpu':
        options['spinning'] = parameters.spinning
    if parameters.backend in ('cuda', 'tensorrt', 'onnxruntime-tensorrt'):
        options['device'] = parameters.device
    if parameters.backend == 'tensorrt':
        options['build'] = parameters.build_engine
    return options
