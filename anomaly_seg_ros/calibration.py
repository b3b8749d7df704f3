# SPDX-License-Identifier: Apache-2.0
"""
Set a model file's temperature and threshold on frames of the user's own.

The temperature (Guo et al., On Calibration of Modern Neural Networks, ICML 2017) minimises the
negative log likelihood of labelled pixels. The threshold is a quantile of the score over
in-distribution pixels (so many false positives, no more), over anomalous ones (so many found, no
fewer), or that of the best F1.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
import hashlib
import logging
import os
from pathlib import Path
from typing import Any

from anomaly_seg_ros.backends import open_backend
from anomaly_seg_ros.backends.onnxruntime import session_options, use_exact_int8
from anomaly_seg_ros.classes import label_ids, UNLABELLED
from anomaly_seg_ros.datasets.frame import Frame
from anomaly_seg_ros.datasets.source import FrameSource
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.extras import require
from anomaly_seg_ros.files import atomic_write_bytes
from anomaly_seg_ros.metrics.calibration import Calibration
from anomaly_seg_ros.model_file import load_model_file, ModelCard, ModelFile, seal_model
from anomaly_seg_ros.networks.variants import MASK_FAMILIES, VARIANTS
from anomaly_seg_ros.parity import compare, LIMITS
from anomaly_seg_ros.pipeline import BadOutput, Pipeline
from anomaly_seg_ros.preprocess import Preprocessor
import cv2
import numpy as np

CRITERIA = ('fpr', 'tpr', 'best-f1')
RATES = {'fpr': 0.01, 'tpr': 0.95}  # where none is given
PIXELS_PER_FRAME = 100_000
FIT_PIXELS = 100_000  # of all frames together
TEMPERATURES = (0.05, 20.0)  # where a fit looks
_SEED = 0

_log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CalibrationRequest:
    """
    What to set, and by which criterion.

    Attributes
    ----------
    temperature
        ``fit``: on the frames' labels; ``keep``; or a number. None fits where the frames have
        labels of the model's classes, the score is changed by it (all but max_logit) and the graph
        has logits to divide, else keeps.
    criterion
        ``fpr``: the lowest threshold with at most ``rate`` of the in-distribution pixels above;
        ``tpr``: the highest with at least ``rate`` of the anomalous ones above; ``best-f1``.
    rate
        A fraction in (0, 1); None takes that of ``RATES``.

    """

    temperature: str | float | None = None
    criterion: str = 'fpr'
    rate: float | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        if self.criterion not in CRITERIA:
            raise ValueError(f'criterion must be one of {CRITERIA}, got {self.criterion!r}')
        if self.rate is not None and self.criterion not in RATES:
            raise ValueError(f'criterion {self.criterion} takes no rate, got {self.rate}')
        if self.rate is not None and not 0 < self.rate < 1:
            raise ValueError(f'rate must be between 0 and 1, got {self.rate}')
        if isinstance(self.temperature, str) and self.temperature not in ('fit', 'keep'):
            raise ValueError(f'temperature must be fit, keep or a number, '
                             f'got {self.temperature!r}')
        if isinstance(self.temperature, float) and not (
                np.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f'temperature must be positive, got {self.temperature}')

    @property
    def share(self) -> float:
        """The rate, or that of the criterion (not best-f1, which has none) where none is given."""
        return self.rate or RATES[self.criterion]


def calibrate(model: Path | str, source: FrameSource, output: Path | str,
              request: CalibrationRequest | None = None, *, backend: str = 'cpu',
              threads: int = 0, limit: int | None = None,
              progress: Progress | None = None) -> ModelCard:
    """
    Write a copy of a model file with its temperature and threshold set, and return its card.

    Parameters
    ----------
    model, output
        The model file and the one to write.
    source
        Frames of the camera, or of a benchmark. Frames without an anomaly mask count as
        in-distribution everywhere.
    request
        What to set.
    backend, threads
        Which backend, and its threads.
    limit
        Take only this many frames, from the first.
    progress
        Called with (what, done, total).

    Raises
    ------
    UserError
        If the frames lack what the request needs (labels of the model's classes for a fit), or
        the graph has no logits to divide.

    """
    request = request or CalibrationRequest()
    model_file = load_model_file(model)
    if model_file.path.suffix == '.engine':
        raise UserError(f'{model}: a TensorRT engine keeps the card that it was built with. '
                        'Calibrate the .onnx, then build the engine of the result.')
    total = min(len(source), limit or len(source))
    notes: dict[str, Any] = {'data': source.name, 'split': source.split, 'frames': total}
    temperature = request.temperature
    ids = None
    try:
        ids = label_ids(model_file.card.classes, source.class_set)
    except UserError as error:
        if temperature == 'fit':
            raise UserError(f'{source.name}: the temperature cannot be fitted: {error}. Use '
                            '--temperature keep.') from error
    if temperature is None:
        fit = ids is not None and model_file.card.score != 'max_logit' \
            and source[0].labels is not None
        temperature = 'fit' if fit else 'keep'
    if temperature != 'keep':
        if backend == 'tensorrt':
            raise UserError(f'{model}: its engine has the score at the temperature that it was '
                            'built with, and no other. Calibrate with --backend cpu, then build '
                            'the engine of the result ("anomaly-seg build-engine"), or use '
                            '--temperature keep.')
        require('export', 'onnx', otherwise='keep the temperature: --temperature keep')
        try:
            check_logits(model_file, source[0].image_rgb, threads)
        except UserError as error:
            if request.temperature is not None:
                raise
            temperature = 'keep'
            _log.warning('the temperature stays %g: %s', model_file.card.temperature, error)
    if temperature != 'keep':
        if temperature == 'fit':
            temperature, notes['temperature_fit'] = fit_temperature(
                model_file, _frames(source, total, 'temperature', progress), ids, threads)
        model_file = with_temperature(model_file, float(temperature))
    threshold, text, score_range = _choose_threshold(
        model_file, _frames(source, total, 'threshold', progress), request, backend, threads)
    card = replace(
        model_file.card, threshold=threshold, score_range=score_range,
        threshold_source=f'{text} of {source.name}'
                         f'{f" ({source.split})" if source.split else ""}, {total} frames, at '
                         f'most {PIXELS_PER_FRAME} random pixels of each kind in each, weighted',
        provenance={**model_file.card.provenance, 'calibration': notes})
    atomic_write_bytes(output, seal_model(model_file.data, card))
    return card


def fit_temperature(model: ModelFile, frames: Iterator[Frame],
                    ids: np.ndarray | None = None, threads: int = 0
                    ) -> tuple[float, dict[str, float]]:
    """
    Return the temperature of least negative log likelihood, and figures before and after.

    Before is at the card's temperature.

    Labels are compared at the network's own output size, where the logits are; at most
    ``FIT_PIXELS`` pixels are used, drawn evenly from those of all frames. ``ids`` is the table of
    ``classes.label_ids``; without it labels are the model's own ids.
    """
    import onnxruntime

    bare, logits_names = _bare_graph(model)
    names = [logits_names] if isinstance(logits_names, str) else logits_names
    options = session_options(threads or len(os.sched_getaffinity(0)))
    if model.card.precision == 'int8':
        use_exact_int8(options)
    session = onnxruntime.InferenceSession(bare.SerializeToString(), options,
                                           providers=['CPUExecutionProvider'])
    preprocess = Preprocessor(model.card)
    drawn = _LabelledPixels(FIT_PIXELS)
    for frame in frames:
        if frame.labels is None:
            raise UserError(f'frame {frame.frame_id} has no labels, which the temperature is '
                            'fitted on; choose a labelled data set or --temperature keep')
        raw = _planes(session.run(names, {'image': preprocess(frame.image_rgb)}),
                      model.card.output_size_hw)
        labelled = frame.labels if ids is None else ids[frame.labels]
        truth = cv2.resize(labelled, raw.shape[:0:-1], interpolation=cv2.INTER_NEAREST_EXACT)
        highest = truth[truth != UNLABELLED].max(initial=0)
        if highest >= len(raw):
            raise UserError(f'frame {frame.frame_id}: label {highest} is none of the {len(raw)} '
                            "classes of this model; give labels that are the model's classes, or "
                            '--temperature keep')
        drawn.offer(raw, truth)
    f, y = drawn.logits.astype(np.float64), drawn.labels.astype(np.int64)
    if not len(y):
        raise UserError('no labelled pixel in these frames; the temperature cannot be fitted')
    temperature = minimise_nll(f, y)
    if min(abs(1 / temperature - 1 / limit) for limit in TEMPERATURES) < 1e-6:
        _log.warning('the fitted temperature %g is the limit of what is looked at, %g to %g: '
                     "these labels hardly fit the model's classes, or the model is sure of "
                     'every one', temperature, *TEMPERATURES)
    figures = {}
    for name, value in (('before', model.card.temperature), ('after', temperature)):
        figures[f'nll_{name}'] = negative_log_likelihood(f, y, value)
        p = np.exp(f / value - _logsumexp(f / value)[:, None])
        calibration = Calibration(samples_per_frame=None)
        calibration.update(0, p.max(1)[None].astype(np.float32),
                           f.argmax(1)[None].astype(np.uint8), y[None].astype(np.uint8), 'pooled')
        figures[f'ece_{name}'] = float(calibration.result().ece or 0.0)
    return temperature, figures


def minimise_nll(logits: np.ndarray, labels: np.ndarray) -> float:
    """
    Return the one of ``TEMPERATURES`` that minimises the negative log likelihood.

    The likelihood is convex in 1 / T, so a ternary search finds the one minimum.

    Parameters
    ----------
    logits
        float64 (N, C).
    labels
        integers (N,), below C.

    """
    high, low = (1 / limit for limit in TEMPERATURES)
    for _ in range(60):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        if negative_log_likelihood(logits, labels, 1 / left) \
                < negative_log_likelihood(logits, labels, 1 / right):
            high = right
        else:
            low = left
    return 2 / (low + high)


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    """Return the mean of ``-ln softmax(logits / T)`` at the labels; arguments as above."""
    scaled = logits / temperature
    return float((_logsumexp(scaled) - scaled[np.arange(len(labels)), labels]).mean())


def with_temperature(model: ModelFile, temperature: float) -> ModelFile:
    """
    Return the model with its score computed from logits divided by ``temperature``.

    The card's figures of the score before are dropped; which kind of int8 the graph is stays.
    """
    from anomaly_seg_ros.export_onnx import append_head, OnnxExportRequest
    import onnx

    bare, logits_names = _bare_graph(model)
    card = replace(model.card, temperature=temperature,
                   parity={name: value for name, value in model.card.parity.items()
                           if name == 'int8'})
    append_head(bare, logits_names, OnnxExportRequest(
        weights=model.path, classes=card.classes, score=card.score, temperature=temperature),
        card.input_size_hw, card.output_size_hw)
    try:
        onnx.checker.check_model(bare)
    except onnx.checker.ValidationError as error:
        raise UserError(f'{model.path}: the graph with its new head is not valid ONNX: '
                        f'{" ".join(str(error).split())[:400]}. No file was written; use '
                        '--temperature keep.') from error
    data = seal_model(bare.SerializeToString(), card)
    # Its own digest: what backends build and keep must not be taken for another model's.
    return ModelFile(model.path, hashlib.sha256(data).hexdigest(), card, data)


def check_logits(model: ModelFile, image_rgb: np.ndarray, threads: int = 0) -> None:
    """
    Raise UserError unless what the labels are taken from are logits, from which the score comes.

    Ensembles take their labels from mean probabilities. A head on these has another score already
    at the model's own temperature, which one frame shows.
    """
    network_input = Preprocessor(model.card)(image_rgb)
    answers = []
    for one in (with_temperature(model, model.card.temperature), model):
        with open_backend(one, threads=threads) as backend:
            answers.append(backend.run(network_input))
    difference = compare(answers[:1], answers[1:])
    try:
        difference.check(LIMITS.get(model.card.precision, LIMITS['fp32']), 'the new head',
                         "the model's own")
    except UserError as error:
        raise UserError(f'{model.path}: the graph has no logits to divide: its labels come from '
                        f'values whose {model.card.score} is off by up to '
                        f'{difference.max_score_error:.2g}. Export it again with --temperature, '
                        'or use --temperature keep.') from error


def _planes(logits: Sequence[np.ndarray], size_hw: tuple[int, ...]) -> np.ndarray:
    """Return (C, h, w) of what the tensors of ``_bare_graph`` hold."""
    if logits[0].ndim == 4:
        return np.asarray(logits[0][0])
    height, width = size_hw
    rows = [x.reshape(height // len(logits), width, -1) for x in logits]
    return np.stack(rows, 1).reshape(height, width, -1).transpose(2, 0, 1)


def _bare_graph(model: ModelFile) -> tuple[Any, str | list[str]]:
    """
    Return the graph with its logits as the only outputs, and their name or names.

    One tensor (1, C, h, w), or those of ``LogitsHead``: r of (P, C), every r-th row each.
    """
    from anomaly_seg_ros.export_onnx import drop_unused, SCORES
    import onnx

    if model.card.score not in SCORES or model.card.input_variant != 'host':
        raise UserError(f'{model.path}: the temperature can be set afterwards for host models '
                        f'with the scores {", ".join(SCORES)}; this is a '
                        f'{model.card.input_variant} model with {model.card.score}. Export it '
                        'again with --temperature, or use --temperature keep.')
    network = VARIANTS.get(model.card.network, (model.card.network,))[0]
    if network in MASK_FAMILIES:
        raise UserError(f'{model.path}: the graph has no logits to divide: {network} gives masks '
                        'and classes. Export it again with --temperature, or use --temperature '
                        'keep.')
    graph = onnx.load_model_from_string(model.data)
    inferred = onnx.shape_inference.infer_shapes(graph).graph
    ranks = {x.name: len(x.type.tensor_type.shape.dim) for x in inferred.value_info}
    logits = [str(node.input[0]) for node in graph.graph.node if node.op_type == 'ArgMax']
    planes = [ranks.get(name) for name in logits] == [4]
    rows = bool(logits) and all(ranks.get(name) == 2 for name in logits)
    if not planes and not rows:
        raise UserError(f'{model.path}: the logits cannot be found in this graph: expected ArgMax '
                        'over one tensor (1, C, h, w), or over rows of pixels, found '
                        f'{len(logits)}. Use --temperature keep.')
    del graph.graph.output[:]
    graph.graph.output.extend(onnx.helper.make_empty_tensor_value_info(x) for x in logits)
    drop_unused(graph.graph)
    return graph, logits[0] if planes else logits


def _choose_threshold(model: ModelFile, frames: Iterator[Frame], request: CalibrationRequest,
                      backend: str, threads: int
                      ) -> tuple[float, str, tuple[float, float]]:
    """Return the threshold, how it was chosen, and the range of the scores."""
    rng = np.random.default_rng(_SEED)
    drawn: dict[int, list[_Drawn]] = {0: [], 1: []}  # by code of the mask
    with open_backend(model, backend, threads=threads) as device:
        pipeline = Pipeline(device)
        for frame in frames:
            try:
                scores = pipeline(frame.image_rgb).anomaly.ravel()
            except (UserError, BadOutput) as error:
                raise UserError(f'frame {frame.frame_id}: {error}') from error
            mask = np.zeros_like(scores, np.uint8) if frame.anomaly_mask is None \
                else frame.anomaly_mask.ravel()
            for code, parts in drawn.items():
                pixels = np.flatnonzero(mask == code)
                parts.append(_Drawn(scores[_draw(rng, pixels)], len(pixels)))
    negatives, positives = WeightedScores.of(drawn[0]), WeightedScores.of(drawn[1])
    if not negatives.scores.size:
        raise UserError('no in-distribution pixel in these frames')
    everything = WeightedScores.of(drawn[0] + drawn[1])
    low, high = (everything.lowest_with_at_most(1 - share) for share in (0.01, 0.999))
    score_range = (low, high if high - low > 1e-6 else low + 1.0)
    if request.criterion == 'fpr':
        threshold = negatives.lowest_with_at_most(request.share)
        return threshold, (f'calibrated: {request.share:.3g} of the in-distribution pixels at or '
                           'above'), score_range
    if not positives.scores.size:
        raise UserError(f'criterion {request.criterion} needs anomalous pixels, and these frames '
                        'have none; use --criterion fpr')
    if request.criterion == 'tpr':
        threshold = positives.highest_with_at_least(request.share)
        return threshold, (f'calibrated: {request.share:.3g} of the anomalous pixels at or '
                           'above'), score_range
    f1, threshold = best_f1(positives, negatives)
    return threshold, f'calibrated: best F1 ({f1:.3f})', score_range


class _LabelledPixels:
    """
    Logits and labels of at most ``size`` pixels, drawn evenly from all that were offered.

    Each pixel gets a random number, and those of the lowest stay: however many frames there are,
    memory is bounded and every pixel has the same chance.

    Attributes
    ----------
    logits, labels
        float32 (N, C) and uint8 (N,).

    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._rng = np.random.default_rng(_SEED)
        self._keys = np.empty(0)
        self.logits = np.empty((0, 0), np.float32)
        self.labels = np.empty(0, np.uint8)

    def offer(self, logits: np.ndarray, labels: np.ndarray) -> None:
        """Draw from a frame's logits (C, h, w) and labels (h, w)."""
        held = len(self.labels)
        pixels = np.flatnonzero(labels.ravel() != UNLABELLED)
        keys = np.append(self._keys, self._rng.random(len(pixels)))
        stay = np.arange(len(keys))
        if len(keys) > self._size:
            stay = np.sort(np.argpartition(keys, self._size)[:self._size])
        old, new = stay[stay < held], pixels[stay[stay >= held] - held]
        flat = logits.reshape(len(logits), -1)
        self._keys = keys[stay]
        self.logits = np.concatenate([self.logits.reshape(held, len(flat))[old], flat[:, new].T])
        self.labels = np.concatenate([self.labels[old], labels.ravel()[new]])


@dataclass(frozen=True)
class _Drawn:
    """Scores of some of a frame's pixels, and how many pixels they stand for."""

    scores: np.ndarray
    pixels: int


@dataclass(frozen=True)
class WeightedScores:
    """
    Drawn pixels of many frames, each for as many pixels as it was drawn from.

    Without the weights, in-distribution pixels, of which a frame has more than are drawn, would
    count less than anomalous ones, of which it has fewer.

    Attributes
    ----------
    scores
        float32 (N,), ascending.
    at_or_above
        float64 (N + 1,): pixels that a score and those after it stand for; the last is 0.

    """

    scores: np.ndarray
    at_or_above: np.ndarray

    @classmethod
    def of(cls, parts: Sequence[_Drawn]) -> 'WeightedScores':
        """Join the frames."""
        scores = np.concatenate([part.scores for part in parts])
        weights = np.concatenate([np.full(part.scores.size, part.pixels / part.scores.size)
                                  for part in parts if part.scores.size] or [np.empty(0)])
        order = np.argsort(scores, kind='stable')
        return cls(scores[order], np.append(np.cumsum(weights[order][::-1])[::-1], 0.0))

    def lowest_with_at_most(self, rate: float) -> float:
        """Return the lowest float32 that at most this share, below 1, is at or above."""
        first = int(np.argmax(self.at_or_above <= rate * self.at_or_above[0]))
        return float(np.nextafter(self.scores[first - 1], np.float32(np.inf)))

    def highest_with_at_least(self, rate: float) -> float:
        """Return the highest score that at least this share of the pixels is at or above."""
        enough = self.at_or_above[:-1] >= rate * self.at_or_above[0]
        return float(self.scores[np.flatnonzero(enough)[-1]])


def best_f1(positives: WeightedScores, negatives: WeightedScores) -> tuple[float, float]:
    """Return the highest F1 and its threshold, the lowest of several."""
    thresholds, first = np.unique(positives.scores, return_index=True)
    tp = positives.at_or_above[first]
    fp = negatives.at_or_above[np.searchsorted(negatives.scores, thresholds, 'left')]
    f1 = 2 * tp / (tp + fp + positives.at_or_above[0])
    best = int(np.argmax(f1))
    return float(f1[best]), float(thresholds[best])


def _frames(source: Sequence[Frame] | FrameSource, total: int, what: str,
            progress: Progress | None) -> Iterator[Frame]:
    for index in range(total):
        yield source[index]
        if progress is not None:
            progress(what, index + 1, total)


def _draw(rng: np.random.Generator, indices: np.ndarray) -> np.ndarray:
    """Return at most ``PIXELS_PER_FRAME`` of ``indices``, drawn at random."""
    if len(indices) <= PIXELS_PER_FRAME:
        return indices
    return rng.choice(indices, PIXELS_PER_FRAME, replace=False)


def _logsumexp(values: np.ndarray) -> np.ndarray:
    """Return ln sum exp over the last axis of (N, C), without overflow."""
    top = values.max(1)
    return np.asarray(top + np.log(np.exp(values - top[:, None]).sum(1)))
