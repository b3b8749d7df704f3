# SPDX-License-Identifier: Apache-2.0
"""The main job from end to end on the synthetic world, as ``make demo`` runs it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anomaly_seg_ros.bags import BagReader, make_bag, read_bag
from anomaly_seg_ros.evaluate import Progress
from anomaly_seg_ros.replay import replay, ReplayOptions
from anomaly_seg_ros.resources import resource
from anomaly_seg_ros.synthetic import SyntheticDrive
import cv2
import numpy as np

PICTURES = 4


@dataclass(frozen=True)
class DemoResult:
    """Where the demo's bag is, and its metrics.json."""

    bag: Path
    metrics: dict[str, Any]


def run_demo(output: Path | str, *, frames: int = 60, seed: int = 2026,
             model: Path | None = None, progress: Progress | None = None) -> DemoResult:
    """
    Render a drive, record it, send it through the live node, score the answers.

    Parameters
    ----------
    output
        Folder for ``drive`` (the bag), ``result_bag``, ``pictures`` and the result files.
    frames, seed
        Length and seed of the drive; the bundled model was trained on other seeds.
    model
        Model file; None takes the bundled one.
    progress
        Called with (what, done, total).

    """
    output = Path(output)
    bag = output / 'drive'
    model = resource('models/demo.onnx') if model is None else model
    drive = SyntheticDrive(seed=seed, frames=frames)
    make_bag(drive, bag, rate_hz=drive.rate_hz, overwrite=True)
    metrics = replay(bag, model, output, ReplayOptions(through_node=True), progress=progress)
    results = read_bag(output / 'result_bag', image_topic='/anomaly_seg/output/overlay')
    write_pictures(results, output / 'pictures')
    return DemoResult(bag, metrics)


def write_pictures(overlays: BagReader, folder: Path, count: int = PICTURES) -> list[Path]:
    """Write ``count`` overlays, evenly spread over the drive, as PNG and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index in np.linspace(0, len(overlays) - 1, count).round().astype(int):
        path = folder / f'overlay_{index:03d}.png'
        cv2.imwrite(str(path), overlays[int(index)].image_rgb[..., ::-1])
        paths.append(path)
    return paths
