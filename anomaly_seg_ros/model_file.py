# SPDX-License-Identifier: Apache-2.0
"""
One ``.onnx`` file is one model: its card lives in the ONNX metadata.

The card says everything that a node or an evaluation needs to use the graph (classes, input size,
normalisation, score, threshold, precision, provenance). It is stored as JSON under the metadata
key ``anomaly_seg_card``; ``anomaly_seg_sha256`` beside it is the SHA-256 over the graph and the
card, so that a damaged or edited file is refused. That digest finds accidents, it is no signature.

Reading needs neither onnx nor onnxruntime: a ``ModelProto`` is a protobuf message, and its
top-level fields (metadata is field 14) are few and easy to walk.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
import hashlib
import json
import math
from pathlib import Path
from typing import Any

from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.files import atomic_write_bytes

CARD_SCHEMA = 1
CARD_KEY = 'anomaly_seg_card'
DIGEST_KEY = 'anomaly_seg_sha256'

INPUT_VARIANTS = ('host', 'device')
PRECISIONS = ('fp32', 'fp16', 'int8')
_METADATA_FIELD = 14  # ModelProto.metadata_props
_KNOWN_FIELDS = frozenset({1, 2, 3, 4, 5, 6, 7, 8, _METADATA_FIELD, 20, 25, 26})


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
                    isinstance(v, int) and 0 < v <= 16384 for v in size)):
                raise ValueError(f'{name} must be two positive integers, got {size}')
        if self.input_variant not in INPUT_VARIANTS:
            raise ValueError(f'input_variant must be one of {INPUT_VARIANTS}, '
                             f'got {self.input_variant!r}')
        if self.input_variant == 'device' and (
                self.frame_size_hw is None or self.frame_size_hw != self.output_size_hw):
            raise ValueError('a device graph needs frame_size_hw, equal to output_size_hw, got '
                             f'{self.frame_size_hw} and {self.output_size_hw}')
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


def load_model_file(path: Path | str) -> ModelFile:
    """
    Read a model file and check that it is whole, unedited and has a valid card.

    A TensorRT engine (``.engine``) made by "anomaly-seg build-engine" is read with the JSON beside
    it; its ``sha256`` is that of the model it was built from.

    Raises
    ------
    UserError
        If the file is missing, not ONNX, truncated, without a card, or changed after export;
        names the file and the remedy.

    """
    path = Path(path)
    if path.suffix == '.engine':
        return _load_engine(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f'{path}: no such model file. Give the path of an .onnx made by '
                        '"anomaly-seg export".') from error
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror}). Give the path of an .onnx '
                        'made by "anomaly-seg export".') from error
    metadata, body_digest = _read_metadata(data, path)
    if CARD_KEY not in metadata:
        raise UserError(
            f'{path}: an ONNX file without an anomaly_seg_ros card (metadata has '
            f'{sorted(metadata) or "no entries"}). Fuse a score into it with '
            '"anomaly-seg export onnx --weights FILE".')
    expected = metadata.get(DIGEST_KEY)
    actual = _seal(body_digest, metadata[CARD_KEY])
    if expected != actual:
        raise UserError(f'{path}: graph or card changed since export (digest {actual[:12]}, '
                        f'file says {str(expected)[:12]}). Copy the file again or export it '
                        'again.')
    try:
        card = ModelCard.from_json(metadata[CARD_KEY])
    except ValueError as error:
        raise UserError(f'{path}: bad model card: {error}. Export the model again.') from error
    return ModelFile(path, hashlib.sha256(data).hexdigest(), card, data)


def _load_engine(path: Path) -> ModelFile:
    """Read a TensorRT engine, whose card and key lie in the JSON beside it."""
    from anomaly_seg_ros.engine import load_engine

    engine = load_engine(path)
    return ModelFile(path, engine.key.model_sha256, engine.card, engine.data)


def seal_model(graph: bytes, card: ModelCard) -> bytes:
    """Return a serialised ONNX model with ``card`` as its metadata; older metadata is dropped."""
    body = b''.join(graph[start:end] for number, start, end, _, _ in _fields(graph)
                    if number != _METADATA_FIELD)
    text = card.to_json()
    digest = _seal(hashlib.sha256(body).digest(), text)
    return body + _metadata_entry(CARD_KEY, text) + _metadata_entry(DIGEST_KEY, digest)


def write_model_file(path: Path | str, graph: bytes, card: ModelCard) -> None:
    """Write ``graph`` (a serialised ONNX model) with ``card`` to ``path``, whole or not at all."""
    atomic_write_bytes(path, seal_model(graph, card))


def _freeze(value: Any) -> Any:
    """Turn JSON lists into tuples, at every depth of lists."""
    return tuple(_freeze(v) for v in value) if isinstance(value, list) else value


def _seal(body_digest: bytes, card_json: str) -> str:
    return hashlib.sha256(body_digest + card_json.encode('utf-8')).hexdigest()


def _read_metadata(data: bytes, path: Path) -> tuple[Mapping[str, str], bytes]:
    """Return the metadata entries and the SHA-256 of all other top-level fields."""
    digest = hashlib.sha256()
    metadata: dict[str, str] = {}
    numbers: set[int] = set()
    try:
        for number, start, end, content_start, wire in _fields(data):
            if number not in _KNOWN_FIELDS:
                raise ValueError(f'field {number} is not part of an ONNX model')
            numbers.add(number)
            if number != _METADATA_FIELD:
                digest.update(memoryview(data)[start:end])
                continue
            if wire != 2:
                raise ValueError('metadata of the wrong type')
            entry = data[content_start:end]
            parts = {key: entry[c:e].decode('utf-8') for key, _, e, c, _ in _fields(entry)}
            metadata[parts.get(1, '')] = parts.get(2, '')
        if not {1, 7} <= numbers:  # ir_version and graph: every ONNX model has both
            raise ValueError('no graph inside')
    except (ValueError, IndexError) as error:
        raise UserError(f'{path}: not a whole ONNX file of {len(data)} bytes ({error}). Copy it '
                        'again or export the model again.') from error
    return metadata, digest.digest()


def _fields(data: bytes) -> Iterator[tuple[int, int, int, int, int]]:
    """Walk the top-level protobuf fields: (number, start, end, content start, wire type)."""
    position = 0
    while position < len(data):
        start = position
        key, position = _varint(data, position)
        wire = key & 7
        content = position
        if wire == 0:
            _, position = _varint(data, position)
        elif wire == 1:
            position += 8
        elif wire == 2:
            length, content = _varint(data, position)
            position = content + length
        elif wire == 5:
            position += 4
        else:
            raise ValueError(f'byte {start} is not protobuf')
        if position > len(data):
            raise ValueError(f'ends in the middle of a field that begins at byte {start}')
        yield key >> 3, start, position, content, wire


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError('number too long')


def _metadata_entry(key: str, value: str) -> bytes:
    entry = b''.join(_delimited(number, text.encode('utf-8'))
                     for number, text in ((1, key), (2, value)))
    return _delimited(_METADATA_FIELD, entry)


def _delimited(number: int, content: bytes) -> bytes:
    return _to_varint(number << 3 | 2) + _to_varint(len(content)) + content


def _to_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
