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
import hashlib
from pathlib import Path

from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.files import atomic_write_bytes
from anomaly_seg_ros.model_card import ModelCard, ModelFile

__all__ = ['CARD_KEY', 'DIGEST_KEY', 'load_model_file', 'ModelCard', 'ModelFile', 'seal_model',
           'write_model_file']

CARD_KEY = 'anomaly_seg_card'
DIGEST_KEY = 'anomaly_seg_sha256'

_METADATA_FIELD = 14  # ModelProto.metadata_props
_KNOWN_FIELDS = frozenset({1, 2, 3, 4, 5, 6, 7, 8, _METADATA_FIELD, 20, 25, 26})


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
