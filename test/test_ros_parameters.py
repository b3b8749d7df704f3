# SPDX-License-Identifier: Apache-2.0
"""Parameters: what is shipped, what is refused, and why."""

from dataclasses import fields
import math
from pathlib import Path
import re

import _needs_ros  # noqa: F401
from anomaly_seg_ros.classes import CITYSCAPES_CLASSES, CITYSCAPES_PALETTE
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.model_file import ModelCard
from anomaly_seg_ros.resources import resource
from anomaly_seg_ros.ros.parameters import (
    ALWAYS, declare_parameters, NAMES, NodeParameters, START, UNCONFIGURED)
import pytest
import rclpy
from rclpy.parameter import Parameter
import yaml


@pytest.fixture
def make_node():
    """Return a function that makes a plain node with parameters given at start."""
    context = rclpy.Context()
    context.init(args=[], domain_id=0)
    nodes = []

    def make(arguments=(), **values):
        node = rclpy.create_node(
            f'parameters_{len(nodes)}', context=context, cli_args=list(arguments),
            parameter_overrides=[Parameter(name, value=value) for name, value in values.items()],
            automatically_declare_parameters_from_overrides=True, enable_rosout=False,
            start_parameter_services=False)
        nodes.append(node)
        return node

    yield make
    for node in nodes:
        node.destroy_node()
    context.try_shutdown()


def card(**values: object) -> ModelCard:
    """Return a card of a model."""
    base: dict[str, object] = {
        'name': 'm', 'network': 'erfnet', 'classes': CITYSCAPES_CLASSES,
        'palette': CITYSCAPES_PALETTE, 'drivable': (0,), 'input_size_hw': (64, 128),
        'output_size_hw': (64, 128), 'score': 'msp', 'threshold': 0.25,
        'threshold_source': 'test', 'score_range': (0.0, 1.0)}
    return ModelCard(**(base | values))


def same(a: object, b: object) -> bool:
    """Compare values; NaN equals NaN."""
    return a == b or (isinstance(a, float) and isinstance(b, float)
                      and math.isnan(a) and math.isnan(b))


def test_the_shipped_file_holds_every_parameter_at_its_default(make_node) -> None:
    """Read by rcl itself, so that types are right too."""
    path = resource('config/anomaly_seg.yaml')
    names = yaml.safe_load(path.read_text())['/**']['ros__parameters']
    assert list(names) == [item.name for item in fields(NodeParameters)]
    node = make_node(['--ros-args', '--params-file', str(path)])
    given = {name: node.get_parameter(name).value for name in names if name != 'threshold'}
    assert len(given) == len(fields(NodeParameters)) - 1
    parameters = declare_parameters(node)
    for item in fields(NodeParameters):
        assert same(getattr(parameters, item.name), item.default), item.name


def test_defaults_without_a_file(make_node) -> None:
    parameters = declare_parameters(make_node())
    for item in fields(NodeParameters):
        assert same(getattr(parameters, item.name), item.default), item.name


def test_given_values_arrive(make_node) -> None:
    parameters = declare_parameters(make_node(
        model='x.onnx', threshold=-3.5, minimum_area_px=7, warm_up_size_hw=[480, 640],
        fallback_flags=['black'], frame_policy='every', autostart=False))
    assert (parameters.model, parameters.threshold, parameters.minimum_area_px) \
        == ('x.onnx', -3.5, 7)
    assert parameters.warm_up_size_hw == (480, 640)
    assert parameters.fallback_flags == ('black',)
    assert (parameters.frame_policy, parameters.autostart) == ('every', False)


def test_every_parameter_is_described_with_range_and_time_of_change(make_node) -> None:
    node = make_node()
    declare_parameters(node)
    for item in fields(NodeParameters):
        descriptor = node.describe_parameter(item.name)
        assert len(descriptor.description) > 20, item.name
        assert item.metadata['change'] in descriptor.additional_constraints
        assert descriptor.read_only == (item.metadata['change'] == START)
        for choice in item.metadata['choices'] or ():
            assert choice in descriptor.additional_constraints
        if item.metadata['between'] and not isinstance(item.default, tuple):
            ranges = [*descriptor.floating_point_range, *descriptor.integer_range]
            assert [(r.from_value, r.to_value) for r in ranges] == [item.metadata['between']]


@pytest.mark.parametrize(('values', 'text'), [
    ({'treshold': 1.0}, 'unknown parameters treshold; known are autostart, backend'),
    ({'threshold': 1}, 'threshold'),
    ({'threshold': math.inf}, 'threshold must be finite'),
    ({'minimum_area_px': 0}, 'minimum_area_px'),
    ({'minimum_area_px': 1.5}, 'minimum_area_px'),
    ({'overlay_opacity': 1.01}, 'overlay_opacity'),
    ({'region': 'road'}, 'region must be of everywhere, drivable'),
    ({'image_transport': 'theora'}, 'image_transport must be of raw, compressed'),
    ({'warm_up_size_hw': [480]}, 'warm_up_size_hw must be height and width'),
    ({'warm_up_size_hw': [480, 0]}, 'warm_up_size_hw must be height and width'),
    ({'warm_up_size_hw': [-1, 5]}, 'warm_up_size_hw must be 0 to 16384'),
    ({'fallback_flags': ['dark']}, 'fallback_flags must be of frozen, black'),
    ({'model': 5}, 'model'),
    ({'autostart': 'yes'}, 'autostart')])
def test_wrong_values_at_start_are_refused_with_the_name(make_node, values, text) -> None:
    with pytest.raises(UserError, match=text):
        declare_parameters(make_node(**values))


def test_time_of_change() -> None:
    parameters = NodeParameters()
    rules = {item.name: item.metadata['change'] for item in fields(NodeParameters)}
    assert set(rules.values()) == {ALWAYS, UNCONFIGURED, START}
    other = {'backend': 'x', 'autostart': False, 'threshold': 2.0, 'overlay_opacity': 0.1}
    assert parameters.changed({'threshold': 2.0, 'overlay_opacity': 0.1},
                              unconfigured=False).threshold == 2.0
    with pytest.raises(ValueError, match='backend can be set while the node is unconfigured; '
                                         'deactivate and clean up the node first'):
        parameters.changed({'backend': other['backend']}, unconfigured=False)
    assert parameters.changed({'backend': 'x'}, unconfigured=True).backend == 'x'
    with pytest.raises(ValueError, match='autostart can be set at start only'):
        parameters.changed({'autostart': False}, unconfigured=True)
    # Setting what it is already is no change.
    assert parameters.changed({'autostart': True, 'backend': 'cpu'},
                              unconfigured=False) == parameters.changed({}, unconfigured=False)


def test_obstacle_settings_take_the_card_unless_a_threshold_is_given() -> None:
    assert NodeParameters().obstacle_settings(card()).threshold == 0.25
    settings = NodeParameters(threshold=0.0, minimum_area_px=9).obstacle_settings(card())
    assert (settings.threshold, settings.minimum_area_px) == (0.0, 9)
    with pytest.raises(UserError, match='has no drivable classes'):
        NodeParameters(region='drivable').obstacle_settings(card(drivable=()))


def test_names() -> None:
    assert frozenset(item.name for item in fields(NodeParameters)) == NAMES


def test_the_documentation_names_every_parameter_with_its_default() -> None:
    text = (Path(__file__).resolve().parent.parent / 'docs' / 'node.md').read_text('utf-8')
    shipped = yaml.safe_load(resource('config/anomaly_seg.yaml').read_text())
    for item in fields(NodeParameters):
        row = re.search(rf'^\| `{item.name}` \| `(.*?)` \| .*? \| (.*) \|$', text, re.MULTILINE)
        assert row is not None, item.name
        value = yaml.safe_load(row[1])
        assert same(value, shipped['/**']['ros__parameters'][item.name]), item.name
        assert row[2] == item.metadata['description']


def test_the_shipped_parameters_are_explained_as_they_work() -> None:
    """The comment above each parameter begins with its description."""
    comments: dict[str, str] = {}
    comment: list[str] = []
    for line in resource('config/anomaly_seg.yaml').read_text('utf-8').splitlines():
        text = line.strip()
        if text.startswith('#'):
            comment.append(text.removeprefix('#').strip())
        else:
            comments[text.split(':')[0]] = ' '.join(comment)
            comment = []
    for item in fields(NodeParameters):
        assert comments[item.name].startswith(item.metadata['description']), item.name
