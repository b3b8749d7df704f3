# SPDX-License-Identifier: Apache-2.0
"""
What the node adds to the network: camera frames from this process, through it, and back.

Labels, obstacle mask and the 8-bit heat map are subscribed, as a vehicle would. One frame is on
its way at a time; both processes share this machine's clock. ``--jpeg`` sends JPEG of quality 90.
``publish`` is the middleware's work in the node's thread, mostly copying to shared memory; the
node's own time is judged with it.
"""

import argparse
from pathlib import Path
import time
from typing import Any

from anomaly_seg_ros.backends import open_backend
from anomaly_seg_ros.images import message_data
from anomaly_seg_ros.model_file import load_model_file, ModelFile
from anomaly_seg_ros.resources import resource
from anomaly_seg_ros.ros.client import make_header, NodeRun
import cv2
import numpy as np
import psutil
from sensor_msgs.msg import CompressedImage, Image

OUTPUTS = ('obstacle_mask', 'labels', 'anomaly_u8')
TARGET_MS = 10.0


def camera_messages(size_hw: tuple[int, int], jpeg: bool) -> list[Any]:
    """Return messages of one synthetic drive, BGR."""
    from anomaly_seg_ros.synthetic import SyntheticDrive
    drive = SyntheticDrive(seed=5, frames=8, size_hw=size_hw, anomalies=True)
    height, width = size_hw
    messages: list[Any] = []
    for index in range(len(drive)):
        bgr = np.ascontiguousarray(drive[index].image_rgb[..., ::-1])
        if jpeg:
            encoded = cv2.imencode('.jpg', bgr, [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
            messages.append(CompressedImage(format='bgr8; jpeg compressed bgr8',
                                            data=message_data(encoded)))
        else:
            messages.append(Image(height=height, width=width, encoding='bgr8', step=3 * width,
                                  data=message_data(bgr)))
    return messages


def bare_run_ms(model: ModelFile, threads: int, count: int) -> np.ndarray:
    """Return the times of the network alone, in this process, in milliseconds."""
    card = model.card
    rng = np.random.default_rng(0)
    network_input = rng.random((1, 3, *card.input_size_hw), np.float32)
    times = []
    with open_backend(model, 'cpu', threads=threads) as backend:
        for index in range(count + 5):
            began = time.perf_counter()
            backend.run(network_input)
            if index >= 5:
                times.append((time.perf_counter() - began) * 1e3)
    return np.array(times)


def answer(run: NodeRun, message: Any, stamp_ns: int) -> dict[str, float]:
    """Send one frame, wait for its outputs and return milliseconds by stage."""
    client = run.client
    message.header = make_header(stamp_ns)
    sent = time.perf_counter()
    client.publish(message)
    while stamp_ns not in client.complete():
        client.spin(1.0)
        run.check()
        if time.perf_counter() - sent > 60:
            raise SystemExit(f'no answer: {client.diagnostics}')
    received = time.perf_counter()
    report = {pair.key: pair.value for pair in client.take(stamp_ns)['frame'].status[0].values}
    stages = {key[:-3]: float(text) for key, text in report.items() if key.endswith('_ms')}
    arrived = float(report['arrived_monotonic_s'])
    return {**stages, 'transport in': (arrived - sent) * 1e3,
            'transport out': (received - arrived) * 1e3 - stages['total'],
            'end to end': (received - sent) * 1e3}


def print_table(times: dict[str, np.ndarray]) -> None:
    """Print p50, p95, p99 of each row."""
    print(f'{"ms":<44}{"p50":>9}{"p95":>9}{"p99":>9}')
    for name, values in times.items():
        p50, p95, p99 = np.percentile(values, (50, 95, 99))
        print(f'{name:<44}{p50:>9.2f}{p95:>9.2f}{p99:>9.2f}')


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--model', type=Path, default=None, help='default: the bundled one')
    parser.add_argument('--frames', type=int, default=200, help='frames measured')
    parser.add_argument('--memory-frames', type=int, default=2000,
                        help='frames in all, for the memory figure')
    parser.add_argument('--threads', type=int, default=0, help='0: every core allowed')
    parser.add_argument('--jpeg', action='store_true', help='send JPEG, not raw frames')
    parser.add_argument('--whole', action='store_true',
                        help='decode JPEG whole (reduced_decode: false)')
    parser.add_argument('--height', type=int, default=1024)
    parser.add_argument('--width', type=int, default=2048)
    args = parser.parse_args()
    model = load_model_file(args.model or resource('models/demo.onnx'))
    size_hw = (args.height, args.width)
    bare = bare_run_ms(model, args.threads, args.frames)

    rows: list[dict[str, float]] = []
    memory: list[float] = []
    parameters = {
        'model': str(model.path.resolve()), 'threads': args.threads,
        'image_transport': 'compressed' if args.jpeg else 'raw', 'reduced_decode': not args.whole,
        'warm_up_size_hw': list(size_hw)}
    messages = camera_messages(size_hw, args.jpeg)
    with NodeRun(parameters, outputs=OUTPUTS, reliable=False) as run:
        process = psutil.Process(run.pid)
        total = max(args.frames, args.memory_frames)
        for index in range(total + 10):
            row = answer(run, messages[index % len(messages)],
                         1_000_000_000 + index * 50_000_000)
            if 10 <= index < args.frames + 10:
                rows.append(row)
            if index % 50 == 49:
                memory.append(process.memory_info().rss / 2**20)

    stages = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    own = stages['total'] - stages['network']
    print(f'{model.path.name}: {model.card.network} {model.card.input_size_hw[0]}x'
          f'{model.card.input_size_hw[1]}, frames {size_hw[1]}x{size_hw[0]} '
          f'{"JPEG" if args.jpeg else "bgr8"}, '
          f'{args.frames} frames, outputs {", ".join(OUTPUTS)}')
    print_table({
        'bare session.run, alone': bare, **{
            name: stages[name] for name in ('transport in', 'wait', 'decode', 'quality',
                                            'preprocess', 'network', 'upsample', 'obstacles',
                                            'convert', 'publish', 'transport out', 'end to end')},
        'node, all but network and transport': own,
        'the same without publish': own - stages['publish']})
    if len(memory) > 4:
        first, last = memory[4], memory[-1]
        print(f'memory of the node after 250 frames {first:.0f} MiB, after {len(memory) * 50} '
              f'frames {last:.0f} MiB ({last / first - 1:+.1%})')
    p50 = float(np.median(own))
    print(f'target {TARGET_MS:.0f} ms p50: {"met" if p50 <= TARGET_MS else "MISSED"} '
          f'({p50:.2f} ms)')


if __name__ == '__main__':
    main()
