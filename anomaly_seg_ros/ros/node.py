# SPDX-License-Identifier: Apache-2.0
"""
The lifecycle node ``anomaly_seg``: camera frames in, labels, score and obstacle masks out.

The executor's thread takes messages, the worker's thread answers them, the watchdog's thread
reports. A callback here converts, calls and publishes; the pipeline is in the core.
"""

from collections.abc import Callable, Mapping, Sequence
import gc
import logging
import math
import os
import signal
import sys
import threading
import time
import traceback
from typing import Any

from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.ros.conversions import full_name, stamp_to_ns
from anomaly_seg_ros.ros.diagnostics import assess, ERROR, Monitor, NodeState, Status, to_message
from anomaly_seg_ros.ros.inbox import Freshness, Gate, Mailbox
from anomaly_seg_ros.ros.loading import (
    LoadedModel, open_model, read_model, read_model_meanwhile)
from anomaly_seg_ros.ros.model_swap import ModelSwap
from anomaly_seg_ros.ros.outputs import Outputs
from anomaly_seg_ros.ros.parameters import declare_parameters, IMAGE_TYPES, NAMES
from anomaly_seg_ros.ros.transport import SharedMemoryCheck
from anomaly_seg_ros.ros.watchdog import Watchdog
from anomaly_seg_ros.ros.worker import Arrival, Worker
from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import SetParametersResult
import rclpy
from rclpy.clock import Clock, ClockType
from rclpy.event_handler import SubscriptionEventCallbacks
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.qos import qos_profile_sensor_data, QoSProfile, ReliabilityPolicy
from rclpy.utilities import get_rmw_implementation_identifier
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import Header

INPUT_TOPIC = '~/input/image'
MASK_TOPIC = '~/output/obstacle_mask'
_STOP_TIMEOUT_S = 10.0


class AnomalySegNode(LifecycleNode):  # type: ignore[misc]
    """See docs/node.md for topics, parameters and diagnostics."""

    def __init__(self, **options: Any) -> None:
        """
        Declare the parameters; with ``autostart``, configure and activate once spinning.

        Raises
        ------
        UserError
            If a parameter is unknown or out of range.

        """
        try:
            super().__init__('anomaly_seg', automatically_declare_parameters_from_overrides=True,
                             **options)
        except ValueError as error:
            raise UserError(f'a parameter has a value that rclpy does not take: {error}. An empty '
                            'list has no type in ROS; leave such a parameter out.') from error
        self._settings = declare_parameters(self)
        self._monitor = Monitor()
        self._worker: Worker | None = None
        self._outputs: Outputs | None = None
        self._inputs: list[Any] = []
        self._lifecycle = 'unconfigured'
        self._transition_error = ''
        # Held while publishers are looked at by the watchdog, made or destroyed by a transition.
        self._outputs_lock = threading.Lock()
        self._swap = ModelSwap()
        self._levels: dict[str, int] = {}
        self._frame_id = ''
        self._shared_memory = SharedMemoryCheck(get_rmw_implementation_identifier(), os.environ)
        self._diagnostics = self.create_publisher(DiagnosticArray, '/diagnostics', 10)
        self.add_on_set_parameters_callback(self._check_parameters)
        self.add_post_set_parameters_callback(self._apply_parameters)
        self._swap_done = self.create_guard_condition(self._finish_swap)
        # Wakes the executor, which then looks at the gate again.
        self._worker_waits = self.create_guard_condition(lambda: None)
        self._sequence_number = 0
        self._watchdog = self._new_watchdog()
        self._autostart = None
        if self._settings.autostart:
            self._autostart = self.create_timer(0.0, self._start,
                                                clock=Clock(clock_type=ClockType.STEADY_TIME))

    # Lifecycle

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load the model and warm it up; without success the node stays unconfigured."""
        return self._transit('configuring', 'inactive', self._configure)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Start to receive frames."""
        super().on_activate(state)  # publishers first: the first answer finds them enabled
        return self._transit('activating', 'active', self._activate)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop; when this returns, nothing more is published."""
        result = self._transit('deactivating', 'inactive', self._deactivate)
        super().on_deactivate(state)
        return result

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free the device, the thread and the publishers."""
        return self._transit('cleaningup', 'unconfigured', self._free)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free everything, from any state."""
        return self._transit('shuttingdown', 'finalized', self._free)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free everything and go back to unconfigured; the reason stays in the diagnostics."""
        reason = self._transition_error
        result = self._transit('errorprocessing', 'unconfigured', self._free)
        self._transition_error = '; then '.join(filter(None, (reason, self._transition_error)))
        return result

    def close(self) -> bool:
        """
        Stop the threads and free the device, before the node is destroyed.

        Returns False if a thread did not end; the process can then not end in order.
        """
        self._watchdog.stop()
        try:
            self._free()
        except RuntimeError as error:
            self.get_logger().fatal(str(error))
            return False
        return self._swap.join(_STOP_TIMEOUT_S)

    def report_error(self, error: Exception) -> None:
        """Count and show an error that a callback did not handle."""
        text = f'{type(error).__name__}: {error}'
        self._monitor.event('callback_errors')
        self._monitor.error(text)
        self.get_logger().error(text, throttle_duration_sec=5.0)

    def _transit(self, during: str, after: str,
                 action: Callable[[], None]) -> TransitionCallbackReturn:
        """Run a transition; what the user can mend is a failure, anything else an error."""
        before, self._lifecycle = self._lifecycle, during
        self._transition_error = ''
        try:
            action()
        except UserError as error:
            self._lifecycle = before
            self._transition_error = f'{during}: {error}'
            self.get_logger().error(self._transition_error)
            return TransitionCallbackReturn.FAILURE
        except Exception as error:  # the state machine goes on to error processing
            self._transition_error = f'{during}: {type(error).__name__}: {error}'
            self.get_logger().error(f'{self._transition_error}\n{traceback.format_exc()}')
            return TransitionCallbackReturn.ERROR
        self._lifecycle = after
        self.get_logger().info(after)
        return TransitionCallbackReturn.SUCCESS

    def _start(self) -> None:
        assert self._autostart is not None
        self.destroy_timer(self._autostart)
        if self.trigger_configure() == TransitionCallbackReturn.SUCCESS:
            self.trigger_activate()

    def _configure(self) -> None:
        if not self._swap.join(_STOP_TIMEOUT_S):
            raise UserError('the model of an earlier change is still being loaded; try again')
        self._finish_swap()
        parameters = self._settings
        self._watchdog.stop()
        self._watchdog = self._new_watchdog()
        self._swap = ModelSwap()
        self._monitor.idle()  # a worker that got stuck earlier is no longer looked at
        began_s = time.monotonic()
        model = open_model(read_model(parameters.model), parameters)
        self.get_logger().info(f'{model.path}: {model.card.name} on '
                               f'{model.about["backend"]}, warm in '
                               f'{time.monotonic() - began_s:.1f} s')
        try:
            with self._outputs_lock:
                self._outputs = Outputs(self, parameters)
            self._mailbox: Mailbox[Arrival] = Mailbox(
                1 if parameters.frame_policy == 'latest' else parameters.queue_size,
                on_waiting=self._worker_waits.trigger)
            self._worker = Worker(
                model, self._mailbox, self._outputs, self._monitor, parameters,
                now_ns=lambda: self.get_clock().now().nanoseconds,
                log_error=self._log_error,
                on_swapped=self._swapped)
        except BaseException:
            model.close()
            raise
        _freeze_garbage_collection()

    def _activate(self) -> None:
        assert self._worker is not None and self._outputs is not None
        parameters = self._settings
        self._publish_label_info(self._worker.model)
        self._monitor.activated()
        self._worker.activate()
        latest = parameters.frame_policy == 'latest'
        qos = QoSProfile(depth=1 if latest else parameters.qos_depth,
                         reliability=ReliabilityPolicy[parameters.input_reliability.upper()])
        kind = Image if parameters.image_transport == 'raw' else CompressedImage
        self._sequence_number = 0
        self._freshness = Freshness()
        self._inputs = [
            self.create_subscription(
                kind, INPUT_TOPIC, self._on_image, qos,
                callback_group=Gate(lambda: self._mailbox.waiting) if latest else None,
                event_callbacks=SubscriptionEventCallbacks(
                    message_lost=lambda event: self._monitor.event(
                        'transport_lost', event.total_count_change),
                    incompatible_qos=self._on_incompatible_qos)),
            self.create_subscription(
                CameraInfo, '~/input/camera_info', self._on_camera_info,
                qos_profile_sensor_data)]

    def _deactivate(self) -> None:
        for subscription in self._inputs:
            self.destroy_subscription(subscription)
        self._inputs = []
        if self._worker is not None:
            self._worker.deactivate()

    def _free(self) -> None:
        self._deactivate()
        worker, self._worker = self._worker, None
        outputs, self._outputs = self._outputs, None
        self._swap.cancel()
        stopped = worker is None or worker.stop(_STOP_TIMEOUT_S)
        if outputs is not None:  # a worker that is stuck may not publish any more either
            with self._outputs_lock:
                outputs.destroy()
        if not stopped:
            raise RuntimeError(f'the worker did not end within {_STOP_TIMEOUT_S:.0f} s; its '
                               'device stays occupied until this process ends')

    # Input

    def _on_image(self, message: Any, info: Mapping[str, Any]) -> None:
        arrived_s = time.perf_counter()
        worker = self._worker
        if worker is None:
            return
        stamp_ns = stamp_to_ns(message.header)
        self._frame_id = message.header.frame_id
        skipped = self._skipped(info['publication_sequence_number'])
        self._monitor.received(
            stamp_ns, (self.get_clock().now().nanoseconds - stamp_ns) / 1e6, skipped)
        latest = self._settings.frame_policy == 'latest'
        wait_s = self._freshness.wait_s(
            info['received_timestamp'], skipped, time.time_ns()) if latest else 0.0
        arrival = Arrival(message, stamp_ns, arrived_s, worker.activation)
        if self._mailbox.put(arrival, wait_s) is not None:
            self._monitor.dropped('superseded' if latest else 'queue_full')

    def _take_frame(self) -> None:
        """Take a frame if there is one, as the executor does, while a callback occupies that."""
        if not self._inputs or (self._settings.frame_policy == 'latest'
                                and not self._mailbox.waiting):
            return
        images = self._inputs[0]
        with images.handle:
            taken = images.handle.take_message(images.msg_type, images.raw)
        if taken is not None:
            self._on_image(*taken)

    def _skipped(self, sequence_number: int | None) -> int:
        """Return how many frames the publisher sent since the last one that was taken."""
        if sequence_number is None:  # not every middleware numbers them
            return 0
        before, self._sequence_number = self._sequence_number, sequence_number
        if self.count_publishers(self._input_topic()) > 1:
            self._sequence_number = 0  # it may be another one's than the next frame's
            return 0
        # The first one, or a restarted publisher: nothing to compare with.
        if before == 0 or sequence_number <= before:
            return 0
        return sequence_number - before - 1

    def _on_camera_info(self, message: CameraInfo) -> None:
        if self._outputs is not None:
            self._outputs.camera_info = message

    def _on_incompatible_qos(self, event: Any) -> None:
        self._monitor.event('incompatible_qos', event.total_count_change)
        self.get_logger().warning(
            f'a publisher of {self._input_topic()} offers another QoS than input_reliability '
            f'{self._settings.input_reliability}; nothing will be received from it')

    # Parameters and model swap

    def _check_parameters(self, changes: Sequence[Parameter]) -> SetParametersResult:
        """Refuse what is out of range, not changeable now, or a model that is not whole."""
        values = {change.name: change.value for change in changes if change.name in NAMES}
        unconfigured = self._worker is None
        try:
            parameters = self._settings.changed(values, unconfigured=unconfigured)
            if self._worker is None or self._swap.restoring:
                return SetParametersResult(successful=True)
            if 'model' in values:  # the same name, too: the file may be another one by now
                model = read_model_meanwhile(parameters.model, self._take_frame, self.context.ok)
                self._swap.check(model, self._worker, parameters)
            self._swap.check_settings(self._worker, parameters)
        except (UserError, ValueError) as error:
            return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)

    def _apply_parameters(self, changes: Sequence[Parameter]) -> None:
        values = {change.name: change.value for change in changes if change.name in NAMES}
        self._settings = self._settings.changed(values, unconfigured=True)
        worker = self._worker
        if worker is None:
            return
        worker.parameters = self._settings
        if 'model' in values and not self._swap.restoring:
            self._swap.begin(self._settings, worker, self._swap_failed)
        if 'threshold' in values:
            self._publish_label_info(worker.model)

    def _swap_failed(self) -> None:
        """Say so at once, and let the executor's thread set the parameter back."""
        if self.context.ok():
            self.get_logger().error(f'model not changed: {self._swap.report}')
        self._swap_done.trigger()

    def _finish_swap(self) -> None:
        """Set the parameter back after a model that could not be opened, unless it is another."""
        if self._swap.given_up is None:
            return
        failed, before = self._swap.given_up
        with self._swap.restore():
            if self._settings.model == failed:
                self.set_parameters([Parameter('model', value=before)])

    def _swapped(self, model: LoadedModel) -> None:
        self._swap.report = f'{model.path} took over'
        self.get_logger().info(self._swap.report)
        self._publish_label_info(model)

    def _publish_label_info(self, model: LoadedModel) -> None:
        if self._outputs is not None:
            self._outputs.publish_label_info(
                model.card, self._settings.obstacle_settings(model.card).threshold)

    # Diagnostics

    def _new_watchdog(self) -> Watchdog:
        return Watchdog(self._settings.diagnostics_period_s, self._report, self._log_error)

    def _log_error(self, text: str) -> None:
        """Log an error of a thread; after shutdown publishing fails, and that is no news."""
        if self.context.ok():
            self.get_logger().error(text, throttle_duration_sec=5.0)

    def _report(self) -> None:
        parameters, monitor, worker = self._settings, self._monitor, self._worker
        if parameters.fallback_mask and self._lifecycle == 'active' and worker is not None \
                and (monitor.since_input_s > parameters.stale_input_s
                     or monitor.busy_s > parameters.stalled_worker_s or not worker.alive):
            info = self._outputs.camera_info if self._outputs is not None else None
            frame_id = self._frame_id or (info.header.frame_id if info is not None else '')
            worker.publish_fallback(Header(stamp=self.get_clock().now().to_msg(),
                                           frame_id=frame_id))
        statuses = assess(monitor.snapshot(), self._state(), parameters)
        self._diagnostics.publish(to_message(
            statuses, full_name(self), self._input_topic(), self.get_clock().now().to_msg()))
        for status in statuses:
            if status.level > self._levels.get(status.part, 0):
                self._log_status(status)
            self._levels[status.part] = status.level

    def _log_status(self, status: Status) -> None:
        text = f'{status.part}: {status.message}'
        # rclpy allows one severity for each line of source.
        if status.level == ERROR:
            self.get_logger().error(text)
        else:
            self.get_logger().warning(text)

    def _state(self) -> NodeState:
        worker = self._worker
        with self._outputs_lock:
            subscribed = self._outputs.subscribed() if self._outputs is not None else ()
            rivals = self.count_publishers(self.resolve_topic_name(MASK_TOPIC)) \
                - (self._outputs is not None)
        inputs = [publisher.topic_type for publisher in
                  self.get_publishers_info_by_topic(self._input_topic())]
        model: dict[str, str] = {}
        note, error = '', self._transition_error
        if worker is not None:
            if not worker.alive and worker is self._worker:  # else it is being freed
                error = 'the worker thread has ended; clean up and configure the node again'
            card, parameters = worker.model.card, worker.parameters
            settings = parameters.obstacle_settings(card)
            source = card.threshold_source if math.isnan(parameters.threshold) \
                else 'parameter threshold'
            model = {**worker.model.about, 'threshold': f'{settings.threshold:.6g}',
                     'threshold_source': source, 'region': settings.region,
                     'minimum_area_px': str(settings.minimum_area_px)}
            if source.startswith('provisional'):
                note = f'threshold is {source}'
        return NodeState(
            lifecycle=self._lifecycle, error=error, model=model, model_note=note,
            transport_note=self._shared_memory.problem(),
            swap=self._swap.report, swap_failed=self._swap.failed,
            subscribed=subscribed, publishers=len(inputs),
            other_types=sorted(set(inputs) - {IMAGE_TYPES[self._settings.image_transport]}),
            input_topic=self._input_topic(), rivals=max(0, rivals),
            paused=not subscribed and self._settings.pause_without_subscribers,
            has_time=self.get_clock().now().nanoseconds > 0)

    def _input_topic(self) -> str:
        return self.resolve_topic_name(INPUT_TOPIC)


def _freeze_garbage_collection() -> None:
    """Let Python's later collections pass over what is here now: 7 ms less for a frame."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def main(args: Sequence[str] | None = None) -> int:
    """
    Run the node until it is interrupted.

    Returns 0, or 2 for a wrong parameter; exits with 1 if the worker is stuck at the end.
    """
    logging.basicConfig(level=logging.INFO, format='[%(levelname)s] [%(name)s]: %(message)s')
    # rclpy ends the context on SIGINT; a KeyboardInterrupt in the middle of its callbacks on top
    # of that would leave them half done.
    signal.signal(signal.SIGINT, lambda number, frame: None)
    # The longest that a thread waits for Python's lock; 5 ms by default, too long for a frame.
    sys.setswitchinterval(5e-4)
    try:
        rclpy.init(args=args)
    except RuntimeError as error:  # a parameter file, remapping or log level that rcl cannot read
        print(f'anomaly_seg: {error}', file=sys.stderr)
        return 2
    try:
        node = AnomalySegNode()
    except UserError as error:
        print(f'anomaly_seg: {error}', file=sys.stderr)
        rclpy.try_shutdown()
        return 2
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        while _spin_once(executor, node):
            pass
    finally:
        if not node.close():
            # Ending in order would wait for ever, or free what the thread still uses.
            os._exit(1)
        node.destroy_node()
        rclpy.try_shutdown()
    return 0


def _spin_once(executor: SingleThreadedExecutor, node: AnomalySegNode) -> bool:
    """Run one callback; False once the node is to end. A callback's error does not end it."""
    try:
        # With a limit: a signal that comes while the executor begins to wait may not wake it.
        executor.spin_once(timeout_sec=0.5)
    except ExternalShutdownException:
        return False
    except Exception as error:
        if rclpy.ok():
            node.report_error(error)
    return rclpy.ok()


if __name__ == '__main__':
    sys.exit('start the node with "python -m anomaly_seg_ros.ros"')
