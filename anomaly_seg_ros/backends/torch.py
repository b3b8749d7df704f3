# SPDX-License-Identifier: Apache-2.0
"""
PyTorch: the reference that the other backends are compared with.

The graph is built from the card and the weights again, by the code that exported it; the weights
are those whose SHA-256 the card holds, or it is refused.
"""

from collections.abc import Mapping
from importlib.util import find_spec
import logging
import os
from pathlib import Path
from typing import Any

from anomaly_seg_ros.backends.base import Backend
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.model_file import ModelFile
from anomaly_seg_ros.ports import check_input, input_port, NetworkOutput
import numpy as np


class TorchBackend(Backend):
    """A network in PyTorch, on the CPU or, as a captured CUDA graph, on a GPU."""

    name = 'torch'

    @classmethod
    def unavailable(cls, model: ModelFile) -> str | None:
        """Tell whether torch, the network and its weights are here."""
        if find_spec('torch') is None:
            return 'torch is not installed (the extra "export")'
        from anomaly_seg_ros.networks import NETWORKS

        if model.card.network not in NETWORKS:
            return f'{model.card.network!r} is not one of the networks that can be built again'
        weights = default_weights(model)
        return None if weights.exists() else (f'it needs the weights, which are not at {weights}; '
                                              'give the backend\'s option "weights"')

    def __init__(self, model: ModelFile, threads: int = 0, weights: Path | str | None = None,
                 device: str = 'cpu', cuda_graph: bool = True) -> None:
        """
        Build the network again.

        Parameters
        ----------
        model
            A model file; only its card is used.
        threads
            CPU threads; 0 takes as many as this process may use cores.
        weights
            File, folder or model id; by default what the card names, beside the model.
        device
            ``cpu`` or ``cuda``.
        cuda_graph
            Capture the graph on CUDA once and replay it.

        """
        reason = self.unavailable(model)
        if reason is not None and not (weights and 'weights' in reason):
            raise UserError(f'{model.path}: backend torch: {reason}')
        from anomaly_seg_ros.networks import load_network
        from anomaly_seg_ros.reference import build_module
        import torch

        if device not in ('cpu', 'cuda'):
            raise ValueError(f'device must be cpu or cuda, got {device!r}')
        if device == 'cuda' and not torch.cuda.is_available():
            raise UserError(f'backend torch: this PyTorch ({torch.__version__}) finds no CUDA '
                            'GPU. Choose device cpu, or install a CUDA build.')
        if model.card.precision == 'int8':
            raise UserError(f'{model.path}: PyTorch has no graph for int8; the reference of an '
                            'int8 model is its float32 one.')
        self.card = model.card
        network = load_network(model.card.network, weights or default_weights(model),
                               model.card.input_size_hw)
        if network.weights_sha256 != model.card.weights_sha256:
            raise UserError(f'{weights or default_weights(model)}: not the weights of '
                            f'{model.path} (SHA-256 {network.weights_sha256[:12]}, the card says '
                            f'{model.card.weights_sha256[:12]}, from '
                            f'{model.card.weights_source}). Give that file.')
        self._threads = threads or len(os.sched_getaffinity(0))
        torch.set_num_threads(self._threads)
        # float32 means float32: torch lets convolutions use TF32 by default.
        torch.backends.cudnn.allow_tf32 = False
        self._torch = torch
        self._device = device
        self._module = build_module(network, model.card).to(device)
        self._input = input_port(model.card)
        self._graph: Any = None
        if device == 'cuda':
            self._prepare_cuda(cuda_graph)

    def _prepare_cuda(self, cuda_graph: bool) -> None:
        torch = self._torch
        dtype = getattr(torch, self._input.dtype)
        host = torch.empty(self._input.shape, dtype=dtype, pin_memory=True)
        self._host, self.input_buffer = host, host.numpy()
        self._static = torch.zeros(self._input.shape, dtype=dtype, device='cuda')
        stream = torch.cuda.Stream()
        with torch.inference_mode(), torch.cuda.stream(stream):
            for _ in range(3):  # cuDNN chooses its algorithms
                self._answer = self._module(self._static)
        stream.synchronize()
        self._results = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
                         for x in self._answer]
        if cuda_graph:
            self._capture()

    def _capture(self) -> None:
        torch = self._torch
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.inference_mode(), torch.cuda.graph(graph):
                self._answer = self._module(self._static)
        except RuntimeError as error:  # some networks make tensors on the CPU while they run
            logging.getLogger(__name__).warning(
                'backend torch: %s was not captured as a CUDA graph and runs without, slower: %s',
                self.card.network, ' '.join(str(error).split())[:300])
        else:
            self._graph = graph

    def run(self, network_input: np.ndarray) -> NetworkOutput:
        """Run one frame."""
        check_input(network_input, self._input)
        with self._torch.inference_mode():
            if self._device == 'cpu':
                labels, anomaly = self._module(
                    self._torch.from_numpy(np.ascontiguousarray(network_input)))
            else:
                labels, anomaly = self._run_cuda(network_input)
        return NetworkOutput(labels[0].numpy(), anomaly[0].numpy())

    def _run_cuda(self, network_input: np.ndarray) -> list[Any]:
        if network_input is not self.input_buffer:
            np.copyto(self._host.numpy(), network_input)
        self._static.copy_(self._host, non_blocking=True)
        if self._graph is not None:
            self._graph.replay()
        else:
            self._answer = self._module(self._static)
        for result, answer in zip(self._results, self._answer, strict=True):
            result.copy_(answer, non_blocking=True)
        self._torch.cuda.current_stream().synchronize()
        return self._results

    def describe(self) -> Mapping[str, str]:
        """Tell version, device and threads."""
        where = self._torch.cuda.get_device_name() if self._device == 'cuda' else 'cpu'
        return {'backend': f'torch {self._device}', 'version': self._torch.__version__,
                'device': where, 'cuda_graph': str(self._graph is not None),
                'threads': str(self._threads)}

    def close(self) -> None:
        """Free the network; the backend cannot run afterwards."""
        self._graph = self._module = self._static = self._answer = None
        self._host = self.input_buffer = None
        self._results = []


def default_weights(model: ModelFile) -> Path:
    """Return where the weights of a model are looked for: beside it, by the card's name."""
    return model.path.parent / Path(model.card.weights_source).name
