# SPDX-License-Identifier: Apache-2.0
"""Evaluation from frames to files, against the pipeline and scikit-learn directly."""

from collections.abc import Sequence
import csv
from dataclasses import replace
import errno
import json
from pathlib import Path
import sys
from typing import Any

from anomaly_seg_ros.backends import open_backend
from anomaly_seg_ros.classes import CITYSCAPES_CLASSES
from anomaly_seg_ros.compare import compare_runs
from anomaly_seg_ros.datasets import Frame, FrameSource, open_dataset
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.evaluate import evaluate, metrics_of_stored, percentiles
from anomaly_seg_ros.model_file import load_model_file
from anomaly_seg_ros.obstacles import ObstacleSettings
from anomaly_seg_ros.pipeline import Pipeline
from anomaly_seg_ros.report import summary_table
from cards import device_model, identity_model
import cv2
import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score


class Memory(FrameSource):
    """Frames that are there already; None is one that cannot be read."""

    name = 'memory'
    root = Path('memory')

    def __init__(self, frames: Sequence[Frame | None], class_set: str | None = None) -> None:
        self._frames = frames
        self.class_set = class_set

    @property
    def frame_ids(self) -> list[str]:
        """Names of the frames."""
        return [str(index) for index in range(len(self._frames))]

    def __getitem__(self, index: int) -> Frame:
        """Return a frame."""
        frame = self._frames[index]
        if frame is None:
            raise UserError(f'{index}.png: cannot be read')
        return frame


def labelled_frame(index: int, size_hw: tuple[int, int] = (24, 40)) -> Frame:
    """Return noise with the labels of the identity model, and a block of anomaly."""
    image = np.random.default_rng(index).integers(0, 256, (*size_hw, 3), dtype=np.uint8)
    mask = np.zeros(size_hw, np.uint8)
    mask[5:15, 5:30] = 1
    return Frame(str(index), image, mask, image.argmax(2).astype(np.uint8))


def pooled(model: Path, root: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return all non-void scores and truths of a benchmark, straight from the pipeline."""
    scores, truths = [], []
    with open_backend(load_model_file(model)) as backend:
        pipeline = Pipeline(backend)
        for frame in open_dataset('road_anomaly_21', root):
            anomaly = pipeline(frame.image_rgb).anomaly
            valid = frame.anomaly_mask != 255
            scores.append(anomaly[valid].copy())
            truths.append(frame.anomaly_mask[valid])
    return np.concatenate(scores), np.concatenate(truths)


def per_frame(run: Path) -> list[dict[str, str]]:
    """Return the rows of a run's per_frame.csv without its latencies."""
    with open(run / 'per_frame.csv', newline='') as stream:
        return [{key: value for key, value in row.items() if not key.endswith('_ms')}
                for row in csv.DictReader(stream)]


def test_the_drivable_region_needs_drivable_classes(tmp_path: Path) -> None:
    """Told before a frame is read, and nothing is there afterwards."""
    model = identity_model(tmp_path / 'm.onnx', drivable=()).path
    with pytest.raises(UserError, match=r"'test' has no drivable classes\. Set region"):
        evaluate(model, Memory([None]), tmp_path / 'out',
                 settings=ObstacleSettings(0.0, region='drivable'))
    assert not (tmp_path / 'out').exists()


def test_figures_equal_scikit_learn(tiny_model: Path, small_benchmark: Path,
                                    tmp_path: Path) -> None:
    """AP and AUROC of the written metrics.json are scikit-learn's on the same pixels."""
    metrics = evaluate(tiny_model, open_dataset('road_anomaly_21', small_benchmark),
                       tmp_path / 'out')
    scores, truths = pooled(tiny_model, small_benchmark)
    written = json.loads((tmp_path / 'out' / 'metrics.json').read_text())
    assert written == json.loads(json.dumps(metrics))
    assert written['pixel']['average_precision'] == pytest.approx(
        average_precision_score(truths, scores), abs=1e-12)
    assert written['pixel']['auroc'] == pytest.approx(roc_auc_score(truths, scores), abs=1e-12)
    assert written['pixel']['pixels'] == len(truths)
    assert written['pixel']['positives'] == int(truths.sum())
    assert written['run']['model_sha256'] == load_model_file(tiny_model).sha256
    with open(tmp_path / 'out' / 'per_frame.csv') as stream:
        rows = list(csv.DictReader(stream))
    assert [row['frame_id'] for row in rows] == ['0', '1', '2', '3', '4']
    assert sum(int(row['positives']) for row in rows) == int(truths.sum())
    assert (tmp_path / 'out' / 'report.html').stat().st_size > 10_000
    assert not (tmp_path / 'out' / 'scores').exists()


def test_saved_scores_give_the_same_figures(tiny_model: Path, small_benchmark: Path,
                                            tmp_path: Path) -> None:
    """``metrics`` on the scores that ``evaluate`` kept gives the bits that it reported."""
    metrics = evaluate(tiny_model, open_dataset('road_anomaly_21', small_benchmark),
                       tmp_path / 'out', save_scores=True)
    again = metrics_of_stored(tmp_path / 'out' / 'scores', tmp_path / 'out' / 'masks',
                              tmp_path / 'again')
    for part in ('pixel', 'components', 'compat'):
        assert again[part] == metrics[part]


def test_damaged_file_is_found_before_anything_runs(
        tiny_model: Path, small_benchmark: Path, tmp_path: Path) -> None:
    """A truncated image ends the run at once, with its name and the way around it."""
    victim = small_benchmark / 'images' / '3.png'
    victim.write_bytes(victim.read_bytes()[:200])
    with pytest.raises(UserError, match=r'3\.png(.|\n)*--keep-going'):
        evaluate(tiny_model, open_dataset('road_anomaly_21', small_benchmark), tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_frame_that_breaks_later_keeps_what_was_computed(
        tiny_model: Path, small_benchmark: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """A file damaged while the run goes on: its name, the place of the scores, no metrics."""
    victim = small_benchmark / 'images' / '3.png'
    source = open_dataset('road_anomaly_21', small_benchmark)
    check = source.check

    def check_then_damage(limit: int | None = None) -> list[str]:
        problems = check(limit)
        victim.write_bytes(victim.read_bytes()[:200])
        return problems

    monkeypatch.setattr(source, 'check', check_then_damage)
    with pytest.raises(UserError, match=r'3\.png(.|\n)*3 frames so far are kept'):
        evaluate(tiny_model, source, tmp_path / 'out')
    kept = sorted(path.name for path in (tmp_path / 'out' / 'scores').iterdir())
    assert kept == ['0.npy', '1.npy', '2.npy']
    assert not (tmp_path / 'out' / 'metrics.json').exists()


def test_keep_going_reports_the_rest_and_names_the_bad(
        tiny_model: Path, small_benchmark: Path, tmp_path: Path) -> None:
    """With keep_going the good frames are scored and metrics.json lists the bad one."""
    victim = small_benchmark / 'images' / '3.png'
    victim.write_bytes(victim.read_bytes()[:200])
    metrics = evaluate(tiny_model,
                       open_dataset('road_anomaly_21', small_benchmark, keep_going=True),
                       tmp_path / 'out', keep_going=True)
    assert metrics['latency_ms']['frames'] == 4
    assert len(metrics['run']['problems']) == 1
    assert '3.png' in metrics['run']['problems'][0]


def test_the_run_says_which_frames_were_scored(
        tiny_model: Path, small_benchmark: Path, tmp_path: Path) -> None:
    """The split, how much of the benchmark is there, and how many frames have a mask."""
    source = open_dataset('road_anomaly_21', small_benchmark)
    run = evaluate(tiny_model, source, tmp_path / 'out', limit=3)['run']
    assert (run['split'], run['incomplete']) == ('validation', '5 of 10 frames')
    assert [run[key] for key in ('frames', 'frames_with_mask', 'frames_with_labels')] == [3, 3, 0]

    for path in small_benchmark.rglob('*.png'):  # as the test split's frames are called
        path.rename(path.with_name(f'cow{path.name}'))
    (small_benchmark / 'labels_masks' / 'cow1.png').unlink()
    metrics = evaluate(tiny_model, open_dataset('road_anomaly_21', small_benchmark, split='test'),
                       tmp_path / 'out')
    run = metrics['run']
    assert [run[key] for key in ('frames', 'frames_with_mask', 'frames_with_labels')] == [5, 4, 0]
    rows = dict(summary_table(metrics))
    assert (rows['split'], rows['frames']) == ('test', '5, 4 with an anomaly mask')
    page = (tmp_path / 'out' / 'report.html').read_text()
    for text in ('Pixels, pooled over 4 frames', '0 dropped, 4 with an anomaly mask'):
        assert text in page
    model = identity_model(tmp_path / 'm.onnx').path
    frames = [labelled_frame(0), replace(labelled_frame(1), labels=None)]
    metrics = evaluate(model, Memory(frames), tmp_path / 'memory')
    assert dict(summary_table(metrics))['frames'] == '2, 1 with labels'
    assert 'incomplete' not in metrics['run'] and metrics['run']['split'] is None
    page = (tmp_path / 'memory' / 'report.html').read_text()
    assert 'All classes, pooled over 1 frame<' in page and 'pooled over 2 frames<' in page


def test_mask_of_another_size_is_never_scored(tiny_model: Path, small_benchmark: Path,
                                              tmp_path: Path) -> None:
    """A mask that does not lie on its image ends the run with its name."""
    cv2.imwrite(str(small_benchmark / 'labels_masks' / '2.png'), np.zeros((10, 10), np.uint8))
    with pytest.raises(UserError, match=r'2\.png'):
        evaluate(tiny_model, open_dataset('road_anomaly_21', small_benchmark), tmp_path / 'out')
    assert not (tmp_path / 'out' / 'metrics.json').exists()


def test_full_disk_names_the_file_and_keeps_the_rest(
        tiny_model: Path, small_benchmark: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """When the disk fills up at the fourth score map, three whole ones stay."""
    real_save = np.save
    calls = []

    def save(stream: Any, array: np.ndarray, **options: Any) -> None:
        calls.append(stream)
        if len(calls) > 6:  # two arrays a frame
            stream.write(b'half of it')
            raise OSError(errno.ENOSPC, 'No space left on device')
        real_save(stream, array, **options)

    monkeypatch.setattr(np, 'save', save)
    with pytest.raises(UserError, match=r'No space left(.|\n)*Free disk space(.|\n)*3 frames'):
        evaluate(tiny_model, open_dataset('road_anomaly_21', small_benchmark), tmp_path / 'out')
    kept = sorted((tmp_path / 'out' / 'scores').iterdir())
    assert [path.name for path in kept] == ['0.npy', '1.npy', '2.npy']
    for path in kept:
        assert np.load(path).dtype == np.float32


def test_full_disk_at_the_end_keeps_the_scores(
        tiny_model: Path, small_benchmark: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Results that cannot be written do not cost the score maps they come from."""
    def full(path: Path, text: str) -> None:
        raise UserError(f'{path}: cannot be written (No space left on device)')

    monkeypatch.setattr('anomaly_seg_ros.evaluate.atomic_write_text', full)
    with pytest.raises(UserError, match=r'metrics\.json(.|\n)*5 frames so far are kept'):
        evaluate(tiny_model, open_dataset('road_anomaly_21', small_benchmark), tmp_path / 'out')
    monkeypatch.undo()
    again = metrics_of_stored(tmp_path / 'out' / 'scores', tmp_path / 'out' / 'masks',
                              tmp_path / 'again')
    expected = evaluate(tiny_model, open_dataset('road_anomaly_21', small_benchmark),
                        tmp_path / 'whole')
    assert again['pixel'] == expected['pixel']
    assert (tmp_path / 'again' / 'report.html').stat().st_size > 10_000


def test_a_start_that_fails_costs_no_older_results(tiny_model: Path, small_benchmark: Path,
                                                   tmp_path: Path) -> None:
    """Results of a run stay when the next one into the same folder cannot even begin."""
    source = open_dataset('road_anomaly_21', small_benchmark)
    evaluate(tiny_model, source, tmp_path / 'out', save_scores=True)
    before = {path: path.read_bytes() for path in (tmp_path / 'out').rglob('*') if path.is_file()}
    with pytest.raises(UserError, match='backend'):
        evaluate(tiny_model, source, tmp_path / 'out', backend='no_such_backend')
    assert before == {path: path.read_bytes() for path in (tmp_path / 'out').rglob('*')
                      if path.is_file()}


def test_folders_of_the_user_are_not_cleared(tiny_model: Path, small_benchmark: Path,
                                             tmp_path: Path) -> None:
    """An output folder that holds somebody's masks is refused; a second run into ours is not."""
    source = open_dataset('road_anomaly_21', small_benchmark)
    mine = tmp_path / 'data' / 'masks' / '0.png'
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b'work of weeks')
    with pytest.raises(UserError, match=r'data/masks(.|\n)*another output folder'):
        evaluate(tiny_model, source, tmp_path / 'data')
    assert mine.read_bytes() == b'work of weeks'
    assert [path.name for path in (tmp_path / 'data').iterdir()] == ['masks']
    for limit in (5, 2):
        evaluate(tiny_model, source, tmp_path / 'out', save_scores=True, limit=limit)
    assert len(list((tmp_path / 'out' / 'scores').iterdir())) == 2


def test_metrics_do_not_overwrite_the_run_whose_scores_they_read(tmp_path: Path) -> None:
    """Beside the scores lies what the run alone knows; its own results ``metrics`` does renew."""
    out = tmp_path / 'out'
    evaluate(identity_model(tmp_path / 'm.onnx').path, Memory([labelled_frame(0)]), out,
             save_scores=True)
    before = (out / 'metrics.json').read_bytes()
    with pytest.raises(UserError, match=r'out/metrics\.json: is of a run (.|\n)*another output'):
        metrics_of_stored(out / 'scores', out / 'masks', out)
    assert (out / 'metrics.json').read_bytes() == before
    for _ in range(2):
        metrics_of_stored(out / 'scores', out / 'masks', tmp_path / 'again')


def test_workers_change_no_bit(tiny_model: Path, small_benchmark: Path, tmp_path: Path) -> None:
    """Two processes give the bits of one: every figure of every frame and of the whole."""
    source = open_dataset('road_anomaly_21', small_benchmark)
    one, two = (evaluate(tiny_model, source, tmp_path / str(workers), workers=workers)
                for workers in (1, 2))
    for part in ('pixel', 'components', 'compat', 'segmentation', 'calibration'):
        assert one[part] == two[part]
    assert per_frame(tmp_path / '1') == per_frame(tmp_path / '2')


def test_per_frame_statistics_are_those_of_the_score_map(
        tiny_model: Path, small_benchmark: Path, tmp_path: Path) -> None:
    """Mean, max and quantiles of each frame, computed in float64 from the stored scores."""
    evaluate(tiny_model, open_dataset('road_anomaly_21', small_benchmark), tmp_path / 'out',
             save_scores=True)
    for row in per_frame(tmp_path / 'out'):
        scores = np.load(tmp_path / 'out' / 'scores' / f'{row["frame_id"]}.npy').astype(np.float64)
        for name, expected in (
                ('mean', scores.mean()), ('max', scores.max()),
                *((f'quantile_{q}', np.quantile(scores, q)) for q in (0.5, 0.9, 0.99))):
            assert float(row[f'score_{name}']) == pytest.approx(expected, rel=1e-6)


def test_without_the_extra_report_the_figures_are_complete(
        tiny_model: Path, small_benchmark: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """No matplotlib: a warning says how to get it, everything but report.html is written."""
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    metrics = evaluate(tiny_model, open_dataset('road_anomaly_21', small_benchmark),
                       tmp_path / 'out')
    assert metrics['pixel']['average_precision'] > 0
    assert {path.name for path in (tmp_path / 'out').iterdir()
            if not path.name.startswith('.')} == {'metrics.json', 'per_frame.csv'}
    assert 'pip install ".[report]"' in caplog.text


@pytest.mark.parametrize('name', ['smooth', 'saturated', 'few_valued'])
def test_metrics_json_of_stored_maps_holds_the_golden_figures(name: str, real_data: Path,
                                                              tmp_path: Path) -> None:
    """
    The files that ``metrics`` writes from score maps on disk hold the reference codes' figures.

    ``test_metrics_golden`` compares every figure; here they go through files and metrics.json.
    """
    golden = json.loads((real_data / 'golden' / f'{name}.json').read_text())
    with np.load(real_data / 'golden' / f'{name}.npz') as maps:
        for folder, key in ('s', 'scores'), ('m', 'masks'):
            (tmp_path / folder).mkdir()
            for index, array in enumerate(maps[key]):
                np.save(tmp_path / folder / f'{index}.npy', array)
    metrics_of_stored(tmp_path / 's', tmp_path / 'm', tmp_path / 'out', workers=2)
    written = json.loads((tmp_path / 'out' / 'metrics.json').read_text())
    smiyc, caos = written['compat']['smiyc']['pixel'], written['compat']['caos_per_image']
    for figure, code, tolerance in (
            (written['pixel']['average_precision'], golden['AuPRC_sklearn_AP'], 1e-9),
            (written['pixel']['auroc'], golden['AUROC_sklearn'], 1e-9),
            (written['pixel']['fpr95'], golden['FPR95_fishyscapes'], 1e-9),
            (written['pixel']['fpr95'], golden['FPR95_RbA'], 1e-9),
            (smiyc['average_precision'], {'value': golden['SMIYC_pixel']['value']['AuPRC']}, 1e-6),
            (caos['images_used'],
             {'value': golden['CAOS_per_image_mean']['value']['images_used']}, 0)):
        assert figure == pytest.approx(code['value'], abs=tolerance)
    assert written['pixel']['pixels'] == golden['n']['value']['evaluated']
    assert written['pixel']['positives'] == golden['n']['value']['positives']


def test_percentiles_are_numpys() -> None:
    """p50, p95, p99 and max of 1..1000 ms."""
    values = [float(v) for v in range(1, 1001)]
    assert percentiles(values) == {'p50': 500.5, 'p95': pytest.approx(950.05),
                                   'p99': pytest.approx(990.01), 'max': 1000.0}


def test_erfnet_reaches_the_published_level(real_data: Path, tmp_path: Path) -> None:
    """Real weights, real frames: AP on RoadAnomaly21 within 0.01 of the reference figure."""
    from anomaly_seg_ros.export import export_model, ExportRequest
    root = real_data / 'anomaly' / 'road_anomaly_21'
    source = open_dataset('road_anomaly_21', root)
    weights = real_data / 'weights' / 'erfnet_cityscapes_20ch.pth'
    for score, expected in (('max_logit', 0.399), ('msp', 0.293)):
        model = tmp_path / f'{score}.onnx'
        export_model(ExportRequest('erfnet', weights, score), model,
                     frames=[source[0].image_rgb])
        metrics = evaluate(model, source, tmp_path / score)
        assert metrics['pixel']['average_precision'] == pytest.approx(expected, abs=0.01)
    cityscapes = evaluate(tmp_path / 'max_logit.onnx',
                          open_dataset('cityscapes', real_data / 'cityscapes', split='train'),
                          tmp_path / 'cityscapes')
    assert cityscapes['segmentation']['accuracy'] >= 0.96


def test_a_frame_left_out_leaves_nothing(tmp_path: Path) -> None:
    """What is named as left out is in no figure and no file, whatever is wrong with it."""
    frames = [labelled_frame(index) for index in range(4)]
    wrong_label = np.full((24, 40), 7, np.uint8)
    bad = [frames[0], replace(frames[1], labels=wrong_label), replace(frames[2], labels=None),
           replace(frames[3], anomaly_mask=np.zeros((9, 9), np.uint8))]
    model = identity_model(tmp_path / 'm.onnx', score='msp').path
    metrics = evaluate(model, Memory(bad), tmp_path / 'out', keep_going=True, save_scores=True)
    assert [problem.split(':')[0] for problem in metrics['run']['problems']] == [
        'frame 1', 'frame 3']
    assert [row['frame_id'] for row in per_frame(tmp_path / 'out')] == ['0', '2']
    assert metrics['pixel']['pixels'] == 2 * 24 * 40
    assert metrics['segmentation']['pixels'] == 24 * 40
    for folder in ('scores', 'masks'):
        assert sorted(path.name for path in (tmp_path / 'out' / folder).iterdir()) == [
            '0.npy', '2.npy']


def test_a_frame_whose_mask_cannot_be_written_is_left_out(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A score map without its mask would end the run when the metrics are computed."""
    real_save = np.save
    calls = []

    def save(stream: Any, array: np.ndarray, **options: Any) -> None:
        calls.append(stream)
        if len(calls) == 4:  # the mask of the second frame
            raise OSError(errno.ENOSPC, 'No space left on device')
        real_save(stream, array, **options)

    monkeypatch.setattr(np, 'save', save)
    metrics = evaluate(identity_model(tmp_path / 'm.onnx').path,
                       Memory([labelled_frame(index) for index in range(3)]), tmp_path / 'out',
                       keep_going=True)
    assert metrics['pixel']['pixels'] == metrics['segmentation']['pixels'] == 2 * 24 * 40
    assert 'No space left' in metrics['run']['problems'][0]


def test_labels_are_compared_only_with_the_same_classes(tmp_path: Path) -> None:
    """Other classes: no mIoU, but the anomaly figures; the same in another order: by name."""
    frames = [labelled_frame(index) for index in range(2)]
    other = identity_model(tmp_path / 'other.onnx', score='msp').path
    metrics = evaluate(other, Memory(frames, 'cityscapes'), tmp_path / 'other')
    assert metrics['segmentation']['miou'] is metrics['calibration']['ece'] is None
    for section in ('segmentation', 'calibration'):
        assert 'cityscapes (19 classes)' in metrics[section]['reason']
        assert '(road, car, sky)' in metrics[section]['reason']
    assert metrics['pixel']['pixels'] == 2 * 24 * 40
    assert evaluate(other, Memory(frames), tmp_path / 'own')['segmentation']['miou'] == 1

    names = tuple(name.replace(' ', '_').title() for name in CITYSCAPES_CLASSES[::-1])
    turned = identity_model(tmp_path / 'turned.onnx', classes=names,
                            palette=((0, 0, 0),) * 19).path
    train_ids = [replace(frame, labels=18 - frame.labels) for frame in frames]
    metrics = evaluate(turned, Memory(train_ids, 'cityscapes'), tmp_path / 'turned')
    assert metrics['segmentation']['accuracy'] == 1
    assert metrics['segmentation']['iou_by_class']['Bicycle'] == 1
    unnamed = identity_model(tmp_path / 'unnamed.onnx', palette=((0, 0, 0),) * 19,
                             classes=tuple(f'LABEL_{index}' for index in range(19))).path
    metrics = evaluate(unnamed, Memory(frames, 'cityscapes'), tmp_path / 'unnamed')
    assert metrics['segmentation']['accuracy'] == 1


def test_an_msp_that_is_no_probability_costs_the_calibration_only(tmp_path: Path) -> None:
    """Where masks overlap 1 - score exceeds 1: a reason, and every other figure."""
    model = identity_model(tmp_path / 'm.onnx', score='msp').path
    metrics = evaluate(model, Memory([labelled_frame(0), labelled_frame(1)]), tmp_path / 'out')
    assert metrics['calibration']['ece'] is None
    assert 'needs probabilities' in metrics['calibration']['reason']
    assert 'in frame 0' in metrics['calibration']['reason']
    assert metrics['segmentation']['accuracy'] == 1
    assert metrics['pixel']['pixels'] == 2 * 24 * 40


def test_frames_a_device_model_does_not_take_are_named(tmp_path: Path) -> None:
    """Another camera's size is one frame's problem."""
    source = Memory([labelled_frame(0), labelled_frame(1, (20, 40)), labelled_frame(2)])
    model = device_model(tmp_path / 'm.onnx').path
    with pytest.raises(UserError, match=r'frame 1: .*24x40, got 20x40(.|\n)*1 frames so far'):
        evaluate(model, source, tmp_path / 'out')
    metrics = evaluate(model, source, tmp_path / 'out', keep_going=True)
    assert metrics['latency_ms']['frames'] == 2
    assert len(metrics['run']['problems']) == 1


def test_warm_up_comes_before_the_first_frame_that_can_be_read(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first frame that is broken does not leave the second one cold."""
    sizes = []
    monkeypatch.setattr(Pipeline, 'warm_up', lambda self, size_hw: sizes.append(size_hw))
    evaluate(identity_model(tmp_path / 'm.onnx').path,
             Memory([None, labelled_frame(1), labelled_frame(2)]), tmp_path / 'out',
             keep_going=True)
    assert sizes == [(24, 40)]


def test_names_that_are_no_text_do_not_cost_the_results(tmp_path: Path) -> None:
    """A byte of a file's name that is no UTF-8 is escaped in per_frame.csv."""
    frame = replace(labelled_frame(0), frame_id='caf\udce9')
    evaluate(identity_model(tmp_path / 'm.onnx').path, Memory([frame]), tmp_path / 'out')
    assert [row['frame_id'] for row in per_frame(tmp_path / 'out')] == ['caf\\udce9']


@pytest.mark.parametrize('name', ['.hidden', '..', '%2Ea', 'n' * 251])
def test_no_name_of_a_frame_costs_its_pixels(name: str, tmp_path: Path) -> None:
    """Its files are no hidden ones, which are passed over, and fit where the image's name does."""
    frames = [replace(labelled_frame(0), frame_id=name), labelled_frame(1)]
    metrics = evaluate(identity_model(tmp_path / 'm.onnx').path, Memory(frames),
                       tmp_path / 'out', save_scores=True)
    assert metrics['pixel']['pixels'] == 2 * 24 * 40
    assert [row['pixels'] for row in per_frame(tmp_path / 'out')] == ['960', '960']
    pooled = [row for row in compare_runs([tmp_path / 'out'] * 2, resamples=100).rows
              if (row.statistic, row.kind) == ('AP', 'pooled')]
    assert pooled[0].low is not None and pooled[0].frames == 2


def test_without_masks_every_figure_is_null_with_the_reason(tmp_path: Path) -> None:
    """The sections have the keys of a run with masks; ``metrics`` has a reason for no times."""
    model = identity_model(tmp_path / 'm.onnx').path
    frame = labelled_frame(0)
    full = evaluate(model, Memory([frame]), tmp_path / 'full', save_scores=True)
    bare = evaluate(model, Memory([replace(frame, anomaly_mask=None)]), tmp_path / 'bare')

    def check(section: dict[str, Any], like: dict[str, Any]) -> None:
        assert section.keys() == like.keys()
        assert section['reason']
        assert not any(value for key, value in section.items()
                       if key != 'reason' and not isinstance(value, dict))

    for name in ('pixel', 'components'):
        check(bare[name], full[name])
    assert bare['compat'].keys() == full['compat'].keys()
    for name in ('caos_per_image', 's2m', 'relis'):
        check(bare['compat'][name], full['compat'][name])
    for name in ('pixel', 'components'):
        check(bare['compat']['smiyc'][name], full['compat']['smiyc'][name])
    stored = metrics_of_stored(tmp_path / 'full' / 'scores', tmp_path / 'full' / 'masks',
                               tmp_path / 'stored')
    assert stored['latency_ms'] == {'end_to_end': None, 'frames': None, 'dropped': None,
                                    'reason': 'score maps hold no times'}


def test_an_interrupt_says_where_the_scores_are(tmp_path: Path) -> None:
    """Ctrl-C brings the command for what was computed until then, with the set's track."""
    def interrupt(what: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    source = Memory([labelled_frame(index) for index in range(3)])
    source.track = 'obstacle'
    with pytest.raises(KeyboardInterrupt, match=(
            r"2 frames so far are kept.*metrics '.*/an out/scores' .*--track obstacle")):
        evaluate(identity_model(tmp_path / 'm.onnx').path, source, tmp_path / 'an out',
                 progress=interrupt)
