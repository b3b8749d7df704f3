# SPDX-License-Identifier: Apache-2.0
"""
The node in real time: a publisher in another process at several rates and sizes, raw and JPEG.

Newest frame wins, best effort on both sides; labels, obstacle mask and the 8-bit heat map are
subscribed. End to end is from the header's stamp, taken just before the frame is published, to
the last of its outputs here. "hold" is 70 % of the rate that the node could reach, "4x" four times
that.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
import subprocess
import sys
import time
from typing import Any

from anomaly_seg_ros.images import message_data
from anomaly_seg_ros.model_file import load_model_file
from anomaly_seg_ros.resources import resource
from anomaly_seg_ros.ros.client import make_header, NodeClient, NodeRun
import cv2
import numpy as np
import psutil
from sensor_msgs.msg import CompressedImage, Image

OUTPUTS = ('obstacle_mask', 'labels', 'anomaly_u8')
SIZES_HW = ((720, 1280), (1024, 2048))
RATES_HZ = (5.0, 10.0, 20.0, 30.0)
SLACK_MS = 20.0


@dataclass
class Row:
    """One line of the table."""

    transport: str
    size_hw: tuple[int, int]
    kind: str
    rate_hz: float
    sent: int
    seconds: float
    end_to_end_ms: np.ndarray
    network_ms: np.ndarray
    own_ms: np.ndarray
    drops: dict[str, int]
    cpu_percent: float
    memory_mib: float

    def verdict(self) -> str:
        """Judge the rows whose rate was chosen for it."""
        p50, p99 = np.percentile(self.end_to_end_ms, (50, 99))
        if self.kind == 'hold':
            whole = len(self.end_to_end_ms) == self.sent and p99 <= 2 * p50
            return 'every frame, p99 <= 2 p50: ' + ('yes' if whole else 'NO')
        if self.kind == '4x':
            limit = float(np.median(self.network_ms)) + 1e3 / self.rate_hz + SLACK_MS
            half = len(self.end_to_end_ms) // 2
            growth = np.median(self.end_to_end_ms[half:]) / np.median(self.end_to_end_ms[:half])
            good = p99 <= limit and growth < 1.2
            return f'p99 <= {limit:.0f} without growth: ' + ('yes' if good else 'NO')
        return ''

    def line(self) -> str:
        """Return the line."""
        height, width = self.size_hw
        p50, p95, p99 = np.percentile(self.end_to_end_ms, (50, 95, 99))
        drops = ' '.join(f'{count} {cause}' for cause, count in self.drops.items() if count)
        return (f'{self.transport:<11}{width}x{height:<6}{self.kind:<5}'
                f'{self.sent / self.seconds:>6.1f}{len(self.end_to_end_ms) / self.seconds:>6.1f}'
                f'{p50:>8.1f}{p95:>8.1f}{p99:>8.1f}{np.median(self.network_ms):>8.1f}'
                f'{np.median(self.own_ms):>7.1f}{self.cpu_percent:>6.0f}{self.memory_mib:>6.0f}'
                f'  {drops or "-":<28}  {self.verdict()}')


HEAD = (f'{"transport":<11}{"size":<11}{"rate":<5}{"in/s":>6}{"out/s":>6}{"p50":>8}{"p95":>8}'
        f'{"p99":>8}{"network":>8}{"own":>7}{"cpu%":>6}{"MiB":>6}  {"drops":<28}')


def camera_messages(size_hw: tuple[int, int], transport: str) -> list[Any]:
    """Return messages of a synthetic drive."""
    from anomaly_seg_ros.synthetic import SyntheticDrive
    drive = SyntheticDrive(seed=5, frames=6, size_hw=size_hw, anomalies=True)
    height, width = size_hw
    messages: list[Any] = []
    for index in range(len(drive)):
        bgr = np.ascontiguousarray(drive[index].image_rgb[..., ::-1])
        if transport == 'raw':
            messages.append(Image(height=height, width=width, encoding='bgr8', step=3 * width,
                                  data=message_data(bgr)))
        else:
            encoded = cv2.imencode('.jpg', bgr, [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
            messages.append(CompressedImage(format='bgr8; jpeg compressed bgr8',
                                            data=message_data(encoded)))
    return messages


def publish(domain_id: int, transport: str, size_hw: tuple[int, int]) -> None:
    """Publish as the lines "rate seconds" on stdin say; answer each with the frames sent."""
    client = NodeClient(domain_id, (), reliable=False, image_transport=transport)
    messages = camera_messages(size_hw, transport)
    print('ready', flush=True)
    for line in sys.stdin:
        rate_hz, seconds = (float(part) for part in line.split())
        start = time.perf_counter()
        count = round(rate_hz * seconds)
        for index in range(count):
            while (left := start + index / rate_hz - time.perf_counter()) > 0:
                time.sleep(left)
            message = messages[index % len(messages)]
            message.header = make_header(time.time_ns())
            client.publish(message)
        print(count, flush=True)


def counters(run: NodeRun) -> dict[str, int]:
    """Return the node's counters as they are after two further reports."""
    wanted = run.client.reports + 2
    while run.client.reports < wanted:
        run.client.spin(0.1)
        run.check()
    prefix = 'input.dropped_'
    found = {key[len(prefix):]: int(value) for key, value in run.client.diagnostics.items()
             if key.startswith(prefix)}
    return {**found, 'received': int(run.client.diagnostics['input.received'])}


def measure(run: NodeRun, publisher: 'subprocess.Popen[str]', transport: str,
            size_hw: tuple[int, int], kind: str, rate_hz: float, seconds: float) -> Row:
    """Let the publisher send at one rate and gather the answers."""
    assert publisher.stdin is not None and publisher.stdout is not None
    process = psutil.Process(run.pid)
    before = counters(run)
    cpu = sum(process.cpu_times()[:2])
    began, began_ns = time.perf_counter(), time.time_ns()
    publisher.stdin.write(f'{rate_hz} {seconds}\n')
    publisher.stdin.flush()
    end_to_end: list[float] = []
    network: list[float] = []
    own: list[float] = []
    until = began + seconds + 1.0
    while time.perf_counter() < until:
        run.client.spin(0.05)
        for stamp_ns in run.client.complete():
            messages = run.client.take(stamp_ns)
            if stamp_ns < began_ns:  # of the line before
                continue
            until = max(until, time.perf_counter() + 1.0)
            end_to_end.append((time.time_ns() - stamp_ns) / 1e6)
            report = {pair.key: pair.value for pair in messages['frame'].status[0].values}
            network.append(float(report['network_ms']))
            own.append(float(report['total_ms']) - float(report['wait_ms']) - network[-1])
    run.check()
    sent = int(publisher.stdout.readline())
    elapsed = time.perf_counter() - began
    cpu = sum(process.cpu_times()[:2]) - cpu
    after = counters(run)
    drops = {cause: after[cause] - before[cause] for cause in before if cause != 'received'}
    drops['transport'] = sent - len(end_to_end) - sum(drops.values())
    return Row(transport, size_hw, kind, rate_hz, sent, seconds, np.array(end_to_end),
               np.array(network), np.array(own), drops, 100 * cpu / elapsed,
               process.memory_info().rss / 2**20)


def measure_stream(run: NodeRun, transport: str, size_hw: tuple[int, int],
                   rates_hz: Sequence[float], seconds: float) -> None:
    """Measure one kind of stream at all rates and print its lines."""
    program = [sys.executable, __file__, '--publish', str(run.domain_id), transport,
               *map(str, size_hw)]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as publisher:
        assert publisher.stdout is not None and publisher.stdin is not None
        publisher.stdout.readline()
        first = measure(run, publisher, transport, size_hw, 'warm', 2.0, 3.0)
        whole_s = float(np.median(first.own_ms + first.network_ms)) / 1e3
        for kind, rate_hz in (*(('', rate) for rate in rates_hz), ('hold', 0.7 / whole_s),
                              ('4x', 2.8 / whole_s)):
            row = measure(run, publisher, transport, size_hw, kind, rate_hz, seconds)
            print(row.line(), flush=True)
        publisher.stdin.close()


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--publish', nargs=4, help=argparse.SUPPRESS)
    parser.add_argument('--model', type=Path, default=None, help='default: the bundled one')
    parser.add_argument('--seconds', type=float, default=10.0, help='for each line')
    parser.add_argument('--rates', type=float, nargs='*', default=RATES_HZ, help='in Hz')
    parser.add_argument('--threads', type=int, default=0, help='0: every core allowed')
    args = parser.parse_args()
    if args.publish:
        domain_id, transport, height, width = args.publish
        publish(int(domain_id), transport, (int(height), int(width)))
        return
    model = load_model_file(args.model or resource('models/demo.onnx'))
    print(f'{model.path.name}: {model.card.network} {model.card.input_size_hw[0]}x'
          f'{model.card.input_size_hw[1]}; milliseconds; own is all but network and transport')
    print(HEAD)
    for transport, reduced in (('raw', False), ('compressed', False), ('compressed', True)):
        parameters = {
            'model': str(model.path.resolve()), 'threads': args.threads,
            'image_transport': transport, 'reduced_decode': reduced,
            'diagnostics_period_s': 0.2, 'stale_input_s': 60.0}
        with NodeRun(parameters, outputs=OUTPUTS, reliable=False) as run:
            run.client.stop_sending()  # a second publisher would hide the numbers of the first
            for size_hw in SIZES_HW:
                if reduced:
                    print('reduced_decode: true')
                measure_stream(run, transport, size_hw, args.rates, args.seconds)


if __name__ == '__main__':
    main()
