# SPDX-License-Identifier: Apache-2.0
"""The worker by itself; what it does inside a node is tested there."""

from collections.abc import Iterator
import time
import weakref

import _needs_ros  # noqa: F401
from anomaly_seg_ros.images import message_data
from anomaly_seg_ros.ros.diagnostics import Monitor
from anomaly_seg_ros.ros.inbox import Mailbox
from anomaly_seg_ros.ros.loading import open_model, read_model
from anomaly_seg_ros.ros.outputs import Outputs
from anomaly_seg_ros.ros.parameters import NodeParameters
from anomaly_seg_ros.ros.worker import Arrival, Worker
import numpy as np
import pytest
import rclpy
from rclpy.lifecycle import LifecycleNode
from ros_helpers import write_tiny_model
from sensor_msgs.msg import Image


@pytest.fixture
def node() -> Iterator[LifecycleNode]:
    """Return a lifecycle node."""
    context = rclpy.Context()
    context.init(args=[], domain_id=0)
    made = LifecycleNode('worker', context=context, enable_rosout=False,
                         start_parameter_services=False)
    yield made
    made.destroy_node()
    context.try_shutdown()


@pytest.mark.parametrize('pause', [True, False])
def test_a_frame_is_let_go_when_it_is_done(node, tmp_path, pause) -> None:
    # Not only with the next one: two frames of 2048x1024 are 12 MB.
    parameters = NodeParameters(pause_without_subscribers=pause)
    monitor, mailbox = Monitor(), Mailbox()
    worker = Worker(
        open_model(read_model(str(write_tiny_model(tmp_path / 'tiny.onnx'))), parameters),
        mailbox, Outputs(node, parameters), monitor, parameters,
        now_ns=time.time_ns, log_error=pytest.fail, on_swapped=lambda model: None)
    try:
        worker.activate()
        message = Image(height=48, width=64, encoding='rgb8', step=192,
                        data=message_data(np.full((48, 64, 3), 100, np.uint8)))
        pixels = weakref.ref(message.data)
        mailbox.put(Arrival(message, 1, time.perf_counter(), worker.activation))
        del message
        deadline = time.monotonic() + 5
        while not mailbox.waiting and time.monotonic() < deadline:
            time.sleep(0.01)
        assert mailbox.waiting
        assert pixels() is None
        snapshot = monitor.snapshot()
        assert snapshot.answered == (not pause)
        assert snapshot.drops.get('paused', 0) == pause
    finally:
        worker.stop(5.0)
