# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime."""

from collections.abc import Mapping
import os
from types import TracebackType

import numpy as np

from anomaly_seg_ros.backends import NetworkOutput
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.model_file import ModelFile

_PROVIDERS = {'cpu': 'CPUExecutionProvider'}


class OnnxRuntimeBackend:
    """A session of ONNX Runtime on one execution provider.

    Attributes
    ----------
    name
        ``cpu``.
    card
        The model's card.

    """

    def __init__(self, model: ModelFile, provider: str = 'cpu', threads: int = 0,
                 spinning: bool = False) -> None:
        """Open ``model``.

        Parameters
        ----------
        model
            A model file; its bytes are used, not what now lies at its path.
        provider
            Which execution provider: ``cpu``.
        threads
            Intra-op threads; 0 takes as many as this process may use cores.
        spinning
            Let idle worker threads spin. A little faster alone, much slower beside others.

        """
        import onnxruntime

        self.name = provider
        self.card = model.card
        self._threads = threads or len(os.sched_getaffinity(0))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.add_session_config_entry('session.intra_op.allow_spinning', str(int(spinning)))
        options.log_severity_level = 3
        wanted = _PROVIDERS[provider]
        try:
            session = onnxruntime.InferenceSession(model.data, options, providers=[wanted])
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            raise UserError(f'{model.path}: ONNX Runtime {onnxruntime.__version__} cannot open '
                            f'it: {error}. Export the model again with this version.') from error
        if session.get_providers()[0] != wanted:
            raise UserError(f'{model.path}: asked for {wanted}, ONNX Runtime fell back to '
                            f'{session.get_providers()}. Install the matching onnxruntime.')
        self._session = session
        self._version = onnxruntime.__version__
        check_graph(model, [(x.name, x.type, x.shape) for x in session.get_inputs()],
                    [(x.name, x.type, x.shape) for x in session.get_outputs()])

    def run(self, network_input: np.ndarray) -> NetworkOutput:
        """Run one frame: float32 (1, 3, h, w)."""
        labels, anomaly = self._session.run(['labels', 'anomaly'], {'image': network_input})
        return NetworkOutput(labels[0], anomaly[0])

    def describe(self) -> Mapping[str, str]:
        """Tell library, version, provider and threads."""
        return {'backend': f'onnxruntime {self.name}', 'version': self._version,
                'provider': self._session.get_providers()[0], 'threads': str(self._threads)}

    def close(self) -> None:
        """Free the session; the backend cannot run afterwards."""
        self._session = None

    def __enter__(self) -> 'OnnxRuntimeBackend':
        """Return the backend itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        """Close."""
        self.close()


def check_graph(model: ModelFile, inputs: list[tuple[str, str, list[object]]],
                outputs: list[tuple[str, str, list[object]]]) -> None:
    """Raise UserError unless the graph's inputs and outputs are those that the card promises."""
    card = model.card
    if card.input_variant == 'host':
        image = ('image', 'tensor(float)', [1, 3, *card.input_size_hw])
    else:
        frame_hw = card.frame_size_hw or ()
        image = ('image', 'tensor(uint8)', [*frame_hw, 3])
    expected = {'inputs': [image],
                'outputs': [('labels', 'tensor(uint8)', [1, *card.output_size_hw]),
                            ('anomaly', 'tensor(float)', [1, *card.output_size_hw])]}
    for what, got in (('inputs', inputs), ('outputs', outputs)):
        if sorted(map(str, got)) != sorted(map(str, expected[what])):
            raise UserError(f'{model.path}: card and graph disagree: by the card the {what} are '
                            f'{expected[what]}, in the graph {got}. Export the model again.')
