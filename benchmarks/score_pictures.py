#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""
Every score on the same three frames of the synthetic world, by the bundled network's weights.

The bundled network gives logits. For the scores of mask networks its logits are read as masks
(query c is class c, its mask logit is the logit of c); for those of several opinions it gets
dropout of 20 % of the channels before its last layer. So the pictures show what the scores look
at, not how good they can be. The table gives AP and FPR95 over the three frames.

python benchmarks/score_pictures.py --output docs/images/scores.jpg
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
import json
from pathlib import Path

from anomaly_seg_ros.files import atomic_write_bytes
from anomaly_seg_ros.fused import applicable_scores, fuse, MONTE_CARLO_SCORES
from anomaly_seg_ros.metrics.pixel import pixel_metrics
from anomaly_seg_ros.networks import load_network, LoadedNetwork
from anomaly_seg_ros.scores import MASK_SCORES
from anomaly_seg_ros.synthetic import SyntheticDrive
from anomaly_seg_ros.visualize import anomaly_u8, draw_outlines, heat_map, panel
import cv2
import numpy as np
from rich.console import Console
from rich.table import Table
import torch

ROOT = Path(__file__).resolve().parent.parent
SEED, STEP, CELL_WIDTH = 2026, 9, 224


class LogitsAsMasks(torch.nn.Module):
    """Read per-pixel logits as masks: query c claims class c with the mask logit of c."""

    def __init__(self, body: torch.nn.Module, classes: int) -> None:
        super().__init__()
        self.body = body
        self.register_buffer('sure', torch.nn.functional.pad(torch.eye(classes) * 12, (0, 1)))

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return class logits (1, C, C + 1) and mask logits (1, C, h, w)."""
        return self.sure[None], self.body(image)


def frames(size_hw: tuple[int, int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return image and mask of the three frames of the drive with most anomalous pixels."""
    drive = SyntheticDrive(seed=SEED, frames=60, size_hw=size_hw, anomalies=True)
    found = [drive[i] for i in range(0, 60, STEP)]
    found.sort(key=lambda frame: -int((frame.anomaly_mask == 1).sum()))
    return [(frame.image_rgb, frame.anomaly_mask) for frame in found[:3]]


def variants(network: LoadedNetwork) -> Iterator[tuple[str, LoadedNetwork, str]]:
    """Yield title, network and score."""
    for name in applicable_scores(network):
        if name not in MONTE_CARLO_SCORES:
            yield name, network, name
    network.module.head = torch.nn.Sequential(torch.nn.Dropout2d(0.2), network.module.head)
    for name in MONTE_CARLO_SCORES:
        yield name, network, name
    masks = replace(network, outputs='masks', mask_size_hw=None,
                    module=LogitsAsMasks(network.module, len(network.classes)).eval())
    for name in MASK_SCORES:
        yield f'masks: {name}', masks, name


def main() -> None:
    """Write the picture and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument('--output', type=Path, help='Picture to write (.jpg or .png).')
    arguments = parser.parse_args()
    settings = json.loads((ROOT / 'models' / 'demo_model.json').read_text(encoding='utf-8'))
    height, width = settings['input_size_hw']
    network = replace(load_network(settings['network'], ROOT / 'models' / settings['weights']),
                      upsample=True)
    shots = frames((height, width))
    masks = np.stack([mask for _, mask in shots])
    pictures, titles = [], []
    for index, (image, mask) in enumerate(shots):
        picture = image.copy()
        draw_outlines(picture, (mask == 1).astype(np.uint8), width_px=2)
        pictures.append(picture)
        titles.append(f'frame {index + 1}, obstacles outlined')
    table = Table(title=f'{len(shots)} frames of the synthetic drive {SEED}')
    for column in ('score', 'AP', 'FPR95'):
        table.add_column(column, justify='left' if column == 'score' else 'right')
    for title, variant, score in variants(network):
        module = fuse(variant, score, 1.0)
        maps = []
        for image, _ in shots:
            values = (image / 255.0 - np.array(network.mean)) / np.array(network.std)
            with torch.inference_mode():
                _, anomaly = module(
                    torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1)[None])
            maps.append(anomaly[0].numpy())
        scores = np.stack(maps)
        low, high = np.quantile(scores, (0.01, 0.999))
        metrics = pixel_metrics(scores, masks)
        table.add_row(title, f'{metrics.average_precision:.3f}', f'{metrics.fpr95:.3f}')
        for one in maps:
            pictures.append(heat_map(anomaly_u8(one, (float(low), float(high)))))
            titles.append(title)
    Console(width=80).print(table)
    if arguments.output is not None:
        picture = panel(pictures, titles, columns=6, cell_width=CELL_WIDTH)
        done, data = cv2.imencode(arguments.output.suffix, picture[..., ::-1],
                                  [cv2.IMWRITE_JPEG_QUALITY, 72])
        if not done:
            raise SystemExit(f'{arguments.output}: cannot be encoded; use .jpg or .png')
        atomic_write_bytes(arguments.output, data.tobytes())


if __name__ == '__main__':
    main()
