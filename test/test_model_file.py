# SPDX-License-Identifier: Apache-2.0
"""Model files: what is written comes back, and whatever was damaged is refused."""

from dataclasses import asdict, fields
import json
from pathlib import Path
from typing import Any

from anomaly_seg_ros.backends import open_backend
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.model_file import (
    CARD_KEY, DIGEST_KEY, load_model_file, ModelCard, seal_model, write_model_file)
from cards import card, identity_graph, identity_model
from hypothesis import given, settings, strategies as st
import onnx
import pytest

FULL = card(
    size_hw=(512, 1024), void_index=19, input_variant='device', frame_size_hw=(1024, 2048),
    output_size_hw=(1024, 2048), channel_order='bgr', mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225), score_parameters={'passes': 8.0}, temperature=1.7,
    precision='fp16', parity={'max_score_error': 1e-7, 'frames': 4}, weights_source='somewhere',
    weights_sha256='ab' * 32, licence='CC BY-NC 4.0 © ü', provenance={'python': '3.11'})


@pytest.mark.parametrize('original', [card(), FULL])
def test_a_card_survives_json(original: ModelCard) -> None:
    """Every entry comes back with its value and type, and equal cards have equal bytes."""
    again = ModelCard.from_json(original.to_json())
    assert again == original
    assert again.to_json() == original.to_json()
    for entry in fields(ModelCard):
        assert type(getattr(again, entry.name)) is type(getattr(original, entry.name)), entry.name


def test_a_written_file_is_onnx_with_the_card_inside(tmp_path: Path) -> None:
    """The graph is unchanged for the onnx library; older metadata is gone."""
    graph = identity_graph()
    graph.metadata_props.add(key='note', value='old')
    path = tmp_path / 'm.onnx'
    write_model_file(path, graph.SerializeToString(), card())
    loaded = onnx.load(path)
    onnx.checker.check_model(loaded)
    assert loaded.graph == graph.graph
    assert sorted(p.key for p in loaded.metadata_props) == sorted([CARD_KEY, DIGEST_KEY])

    model = load_model_file(path)
    assert model.card == card()
    assert model.data == path.read_bytes()
    again = seal_model(model.data, model.card)
    assert again == model.data


def test_metadata_order_and_other_writers_do_not_matter(tmp_path: Path) -> None:
    """A file that onnx has read and written again is still whole."""
    model = identity_model(tmp_path / 'm.onnx')
    onnx.save(onnx.load(model.path), tmp_path / 'again.onnx')
    assert load_model_file(tmp_path / 'again.onnx').card == model.card


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """With what to do."""
    with pytest.raises(UserError, match=r'nothing\.onnx: no such model file.*export'):
        load_model_file(tmp_path / 'nothing.onnx')


def test_a_folder_is_refused(tmp_path: Path) -> None:
    """Named, with the system's reason."""
    with pytest.raises(UserError, match=r'cannot be read \(Is a directory\)'):
        load_model_file(tmp_path)


@pytest.mark.parametrize('content', [
    b'', b'\x00', b'PK\x03\x04' + bytes(100), b'<html>not found</html>', b'\x89PNG\r\n\x1a\n' * 9,
    b'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n', bytes(1000),
    b'\xff' * 64])
def test_other_formats_are_refused(content: bytes, tmp_path: Path) -> None:
    """Whatever it is, the error names the file and what to do."""
    path = tmp_path / 'bad.onnx'
    path.write_bytes(content)
    with pytest.raises(UserError, match=r'bad\.onnx: not a whole ONNX file'):
        load_model_file(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    """Cut anywhere, also exactly between two fields, the file is never taken for whole."""
    data = identity_model(tmp_path / 'm.onnx').data
    path = tmp_path / 'cut.onnx'
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match=r'cut\.onnx'):
            load_model_file(path)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_every_changed_byte_is_refused(tmp_path_factory: pytest.TempPathFactory,
                                       data: st.DataObject) -> None:
    """A bit flipped in the graph, the card or the digest is found."""
    whole = seal_model(identity_graph().SerializeToString(), card())
    position = data.draw(st.integers(0, len(whole) - 1))
    value = data.draw(st.integers(1, 255))
    changed = bytearray(whole)
    changed[position] ^= value
    path = tmp_path_factory.mktemp('m') / 'm.onnx'
    path.write_bytes(changed)
    with pytest.raises(UserError):
        load_model_file(path)


def test_an_edited_card_is_refused(tmp_path: Path) -> None:
    """A threshold written over by hand does not go unnoticed."""
    model = onnx.load(identity_model(tmp_path / 'm.onnx').path)
    for entry in model.metadata_props:
        if entry.key == CARD_KEY:
            entry.value = entry.value.replace('"threshold": -0.5', '"threshold": -0.1')
    onnx.save(model, tmp_path / 'edited.onnx')
    with pytest.raises(UserError, match='graph or card changed since export'):
        load_model_file(tmp_path / 'edited.onnx')


def test_an_edited_graph_is_refused(tmp_path: Path) -> None:
    """So is another weight."""
    model = onnx.load(identity_model(tmp_path / 'm.onnx').path)
    model.graph.node[0].attribute[0].i = 2
    onnx.save(model, tmp_path / 'edited.onnx')
    with pytest.raises(UserError, match='graph or card changed since export'):
        load_model_file(tmp_path / 'edited.onnx')


def test_onnx_without_a_card_says_how_to_get_one(tmp_path: Path) -> None:
    """A plain ONNX file needs the head fused in first."""
    onnx.save(identity_graph(), tmp_path / 'plain.onnx')
    with pytest.raises(UserError, match=r'without an anomaly_seg_ros card.*export onnx'):
        load_model_file(tmp_path / 'plain.onnx')


def _write_with_card(path: Path, text: str) -> None:
    """Seal ``text`` as the card, valid or not, with a right digest."""
    class Card:
        def to_json(self) -> str:
            return text
    path.write_bytes(seal_model(identity_graph().SerializeToString(), Card()))


@pytest.mark.parametrize(('change', 'message'), [
    ({'colour': 'red'}, 'unknown entries.*colour'),
    ({'schema': 2}, 'schema must be 1, got 2'),
    ({'classes': []}, '1 to 255 names'),
    ({'classes': ['a']}, 'palette must have one colour a class'),
    ({'palette': [[0, 0, 0], [1, 1, 1], [2, 2, 256]]}, '0..255'),
    ({'drivable': [3]}, 'drivable'),
    ({'input_size_hw': [0, 4]}, 'input_size_hw'),
    ({'output_size_hw': [4.5, 4]}, 'output_size_hw'),
    ({'input_variant': 'gpu'}, 'input_variant'),
    ({'input_variant': 'device'}, 'frame_size_hw'),
    ({'frame_channel_order': 'gbr'}, 'frame_channel_order'),
    ({'channel_order': 'grb'}, 'channel_order'),
    ({'std': [1, 1, 0]}, 'std positive'),
    ({'precision': 'fp8'}, 'precision'),
    ({'temperature': 0}, 'temperature'),
    ({'threshold': None}, 'not complete'),
    ({'score_range': [1, 0]}, 'increasing')])
def test_a_bad_card_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    """The error names the file and the entry."""
    path = tmp_path / 'm.onnx'
    _write_with_card(path, json.dumps({**asdict(card()), **change}))
    with pytest.raises(UserError, match=rf'm\.onnx: bad model card: .*{message}'):
        load_model_file(path)


@pytest.mark.parametrize('missing', ['name', 'classes', 'threshold', 'score'])
def test_a_card_without_an_entry_is_refused(missing: str, tmp_path: Path) -> None:
    """The error names what is missing."""
    values = asdict(card())
    del values[missing]
    path = tmp_path / 'm.onnx'
    _write_with_card(path, json.dumps(values))
    with pytest.raises(UserError, match=f'not complete.*{missing}'):
        load_model_file(path)


@pytest.mark.parametrize('text', ['{', '[]', '"x"', '{"threshold": NaN}'])
def test_a_card_that_is_no_object_is_refused(text: str, tmp_path: Path) -> None:
    """JSON that is damaged or of another kind."""
    path = tmp_path / 'm.onnx'
    _write_with_card(path, text)
    with pytest.raises(UserError, match='bad model card'):
        load_model_file(path)


@pytest.mark.parametrize('change', [
    {'input_size_hw': (24, 48)}, {'output_size_hw': (48, 80)},
    {'input_variant': 'device', 'frame_size_hw': (48, 80), 'output_size_hw': (48, 80)}])
def test_a_card_that_disagrees_with_its_graph_is_refused(change: dict[str, Any],
                                                         tmp_path: Path) -> None:
    """The backend compares them and says what each promises."""
    model = identity_model(tmp_path / 'm.onnx', **change)
    with pytest.raises(UserError, match=r'm\.onnx: card and graph disagree.*Export'):
        open_backend(model, 'cpu')
