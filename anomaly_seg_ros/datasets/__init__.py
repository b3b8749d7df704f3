# SPDX-License-Identifier: Apache-2.0
"""Benchmark data sets, one adapter each, all with the same interface."""

from pathlib import Path
from typing import Any

from anomaly_seg_ros.datasets.acdc import Acdc
from anomaly_seg_ros.datasets.bdd_anomaly import BddAnomaly
from anomaly_seg_ros.datasets.cityscapes import Cityscapes
from anomaly_seg_ros.datasets.fishyscapes import FsLostAndFound, FsStatic
from anomaly_seg_ros.datasets.folder import LabelledFolder
from anomaly_seg_ros.datasets.frame import Frame
from anomaly_seg_ros.datasets.idd import Idd
from anomaly_seg_ros.datasets.lost_and_found import LostAndFound
from anomaly_seg_ros.datasets.media import ImageFolder, VideoFile
from anomaly_seg_ros.datasets.paired import PairedDataset
from anomaly_seg_ros.datasets.road_anomaly import RoadAnomaly
from anomaly_seg_ros.datasets.smiyc import RoadAnomaly21, RoadObstacle21
from anomaly_seg_ros.datasets.source import FrameSource
from anomaly_seg_ros.datasets.streethazards import StreetHazards
from anomaly_seg_ros.errors import UserError

__all__ = [
    'DATASETS', 'Frame', 'FrameSource', 'ImageFolder', 'open_dataset', 'PairedDataset',
    'VideoFile']

DATASETS: dict[str, type[PairedDataset]] = {
    'road_anomaly_21': RoadAnomaly21,
    'road_obstacle_21': RoadObstacle21,
    'fs_lost_and_found': FsLostAndFound,
    'fs_static': FsStatic,
    'road_anomaly': RoadAnomaly,
    'lost_and_found': LostAndFound,
    'streethazards': StreetHazards,
    'bdd_anomaly': BddAnomaly,
    'cityscapes': Cityscapes,
    'acdc': Acdc,
    'idd': Idd,
    'folder': LabelledFolder,
}


def open_dataset(name: str, root: Path | str, **options: Any) -> PairedDataset:
    """
    Open a data set by name.

    Parameters
    ----------
    name
        A key of :data:`DATASETS`.
    root
        The folder that was downloaded.
    options
        ``split`` and ``keep_going`` (see :class:`PairedDataset`), and ``weather`` (acdc),
        ``cityscapes`` (fs_static), ``unknown`` (idd), ``config`` (folder).

    Raises
    ------
    UserError
        If the name is unknown (lists the choices) or the folder is not such a data set (says what
        was looked for and what is there).

    """
    if name not in DATASETS:
        raise UserError(f'no data set {name!r}. Choose one of {", ".join(DATASETS)}.')
    return DATASETS[name](root, **options)
