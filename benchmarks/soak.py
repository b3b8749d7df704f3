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
# Every 20 s. Not with the pictures, which repeat every 40 frames: swaps must meet both sizes.
SWAP_FRAMES = 103


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


def memory_mib(pid: int) -> tuple[float, float]:
    """
    Return what a process has for itself, and what it has touched of shared memory.

    The second are pages of Fast DDS's segments, the node's own and those of whoever sends to it:
    in time every page of them is used once, up to their size, which is fixed.
    """
    lines = dict(line.split(':', 1) for line in
                 Path(f'/proc/{pid}/status').read_text(encoding='ascii').splitlines())
    anonymous, file, shared = (int(lines[name].split()[0]) / 1024
                               for name in ('RssAnon', 'RssFile', 'RssShmem'))
    return anonymous + file, shared


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
    parser.add_argument('--no-swaps', action='store_true', help='keep to one model')
    args = parser.parse_args()
    frames = [SyntheticDrive(seed=9, frames=2, size_hw=size, anomalies=True)[k].image_rgb
              for size in ((480, 640), (720, 1280)) for k in range(2)]
    model = args.model or resource('models/demo.onnx')
    print(f'{"minute":>7}{"MiB":>8}{"shared":>8}{"threads":>9}{"files":>7}{"sent":>8}'
          f'{"answered":>10}{"reports":>9}')
    with tempfile.TemporaryDirectory() as folder:
        copies = [Path(folder) / name for name in ('a.onnx', 'b.onnx')]
        for copy in copies:
            shutil.copy(model, copy)
        parameters = {'model': str(copies[0]), 'diagnostics_period_s': PERIOD_S}
        with NodeRun(parameters, outputs=OUTPUTS, reliable=False) as run:
            return soak(run, frames, copies[:1 if args.no_swaps else 2], args.minutes, args.rate)


def soak(run: NodeRun, frames: list[np.ndarray], copies: list[Path], minutes: float,
         rate_hz: float) -> int:
    """Send frames for ``minutes`` and judge what the node used after the warm-up."""
    process = psutil.Process(run.pid)
    began = time.monotonic()
    warm_s = min(300.0, minutes * 60 / 4)
    sent = answered = bad = index = 0
    uses: list[tuple[float, float, int, int, float]] = []  # seconds, MiB, threads, files, shared
    warm: tuple[float, int] | None = None  # seconds, reports
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
        if index % SWAP_FRAMES == 0 and len(copies) > 1:
            set_parameter(run, 'model', str(copies[index // SWAP_FRAMES % 2]))
        for stamp_ns in run.client.complete():
            run.client.take(stamp_ns)
            answered += 1
        run.check()
        if warm is None and now > warm_s:
            warm = (now, run.client.reports)
        if not uses or now - uses[-1][0] >= 1:
            own_mib, shared_mib = memory_mib(run.pid)
            uses.append((now, own_mib, process.num_threads(), process.num_fds(), shared_mib))
            if int(now) % 60 == 0:
                print(f'{now / 60:>7.1f}{own_mib:>8.0f}{shared_mib:>8.0f}{uses[-1][2]:>9}'
                      f'{uses[-1][3]:>7}{sent:>8}{answered:>10}{run.client.reports:>9}',
                      flush=True)
    if warm is None:
        raise SystemExit('too short to judge')
    missed = max(0, round((time.monotonic() - began - warm[0]) / PERIOD_S) - 1
                 - (run.client.reports - warm[1]))
    # Medians of the first and the last third, of some 24 swaps each in half an hour: what lies
    # unused between used pieces of the heap differs by some MiB from swap to swap, and while a
    # model is being loaded there is one thread more.
    after = np.array([use for use in uses if use[0] >= warm[0]])
    part = max(1, len(after) // 3)
    first, last = (np.median(after[rows], axis=0)[1:] for rows in
                   (slice(None, part), slice(-part, None)))
    grown = last[0] / first[0] - 1
    print(f'after warm-up of {warm[0]:.0f} s: memory {first[0]:.0f} -> {last[0]:.0f} MiB '
          f'({grown:+.1%}), shared {first[3]:.0f} -> {last[3]:.0f} MiB, threads {first[1]:.0f} -> '
          f'{last[1]:.0f}, files {first[2]:.0f} -> {last[2]:.0f}, missed diagnostics {missed}; '
          f'answered {answered} of {sent}, bad frames {bad}')
    good = grown <= GROWTH and (last[1:3] <= first[1:3]).all() and missed == 0
    print('passed' if good else 'FAILED')
    return 0 if good else 1


if __name__ == '__main__':
    sys.exit(main())
