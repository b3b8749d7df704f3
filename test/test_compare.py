# SPDX-License-Identifier: Apache-2.0
"""Comparison of runs: intervals against scipy and brute force, and what is refused."""

import csv
import json

from anomaly_seg_ros.compare import (
    compare_runs, comparison_table, draw_frames, pooled_figures, write_comparison)
from anomaly_seg_ros.errors import UserError
from browser import Browser
import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

FRAMES = 40


def write_run(folder, rows, metrics=None):
    """Write a run folder; rows are dicts with a frame_id."""
    folder.mkdir()
    (folder / 'metrics.json').write_text(json.dumps(metrics or {}))
    names = list(dict.fromkeys(key for row in rows for key in row))
    with open(folder / 'per_frame.csv', 'w', newline='') as stream:
        writer = csv.DictWriter(stream, names, restval='')
        writer.writeheader()
        writer.writerows(rows)
    return folder


def frame_rows(values, **constant):
    """Return one row for each value of AP; None is an empty field."""
    return [{'frame_id': f'f/{i}', 'average_precision': '' if v is None else repr(float(v)),
             **constant} for i, v in enumerate(values)]


def select(comparison, statistic, kind='frame mean'):
    """Return the rows of a statistic."""
    return [row for row in comparison.rows if (row.statistic, row.kind) == (statistic, kind)]


@pytest.fixture
def paired_values():
    """Return AP of three runs on the same frames, correlated over frames."""
    rng = np.random.default_rng(3)
    hardness = rng.beta(2, 3, FRAMES)
    return [np.clip(hardness + rng.normal(shift, 0.05, FRAMES), 0, 1)
            for shift in (0.0, 0.03, -0.2)]


def test_means_and_intervals_agree_with_scipy(paired_values, tmp_path):
    runs = [write_run(tmp_path / name, frame_rows(values))
            for name, values in zip('abc', paired_values, strict=True)]
    comparison = compare_runs(runs, resamples=20_000)
    rows = select(comparison, 'AP')
    assert comparison.runs == ('a', 'b', 'c') == tuple(row.run for row in rows)
    for row, values in zip(rows, paired_values, strict=True):
        assert row.value == pytest.approx(values.mean(), abs=1e-12)
        expected = stats.bootstrap((values,), np.mean, n_resamples=20_000, method='percentile',
                                   rng=np.random.default_rng(8)).confidence_interval
        width = expected.high - expected.low
        assert row.low == pytest.approx(expected.low, abs=0.03 * width)
        assert row.high == pytest.approx(expected.high, abs=0.03 * width)
    for row, values in zip(rows[1:], paired_values[1:], strict=True):
        expected = stats.bootstrap(
            (values, paired_values[0]), lambda x, y, axis: (x - y).mean(axis), paired=True,
            n_resamples=20_000, method='percentile', rng=np.random.default_rng(8))
        low, high = expected.confidence_interval
        assert row.difference == pytest.approx(values.mean() - paired_values[0].mean(), abs=1e-12)
        assert row.difference_low == pytest.approx(low, abs=0.03 * (high - low))
        assert row.difference_high == pytest.approx(high, abs=0.03 * (high - low))
        gaps = expected.bootstrap_distribution
        assert row.better == pytest.approx((gaps > 0).mean(), abs=0.01)
    # Pairing matters: the difference is known better than either mean.
    assert rows[1].difference_high - rows[1].difference_low < 0.3 * (rows[1].high - rows[1].low)


def test_frames_are_drawn_alike_for_every_seed_and_evenly():
    drawn = draw_frames(25, 4000, 7)
    assert (drawn.sum(1) == 25).all()
    assert abs(drawn.mean(0) - 1).max() < 0.08
    np.testing.assert_array_equal(drawn, draw_frames(25, 4000, 7))
    assert (drawn != draw_frames(25, 4000, 8)).any()


def test_equal_seeds_give_equal_results_and_other_seeds_do_not(paired_values, tmp_path):
    runs = [write_run(tmp_path / name, frame_rows(values))
            for name, values in zip('ab', paired_values, strict=False)]
    assert compare_runs(runs, resamples=500) == compare_runs(runs, resamples=500)
    assert compare_runs(runs, resamples=500) != compare_runs(runs, resamples=500, seed=1)


def test_frames_align_by_name_and_lacking_figures_leave_both_runs(tmp_path):
    one = frame_rows([0.1, 0.2, None, 0.6])
    two = frame_rows([0.3, None, 0.9, 0.7])[::-1]
    comparison = compare_runs([write_run(tmp_path / 'a', one), write_run(tmp_path / 'b', two)])
    first, second = select(comparison, 'AP')
    assert (first.value, second.value) == pytest.approx((0.35, 0.5))
    assert first.frames == second.frames == 2 and comparison.frames == 4
    assert any('fewer than 20' in note for note in comparison.notes)


def test_one_frame_has_no_interval(tmp_path):
    runs = [write_run(tmp_path / name, frame_rows([value]))
            for name, value in (('a', 0.25), ('b', 0.5))]
    row = select(compare_runs(runs), 'AP')[1]
    assert (row.difference, row.low, row.difference_low, row.better) == (0.25, None, None, None)


def test_one_frame_has_no_pooled_interval(stored_frames, tmp_path):
    runs = [stored_run(tmp_path / name, frames[:1], {'pixel': {'average_precision': 0.5}})
            for name, frames in zip('ab', stored_frames, strict=True)]
    comparison = compare_runs(runs)
    assert [row.low for row in select(comparison, 'AP', 'pooled')] == [None, None]
    assert any('no figure has an interval' in note for note in comparison.notes)
    for run in runs:
        with open(run / 'per_frame.csv', 'a') as stream:
            stream.write('no_mask,,\n')
    comparison = compare_runs(runs)
    assert [row.low for row in select(comparison, 'AP', 'pooled')] == [None, None]
    assert any('fewer than two frames have an anomaly mask' in note for note in comparison.notes)


def test_component_figures_of_two_tracks_are_not_compared(tmp_path):
    def compare(*tracks):
        runs = [write_run(tmp_path / f'{len(tracks)}{track}{i}', frame_rows([0.1, 0.2]), {
            'components': {'track': track, 'mean_f1': 0.4}}) for i, track in enumerate(tracks)]
        return compare_runs(runs, resamples=100)

    mixed, equal = compare('anomaly', 'obstacle'), compare('obstacle', 'obstacle', 'obstacle')
    assert not select(mixed, 'component mean F1', 'pooled')
    assert any('tracks (anomaly, obstacle)' in note for note in mixed.notes)
    assert len(select(equal, 'component mean F1', 'pooled')) == 3
    assert not any('tracks' in note for note in equal.notes)


def test_lower_is_better_for_fpr95_and_ties_count_half(tmp_path):
    runs = [write_run(tmp_path / name, [
        {'frame_id': i, 'fpr95': value, 'auroc': 0.5} for i in range(30)])
        for name, value in (('a', 0.4), ('b', 0.3))]
    comparison = compare_runs(runs, resamples=200)
    assert select(comparison, 'FPR95')[1].better == 1.0
    assert select(comparison, 'AUROC')[1].better == 0.5


def stored_run(folder, frames, metrics):
    """Write a run with stored scores; frames are (scores, mask)."""
    rows = [{'frame_id': f'100%/{i}', 'pixels': int((mask != 255).sum()),
             'positives': int((mask == 1).sum())} for i, (_, mask) in enumerate(frames)]
    write_run(folder, rows, metrics)
    for name in ('scores', 'masks'):
        (folder / name).mkdir()
    for i, (scores, mask) in enumerate(frames):
        np.save(folder / 'scores' / f'100%25%2F{i}.npy', scores)
        np.save(folder / 'masks' / f'100%25%2F{i}.npy', mask)
    return folder


def pooled_reference(frames, counts):
    """Return AP, FPR95 and AUROC of frames repeated ``counts`` times, by scikit-learn."""
    scores = np.concatenate([np.repeat(s[m != 255], n) for (s, m), n in
                             zip(frames, counts, strict=True)])
    truth = np.concatenate([np.repeat(m[m != 255], n) for (_, m), n in
                            zip(frames, counts, strict=True)])
    fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
    return (average_precision_score(truth, scores), fpr[np.argmax(tpr >= 0.95)],
            roc_auc_score(truth, scores))


@pytest.fixture
def stored_frames():
    """Return the frames of two runs over the same masks, one frame without anomaly."""
    rng = np.random.default_rng(5)
    masks = [rng.choice(np.array([0, 0, 0, 0, 0, 1, 255], np.uint8), (20, 25))
             for _ in range(12)]
    masks[3][masks[3] == 1] = 0
    shifts = rng.uniform(0.2, 2.5, 12)
    return [[(rng.normal(0, 1, m.shape).astype(np.float32) + (m == 1) * (s * gain), m)
             for m, s in zip(masks, shifts, strict=True)] for gain in (1.0, 1.3)]


@pytest.mark.parametrize(('levels', 'tolerance'), [(2048, 1e-9), (256, 2e-2)])
def test_pooled_intervals_agree_with_scikit_learn_on_the_same_resamples(
        stored_frames, levels, tolerance, tmp_path, monkeypatch):
    # With as many levels as anomalous pixels the figures are exact.
    monkeypatch.setattr('anomaly_seg_ros.compare.SCORE_LEVELS', levels)
    exact = [pooled_reference(frames, np.ones(12, int)) for frames in stored_frames]
    runs = [stored_run(tmp_path / name, frames, {'pixel': dict(zip(
        ('average_precision', 'fpr95', 'auroc'), figures, strict=True))})
        for name, frames, figures in zip('ab', stored_frames, exact, strict=True)]
    comparison = compare_runs(runs, resamples=100, seed=2)
    drawn = draw_frames(12, 100, 2)
    reference = np.array([[pooled_reference(frames, counts) for frames in stored_frames]
                          for counts in drawn])  # (resamples, runs, figures)
    for k, statistic in enumerate(('AP', 'FPR95', 'AUROC')):
        rows = select(comparison, statistic, 'pooled')
        for i, row in enumerate(rows):
            assert row.value == exact[i][k]
            expected = np.quantile(reference[:, i, k], (0.025, 0.975))
            assert (row.low, row.high) == pytest.approx(tuple(expected), abs=tolerance)
        gaps = np.quantile(reference[:, 1, k] - reference[:, 0, k], (0.025, 0.975))
        assert (rows[1].difference_low, rows[1].difference_high) == pytest.approx(
            tuple(gaps), abs=tolerance)
    assert not any('no interval' in note for note in comparison.notes)


def test_frames_without_a_mask_cost_no_interval(stored_frames, tmp_path):
    comparisons = []
    for kind, lines in ('masked', ''), ('some', 'no_mask,,\nvoid,0,0\n'):
        (tmp_path / kind).mkdir()
        runs = [stored_run(tmp_path / kind / name, frames, {
            'pixel': {'average_precision': 0.5}, 'segmentation': {'miou': 0.5}})
            for name, frames in zip('ab', stored_frames, strict=True)]
        for run in runs:
            with open(run / 'per_frame.csv', 'a') as stream:
                stream.write(lines)
        comparisons.append(compare_runs(runs, resamples=100))
    masked, some = comparisons
    assert select(some, 'AP', 'pooled') == select(masked, 'AP', 'pooled')
    assert some.rows[0].low is not None and some.rows[0].frames == 12
    assert select(some, 'mIoU', 'pooled')[0].frames == some.frames == 14


def test_figures_of_bins_are_those_of_tied_scores():
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 6, (2, 5, 9))
    counts[0, 4] = 0
    figures = pooled_figures(*counts.astype(float))
    levels = np.arange(9)[::-1]
    for i in range(4):
        truth = np.repeat([1, 0], counts[:, i].sum(1))
        scores = np.concatenate([np.repeat(levels, counts[0, i]), np.repeat(levels, counts[1, i])])
        expected = pooled_reference([(scores, truth)], [1])
        np.testing.assert_allclose(figures[:, i], expected, rtol=1e-12)
    assert np.isnan(figures[:, 4]).all()


def test_pooled_figures_without_score_maps_say_why_they_have_no_interval(paired_values, tmp_path):
    metrics = {'pixel': {'average_precision': 0.4}, 'segmentation': {'miou': 0.7},
               'latency_ms': {'end_to_end': {'p50': 20.0, 'p99': None}}}
    runs = [write_run(tmp_path / name, frame_rows(values), metrics)
            for name, values in zip('ab', paired_values, strict=False)]
    for name in ('scores', 'masks'):  # kept, but of data without anomaly masks
        (runs[0] / name).mkdir()
    comparison = compare_runs(runs, resamples=100)
    assert [row.value for row in select(comparison, 'AP', 'pooled')] == [0.4, 0.4]
    assert select(comparison, 'AP', 'pooled')[1].difference_low is None
    assert len(select(comparison, 'mIoU', 'pooled')) == 2
    assert len(select(comparison, 'latency p50, ms', 'pooled')) == 2
    assert not select(comparison, 'latency p99, ms', 'pooled')
    assert any('a, b kept no score map' in note and 'a folder of "metrics" has none' in note
               for note in comparison.notes)


def test_runs_over_other_frames_are_refused_unless_only_common_ones_are_asked_for(tmp_path):
    one = write_run(tmp_path / 'a', frame_rows([0.1, 0.2, 0.3]), {'segmentation': {'miou': 0.5}})
    two = write_run(tmp_path / 'b', frame_rows([0.2, 0.3, 0.4, 0.5]),
                    {'segmentation': {'miou': 0.6}})
    with pytest.raises(UserError, match=(r'1 frames of .*b are not in .*a \(f/3\)(.|\n)*'
                                         '--common-frames')):
        compare_runs([one, two])
    comparison = compare_runs([one, two], common_frames=True)
    assert comparison.frames == 3
    assert select(comparison, 'AP')[1].difference == pytest.approx(0.1)
    assert not select(comparison, 'mIoU', 'pooled')
    assert any('differ in their frames' in note for note in comparison.notes)
    three = write_run(tmp_path / 'c', [{'frame_id': 'other', 'average_precision': 1}])
    with pytest.raises(UserError, match='no frame in common'):
        compare_runs([one, three], common_frames=True)


def test_score_maps_are_not_read_for_figures_that_are_left_out(
        stored_frames, tmp_path, monkeypatch):
    runs = [stored_run(tmp_path / name, frames[:count], {'pixel': {'average_precision': 0.5}})
            for name, frames, count in zip('ab', stored_frames, (12, 11), strict=True)]
    for run in runs:  # a figure of each frame, which is compared
        text = (run / 'per_frame.csv').read_text().splitlines()
        (run / 'per_frame.csv').write_text('\n'.join(
            [f'{text[0]},auroc', *(f'{line},0.5' for line in text[1:])]))
    monkeypatch.setattr('anomaly_seg_ros.compare.StoredScores', None)
    comparison = compare_runs(runs, resamples=100, common_frames=True)
    assert comparison.frames == 11
    assert [row.statistic for row in comparison.rows] == ['AUROC', 'AUROC']
    assert not any('no interval' in note for note in comparison.notes)


def test_runs_over_other_masks_are_refused(tmp_path):
    runs = [write_run(tmp_path / name, frame_rows([0.1, 0.2], pixels=100, positives=positives))
            for name, positives in (('a', 7), ('b', 8))]
    with pytest.raises(UserError, match=r"'f/0' has 7 positives .* and 8"):
        compare_runs(runs)


@pytest.mark.parametrize(('name', 'content', 'message'), [
    ('metrics.json', None, r'metrics\.json: cannot be read'),
    ('per_frame.csv', None, r'per_frame\.csv: cannot be read'),
    ('metrics.json', '{"pixel": ', r'metrics\.json: not JSON'),
    ('metrics.json', '[]', r'metrics\.json: must hold a JSON object'),
    ('per_frame.csv', '', r'per_frame\.csv: must hold a column frame_id'),
    ('per_frame.csv', 'a,b\n1,2\n', r'per_frame\.csv: must hold a column frame_id'),
    ('per_frame.csv', 'frame_id,fpr95\nx,0.5\nx,0.6\n', "line 3: frame 'x' is there twice"),
    ('per_frame.csv', 'frame_id,fpr95\nx,half\n', r'per_frame\.csv: line 2: could not convert'),
    ('per_frame.csv', 'frame_id,fpr95\nx,1,2\n', r'per_frame\.csv: line 2'),
    ('per_frame.csv', b'frame_id\n\xff\xfe\n', r'per_frame\.csv: not CSV'),
])
def test_broken_runs_are_named(name, content, message, tmp_path):
    good = write_run(tmp_path / 'good', frame_rows([0.5, 0.6]))
    bad = write_run(tmp_path / 'bad', frame_rows([0.5, 0.6]))
    (bad / name).unlink()
    if content is not None:
        (bad / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        compare_runs([good, bad])


def test_runs_without_a_figure_in_common_are_refused(tmp_path):
    runs = [write_run(tmp_path / name, [{'frame_id': 'x', column: 1}])
            for name, column in (('a', 'fpr95'), ('b', 'auroc'))]
    with pytest.raises(UserError, match='no figure in common'):
        compare_runs(runs)


@pytest.mark.parametrize('call', [
    lambda: compare_runs(['only one']),
    lambda: compare_runs(['a', 'b'], resamples=10),
    lambda: compare_runs(['a', 'b'], level=1.0),
])
def test_wrong_arguments_are_named(call):
    with pytest.raises(ValueError, match='got'):
        call()


def test_runs_are_named_by_what_tells_them_apart(tmp_path):
    for name in ('x', 'y'):
        (tmp_path / name).mkdir()
    one = write_run(tmp_path / 'x' / 'out', frame_rows([0.5, 0.6]))
    two = write_run(tmp_path / 'y' / 'out', frame_rows([0.5, 0.6]))
    assert compare_runs([one, two]).runs == ('x/out', 'y/out')
    assert compare_runs([one, one]).runs == ('out (1)', 'out (2)')


def test_files_hold_the_exact_values_and_the_page_fits_a_phone(paired_values, tmp_path):
    names = ('first', '<b>second</b>', 'a run with a rather long name for a chart')
    runs = [write_run(tmp_path / name.replace('/', '_'), frame_rows(values))
            for name, values in zip(names, paired_values, strict=True)]
    comparison = compare_runs(runs, resamples=1000)
    csv_path, html_path = write_comparison(comparison, tmp_path / 'out')
    with open(csv_path, newline='') as stream:
        lines = list(csv.DictReader(stream))
    for line, row in zip(lines, comparison.rows, strict=True):
        assert line['run'] == row.run and float(line['value']) == row.value
        assert line['difference_low'] == ('' if row.difference_low is None
                                          else repr(row.difference_low))
    header, table = comparison_table(comparison)
    assert len(table) == 3 and {len(row) for row in table} == {len(header)}
    assert table[2][4] == f'{comparison.rows[2].difference:+.4f}'
    page = html_path.read_text()
    assert '<b>' not in page.replace('<body>', '') and '&lt;b&gt;second' in page
    assert 'http' not in page.replace('http-equiv', '')
    browser = Browser(html_path, tmp_path)
    seen = browser.measure(390)
    assert seen['width'] <= 390 and seen['broken'] == 0 and seen['images'] == 2
