# SPDX-License-Identifier: Apache-2.0
"""
Static int8 quantisation of an exported graph, kept only if the metrics hold.

Weights and activations of the convolutions pass through QuantizeLinear and DequantizeLinear nodes
(QDQ), which ONNX Runtime, OpenVINO and TensorRT run in integers. The ranges of the activations are
measured on frames of the user's camera. The convolutions that make the logits, whose digits are
the anomaly score, stay in float, as do transposed ones, for which ONNX Runtime has no integer
kernel.
"""

from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
import tempfile
from typing import Any, TYPE_CHECKING

from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.metrics.pixel import PixelCurve, split_scores
from anomaly_seg_ros.metrics.segmentation import ConfusionMatrix
from anomaly_seg_ros.model_file import ModelCard, ModelFile, seal_model
from anomaly_seg_ros.preprocess import Preprocessor
import numpy as np

if TYPE_CHECKING:
    from anomaly_seg_ros.datasets.frame import Frame

# Activations beyond this percentile are clipped. With plain minima and maxima single outliers take
# the range: ERFNet then loses 14 points of mean IoU, with this less than 1.
PERCENTILE = 99.99


def quantize(graph: bytes, card: ModelCard, frames: Sequence[np.ndarray]) -> bytes:
    """
    Return the int8 version of a float32 ``host`` graph.

    Parameters
    ----------
    graph
        Serialised ONNX model.
    card
        Its card; tells how frames become inputs.
    frames
        Images uint8 (H, W, 3), RGB, that show what the camera sees.

    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    preprocess = Preprocessor(card)

    class Frames(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(frames)

        def __len__(self) -> int:
            return len(frames)

        def set_range(self, start_index: int, end_index: int) -> None:
            self.left = iter(frames[start_index:end_index])

        def get_next(self) -> dict[str, np.ndarray] | None:
            frame = next(self.left, None)
            return None if frame is None else {'image': preprocess(frame).copy()}

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / 'float.onnx').write_bytes(graph)
        # Folds batch normalisation into the convolutions, which otherwise keeps them in float.
        quant_pre_process(folder / 'float.onnx', folder / 'folded.onnx', skip_symbolic_shape=True)
        with redirect_stdout(StringIO()):  # it prints each frame
            quantization.quantize_static(
                folder / 'folded.onnx', folder / 'int8.onnx', Frames(),
                quant_format=quantization.QuantFormat.QDQ, per_channel=True,
                activation_type=quantization.QuantType.QInt8,
                weight_type=quantization.QuantType.QInt8, op_types_to_quantize=['Conv'],
                nodes_to_exclude=_last_convolutions(folder / 'folded.onnx'),
                calibrate_method=quantization.CalibrationMethod.Percentile,
                # Zero points of 0 are what TensorRT takes. One frame at a time: the histograms
                # of all layers would not fit into memory otherwise.
                extra_options={'ActivationSymmetric': True, 'CalibPercentile': PERCENTILE,
                               'CalibStridedMinMax': 1})
        return (folder / 'int8.onnx').read_bytes()


def _last_convolutions(path: Path) -> list[str]:
    """Return the names of the convolutions from which no other leads to the outputs."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    makers = {name: node for node in graph.node for name in node.output}
    waiting = [output.name for output in graph.output]
    seen: set[str] = set()
    found: list[str] = []
    while waiting:
        name = waiting.pop()
        node = makers.get(name)
        if node is None or name in seen:
            continue
        seen.add(name)
        if node.op_type == 'Conv':
            found.append(node.name)
        else:
            waiting += node.input
    return found


def check_drop(reference: bytes, graph: bytes, card: ModelCard, dataset: 'Sequence[Frame]',
               maximum_drop: float) -> dict[str, Any]:
    """
    Return average precision and mean IoU of both graphs on a data set, for the card.

    Raises
    ------
    UserError
        If one of them falls by more than ``maximum_drop``, or the data set has neither anomaly
        masks nor labels.

    """
    before, after = (_metrics(ModelFile(Path(name), '', card, seal_model(data, card)), dataset)
                     for name, data in (('float32 graph', reference), ('int8 graph', graph)))
    if not before:
        raise UserError('the data set of the int8 gate has neither anomaly masks nor labels; give '
                        'one with ground truth')
    drop = {name: before[name] - after[name] for name in before}
    if any(value > maximum_drop for value in drop.values()):
        figures = ', '.join(f'{name} {before[name]:.4f} -> {after[name]:.4f}' for name in before)
        raise UserError(f'int8 costs too much: {figures} (at most {maximum_drop:g} is allowed). '
                        'Calibrate on more and more varied frames, raise --maximum-drop, or use '
                        'fp16. No file was written.')
    return {'dataset': getattr(dataset, 'name', ''), 'frames': len(dataset), 'float32': before,
            'int8': after, 'maximum_drop': maximum_drop}


def _metrics(model: ModelFile, dataset: 'Sequence[Frame]') -> dict[str, float]:
    """Return what of average_precision and miou the data set's ground truth allows."""
    from anomaly_seg_ros.backends import open_backend
    from anomaly_seg_ros.pipeline import Pipeline

    positives, negatives = [], []
    confusion = ConfusionMatrix(model.card.classes)
    labelled = False
    with open_backend(model, 'cpu') as backend:
        pipeline = Pipeline(backend)
        for frame in _frames(dataset):
            detection = pipeline(frame.image_rgb)
            if frame.anomaly_mask is not None:
                split = split_scores(detection.anomaly, frame.anomaly_mask, frame.frame_id)
                positives.append(split.positives)
                negatives.append(split.negatives)
            if frame.labels is not None:
                labelled = True
                confusion.update(detection.labels, frame.labels, frame.frame_id)
    metrics: dict[str, float] = {}
    if positives:
        curve = PixelCurve.of(np.concatenate(positives), np.concatenate(negatives))
        if curve.undefined is None:
            metrics['average_precision'] = curve.average_precision()
    if labelled:
        miou = confusion.result().miou
        if miou is not None:
            metrics['miou'] = miou
    return metrics


def _frames(dataset: 'Sequence[Frame]') -> 'Iterator[Frame]':
    return (dataset[index] for index in range(len(dataset)))
