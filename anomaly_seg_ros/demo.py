# SPDX-License-Identifier: Apache-2.0
"""The main job from end to end on the synthetic world, as ``make demo`` runs it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anomaly_seg_ros.bags import make_bag, read_bag
from anomaly_seg_ros.evaluate import claim, Progress, RUN_FOLDERS
from anomaly_seg_ros.files import atomic_write_bytes
from anomaly_seg_ros.model_file import load_model_file
from anomaly_seg_ros.replay import replay, ReplayOptions
from anomaly_seg_ros.resources import resource
from anomaly_seg_ros.synthetic import SyntheticDrive
from anomaly_seg_ros.visualize import colour_labels, heat_map, panel
import cv2
import numpy as np

PICTURES = 4
# As RUN_FOLDERS. The mark is the demo's own: a run of another command does not make a drive or
# pictures beside it the demo's.
_FOLDERS = {**RUN_FOLDERS, '.anomaly_seg_demo': ('drive', 'pictures')}


@dataclass(frozen=True)
class DemoResult:
    """Where the demo's bag is, and its metrics.json."""

    bag: Path
    metrics: dict[str, Any]


def run_demo(output: Path | str, *, frames: int = 60, seed: int = 23,
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

    Raises
    ------
    UserError
        If the model cannot be read, or ``output`` has sub-folders of these names that no demo
        made; nothing is written then. Else as ``replay``.

    """
    output = Path(output)
    bag = output / 'drive'
    model = resource('models/demo.onnx') if model is None else model
    palette = load_model_file(model).card.palette
    claim(output, _FOLDERS)
    drive = SyntheticDrive(seed=seed, frames=frames)
    make_bag(drive, bag, rate_hz=drive.rate_hz, overwrite=True)
    metrics = replay(bag, model, output, ReplayOptions(through_node=True), progress=progress)
    write_pictures(output / 'result_bag', output / 'pictures', palette)
    return DemoResult(bag, metrics)


def write_pictures(result_bag: Path, folder: Path, palette: Sequence[tuple[int, int, int]],
                   count: int = PICTURES) -> list[Path]:
    """
    Write ``count`` panels of camera, labels, heat map and mask, evenly spread over the drive.

    Pictures of an earlier drive are removed. Returns the paths of the PNG files.
    """
    for old in folder.glob('frame_*.png'):
        old.unlink()
    topics = {name: read_bag(result_bag, image_topic=f'/anomaly_seg/{name}')
              for name in ('input/image', 'output/overlay', 'output/labels', 'output/anomaly_u8')}
    frames = len(topics['input/image'])
    paths = []
    for index in np.linspace(0, frames - 1, count).round().astype(int).tolist():
        pixels = {name: bag[index].image_rgb for name, bag in topics.items()}
        picture = panel(
            [pixels['input/image'], pixels['output/overlay'],
             colour_labels(np.ascontiguousarray(pixels['output/labels'][..., 0]), palette),
             heat_map(np.ascontiguousarray(pixels['output/anomaly_u8'][..., 0]))],
            ['camera', 'overlay: obstacles outlined', 'labels', 'anomaly score'])
        paths.append(folder / f'frame_{index:03d}.png')
        encoded, data = cv2.imencode('.png', picture[..., ::-1])
        if not encoded:
            raise RuntimeError(f'{paths[-1]}: OpenCV cannot encode the picture')
        atomic_write_bytes(paths[-1], data.tobytes())
    return paths
