# SPDX-License-Identifier: Apache-2.0
"""Network + score -> one ONNX file with a card, kept only if it agrees with PyTorch."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
import logging
from pathlib import Path
import platform
import time
from typing import Any, TYPE_CHECKING

import cv2
import numpy as np

from anomaly_seg_ros import __version__
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.files import atomic_write_bytes
from anomaly_seg_ros.fused import fuse
from anomaly_seg_ros.model_file import ModelCard, ModelFile, seal_model
from anomaly_seg_ros.networks import load_network, LoadedNetwork
from anomaly_seg_ros.preprocess import Preprocessor
from anomaly_seg_ros.scores import score_function

if TYPE_CHECKING:
    from torch import nn, Tensor

OPSET = 20

# A kept file differs from float32 PyTorch by no more than this. The score limit is relative to
# the larger of 1 and the score's range over the check frames; labels may differ where two classes
# tie to rounding.
MAX_SCORE_ERROR = {'fp32': 1e-4}
MAX_LABEL_MISMATCH = {'fp32': 1e-4}


@dataclass(frozen=True)
class ExportRequest:
    """What to export.

    Attributes
    ----------
    network, weights
        Name of the network and file of its weights.
    score, temperature
        Anomaly score to fuse in, and the temperature that divides the logits.
    input_size_hw
        Height and width at which the network runs.
    precision
        ``fp32``.
    threshold
        Decision threshold on the score; None takes a provisional one from the check frames.
    name
        Name of the model for people; default: network and score.

    """

    network: str
    weights: Path
    score: str = 'max_logit'
    input_size_hw: tuple[int, int] = (512, 1024)
    temperature: float = 1.0
    precision: str = 'fp32'
    threshold: float | None = None
    score_range: tuple[float, float] | None = None
    name: str | None = None


def export_model(request: ExportRequest, output: Path | str,
                 frames: Iterable[np.ndarray] | None = None) -> ModelCard:
    """Export a network with its score to ``output`` and return its card.

    Parameters
    ----------
    request
        What to export.
    output
        The ``.onnx`` file to write; written only after the parity check has passed.
    frames
        Images uint8 (H, W, 3), RGB, on which the file is compared with PyTorch and from which a
        provisional threshold is taken; default: frames of the synthetic world.

    Raises
    ------
    UserError
        If weights, score or size do not fit, or the exported graph differs from PyTorch by more
        than the limits.

    """
    import torch

    started = time.perf_counter()
    if request.precision not in MAX_SCORE_ERROR:
        raise UserError(f'unknown precision {request.precision!r}; choose one of '
                        f'{", ".join(MAX_SCORE_ERROR)}')
    try:
        score_function(request.score)
    except ValueError as error:
        raise UserError(str(error)) from error
    network = load_network(request.network, request.weights)
    check_size(request.input_size_hw, network)
    fused = fuse(network, request.score, request.temperature)
    card = _draft_card(request, network)
    inputs = [Preprocessor(card)(frame).copy()
              for frame in (check_frames() if frames is None else frames)]
    if not inputs:
        raise UserError('no frames to check the export on; give at least one image')
    with torch.inference_mode():
        reference = [fused(torch.from_numpy(x)) for x in inputs]
    graph = to_onnx(fused, torch.from_numpy(inputs[0]))
    scores = np.concatenate([s.numpy().ravel() for _, s in reference])
    card = replace(
        card, output_size_hw=tuple(reference[0][1].shape[1:]),
        **_threshold_and_range(request, scores),
        provenance={
            'anomaly_seg_ros': __version__, 'torch': torch.__version__, 'opset': OPSET,
            'python': platform.python_version(), 'exported': time.strftime('%Y-%m-%d')})
    parity = check_parity(graph, card, inputs, reference)
    card = replace(card, parity=parity)
    atomic_write_bytes(output, seal_model(graph, card))
    logging.getLogger(__name__).info('exported in %.1f s', time.perf_counter() - started)
    return card


def to_onnx(fused: 'nn.Module', example: 'Tensor') -> bytes:
    """Export with the dynamo exporter at fixed size and return the serialised graph."""
    import torch

    program = torch.onnx.export(fused, (example,), dynamo=True, opset_version=OPSET,
                                input_names=['image'], output_names=['labels', 'anomaly'],
                                verbose=False)
    if program is None:
        raise UserError('torch.onnx.export gave no program')
    data: bytes = program.model_proto.SerializeToString()
    return data


def check_parity(graph: bytes, card: ModelCard, inputs: list[np.ndarray],
                 reference: 'list[tuple[Tensor, Tensor]]') -> dict[str, Any]:
    """Compare the graph on ONNX Runtime with PyTorch's outputs; raise UserError on drift.

    Returns the figures for the card: largest and mean absolute score error, fraction of pixels
    whose label differs, number of frames.
    """
    from anomaly_seg_ros.backends import open_backend

    sealed = seal_model(graph, card)
    errors, mismatches, largest, span = [], [], 0.0, 1.0
    with open_backend(ModelFile(Path('exported graph'), '', card, sealed), 'cpu') as backend:
        for network_input, (labels, anomaly) in zip(inputs, reference, strict=True):
            output = backend.run(network_input)
            expected = anomaly[0].numpy().astype(np.float64)
            if not (np.isfinite(expected).all() and np.isfinite(output.anomaly).all()):
                raise UserError(f'score {card.score!r} is not finite on a check frame; these '
                                'weights cannot be exported with it')
            error = np.abs(expected - output.anomaly)
            errors.append(float(error.mean()))
            largest = max(largest, float(error.max()))
            span = max(span, float(expected.max() - expected.min()))
            mismatches.append(float((labels[0].numpy() != output.labels).mean()))
    parity = {'reference': 'PyTorch float32', 'backend': 'onnxruntime cpu', 'frames': len(inputs),
              'max_score_error': largest, 'mean_score_error': float(np.mean(errors)),
              'label_mismatch': float(np.mean(mismatches))}
    limit = MAX_SCORE_ERROR[card.precision] * span
    if largest > limit or parity['label_mismatch'] > MAX_LABEL_MISMATCH[card.precision]:
        raise UserError(
            f'the exported graph does not agree with PyTorch: score error {largest:.2e} '
            f'(limit {limit:.2e}), labels differ on {parity["label_mismatch"]:.2e} of the pixels '
            f'(limit {MAX_LABEL_MISMATCH[card.precision]:.0e}). No file was written.')
    return parity


def check_frames(count: int = 4, size_hw: tuple[int, int] = (720, 1280)) -> Iterator[np.ndarray]:
    """Yield RGB frames of the synthetic world and one of noise."""
    from anomaly_seg_ros.synthetic import SyntheticDrive

    drive = SyntheticDrive(seed=11, frames=10 * (count - 1), size_hw=size_hw, anomalies=False)
    for index in range(0, len(drive), 10):
        yield drive[index].image_rgb
    noise = np.random.default_rng(11).integers(0, 256, (size_hw[0] // 8, size_hw[1] // 8, 3),
                                               dtype=np.uint8)
    yield cv2.resize(noise, size_hw[::-1], interpolation=cv2.INTER_CUBIC)


def check_size(size_hw: tuple[int, int], network: LoadedNetwork) -> None:
    """Raise UserError unless the network can run at this size; names the nearest that works."""
    divisor = network.size_divisor
    if any(v < divisor or v % divisor for v in size_hw):
        near = 'x'.join(str(max(divisor, round(v / divisor) * divisor)) for v in size_hw)
        raise UserError(f'{network.name} needs an input height and width divisible by {divisor}, '
                        f'got {size_hw[0]}x{size_hw[1]}; the nearest possible is {near}')


def _draft_card(request: ExportRequest, network: LoadedNetwork) -> ModelCard:
    return ModelCard(
        name=request.name or f'{network.name}_{request.score}',
        network=network.name, classes=network.classes, palette=network.palette,
        drivable=network.drivable, input_size_hw=request.input_size_hw,
        output_size_hw=request.input_size_hw, score=request.score, threshold=0.0,
        threshold_source='', score_range=(0.0, 1.0), void_index=network.void_index,
        channel_order=network.channel_order, mean=network.mean, std=network.std,
        temperature=request.temperature, precision=request.precision,
        weights_source=network.weights_source, weights_sha256=network.weights_sha256,
        licence=network.licence)


def _threshold_and_range(request: ExportRequest, scores: np.ndarray) -> dict[str, Any]:
    """Take what the request gives, else the 99th percentile and the 1 % to 99.9 % range."""
    low, middle, high = (float(v) for v in np.quantile(scores, (0.01, 0.99, 0.999)))
    threshold, source = request.threshold, 'given at export'
    if threshold is None:
        threshold = middle
        source = ('provisional: 99th percentile of the score over the export\'s check frames; '
                  'run "anomaly-seg calibrate" with frames of your camera')
    if request.score_range is not None:
        low, high = request.score_range
    elif not high - low > 1e-6:
        low, high = threshold - 1.0, threshold + 1.0
    return {'threshold': threshold, 'threshold_source': source, 'score_range': (low, high)}
