# SPDX-License-Identifier: Apache-2.0
"""Importing this skips a test module where there is no rclpy; it sorts before what needs it."""

import pytest

pytest.importorskip('rclpy', reason='needs rclpy: pip install ".[ros]", or source a ROS 2')
