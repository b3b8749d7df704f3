# SPDX-License-Identifier: Apache-2.0
"""
The node's parameters: one frozen dataclass, checked as a whole.

Each field carries its description, its range and when it may change. Nothing else in the package
reads ROS parameters.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
import math
from typing import Any

from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.model_file import ModelCard
from anomaly_seg_ros.obstacles import ObstacleSettings, REGIONS, settings_for
from anomaly_seg_ros.quality import FLAGS
from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException
from rclpy.node import Node

# When a parameter may change.
ALWAYS = 'at any time; holds from the next frame on'
UNCONFIGURED = 'while the node is unconfigured'
START = 'at start only'

# image_transport -> type of ~/input/image.
IMAGE_TYPES = {'raw': 'sensor_msgs/msg/Image', 'compressed': 'sensor_msgs/msg/CompressedImage'}


def _parameter(default: Any, description: str, change: str = ALWAYS, *,
               between: tuple[float, float] | None = None,
               choices: Iterable[str] | None = None) -> Any:
    return field(default=default, metadata={
        'description': description, 'change': change, 'between': between,
        'choices': tuple(choices) if choices is not None else None})


@dataclass(frozen=True)
class NodeParameters:
    """Every parameter of the node, at its default; see each field's description."""

    model: str = _parameter(
        '', 'Model file (.onnx); empty takes the bundled one, which knows only the synthetic '
        'world. While active the old model answers until the new one is warm.')
    backend: str = _parameter(
        'cpu', 'Where the network runs: cpu, cuda, tensorrt, openvino, ... or auto.',
        UNCONFIGURED)
    device: int = _parameter(
        0, 'Number of the GPU, for the backends cuda, tensorrt and onnxruntime-tensorrt.',
        UNCONFIGURED, between=(0, 255))
    build_engine: bool = _parameter(
        False, 'Backend tensorrt: build the engine when configuring where there is none that '
        'fits, which takes minutes. Otherwise configuring fails with the command to build it.',
        UNCONFIGURED)
    spinning: bool = _parameter(
        False, 'Backend cpu: idle threads spin. A little faster alone, much slower beside other '
        'programs.', UNCONFIGURED)
    threads: int = _parameter(
        0, 'Threads of the network; 0 takes every core allowed.', UNCONFIGURED,
        between=(0, 256))
    image_threads: int = _parameter(
        0, 'Threads of image operations (OpenCV); 0 takes every core allowed.', UNCONFIGURED,
        between=(0, 256))
    warm_up_size_hw: tuple[int, ...] = _parameter(
        (0, 0), 'Height and width of the camera frames that configure warms up with; 0, 0 takes '
        'the size at which the network runs.', UNCONFIGURED, between=(0, 16384))
    autostart: bool = _parameter(
        True, 'Configure and activate at start, without a lifecycle manager.', START)

    image_transport: str = _parameter(
        'raw', 'Type of ~/input/image: raw is sensor_msgs/Image, compressed is '
        'sensor_msgs/CompressedImage.', UNCONFIGURED, choices=IMAGE_TYPES)
    reduced_decode: bool = _parameter(
        True, 'Decode JPEG at a half, a quarter or an eighth where the network still is no '
        'larger and the size divides evenly. Faster; the outputs keep the size of the camera, '
        'but the network sees slightly other pixels than after a full decode.')
    input_reliability: str = _parameter(
        'best_effort', 'QoS of ~/input/image. best_effort receives from every publisher.',
        UNCONFIGURED, choices=('best_effort', 'reliable'))
    output_reliability: str = _parameter(
        'reliable', 'QoS of the outputs. reliable serves every subscriber.',
        UNCONFIGURED, choices=('best_effort', 'reliable'))
    qos_depth: int = _parameter(
        5, 'QoS history depth of the outputs, and under frame_policy every of the input, in '
        'messages.', UNCONFIGURED,
        between=(1, 1000))
    frame_policy: str = _parameter(
        'latest', 'latest: the newest frame replaces one that waits. every: frames wait in a '
        'queue, for bags.', UNCONFIGURED, choices=('latest', 'every'))
    queue_size: int = _parameter(
        32, 'Frames that may wait under frame_policy every; beyond, the oldest is dropped.',
        UNCONFIGURED, between=(1, 10000))
    max_frame_age_ms: float = _parameter(
        0.0, 'Drop frames whose stamp is older than this when their turn comes; 0 keeps all.',
        between=(0.0, 3.6e6))
    pause_without_subscribers: bool = _parameter(
        True, 'Do not run the network while no output has a subscriber.')

    threshold: float = _parameter(
        math.nan, 'A pixel is an obstacle when score >= threshold, in units of the score; .nan '
        'takes the threshold on the card of the model.')
    minimum_area_px: int = _parameter(
        50, 'Obstacles of fewer pixels of the camera image are dropped.', between=(1, 10**8))
    region: str = _parameter(
        'everywhere', 'everywhere: obstacles count wherever they are. drivable: only those that '
        'touch the convex hull of the drivable classes.', choices=REGIONS)
    overlay_opacity: float = _parameter(
        0.5, 'Weight of the class colours in ~/output/overlay.', between=(0.0, 1.0))

    quality_checks: bool = _parameter(
        True, 'Flag frozen, black, over-exposed, blurred and half-transmitted frames.')
    fallback_mask: bool = _parameter(
        False, 'Publish a mask that is an obstacle everywhere whenever the node cannot vouch for '
        'its answer; ~/output/fallback carries the header of each such mask.')
    fallback_flags: tuple[str, ...] = _parameter(
        ('frozen', 'black', 'over_exposed', 'half_transmitted'),
        'Input-quality flags for which the node does not vouch; used with fallback_mask.',
        choices=FLAGS)

    diagnostics_period_s: float = _parameter(
        1.0, 'Time between two messages on /diagnostics.', UNCONFIGURED, between=(0.05, 60.0))
    max_allowed_processing_time_ms: float = _parameter(
        500.0, 'WARN when a frame takes longer from its arrival to its last output; 0: never, and '
        'none is too slow for max_acceptable_consecutive_delay_ms either.', between=(0.0, 3.6e6))
    max_acceptable_consecutive_delay_ms: float = _parameter(
        2000.0, 'ERROR when frames have taken longer than max_allowed_processing_time_ms for '
        'this time without a pause; 0: never.', between=(0.0, 3.6e6))
    stale_input_s: float = _parameter(
        2.0, 'ERROR when no frame has come for this time.', between=(0.05, 3600.0))
    stalled_worker_s: float = _parameter(
        5.0, 'ERROR when one frame has been worked on for this time.', between=(0.05, 3600.0))
    max_consecutive_failures: int = _parameter(
        3, 'ERROR when this many frames in a row got no answer: bad, too old or failed.',
        between=(1, 10**6))

    def __post_init__(self) -> None:
        """Check every value; the message says what was expected."""
        for item in fields(self):
            value, rule = getattr(self, item.name), item.metadata
            parts = value if isinstance(value, tuple) else (value,)
            if rule['choices'] and not set(parts) <= set(rule['choices']):
                raise ValueError(f'{item.name} must be of {", ".join(rule["choices"])}, '
                                 f'got {value!r}')
            if rule['between']:
                low, high = rule['between']
                if not all(low <= part <= high for part in parts):  # also refuses NaN
                    raise ValueError(f'{item.name} must be {low} to {high}, got {value}')
        if math.isinf(self.threshold):
            raise ValueError(f'threshold must be finite, or .nan for that on the card, '
                             f'got {self.threshold}')
        if len(self.warm_up_size_hw) != 2 or (0 in self.warm_up_size_hw
                                              and any(self.warm_up_size_hw)):
            raise ValueError('warm_up_size_hw must be height and width, or 0, 0, '
                             f'got {list(self.warm_up_size_hw)}')

    def obstacle_settings(self, card: ModelCard) -> ObstacleSettings:
        """
        Return the settings for one model; its card's threshold unless one is set here.

        Raises
        ------
        UserError
            If the region needs drivable classes and the model has none.

        """
        threshold = card.threshold if math.isnan(self.threshold) else self.threshold
        return settings_for(card, ObstacleSettings(threshold, self.minimum_area_px, self.region))

    def differing(self, other: 'NodeParameters') -> set[str]:
        """Return the names of the parameters in which ``other`` differs."""
        # By their text, in which NaN equals itself.
        return {item.name for item in fields(self)
                if repr(getattr(self, item.name)) != repr(getattr(other, item.name))}

    def changed(self, values: Mapping[str, Any], *, unconfigured: bool) -> 'NodeParameters':
        """
        Return a copy with ``values``; ROS arrays become tuples.

        Raises
        ------
        ValueError
            If a value is out of range, or may not change in this state.

        """
        rules = {item.name: item.metadata['change'] for item in fields(self)}
        frozen = {name: _plain(value) for name, value in values.items()}
        for name, value in frozen.items():
            if value == getattr(self, name):
                continue
            if rules[name] == START or (rules[name] == UNCONFIGURED and not unconfigured):
                raise ValueError(f'{name} can be set {rules[name]}' + (
                    '' if rules[name] == START else
                    '; deactivate and clean up the node first'))
        return replace(self, **frozen)


NAMES = frozenset(item.name for item in fields(NodeParameters))


def declare_parameters(node: Node) -> NodeParameters:
    """
    Declare all parameters with their descriptors and return the values given at start.

    ``node`` must have been made with ``automatically_declare_parameters_from_overrides``: only so
    can a misspelt name be noticed instead of ignored.

    Raises
    ------
    UserError
        If a name is unknown, or a value has the wrong type or is out of range.

    """
    given = [name for name in node.get_parameters_by_prefix('')
             if name not in ('use_sim_time', 'start_type_description_service')
             and not name.startswith('qos_overrides')]
    unknown = sorted(set(given) - NAMES)
    if unknown:
        raise UserError(f'unknown parameters {", ".join(unknown)}; known are '
                        f'{", ".join(sorted(NAMES))}. Check parameter file and command line.')
    for name in given:
        node.undeclare_parameter(name)
    values = {}
    for item in fields(NodeParameters):
        default = list(item.default) if isinstance(item.default, tuple) else item.default
        try:
            parameter = node.declare_parameter(item.name, default, _descriptor(item))
        except InvalidParameterTypeException as error:
            hint = '; write 1.0, not 1' if isinstance(default, float) else ''
            raise UserError(f'parameter {item.name}: {error}{hint}') from error
        except InvalidParameterValueException as error:
            raise UserError(f'parameter {item.name}: {error}') from error
        values[item.name] = _plain(parameter.value)
    try:
        return NodeParameters(**values)
    except ValueError as error:
        raise UserError(f'parameter {error}') from error


def _plain(value: Any) -> Any:
    """Turn ROS arrays and lists into tuples."""
    return value if isinstance(value, (str, bool, int, float)) else tuple(value)


def _descriptor(item: Any) -> ParameterDescriptor:
    rule = item.metadata
    descriptor = ParameterDescriptor(
        description=rule['description'], read_only=rule['change'] == START,
        additional_constraints=f'Can be set {rule["change"]}.')
    if rule['choices']:
        descriptor.additional_constraints += f' One of {", ".join(rule["choices"])}.'
    if rule['between']:
        low, high = rule['between']
        if isinstance(item.default, float):
            descriptor.floating_point_range = [
                FloatingPointRange(from_value=float(low), to_value=float(high), step=0.0)]
        elif isinstance(item.default, int):
            descriptor.integer_range = [
                IntegerRange(from_value=int(low), to_value=int(high), step=1)]
    return descriptor
