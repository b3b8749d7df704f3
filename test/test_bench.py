# SPDX-License-Identifier: Apache-2.0
"""The benchmark measures what it says, in processes of their own."""

from dataclasses import asdict
import json
from pathlib import Path
import time

from anomaly_seg_ros import bench as module
from anomaly_seg_ros.backends import BACKENDS
from anomaly_seg_ros.backends.onnxruntime import OnnxRuntimeCpu
from anomaly_seg_ros.bench import bench, choose, Distribution, measure, Measurement, table
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.pipeline import STAGES
from anomaly_seg_ros.ports import NetworkOutput
from cards import device_model, identity_model
import numpy as np
from onnx import helper, numpy_helper, TensorProto
import pytest


def test_distribution_is_numpys() -> None:
    """Percentiles of 1..100."""
    got = Distribution.of([float(v) for v in range(1, 101)])
    assert (got.p50, got.p95, got.maximum, got.mean) == (50.5, pytest.approx(95.05), 100.0, 50.5)
    assert got.p99 == pytest.approx(99.01)


def test_available_backends_are_measured_and_the_others_explained(tmp_path: Path) -> None:
    """One row each, plain JSON, and a table in which every row starts with the name."""
    path = identity_model(tmp_path / 'm.onnx').path
    seen: list[tuple[str, int, int]] = []
    results = bench(path, names=['cpu', 'cuda'], frames=12, warm_up=2, frame_size_hw=(48, 80),
                    threads=1, progress=lambda *x: seen.append(x))
    cpu, cuda = results
    assert (cpu.name, cpu.reason, cpu.frames, cpu.frame_size_hw) == ('cpu', None, 12, (48, 80))
    assert cpu.runs_on is not None
    assert cpu.runs_on['threads'] == '1'
    assert cpu.end_to_end_ms is not None
    assert cpu.stages_ms is not None
    assert tuple(cpu.stages_ms) == STAGES
    assert 0 < cpu.end_to_end_ms.p50 <= cpu.end_to_end_ms.p95 <= cpu.end_to_end_ms.maximum
    parts = sum(stage.mean for stage in cpu.stages_ms.values())
    assert 0.5 * cpu.end_to_end_ms.mean < parts <= cpu.end_to_end_ms.mean * 1.001
    assert cpu.frames_per_second == pytest.approx(1e3 / cpu.end_to_end_ms.mean)
    assert 20 < cpu.memory_mib < 4000
    assert seen == [('cpu', 0, 2), ('cuda', 1, 2), ('done', 2, 2)]
    if cuda.reason is not None:
        assert 'CUDA' in cuda.reason
        assert table(results)[2] == ['cuda', f'not measured: {cuda.reason}']
    again = json.loads(json.dumps([asdict(result) for result in results]))
    assert again[0]['stages_ms']['network']['p50'] == cpu.stages_ms['network'].p50
    assert table(results)[1][2] == f'{cpu.end_to_end_ms.p50:.1f}'


def test_the_memory_is_not_that_of_the_caller(tmp_path: Path) -> None:
    """500 MiB that the caller holds are neither in a row's peak nor hide its growth."""
    path = identity_model(tmp_path / 'm.onnx').path
    held = np.ones(500 << 17)
    image = np.zeros((2000, 3000, 3), np.uint8)
    small = bench(path, names=['cpu'], frames=1, warm_up=0, frame_size_hw=(48, 80), threads=1)[0]
    assert held.nbytes == 500 << 20
    assert small.memory_mib < 400
    growing = module._in_own_process('x', path, 'cpu', {'threads': 1},
                                     [image[:48, :80].copy(), image], 2, 1)
    assert 30 < growing.growth_mib < 400


def test_warm_up_is_not_counted_and_stages_are_told_apart(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend whose first two runs take 200 ms and whose others take 20."""
    path = identity_model(tmp_path / 'm.onnx').path

    class Slow(OnnxRuntimeCpu):
        calls = 0

        def run(self, network_input: np.ndarray) -> NetworkOutput:
            Slow.calls += 1
            time.sleep(0.2 if Slow.calls <= 2 else 0.02)
            return super().run(network_input)
    monkeypatch.setitem(BACKENDS, 'cpu', Slow)
    images = [np.full((48, 80, 3), value, np.uint8) for value in (50, 200)]
    result = measure('cpu', path, 'cpu', {'threads': 1}, images, 6, 2)
    assert Slow.calls == 8
    assert result.end_to_end_ms is not None
    assert result.stages_ms is not None
    assert 20 <= result.stages_ms['network'].p50 < 150
    assert result.stages_ms['preprocess'].p50 < 15


def test_a_backend_that_kills_its_process_is_reported(tmp_path: Path) -> None:
    """The other rows stay."""
    path = identity_model(tmp_path / 'm.onnx').path
    dead = module._in_own_process('x', path, 'cpu', {'nonsense': 1}, [], 1, 1)
    assert dead.name == 'x'
    assert 'TypeError' in (dead.reason or '')


def test_the_floor_counts_operations_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A strided and a transposed convolution, counted by hand."""
    monkeypatch.syspath_prepend(str(Path(module.__file__).resolve().parent.parent / 'benchmarks'))
    from gpu import convolution_costs

    weights = [numpy_helper.from_array(np.zeros(shape, np.float32), name)
               for name, shape in (('w', (8, 3, 5, 5)), ('v', (8, 2, 2, 2)))]
    nodes = [helper.make_node('Conv', ['x', 'w'], ['y'], strides=[2, 2], pads=[2] * 4),
             helper.make_node('ConvTranspose', ['y', 'v'], ['z'], strides=[2, 2])]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
             for name, shape in (('x', (1, 3, 16, 32)), ('z', (1, 2, 16, 32)))]
    model = helper.make_model(helper.make_graph(nodes, 'g', ports[:1], ports[1:], weights))
    first, second = convolution_costs(model.SerializeToString())
    assert first == (2 * 8 * 16 * 8 * 3 * 25, 2 * (3 * 16 * 32 + 8 * 3 * 25 + 8 * 8 * 16))
    assert second == (2 * 16 * 32 * 2 * 8, 2 * (8 * 8 * 16 + 8 * 2 * 4 + 2 * 16 * 32))


def test_unknown_names_and_counts_are_refused(tmp_path: Path) -> None:
    """With the choices."""
    with pytest.raises(UserError, match="unknown backend 'gpu'; choose from cpu; openvino"):
        choose(['gpu'])
    assert [entry[0] for entry in choose(['openvino, speed', 'cpu'])] == ['openvino, speed', 'cpu']
    path = identity_model(tmp_path / 'm.onnx').path
    with pytest.raises(ValueError, match='frames must be at least 1'):
        bench(path, frames=0)
    with pytest.raises(UserError, match='no images'):
        bench(path, images=[])
    device = device_model(tmp_path / 'd.onnx').path
    with pytest.raises(UserError, match='made for frames of 24x40, not 48x80'):
        bench(device, names=['cpu'], frame_size_hw=(48, 80))
    assert table([Measurement('a', 'why')])[1] == ['a', 'not measured: why']
