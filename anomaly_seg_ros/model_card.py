# SPDX-License-Identifier: Apache-2.0
"""The model card: everything a node or an evaluation needs to know about a graph."""

from dataclasses import asdict, dataclass, field, fields
import json
import math
from pathlib import Path
from typing import Any

CARD_SCHEMA = 1
INPUT_VARIANTS = ('host', 'device')
PRECISIONS = ('fp32', 'fp16', 'int8')
RESIZES = ('antialiased', 'bilinear')
LARGEST_SIDE = 16384  # pixels of an image


@dataclass(frozen=True)
class ModelCard:
    """
    What a model file says about itself.

    Attributes
    ----------
    name
        Short name of the model, for people.
    network
        Name of the architecture (see ``anomaly_seg_ros.networks``).
    classes, palette
        Names and RGB colours of the class ids that ``labels`` holds, in order.
    drivable
        Class ids a vehicle may drive on.
    void_index
        Output channel of the network that means "void"; dropped before labels and score.
    input_size_hw
        Height and width in pixels at which the network runs.
    input_variant
        ``host``: float32 (1, 3, h, w), normalised outside. ``device``: uint8 (H, W, 3) frame of
        ``frame_size_hw``, everything else inside the graph.
    frame_size_hw, frame_channel_order
        Camera frame size, and order of its channels (``rgb`` or ``bgr``), that a ``device`` graph
        is made for.
    resize
        How frames are scaled to the input size: ``antialiased`` or ``bilinear``, see ``resize``.
    channel_order
        ``rgb`` or ``bgr``, the order in which the network wants its channels.
    mean, std
        Normalisation of values in [0, 1]: ``(value / 255 - mean) / std``, one per channel of
        ``channel_order``.
    output_size_hw
        Height and width of ``labels`` and ``anomaly``.
    score, score_parameters, temperature
        The fused anomaly score (see ``anomaly_seg_ros.scores``); higher is more anomalous.
    threshold, threshold_source
        A pixel is anomalous when score >= threshold; how that value was chosen.
    score_range
        (low, high) score mapped to 0 and 255 for display.
    precision
        ``fp32``, ``fp16`` or ``int8``: arithmetic of the network's body.
    parity
        Error against the float32 PyTorch reference, as measured at export.
    weights_source, weights_sha256, licence
        Where the weights come from, and under which terms.
    provenance
        Versions, command and whatever else tells how the file was made.

    """

    name: str
    network: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    drivable: tuple[int, ...]
    input_size_hw: tuple[int, int]
    output_size_hw: tuple[int, int]
    score: str
    threshold: float
    threshold_source: str
    score_range: tuple[float, float]
    void_index: int | None = None
    input_variant: str = 'host'
    frame_size_hw: tuple[int, int] | None = None
    frame_channel_order: str = 'rgb'
    resize: str = 'bilinear'
    channel_order: str = 'rgb'
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    score_parameters: dict[str, float] = field(default_factory=dict)
    temperature: float = 1.0
    precision: str = 'fp32'
    parity: dict[str, Any] = field(default_factory=dict)
    weights_source: str = ''
    weights_sha256: str = ''
    licence: str = ''
    provenance: dict[str, Any] = field(default_factory=dict)
    schema: int = CARD_SCHEMA

    def __post_init__(self) -> None:
        """Check every value that later code relies on."""
        if self.schema != CARD_SCHEMA:
            raise ValueError(f'schema must be {CARD_SCHEMA}, got {self.schema}; update this '
                             'package or export the model again')
        if not 1 <= len(self.classes) <= 255:
            raise ValueError(f'classes must be 1 to 255 names, got {len(self.classes)}')
        if len(self.palette) != len(self.classes):
            raise ValueError(f'palette must have one colour a class ({len(self.classes)}), '
                             f'got {len(self.palette)}')
        if any(len(c) != 3 or not all(0 <= v <= 255 for v in c) for c in self.palette):
            raise ValueError('palette must hold RGB colours of 0..255')
        if any(not 0 <= index < len(self.classes) for index in self.drivable):
            raise ValueError(f'drivable must be class ids below {len(self.classes)}, '
                             f'got {self.drivable}')
        for name in ('input_size_hw', 'output_size_hw', 'frame_size_hw'):
            size = getattr(self, name)
            if size is not None and (len(size) != 2 or not all(
                    isinstance(v, int) and 0 < v <= LARGEST_SIDE for v in size)):
                raise ValueError(f'{name} must be two integers from 1 to {LARGEST_SIDE}, '
                                 f'got {size}')
        if self.input_variant not in INPUT_VARIANTS:
            raise ValueError(f'input_variant must be one of {INPUT_VARIANTS}, '
                             f'got {self.input_variant!r}')
        if self.input_variant == 'device' and (
                self.frame_size_hw is None or self.frame_size_hw != self.output_size_hw):
            raise ValueError('a device graph needs frame_size_hw, equal to output_size_hw, got '
                             f'{self.frame_size_hw} and {self.output_size_hw}')
        if self.resize not in RESIZES:
            raise ValueError(f'resize must be one of {RESIZES}, got {self.resize!r}')
        for name in ('channel_order', 'frame_channel_order'):
            if getattr(self, name) not in ('rgb', 'bgr'):
                raise ValueError(f'{name} must be rgb or bgr, got {getattr(self, name)!r}')
        if len(self.mean) != 3 or len(self.std) != 3 or not all(v > 0 for v in self.std):
            raise ValueError(f'mean and std must be 3 values, std positive, '
                             f'got {self.mean} and {self.std}')
        if self.precision not in PRECISIONS:
            raise ValueError(f'precision must be one of {PRECISIONS}, got {self.precision!r}')
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f'temperature must be positive, got {self.temperature}')
        if not math.isfinite(self.threshold):
            raise ValueError(f'threshold must be finite, got {self.threshold}')
        low, high = self.score_range
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f'score_range must be finite and increasing, got {self.score_range}')

    @property
    def reduced_hw(self) -> tuple[int, int] | None:
        """Size down to which JPEG frames may be reduced while decoded; None: not at all."""
        return self.input_size_hw if self.input_variant == 'host' else None

    def to_json(self) -> str:
        """Return the card as JSON with sorted keys, so that equal cards have equal bytes."""
        return json.dumps(asdict(self), sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> 'ModelCard':
        """Read a card; raises ValueError that says what is missing, unknown or out of range."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f'card is not JSON: {error}') from error
        if not isinstance(values, dict):
            raise ValueError('card must be a JSON object')
        known = {f.name for f in fields(cls)}
        unknown = sorted(values.keys() - known)
        if unknown:
            raise ValueError(f'card has unknown entries {unknown}')
        try:
            return cls(**{name: _freeze(value) for name, value in values.items()})
        except (TypeError, AttributeError) as error:
            raise ValueError(f'card is not complete: {error}') from error


@dataclass(frozen=True)
class ModelFile:
    """
    A model file that has been read and found whole.

    Attributes
    ----------
    path
        Where it was read from.
    sha256
        SHA-256 of the whole file, hexadecimal.
    card
        Its card.
    data
        The file's bytes; a backend opens these, so that a file replaced on disk afterwards
        cannot mix with the card read here.

    """

    path: Path
    sha256: str
    card: ModelCard
    data: bytes = field(repr=False)


def _freeze(value: Any) -> Any:
    """Turn JSON lists into tuples, at every depth of lists."""
    return tuple(_freeze(v) for v in value) if isinstance(value, list) else value
