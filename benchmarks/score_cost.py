#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""
What each score costs on top of the bare network, in ONNX Runtime on this machine's CPU.

"Bare" is the network giving its logits, without labels. All graphs take turns, one run each, so
that other work on the machine slows all of them alike; a cost is the median over the turns of the
graph's time over the bare one's in the same turn. Ends with 1 if a max-type score (one reduction
over the logits) costs more than 3 %.

python benchmarks/score_cost.py --threads 2 --runs 20
"""

import argparse
from pathlib import Path
import sys
import time
from typing import Any

from anomaly_seg_ros.export import to_onnx
from anomaly_seg_ros.fused import applicable_scores, fuse, MONTE_CARLO_SCORES
from anomaly_seg_ros.networks import load_network, LoadedNetwork
import numpy as np
import onnxruntime
from rich.console import Console
from rich.table import Table
import torch

MAX_TYPE = ('max_logit',)
LIMIT = 0.03


def random_erfnet() -> LoadedNetwork:
    """Make ERFNet with a void channel and random weights: times do not depend on them."""
    from tempfile import TemporaryDirectory

    from anomaly_seg_ros.networks.erfnet import ERFNet

    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        path = Path(folder) / 'erfnet.pth'
        torch.save(ERFNet(20).state_dict(), path)
        return load_network('erfnet', path)


def open_session(module: torch.nn.Module, image: torch.Tensor, threads: int) -> Any:
    """Export a module and open it as the backend ``cpu`` does."""
    if isinstance(module, Bare):
        program = torch.onnx.export(module, (image,), dynamo=True, opset_version=20,
                                    input_names=['image'], verbose=False)
        graph = program.model_proto.SerializeToString()
    else:
        graph = to_onnx(module, image)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(graph, options, providers=['CPUExecutionProvider'])


class Bare(torch.nn.Module):
    """The network alone."""

    def __init__(self, network: LoadedNetwork) -> None:
        super().__init__()
        self.body = network.module

    def forward(self, image: torch.Tensor) -> Any:
        """Return what the network gives."""
        return self.body(image)


def measure(sessions: dict[str, Any], image: np.ndarray, runs: int) -> dict[str, np.ndarray]:
    """Run every session once a turn and return the times in milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(runs + 2):
        for name, session in sessions.items():
            began = time.perf_counter()
            session.run(None, {'image': image})
            if turn >= 2:
                times[name].append((time.perf_counter() - began) * 1e3)
    return {name: np.array(values) for name, values in times.items()}


def main() -> int:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument('--network', default='erfnet')
    parser.add_argument('--weights', help='Weights of the network. Default: random ones.')
    parser.add_argument('--input-size', default='512x1024', help='Height x width.')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--runs', type=int, default=20)
    parser.add_argument('--scores', nargs='*', help='Default: all but those of MC dropout.')
    arguments = parser.parse_args()
    height, width = map(int, arguments.input_size.split('x'))
    if arguments.weights is None and arguments.network != 'erfnet':
        parser.error(f'{arguments.network} needs --weights')
    network = random_erfnet() if arguments.weights is None else load_network(
        arguments.network, arguments.weights, (height, width))
    scores = arguments.scores or [name for name in applicable_scores(network)
                                  if name not in MONTE_CARLO_SCORES]
    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    sessions = {'bare': open_session(Bare(network), image, arguments.threads)}
    for name in scores:
        sessions[name] = open_session(fuse(network, name, 1.0), image, arguments.threads)
    times = measure(sessions, image.numpy(), arguments.runs)

    table = Table(title=f'{network.name} at {height}x{width}, ONNX Runtime '
                        f'{onnxruntime.__version__}, {arguments.threads} threads, '
                        f'{arguments.runs} runs')
    for column in ('graph', 'p50 ms', 'best ms', 'over bare ms', 'over bare %'):
        table.add_column(column, justify='left' if column == 'graph' else 'right')
    too_slow = []
    for name, values in times.items():
        cost = float(np.median(values / times['bare'])) - 1
        table.add_row(name, f'{np.median(values):.1f}', f'{values.min():.1f}',
                      f'{cost * np.median(times["bare"]):+.1f}', f'{cost * 100:+.1f}')
        if name in MAX_TYPE and cost > LIMIT:
            too_slow.append(name)
    Console(width=80).print(table)
    if too_slow:
        print(f'cost more than {LIMIT * 100:.0f} %: {", ".join(too_slow)}')
    return int(bool(too_slow))


if __name__ == '__main__':
    sys.exit(main())
