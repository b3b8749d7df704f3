# SPDX-License-Identifier: Apache-2.0
"""SegmentMeIfYouCan submissions, read back as the benchmark's own loader does."""

from pathlib import Path

from anomaly_seg_ros.cli import cli
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.submission import SMIYC_DATASETS, write_smiyc_submission
from click.testing import CliRunner
import h5py
import numpy as np
import pytest


def test_files_hold_float16_value_under_the_benchmark_path(tmp_path: Path) -> None:
    """Frames of two folders become one submission; the float16 values are the maps' own."""
    rng = np.random.default_rng(0)
    maps = {}
    for folder, name in (('a', 'validation0000'), ('b', 'airplane0001')):
        maps[name] = rng.normal(size=(7, 9)).astype(np.float32)
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / f'{name}.npy', maps[name])
    written = write_smiyc_submission([tmp_path / 'a', tmp_path / 'b'], tmp_path / 'out',
                                     method='mine', dataset='AnomalyTrack-all')
    assert [path.relative_to(tmp_path / 'out').as_posix() for path in written] == [
        'anomaly_p/mine/AnomalyTrack-all/airplane0001.hdf5',
        'anomaly_p/mine/AnomalyTrack-all/validation0000.hdf5']
    for path in written:
        with h5py.File(path, 'r') as file:
            value = file['value'][:]
            assert file['value'].compression_opts == 9
        assert value.dtype == np.float16
        np.testing.assert_array_equal(value, maps[path.stem].astype(np.float16))


def test_frames_of_another_submission_are_not_mixed_in(tmp_path: Path) -> None:
    """They are named and nothing is written; the same frames may be written again."""
    def write(name: str, dataset: str = 'AnomalyTrack-all') -> None:
        (tmp_path / name).mkdir(exist_ok=True)
        np.save(tmp_path / name / f'{name}.npy', np.zeros((2, 2), np.float32))
        write_smiyc_submission([tmp_path / name], tmp_path / 'out', method='m', dataset=dataset)

    for _ in range(2):
        write('old')
    write('new', 'ObstacleTrack-all')
    with pytest.raises(UserError, match=r'AnomalyTrack-all: holds 1 files .*\(old\.hdf5\)'):
        write('new')
    folder = tmp_path / 'out' / 'anomaly_p' / 'm' / 'AnomalyTrack-all'
    assert [path.name for path in folder.iterdir()] == ['old.hdf5']


@pytest.mark.parametrize('bad', [np.nan, np.inf, 70000.0])
def test_scores_that_float16_cannot_hold_are_refused(tmp_path: Path, bad: float) -> None:
    """The file's name is given and nothing is written for it."""
    np.save(tmp_path / 'frame.npy', np.array([[0.0, bad]], np.float32))
    with pytest.raises(UserError, match=r'frame\.npy'):
        write_smiyc_submission([tmp_path], tmp_path / 'out', method='m',
                               dataset='AnomalyTrack-all')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('bad', [np.zeros((1, 4, 6), np.float32), np.zeros((4, 6, 1), np.float32),
                                 np.zeros((4, 6), np.uint8), np.zeros((0, 6), np.float32)])
def test_what_is_no_score_map_is_refused(tmp_path: Path, bad: np.ndarray) -> None:
    """The benchmark reads floats of shape (H, W)."""
    np.save(tmp_path / 'frame.npy', bad)
    with pytest.raises(UserError, match=rf'frame\.npy: .*got {bad.dtype} \({bad.shape[0]}, '):
        write_smiyc_submission([tmp_path], tmp_path / 'out', method='m',
                               dataset='AnomalyTrack-all')
    assert not (tmp_path / 'out').exists()


def test_the_command_offers_the_benchmarks() -> None:
    """Another name is wrong usage and shows them all."""
    result = CliRunner().invoke(cli, ['submit', 's', '--benchmark', 'RoadAnomaly21', '--method',
                                      'm', '--output', 'o'])
    assert result.exit_code == 2
    assert all(name in result.stderr for name in SMIYC_DATASETS)


def test_names_are_checked(tmp_path: Path) -> None:
    """Unknown benchmarks, duplicate frames, empty and missing folders are refused."""
    with pytest.raises(UserError, match='ObstacleTrack-all'):
        write_smiyc_submission([tmp_path], tmp_path, method='m', dataset='RoadAnomaly21')
    with pytest.raises(UserError, match='save-scores'):
        write_smiyc_submission([tmp_path], tmp_path, method='m', dataset='AnomalyTrack-all')
    for folder in ('a', 'b'):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / 'x.npy', np.zeros((2, 2)))
    for folder in ('none', 'a/x.npy'):
        with pytest.raises(UserError, match=rf'{folder}: no folder with score maps'):
            write_smiyc_submission([tmp_path / 'a', tmp_path / folder], tmp_path / 'out',
                                   method='m', dataset='AnomalyTrack-all')
    assert not (tmp_path / 'out').exists()
    with pytest.raises(UserError, match='once'):
        write_smiyc_submission([tmp_path / 'a', tmp_path / 'b'], tmp_path, method='m',
                               dataset='AnomalyTrack-all')
