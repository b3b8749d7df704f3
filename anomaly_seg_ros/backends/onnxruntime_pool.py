# SPDX-License-Identifier: Apache-2.0
"""
One pool of working memory for all sessions of ONNX Runtime on the CPU.

A session's own pool leaves holes in the heap when it goes: after some changes of the model a node
held up to a third more memory than before.
"""

from functools import cache
from typing import Any

import numpy as np

# An ONNX model, y = Identity(x) of one float32, opset 13: serialised, to need no onnx.
_IDENTITY = (b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08'
             b'\x01\x12\x04\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B'
             b'\x04\n\x00\x10\r')


def use_pool(options: Any) -> None:
    """Let a session take its working memory from the pool, and its weights from the heap."""
    _create_pool()
    options.add_session_config_entry('session.use_env_allocators', '1')
    options.add_session_config_entry('session.use_device_allocator_for_initializers', '1')


def give_back() -> None:
    """
    Free what no run is using of the pool's memory; the next run takes its own anew.

    For the end of a session. While its successor warmed up both ran at the same time, perhaps, and
    the pool would hold memory for two from then on.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    use_pool(options)
    # Shrinking is something that a run does at its end.
    shrinking = onnxruntime.RunOptions()
    shrinking.add_run_config_entry('memory.enable_memory_arena_shrinkage', 'cpu:0')
    session = onnxruntime.InferenceSession(_IDENTITY, options, providers=['CPUExecutionProvider'])
    session.run(None, {'x': np.zeros(1, np.float32)}, shrinking)


@cache
def _create_pool() -> None:
    import onnxruntime

    about = onnxruntime.OrtMemoryInfo('Cpu', onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0,
                                      onnxruntime.OrtMemType.DEFAULT)
    # No limit, and as much at a time as is asked for; -1: the defaults.
    as_requested = 1
    onnxruntime.create_and_register_allocator(
        about, onnxruntime.OrtArenaCfg(0, as_requested, -1, -1))
