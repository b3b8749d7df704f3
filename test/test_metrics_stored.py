# SPDX-License-Identifier: Apache-2.0
"""Metrics of stored score maps: same bits for any split, and what is wrong with bad files."""

import json
import multiprocessing
import os
from pathlib import Path
import re
import signal
import subprocess
import sys
import time

from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.metrics.components import ComponentCounts
from anomaly_seg_ros.metrics.pixel import pixel_metrics
from anomaly_seg_ros.metrics.stored import score_metrics, StoredScores
import cv2
import numpy as np
import pytest


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Seven score maps of different sizes and dtypes with masks; one without anomaly."""
    scores_dir, masks_dir = tmp_path / 'scores', tmp_path / 'masks'
    scores_dir.mkdir()
    masks_dir.mkdir()
    random = np.random.default_rng(4)
    for number in range(7):
        shape = (40 + 3 * number, 50)
        mask = np.zeros(shape, np.uint8)
        if number != 2:
            mask[5:20, 8:8 + 4 * number + 6] = 1
        mask[:, -5:] = 255
        scores = random.standard_normal(shape) + 2 * (mask == 1)
        dtype = np.float16 if number == 5 else np.float32
        np.save(scores_dir / f'frame_{number}.npy', np.round(scores, 2).astype(dtype))
        if number % 2:
            np.save(masks_dir / f'frame_{number}.npy', mask)
        else:
            cv2.imwrite(str(masks_dir / f'frame_{number}.png'), mask)
    return scores_dir, masks_dir


def test_figures_are_those_of_all_pixels_together(folders):
    source = StoredScores(*folders)
    assert source.frame_ids == [f'frame_{number}' for number in range(7)] and not source.problems
    seen = []
    result = score_metrics(source, track='obstacle', progress=lambda *done: seen.append(done))
    frames = [source.load(name) for name in source.frame_ids]
    scores = np.concatenate([frame.scores.ravel().astype(np.float32) for frame in frames])
    mask = np.concatenate([frame.mask.ravel() for frame in frames])
    assert result.pixel == pixel_metrics(scores, mask)
    assert seen[-1] == (21, 21) and len(seen) == 21
    counts = ComponentCounts('obstacle', result.pixel.best_f1_threshold)
    for frame in frames:
        counts.update(frame.scores, frame.mask)
    assert result.components == counts.result()
    assert result.components.ground_truth_components == 6
    for frame, row in zip(frames, result.per_frame, strict=True):
        own = pixel_metrics(frame.scores, frame.mask)
        assert (row.frame_id, row.average_precision, row.pixels) == (
            frame.frame_id, own.average_precision, own.pixels)
    assert result.per_frame[2].auroc is None and result.per_frame[2].positives == 0
    sections = json.loads(json.dumps(result.as_json(), allow_nan=False))
    assert sections['pixel']['average_precision'] == result.pixel.average_precision
    assert sections['compat']['relis']['reason']
    assert sections['compat']['caos_per_image']['images_used'] == 6


def test_curves_hold_vertices_of_the_exact_curves(folders):
    source = StoredScores(*folders)
    result = score_metrics(source, track=None)
    curves = result.curves
    frames = [source.load(name) for name in source.frame_ids]
    scores = np.concatenate([frame.scores.ravel() for frame in frames])
    mask = np.concatenate([frame.mask.ravel() for frame in frames])
    assert 50 < curves.thresholds.size <= 2000
    for index in (0, 7, -1):
        predicted = scores >= curves.thresholds[index]
        hits = np.count_nonzero(predicted & (mask == 1))
        wrong = np.count_nonzero(predicted & (mask == 0))
        assert curves.recall[index] == hits / np.count_nonzero(mask == 1)
        assert curves.fpr[index] == wrong / np.count_nonzero(mask == 0)
        assert curves.precision[index] == hits / (hits + wrong)
    assert curves.recall[-1] == 1
    assert curves.histogram_positives.sum() == result.pixel.positives
    assert (curves.histogram_positives + curves.histogram_negatives).sum() == result.pixel.pixels
    assert result.components.mean_f1 is None and 'no track' in result.components.reason


def as_bits(result) -> list:
    """Everything in a result, for comparison to the last bit."""
    return [repr(result.as_json()), result.per_frame, result.skipped,
            *(getattr(result.curves, name).tobytes() for name in vars(result.curves))]


def test_workers_change_no_bit(folders):
    source = StoredScores(*folders)
    alone = score_metrics(source, track='obstacle')
    seen = []
    assert as_bits(score_metrics(source, track='obstacle', workers=3,
                                 progress=lambda *done: seen.append(done))) == as_bits(alone)
    assert seen[-1] == (21, 21)


def test_an_interrupt_of_all_processes_ends_with_the_first_ones_word_only(folders):
    """Ctrl-C in a terminal reaches the workers too, here while they import."""
    code = ('import signal, sys, time\n'
            'from anomaly_seg_ros.metrics.stored import score_metrics, StoredScores\n'
            'signal.signal(signal.SIGINT, signal.default_int_handler)\n'
            'score_metrics(StoredScores(*sys.argv[1:]), track=None, workers=3,\n'
            '              progress=lambda *done: time.sleep(60))')
    with subprocess.Popen([sys.executable, '-c', code, *map(str, folders)], text=True,
                          stderr=subprocess.PIPE, start_new_session=True) as process:
        children = Path(f'/proc/{process.pid}/task/{process.pid}/children')
        end = time.monotonic() + 60
        while len(children.read_text().split()) < 3:  # the resource tracker is one
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert 'KeyboardInterrupt' in errors and 'spawn_main' not in errors


def test_no_more_processes_than_frames(folders):
    source = StoredScores(*folders)
    source._paths = {'frame_1': source._paths['frame_1']}
    before, started = multiprocessing.active_children(), []
    score_metrics(source, track=None, workers=8,
                  progress=lambda done, total: started.append(multiprocessing.active_children()))
    assert started == [before, before]


@pytest.mark.slow
def test_ray_changes_no_bit(folders, monkeypatch):
    ray = pytest.importorskip('ray')
    monkeypatch.setenv('RAY_USAGE_STATS_ENABLED', '0')
    source = StoredScores(*folders)
    alone = score_metrics(source, track='obstacle')
    ray.init(address='local', num_cpus=2, log_to_driver=False)
    try:
        assert as_bits(score_metrics(source, track='obstacle', ray='auto')) == as_bits(alone)
        np.save(folders[0] / 'frame_1.npy', np.zeros((2, 2), np.float32))
        with pytest.raises(UserError, match='1 problems, 6 usable frames'):
            score_metrics(source, track='obstacle', ray='auto')
        assert ray.is_initialized()
    finally:
        ray.shutdown()


def test_given_threshold_and_no_compat(folders):
    result = score_metrics(StoredScores(*folders), track='obstacle', threshold=1.5, compat=False)
    assert result.components.threshold == 1.5
    assert result.as_json()['compat'] is None


def test_no_anomaly_at_all_is_null_not_an_error(folders):
    scores_dir, masks_dir = folders
    for path in masks_dir.iterdir():
        if path.stem != 'frame_2':
            path.unlink()
            (scores_dir / f'{path.stem}.npy').unlink()
    result = score_metrics(StoredScores(*folders), track='anomaly')
    assert result.pixel.average_precision is None and result.pixel.pixels == 46 * 45
    assert result.components.reason == 'no threshold: no anomalous pixel'
    assert result.compat.smiyc_pixel.auroc is None and result.curves.recall.size == 0
    assert result.compat.caos_per_image.reason == 'no image holds both classes'
    json.dumps(result.as_json(), allow_nan=False)


def break_files(scores_dir: Path, masks_dir: Path) -> dict[str, str]:
    """Damage frames 0 to 4; return the message that each must give."""
    data = (masks_dir / 'frame_0.png').read_bytes()
    (masks_dir / 'frame_0.png').write_bytes(data[:-30])
    np.save(scores_dir / 'frame_1.npy', np.full((43, 50), np.nan, np.float32))
    np.save(scores_dir / 'frame_2.npy', np.zeros((9, 9), np.float32))
    mask = np.load(masks_dir / 'frame_3.npy')
    mask[0, 0] = 7
    np.save(masks_dir / 'frame_3.npy', mask)
    np.save(scores_dir / 'frame_4.npy', np.array([{'a': 1}], object), allow_pickle=True)
    (masks_dir / 'frame_6.png').rename(masks_dir / 'frame_7.png')
    return {
        'masks/frame_0.png': 'must be a whole PNG file. Download or copy it again.',
        'scores/frame_1.npy': '2150 of 2150 scores are NaN or infinite',
        'scores/frame_2.npy': r'scores are (9, 9) and the mask is (46, 50)',
        'scores/frame_3.npy': 'the mask holds codes [7]; only 0',
        'scores/frame_4.npy': 'not a readable .npy array (it holds pickled objects or no array)',
        'scores/frame_6.npy': 'has no mask; expected frame_6.png or frame_6.npy',
        'masks/frame_7.png': 'has no score map; expected frame_7.npy'}


@pytest.mark.parametrize('workers', [1, 2])
def test_all_that_is_wrong_is_listed(folders, workers):
    expected = break_files(*folders)
    with pytest.raises(UserError) as caught:
        score_metrics(StoredScores(*folders), track=None, workers=workers)
    message = str(caught.value)
    for name in ('frame_2', 'frame_3'):  # the mask may be what is wrong
        assert re.search(rf'scores/{name}\.npy with \S+masks/{name}\.(npy|png): ', message)
    assert message.startswith('7 problems, 1 usable frames:')
    assert message.endswith('use --keep-going to score the others.')
    for name, text in expected.items():
        line = next(line for line in message.splitlines() if name in line)
        assert text in line


def test_keep_going_scores_the_right_ones_and_lists_the_others(folders):
    source = StoredScores(*folders)
    frame = source.load('frame_5')
    break_files(*folders)
    result = score_metrics(StoredScores(*folders), track='obstacle', keep_going=True)
    assert result.pixel == pixel_metrics(frame.scores, frame.mask)
    assert [row.frame_id for row in result.per_frame] == ['frame_5']
    assert len(result.skipped) == 7
    (folders[0] / 'frame_5.npy').write_bytes(b'\x93NUMPY')
    with pytest.raises(UserError, match='8 problems, 0 usable frames'):
        score_metrics(StoredScores(*folders), track=None, keep_going=True)


def test_masks_that_are_all_there_twice_are_named(tmp_path):
    for number in range(9):
        np.save(tmp_path / f'{number}.npy', np.zeros((4, 4), np.float32))
        (tmp_path / f'{number}.png').touch()
    with pytest.raises(UserError, match=r'0\.npy: there is a second mask 0\.png; remove one of '
                                        r'them\n(.*\n){7}  and 1 more$'):
        StoredScores(tmp_path, tmp_path)


def test_folders_that_do_not_pair_say_what_was_found(folders, tmp_path):
    with pytest.raises(UserError, match='missing: not a folder; expected the folder of the masks'):
        StoredScores(folders[0], tmp_path / 'missing')
    other = tmp_path / 'other'
    other.mkdir()
    (other / 'mask_1.png').touch()
    with pytest.raises(UserError, match=r'no name in common: 7 score maps \(frame_0.npy, .*'
                                        r'1 masks \(mask_1.png\)'):
        StoredScores(folders[0], other)


def test_files_of_other_kinds_are_refused(folders):
    scores_dir, masks_dir = folders
    colour = np.arange(6000, dtype=np.uint16).astype(np.uint8).reshape(40, 50, 3)
    cv2.imwrite(str(masks_dir / 'frame_0.png'), colour)
    np.save(masks_dir / 'frame_1.npy', np.zeros((43, 50), np.float32))
    np.save(scores_dir / 'frame_3.npy', np.zeros((1, 49, 50), np.float32))
    (masks_dir / 'frame_5.png').write_bytes((masks_dir / 'frame_4.png').read_bytes())
    with open(scores_dir / 'frame_2.npy', 'wb') as stream:
        np.savez(stream, scores=np.zeros((46, 50), np.float32))
    whole = (scores_dir / 'frame_4.npy').read_bytes()
    (scores_dir / 'frame_4.npy').write_bytes(whole[:-100])
    source = StoredScores(*folders)
    for name, message in (('frame_0', 'frame_0.png: a mask must hold one code a pixel, got a col'),
                          ('frame_1', 'frame_1.npy: a mask must hold integers, got float32'),
                          ('frame_2', r'frame_2.npy: not a readable .npy array \(an .npz archive'),
                          ('frame_4', 'frame_4.npy: not a readable .npy array'),
                          ('frame_3', r'frame_3.npy: must have shape \(H, W\), got \(1, 49, 50\)'),
                          ):
        with pytest.raises(UserError, match=message):
            source.load(name)
    assert len(source.problems) == 1 and 'there is a second mask frame_5.png' in source.problems[0]
    assert 'frame_5' not in source.frame_ids


@pytest.mark.parametrize('kind', ['P', 'RGB', 'RGBA', 'uint16'])
def test_masks_are_read_as_those_of_data_sets(folders, kind):
    """The figures are those of the grey 8-bit mask."""
    pil = pytest.importorskip('PIL.Image', reason='writes masks of other kinds')
    path = folders[1] / 'frame_0.png'
    mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if kind == 'P':
        picture = pil.fromarray(mask, mode='P')
        picture.putpalette(bytes((0, 90, 0, 250)) + bytes(764))
    elif kind == 'uint16':
        picture = pil.fromarray(mask.astype(np.uint16))
    else:
        picture = pil.fromarray(mask).convert('RGB').convert(kind)
    picture.save(path)
    frame = StoredScores(*folders).load('frame_0')
    assert frame.mask.dtype == np.uint8
    np.testing.assert_array_equal(frame.mask, mask)


def test_upper_case_endings(folders):
    expected = score_metrics(StoredScores(*folders), track=None)
    for folder in folders:
        for path in sorted(folder.iterdir()):
            path.rename(path.with_suffix(path.suffix.upper()))
    assert score_metrics(StoredScores(*folders), track=None).pixel == expected.pixel


def test_boolean_png_masks_do_not_lose_their_anomalies(folders):
    """The 1 that they hold is 255 to OpenCV, void."""
    pil = pytest.importorskip('PIL.Image', reason='writes masks of one bit')
    pil.fromarray(np.eye(40, 50, dtype=bool)).save(folders[1] / 'frame_0.png')
    with pytest.raises(UserError, match=r'frame_0\.png: a mask must have 8 bits a pixel, got 1'):
        StoredScores(*folders).load('frame_0')


@pytest.mark.parametrize('shape', [(0, 0), (0, 50), (40, 0)])
def test_empty_score_maps_are_refused(folders, shape):
    """The component search of OpenCV would end the process."""
    (folders[1] / 'frame_0.png').unlink()
    np.save(folders[0] / 'frame_0.npy', np.zeros(shape, np.float32))
    np.save(folders[1] / 'frame_0.npy', np.zeros(shape, np.uint8))
    with pytest.raises(UserError, match=r'frame_0\.npy: a score map must have at least one pixel'):
        score_metrics(StoredScores(*folders), track='anomaly')


def test_wrong_arguments(folders):
    source = StoredScores(*folders)
    with pytest.raises(ValueError, match='unknown track'):
        score_metrics(source, track='street')
    with pytest.raises(ValueError, match='workers must be at least 1'):
        score_metrics(source, track=None, workers=0)
