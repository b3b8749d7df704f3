# SPDX-License-Identifier: Apache-2.0
"""
Submissions to benchmarks with a hidden ground truth.

SegmentMeIfYouCan (road-anomaly-benchmark, Evaluation.save_output): one HDF5 file a frame,
``anomaly_p/METHOD/DATASET/FRAME.hdf5``, with the float16 data set ``value`` (H, W), gzip level 9.
"""

from collections.abc import Iterable
from pathlib import Path

from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.files import atomic_write
from anomaly_seg_ros.metrics.stored import read_npy
import cv2
import numpy as np

SMIYC_DATASETS = ('AnomalyTrack-all', 'ObstacleTrack-all', 'LostAndFound-test',
                  'LostAndFound-train')


def write_smiyc_submission(score_folders: Iterable[Path | str], output: Path | str, *,
                           method: str, dataset: str) -> list[Path]:
    """
    Write stored score maps in SegmentMeIfYouCan's submission layout.

    Parameters
    ----------
    score_folders
        Folders of ``FRAME.npy`` score maps, float (H, W), as ``evaluate --save-scores`` keeps
        them; frame names must be the benchmark's.
    output
        Folder that gets ``anomaly_p/METHOD/DATASET/FRAME.hdf5``.
    method
        Name of the method, no slash.
    dataset
        One of ``SMIYC_DATASETS``.

    Returns
    -------
    list of Path
        The files written, in order of their names.

    Raises
    ------
    UserError
        If a name, a folder or a score map is not usable: not finite, or outside the range of
        float16, where its order would be lost; or if the folder to write holds other frames.

    """
    import h5py

    if dataset not in SMIYC_DATASETS:
        raise UserError(f'unknown benchmark {dataset!r}; choose one of '
                        f'{", ".join(SMIYC_DATASETS)}')
    if not method or '/' in method:
        raise UserError(f'method must be a name without slashes, got {method!r}')
    maps: dict[str, Path] = {}
    for folder in score_folders:
        paths = sorted(Path(folder).glob('[!.]*.npy'))
        if not paths:
            raise UserError(f'{folder}: no folder with score maps (FRAME.npy); make them with '
                            '"anomaly-seg evaluate --save-scores"')
        for path in paths:
            if path.stem in maps:
                raise UserError(f'{path}: frame {path.stem} is in {maps[path.stem].parent} too; '
                                'give each frame once')
            maps[path.stem] = path
    folder = Path(output) / 'anomaly_p' / method / dataset
    others = sorted(path.name for path in folder.glob('[!.]*.hdf5') if path.stem not in maps)
    if others:
        raise UserError(f'{folder}: holds {len(others)} files of other frames '
                        f'({", ".join(others[:3])}{", ..." if len(others) > 3 else ""}), which '
                        'would be submitted too. Remove them, choose another folder, or give all '
                        'folders of score maps at once.')
    written = []
    for name, path in sorted(maps.items()):
        scores = read_npy(path)
        if scores.ndim != 2 or scores.dtype.kind != 'f' or not scores.size:
            raise UserError(f'{path}: a score map must be floating point of shape (H, W) with at '
                            f'least one pixel, got {scores.dtype} {scores.shape}. Store one frame '
                            'a file, without batch or channel axes.')
        limit = float(np.finfo(np.float16).max)
        low, high, _, _ = cv2.minMaxLoc(scores.astype(np.float64))
        if not (np.isfinite(scores).all() and -limit <= low and high <= limit):
            raise UserError(f'{path}: scores reach from {low} to {high}, beyond float16 or not '
                            'finite; use a bounded score, or scale it')
        target = folder / f'{name}.hdf5'
        with atomic_write(target) as temporary, h5py.File(temporary, 'w') as file:
            file.create_dataset('value', data=scores.astype(np.float16), compression=9)
        written.append(target)
    return written
