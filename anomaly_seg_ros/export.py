# SPDX-License-Identifier: Apache-2.0
"""Network + score -> one ONNX file with a card, kept only if it agrees with float32 PyTorch."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
import logging
from pathlib import Path
import platform
import time
from typing import Any, TYPE_CHECKING

from anomaly_seg_ros import __version__
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.files import atomic_write_bytes
from anomaly_seg_ros.fused import score_parameters
from anomaly_seg_ros.graph_variants import check_half
from anomaly_seg_ros.model_card import LARGEST_SIDE, RESIZES
from anomaly_seg_ros.model_file import ModelCard, ModelFile, seal_model
from anomaly_seg_ros.networks import load_network, LoadedNetwork
from anomaly_seg_ros.parity import compare, Difference, LIMITS, Limits
from anomaly_seg_ros.pipeline import resize_output
from anomaly_seg_ros.ports import NetworkOutput
from anomaly_seg_ros.preprocess import Preprocessor
from anomaly_seg_ros.quantize import check_drop, quantize, TARGETS
from anomaly_seg_ros.reference import build_module, run_torch
from anomaly_seg_ros.scores import score_function
import cv2
import numpy as np

if TYPE_CHECKING:
    from anomaly_seg_ros.datasets.frame import Frame
    from torch import nn, Tensor

OPSET = 20
MAX_CHECK_FRAMES = 20
MAX_CALIBRATION_FRAMES = 64  # for int8
# PyTorch's float16 takes up to a minute a frame on processors without such arithmetic; when this
# time is over, the frames so far must do. The card says how many they were.
HALF_SECONDS = 180.0


@dataclass(frozen=True)
class ExportRequest:
    """
    What to export.

    Attributes
    ----------
    network, weights
        Name of the network, and its weights: file, folder or model id; several make an ensemble.
    score, temperature
        Anomaly score to fuse in, and the temperature that divides the logits.
    input_size_hw
        Height and width at which the network runs.
    precision
        ``fp32``; ``fp16``: the network's body in float16, the score in float32; ``int8``: static
        quantisation, see ``anomaly_seg_ros.quantize``.
    input_variant
        ``host`` or ``device``, see ``ModelCard``.
    resize
        How frames are scaled, see ``ModelCard``; None takes the way of the network's training.
    frame_size_hw, frame_channel_order
        Size of the camera's frames and order of their channels, for ``device``.
    threshold
        Decision threshold on the score; None takes a provisional one from the check frames.
    score_range
        Scores shown as black and white; None takes the range over the check frames.
    name
        Name of the model for people; default: network and score.
    maximum_drop
        For ``int8``: by how much average precision and mean IoU may fall, as fractions.
    int8_for
        For ``int8``: what the file is best for, one of ``quantize.TARGETS``.

    """

    network: str
    weights: Path | str | Sequence[Path | str]
    score: str = 'max_logit'
    input_size_hw: tuple[int, int] = (512, 1024)
    temperature: float = 1.0
    precision: str = 'fp32'
    input_variant: str = 'host'
    resize: str | None = None
    frame_size_hw: tuple[int, int] | None = None
    frame_channel_order: str = 'rgb'
    threshold: float | None = None
    score_range: tuple[float, float] | None = None
    name: str | None = None
    maximum_drop: float = 0.02
    int8_for: str = 'onnxruntime'


def export_model(request: ExportRequest, output: Path | str,
                 frames: Iterable[np.ndarray] | None = None,
                 gate: 'Sequence[Frame] | None' = None) -> ModelCard:
    """
    Export a network with its score to ``output`` and return its card.

    Parameters
    ----------
    request
        What to export.
    output
        The ``.onnx`` file to write; written only after the parity check has passed.
    frames
        Images uint8 (H, W, 3), RGB. 20 of them at most serve to compare the file with PyTorch and
        to take a provisional threshold, 64 to calibrate ``int8``, which needs real ones: see
        ``some_frames``. Default: frames of the synthetic world.
    gate
        For ``int8``: a data set whose metrics may fall by ``request.maximum_drop`` at the most.

    Raises
    ------
    UserError
        If weights, score or size do not fit, float16 overflows, or the exported graph differs from
        float32 PyTorch by more than the limits.

    """
    import torch

    started = time.perf_counter()
    _check_request(request, frames, gate)
    network = load_network(request.network, request.weights, request.input_size_hw)
    check_size(request.input_size_hw, network)
    frames = some_frames(check_frames() if frames is None else frames,
                         most_frames(request.precision))
    if not frames:
        raise UserError('no frames to check the export on; give at least one image')
    images = some_frames(frames, MAX_CHECK_FRAMES)
    if request.input_variant == 'device' and request.frame_size_hw is not None:
        images = [_resize(image, request.frame_size_hw) for image in images]
    host_card = _draft_card(replace(request, input_variant='host', precision='fp32'), network)
    inputs = [Preprocessor(host_card)(image).copy() for image in images]
    reference = run_torch(build_module(network, host_card, plain=True), inputs)
    card = replace(
        _draft_card(request, network),
        output_size_hw=request.frame_size_hw if request.input_variant == 'device'
        and request.frame_size_hw is not None else reference[0].labels.shape,
        **threshold_and_range(request.threshold, request.score_range, reference),
        provenance={
            'anomaly_seg_ros': __version__, 'torch': torch.__version__, 'opset': OPSET,
            'python': platform.python_version(), 'exported': time.strftime('%Y-%m-%d')})
    parity: dict[str, Any] = {'reference': 'PyTorch float32'}
    if request.precision == 'fp16':
        parity['float16'] = _check_float16(network, host_card, inputs, reference)
    module = build_module(network, card)
    if request.input_variant == 'device':
        inputs = [image if card.frame_channel_order == 'rgb' else image[..., ::-1].copy()
                  for image in images]
        reference = [NetworkOutput(*resize_output(x.labels, x.anomaly, card.output_size_hw))
                     for x in reference]
    graph = to_onnx(module, torch.from_numpy(inputs[0]))
    if request.precision == 'int8':
        float_graph = graph
        graph, parity['int8'] = quantize(graph, card, frames, request.int8_for)
        parity['drop'] = check_drop(float_graph, graph, card, gate or (), request.maximum_drop)
    # int8 has no limits: what counts is the drop of the metrics, which is within its own.
    difference = check_graph(graph, card, inputs, reference, LIMITS.get(card.precision),
                             'float32 PyTorch')
    card = replace(card, parity={**parity, 'backend': 'onnxruntime cpu', **difference.as_card()})
    atomic_write_bytes(output, seal_model(graph, card))
    logging.getLogger(__name__).info('exported in %.1f s', time.perf_counter() - started)
    return card


def to_onnx(module: 'nn.Module', example: 'Tensor') -> bytes:
    """Export with the dynamo exporter at fixed size and return the serialised graph."""
    import torch

    program = torch.onnx.export(module, (example,), dynamo=True, opset_version=OPSET,
                                input_names=['image'], output_names=['labels', 'anomaly'],
                                verbose=False)
    if program is None:
        raise UserError('torch.onnx.export gave no program')
    model = program.model_proto
    # The exporter notes stack traces with the paths of this machine; they are nobody's business.
    graph = model.graph
    for part in (graph, *graph.node, *graph.value_info, *graph.initializer, *graph.input,
                 *graph.output, *model.functions,
                 *(node for function in model.functions for node in function.node)):
        del part.metadata_props[:]
        part.doc_string = ''
    data: bytes = model.SerializeToString()
    return data


def check_graph(graph: bytes, card: ModelCard, inputs: Sequence[np.ndarray],
                reference: Sequence[NetworkOutput], limits: Limits | None,
                reference_name: str) -> Difference:
    """
    Run a graph on ONNX Runtime and return how far it is from the reference.

    Parameters
    ----------
    graph, card
        What to check.
    inputs, reference
        Network inputs, and what the reference answers to them.
    limits
        How far it may be; None where something else decides.
    reference_name
        What the reference is, for the error.

    Raises
    ------
    UserError
        If it is further than the limits, or a score is not finite.

    """
    from anomaly_seg_ros.backends import open_backend

    model = ModelFile(Path('exported graph'), '', card, seal_model(graph, card))
    with open_backend(model, 'cpu') as backend:
        difference = compare((backend.run(x) for x in inputs), reference)
    if limits is not None:
        difference.check(limits, 'the exported graph', reference_name)
    return difference


def check_frames(count: int = 4, size_hw: tuple[int, int] = (720, 1280)) -> Iterator[np.ndarray]:
    """Yield RGB frames of the synthetic world and one of noise."""
    from anomaly_seg_ros.synthetic import SyntheticDrive

    drive = SyntheticDrive(seed=11, frames=10 * (count - 1), size_hw=size_hw, anomalies=False)
    for index in range(0, len(drive), 10):
        yield drive[index].image_rgb
    noise = np.random.default_rng(11).integers(0, 256, (size_hw[0] // 8, size_hw[1] // 8, 3),
                                               dtype=np.uint8)
    yield cv2.resize(noise, size_hw[::-1], interpolation=cv2.INTER_CUBIC)


def most_frames(precision: str) -> int:
    """Return how many frames an export in this precision looks at, at the most."""
    return MAX_CALIBRATION_FRAMES if precision == 'int8' else MAX_CHECK_FRAMES


def some_frames(frames: Iterable[np.ndarray], most: int) -> list[np.ndarray]:
    """
    Return ``most`` frames at the most: of a sequence evenly spread ones, else the first.

    Neighbours in a drive look alike. An iterator does not tell how long it is.
    """
    if not isinstance(frames, Sequence):
        return list(islice(frames, most))
    return [frames[index] for index in spread(len(frames), most)]


def spread(count: int, most: int) -> list[int]:
    """Return ``most`` of the indices below ``count`` at the most, evenly from first to last."""
    return [int(v) for v in np.linspace(0, count - 1, min(most, count)).round()]


def check_size(size_hw: tuple[int, int], network: LoadedNetwork) -> None:
    """Raise UserError unless the network can run at this size; names the nearest that works."""
    divisor = network.size_divisor
    if any(v < divisor or v % divisor for v in size_hw):
        near = 'x'.join(str(max(divisor, round(v / divisor) * divisor)) for v in size_hw)
        raise UserError(f'{network.name} needs an input height and width divisible by {divisor}, '
                        f'got {size_hw[0]}x{size_hw[1]}; the nearest possible is {near}')


def threshold_and_range(threshold: float | None, score_range: tuple[float, float] | None,
                        reference: Sequence[NetworkOutput]) -> dict[str, Any]:
    """Return what is given, else the 99th percentile and the 1 % to 99.9 % range of the score."""
    scores = np.concatenate([output.anomaly.ravel() for output in reference])
    if not np.isfinite(scores).all():
        raise UserError('the score of these weights is not finite on the check frames; they '
                        'cannot be exported with this score. No file was written.')
    low, middle, high = (float(v) for v in np.quantile(scores, (0.01, 0.99, 0.999)))
    source = 'given at export'
    if threshold is None:
        threshold = middle
        source = ("provisional: 99th percentile of the score over the export's check frames; "
                  'run "anomaly-seg calibrate" with frames of your camera')
    if score_range is not None:
        low, high = score_range
    elif not high - low > 1e-6:
        low, high = threshold - 1.0, threshold + 1.0
    return {'threshold': threshold, 'threshold_source': source, 'score_range': (low, high)}


def _check_request(request: ExportRequest, frames: Iterable[np.ndarray] | None,
                   gate: 'Sequence[Frame] | None') -> None:
    if request.precision not in ('fp32', 'fp16', 'int8'):
        raise UserError(f'unknown precision {request.precision!r}; choose one of fp32, fp16, int8')
    if request.input_variant not in ('host', 'device'):
        raise UserError(f'unknown input variant {request.input_variant!r}; choose host or device')
    if request.input_variant == 'device':
        if request.frame_size_hw is None:
            raise UserError('a device graph is made for one camera: give --frame-size HxW')
        if request.precision == 'int8':
            raise UserError('int8 is made as a host graph only; choose --input-variant host')
    for size_hw in (request.input_size_hw, request.frame_size_hw or ()):
        if not all(0 < side <= LARGEST_SIDE for side in size_hw):
            raise UserError(f'{"x".join(map(str, size_hw))}: height and width must be 1 to '
                            f'{LARGEST_SIDE} pixels')
    if not (np.isfinite(request.temperature) and request.temperature > 0):
        raise UserError(f'temperature must be positive, got {request.temperature}')
    if request.resize not in (None, *RESIZES):
        raise UserError(f'unknown resize {request.resize!r}; choose {" or ".join(RESIZES)}')
    if request.int8_for not in TARGETS:
        raise UserError(f'int8 is made for one of {", ".join(TARGETS)}, not for '
                        f'{request.int8_for!r}')
    if request.precision == 'int8' and (frames is None or not gate):
        raise UserError('int8 is calibrated on frames of your camera and kept only if the metrics '
                        'hold: give --frames, and --gate-dataset with --gate-root')
    try:
        score_function(request.score)
    except ValueError as error:
        raise UserError(str(error)) from error


def _check_float16(network: LoadedNetwork, card: ModelCard, inputs: Sequence[np.ndarray],
                   reference: Sequence[NetworkOutput]) -> dict[str, Any]:
    """Compare torch's own float16 with float32; ONNX Runtime's CPU computes it in float32."""
    import torch

    module = build_module(network, replace(card, precision='fp16'))
    largest, outputs = check_half(module, [torch.from_numpy(x) for x in inputs], HALF_SECONDS)
    answers = [NetworkOutput(labels[0].numpy(), anomaly[0].numpy()) for labels, anomaly in outputs]
    difference = compare(answers, reference[:len(answers)])
    difference.check(LIMITS['fp16'], 'float16 PyTorch', 'float32 PyTorch')
    return {'backend': 'torch cpu float16', 'largest_activation': largest, **difference.as_card()}


def _draft_card(request: ExportRequest, network: LoadedNetwork) -> ModelCard:
    device = request.input_variant == 'device'
    frame_size_hw = request.frame_size_hw if device else None
    try:
        return ModelCard(
            name=request.name or f'{network.name}_{request.score}',
            network=network.name, classes=network.classes, palette=network.palette,
            drivable=network.drivable, input_size_hw=request.input_size_hw,
            output_size_hw=frame_size_hw or request.input_size_hw,
            input_variant=request.input_variant, frame_size_hw=frame_size_hw,
            frame_channel_order=request.frame_channel_order if device else 'rgb',
            score=request.score, threshold=0.0, threshold_source='', score_range=(0.0, 1.0),
            void_index=network.void_index, resize=request.resize or network.resize,
            channel_order=network.channel_order, mean=network.mean, std=network.std,
            score_parameters=score_parameters(network, request.score),
            temperature=request.temperature, precision=request.precision,
            weights_source=network.weights_source, weights_sha256=network.weights_sha256,
            licence=network.licence)
    except ValueError as error:
        raise UserError(f'{network.weights_source}: these values do not make a model card: '
                        f'{error}') from error


def _resize(image: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    return image if image.shape[:2] == size_hw else cv2.resize(image, size_hw[::-1])
