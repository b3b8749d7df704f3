#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""
ERFNet in FP16 on an NVIDIA GPU, by device events, next to what the card could do at best.

The floor is the sum over the network's convolutions of the larger of two times: their operations
over the card's float16 rate, and their input, output and weights over its memory bandwidth; both
are measured here. Says that there is no GPU where there is none.

python benchmarks/gpu.py --frames 1000
"""

import argparse
import os
from pathlib import Path
import sys
import tempfile
import time
from typing import Any

from anomaly_seg_ros.backends import open_backend
from anomaly_seg_ros.cuda import missing_cuda
from anomaly_seg_ros.export import export_model, ExportRequest
from anomaly_seg_ros.model_file import load_model_file, ModelFile
from anomaly_seg_ros.pipeline import Pipeline
from erfnet_speedup import FRAME_HW, INPUT_HW, load_frames, random_weights
import numpy as np
import onnx

ROOT = Path(__file__).resolve().parent.parent
TARGET_FLOORS, TARGET_END_TO_END_MS = 2.5, 1.5
_BYTES = 2  # float16


def convolution_costs(graph: bytes) -> list[tuple[float, float]]:
    """
    Return (operations, bytes) of each convolution in float16.

    A multiplication and an addition are two operations; bytes are those of input, weights and
    output, each once.
    """
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(graph))
    shapes = {x.name: [d.dim_value for d in x.type.tensor_type.shape.dim]
              for x in (*model.graph.value_info, *model.graph.input, *model.graph.output)}
    shapes |= {x.name: list(x.dims) for x in model.graph.initializer}
    costs = []
    for node in model.graph.node:
        if node.op_type not in ('Conv', 'ConvTranspose'):
            continue
        image, weights, output = (shapes[name] for name in (*node.input[:2], node.output[0]))
        # Every weight is used once at every place: of the output, or of a transposed one's input.
        places = output if node.op_type == 'Conv' else image
        operations = 2 * float(np.prod(weights)) * float(np.prod(places[2:])) * places[0]
        moved = _BYTES * sum(float(np.prod(shape)) for shape in (image, weights, output))
        costs.append((operations, moved))
    return costs


def event_times_ms(work: Any, count: int) -> list[float]:
    """Return the device's own times of ``work``, by events around it on torch's stream."""
    import torch

    times = []
    for index in range(count + 20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        if index >= 20:
            times.append(begin.elapsed_time(end))
    return times


def measure_card() -> tuple[float, float]:
    """Return the card's memory bandwidth in bytes/s and its float16 rate in operations/s."""
    import torch

    source = torch.empty(1 << 29, dtype=torch.float16, device='cuda')
    target = torch.empty_like(source)
    copy_ms = min(event_times_ms(lambda: target.copy_(source), 30))
    n = 8192
    a, b = (torch.randn(n, n, dtype=torch.float16, device='cuda') for _ in range(2))
    product_ms = min(event_times_ms(lambda: a @ b, 30))
    return 2 * source.nbytes / copy_ms * 1e3, 2 * n**3 / product_ms * 1e3


def end_to_end(model: ModelFile, backend: str, options: dict[str, Any], frames: list[np.ndarray],
               count: int) -> tuple[list[float], list[float]]:
    """Return whole times and network times of ``count`` frames in ms, on the host's clock."""
    whole, network = [], []
    with open_backend(model, backend, **options) as device:
        pipeline = Pipeline(device)
        pipeline.warm_up(runs=20)
        for index in range(count):
            started = time.perf_counter()
            detection = pipeline(frames[index % len(frames)])
            whole.append((time.perf_counter() - started) * 1e3)
            network.append(detection.stages_ms['network'])
    return whole, network


def torch_graph_ms(weights: Path, model: ModelFile, count: int) -> list[float]:
    """Return the device's time of the captured PyTorch graph alone."""
    with open_backend(model, 'torch', weights=weights, device='cuda') as device:
        return event_times_ms(device._graph.replay, count)  # type: ignore[attr-defined]


def main() -> int:
    """Measure, print the table, and return 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument('--frames', type=int, default=1000)
    parser.add_argument('--data', type=Path, default=Path(os.environ.get(
        'ANOMALY_SEG_DATA', ROOT.parent / 'shared/data')))
    arguments = parser.parse_args()
    reason = missing_cuda()
    if reason is not None:
        print(f'not measured: {reason}')
        return 0
    frames = load_frames(arguments.data, 8)
    with tempfile.TemporaryDirectory() as name:
        weights = arguments.data / 'weights/erfnet_cityscapes_20ch.pth'
        if not weights.exists():
            weights = random_weights(Path(name))
        path = Path(name) / 'erfnet.onnx'
        request = ExportRequest('erfnet', weights, input_size_hw=INPUT_HW, precision='fp16',
                                input_variant='device', frame_size_hw=FRAME_HW)
        export_model(request, path, frames[:2])
        model = load_model_file(path)
        bandwidth, rate = measure_card()
        costs = convolution_costs(model.data)
        floor_ms = 1e3 * sum(max(ops / rate, size / bandwidth) for ops, size in costs)
        operations, moved = np.sum(costs, 0)
        print(f'{bandwidth / 1e9:.0f} GB/s, {rate / 1e12:.0f} Top/s in float16; network '
              f'{operations / 1e9:.1f} Gop, {moved / 1e6:.0f} MB; floor {floor_ms:.3f} ms')
        graph = torch_graph_ms(weights, model, arguments.frames)
        print(line('torch CUDA graph, device events', graph, floor_ms))
        fastest = float('inf')
        for backend, options in (('torch', {'weights': weights, 'device': 'cuda'}), ('cuda', {}),
                                 ('tensorrt', {'build': True})):
            try:
                whole, network = end_to_end(model, backend, options, frames, arguments.frames)
            except RuntimeError as error:
                print(f'{backend}: not measured: {error}')
                continue
            print(line(f'{backend}, network with copies', network, floor_ms))
            print(line(f'{backend}, end to end', whole, None))
            fastest = min(fastest, float(np.median(whole)))
    reached = np.median(graph) <= TARGET_FLOORS * floor_ms and fastest <= TARGET_END_TO_END_MS
    return int(not reached)


def line(what: str, times_ms: list[float], floor_ms: float | None) -> str:
    """Return one row of the table."""
    p50, p99 = (float(v) for v in np.percentile(times_ms, (50, 99)))
    floors = f'  {p50 / floor_ms:5.2f} floors' if floor_ms else ''
    return f'{what:36} p50 {p50:8.3f} ms  p99 {p99:8.3f} ms{floors}'


if __name__ == '__main__':
    sys.exit(main())
