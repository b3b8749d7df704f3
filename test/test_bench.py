# SPDX-License-Identifier: Apache-2.0
"""The benchmark measures what it says: frames, stages that add up, reasons."""

import json
from pathlib import Path

from anomaly_seg_ros.bench import bench, bench_table
from anomaly_seg_ros.errors import UserError
import numpy as np
import pytest


def test_stages_add_up_and_frames_are_counted(tiny_model: Path) -> None:
    """Every stage is there, their medians fit into the whole, JSON is plain."""
    calls = []
    report = bench(tiny_model, backends=['cpu'], frames=12, warm_up=2,
                   images=[np.full((96, 160, 3), 90, np.uint8)], frame_size_hw=(96, 160),
                   progress=lambda *call: calls.append(call))
    (result,) = report.results
    assert calls[-1] == ('cpu', 12, 12) and len(calls) == 12
    assert set(result.stages_ms) == {'preprocess', 'network', 'upsample', 'obstacles',
                                     'end_to_end'}
    parts = sum(result.stages_ms[name]['p50'] for name in result.stages_ms
                if name != 'end_to_end')
    assert 0.3 * result.stages_ms['end_to_end']['p50'] < parts \
        < 2 * result.stages_ms['end_to_end']['max']
    assert result.frames_per_s > 0 and result.open_ms > result.stages_ms['network']['p50']
    assert json.loads(json.dumps(report.as_json()))['results'][0]['backend'] == 'cpu'
    header, rows = bench_table(report)
    assert len(header) == len(rows[0])


def test_backend_that_cannot_run_says_why(tiny_model: Path) -> None:
    """Asking for CUDA where there is none is an error with the reason, not a fallback."""
    report = bench(tiny_model, frames=1, warm_up=0, frame_size_hw=(96, 160),
                   images=[np.zeros((96, 160, 3), np.uint8)])
    assert report.unavailable
    name, reason = next(iter(report.unavailable.items()))
    with pytest.raises(UserError, match=name):
        bench(tiny_model, backends=[name])
    assert len(reason) > 10
    with pytest.raises(UserError, match='unknown backend'):
        bench(tiny_model, backends=['fpga'])
