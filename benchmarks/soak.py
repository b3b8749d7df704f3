# SPDX-License-Identifier: Apache-2.0
"""
A long run of the node: memory, threads and files must not grow, diagnostics must not be missed.

Frames of two sizes come at a steady rate; now and then a bad one, a change of a parameter, and a
swap of the model. Exits with 1 when something grows, is missed, or is not answered.
"""

import argparse
from pathlib import Path
import shutil
import sys
import tempfile
import time

from anomaly_seg_ros.images import message_data
from anomaly_seg_ros.resources import resource
from anomaly_seg_ros.ros.client import make_header, NodeRun
import numpy as np
import psutil
from rcl_interfaces.srv import SetParametersAtomically
from rclpy.parameter import Parameter
from sensor_msgs.msg import Image

OUTPUTS = ('obstacle_mask', 'labels', 'anomaly_u8', 'overlay')
PERIOD_S = 1.0
GROWTH = 0.02


def set_parameter(run: NodeRun, name: str, value: object) -> None:
    """Set one parameter and wait for the reply."""
    client = run.client.node.create_client(
        SetParametersAtomically, '/anomaly_seg/set_parameters_atomically')
    try:
        while not client.service_is_ready():
            run.client.spin(0.05)
        future = client.call_async(SetParametersAtomically.Request(
            parameters=[Parameter(name, value=value).to_parameter_msg()]))
        while not future.done():
            run.client.spin(0.05)
        if not future.result().result.successful:
            raise SystemExit(f'{name} was refused: {future.result().result.reason}')
    finally:
        run.client.node.destroy_client(client)


def bad_image(stamp_ns: int) -> Image:
    """Return a message whose data is cut off."""
    return Image(height=480, width=640, encoding='rgb8', step=1920,
                 data=message_data(np.zeros(1000, np.uint8)), header=make_header(stamp_ns))


def main() -> int:
    """Run and print a line a minute."""
    from anomaly_seg_ros.synthetic import SyntheticDrive
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--minutes', type=float, default=30.0)
    parser.add_argument('--rate', type=float, default=5.0, help='frames per second')
    parser.add_argument('--model', type=Path, default=None, help='default: the bundled one')
    args = parser.parse_args()
    frames = [SyntheticDrive(seed=9, frames=2, size_hw=size, anomalies=True)[k].image_rgb
              for size in ((480, 640), (720, 1280)) for k in range(2)]
    model = args.model or resource('models/demo.onnx')
    print(f'{"minute":>7}{"MiB":>8}{"threads":>9}{"files":>7}{"sent":>8}{"answered":>10}'
          f'{"reports":>9}')
    with tempfile.TemporaryDirectory() as folder:
        copies = [Path(folder) / name for name in ('a.onnx', 'b.onnx')]
        for copy in copies:
            shutil.copy(model, copy)
        parameters = {'model': str(copies[0]), 'diagnostics_period_s': PERIOD_S}
        with NodeRun(parameters, outputs=OUTPUTS, reliable=False) as run:
            return soak(run, frames, copies, args.minutes, args.rate)


def soak(run: NodeRun, frames: list[np.ndarray], copies: list[Path], minutes: float,
         rate_hz: float) -> int:
    """Send frames for ``minutes`` and judge what the node used."""
    process = psutil.Process(run.pid)
    began = time.monotonic()
    warm_s = min(120.0, minutes * 60 / 4)
    sent = answered = bad = index = 0
    first: tuple[float, int, int] | None = None
    reports = 0
    peak = (0.0, 0, 0)
    next_line = 60.0
    while (now := time.monotonic() - began) < minutes * 60:
        while (left := began + index / rate_hz - time.monotonic()) > 0:
            run.client.spin(left)
        index += 1
        if index % 50 == 0:
            run.client.publish(bad_image(time.time_ns()))
            bad += 1
        else:
            run.client.send(frames[index // 10 % len(frames)], time.time_ns())
            sent += 1
        if index % 97 == 0:
            set_parameter(run, 'minimum_area_px', 50 + index % 50)
        if index % 401 == 0:
            set_parameter(run, 'model', str(copies[index // 401 % 2]))
        for stamp_ns in run.client.complete():
            run.client.take(stamp_ns)
            answered += 1
        run.check()
        use = (process.memory_info().rss / 2**20, process.num_threads(), process.num_fds())
        if first is None and now > warm_s:
            first, reports, counted_from = use, run.client.reports, time.monotonic()
        if first is not None:
            peak = tuple(map(max, peak, use))  # type: ignore[assignment]
        if now > next_line:
            print(f'{now / 60:>7.1f}{use[0]:>8.0f}{use[1]:>9}{use[2]:>7}{sent:>8}{answered:>10}'
                  f'{run.client.reports:>9}', flush=True)
            next_line += 60.0
    if first is None:
        raise SystemExit('too short to judge')
    expected = (time.monotonic() - counted_from) / PERIOD_S
    missed = max(0, round(expected) - 1 - (run.client.reports - reports))
    grown = use[0] / first[0] - 1
    # While a model is loaded there is one thread more, and its own.
    print(f'memory {first[0]:.0f} -> {use[0]:.0f} MiB ({grown:+.1%}), threads {first[1]} -> '
          f'{use[1]} (at most {peak[1]}), files {first[2]} -> {use[2]} (at most {peak[2]}), '
          f'missed diagnostics {missed}, answered {answered} of {sent}, bad frames {bad}')
    good = grown <= GROWTH and use[1] <= first[1] and use[2] <= first[2] and missed == 0
    print('passed' if good else 'FAILED')
    return 0 if good else 1


if __name__ == '__main__':
    sys.exit(main())
