# SPDX-License-Identifier: Apache-2.0
"""Start the node: ``python -m anomaly_seg_ros.ros``, ``ros2 run anomaly_seg_ros anomaly_seg``."""

from collections.abc import Sequence
import sys

from anomaly_seg_ros.heap import keep_freed_memory, share_one_heap

# A few frames; all of it goes back when the model changes.
_MOST_UNUSED_MEMORY = 64 << 20


def main(args: Sequence[str] | None = None) -> int:
    """Run the node as ``anomaly_seg_ros.ros.node.main`` does, with memory that stays level."""
    share_one_heap()
    keep_freed_memory(_MOST_UNUSED_MEMORY)
    # Only now: numpy and others start threads, each with a heap of its own, when imported.
    from anomaly_seg_ros.ros.node import main as run
    return run(args)


if __name__ == '__main__':
    sys.exit(main())
