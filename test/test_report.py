# SPDX-License-Identifier: Apache-2.0
"""The report: what it says, that it is self-contained and safe, and how a browser shows it."""

import base64
from html.parser import HTMLParser
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

from anomaly_seg_ros import plots
from anomaly_seg_ros.classes import CITYSCAPES_CLASSES, CITYSCAPES_PALETTE
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.metrics.stored import ScoreCurves
from anomaly_seg_ros.report import (
    choose_frames, frame_caption, FramePicture, Reliability, ReportData, summary_table,
    write_report)
from browser import Browser
import cv2
import numpy as np
import pytest

CURVES = ScoreCurves(
    thresholds=np.array([3.0, 2.0, 0.0]), recall=np.array([0.25, 0.5, 1.0]),
    precision=np.array([1.0, 0.5, 0.125]), fpr=np.array([0.0, 0.1, 0.75]),
    histogram_edges=np.linspace(-4, 4, 9),
    histogram_positives=np.array([0, 0, 0, 1, 2, 3, 2, 1]),
    histogram_negatives=np.array([5, 9, 30, 40, 10, 2, 1, 0]))
HOSTILE = '<script>alert(1)</script>"\'&\udcff/0001'


def full_metrics():
    """Return a metrics.json with every section filled."""
    return {
        'pixel': {'average_precision': 0.41234, 'fpr95': 0.1579, 'auroc': 0.9321,
                  'best_f1': 0.5, 'best_f1_threshold': -1.25, 'pixels': 1234567,
                  'positives': 24691, 'ties': 0, 'recall_at_fpr': {'0.01': 0.25},
                  'reason': None},
        'components': {'track': 'anomaly', 'threshold': -1.25, 'siou_gt': 0.3, 'ppv': 0.2,
                       'mean_f1': 0.123, 'f1_by_tau': {'0.25': 0.2, '0.3': 0.17, '0.75': 0.01},
                       'reason': None},
        'compat': {'smiyc': {'pixel': {'average_precision': 0.4099, 'reason': None},
                             'components': {'mean_f1': 0.119, 'reason': None}},
                   'caos_per_image': {'auroc': 0.9, 'reason': None},
                   's2m': {'raw': {'mean_f1': 0.25}, 'reason': None},
                   'relis': {'ece': None, 'reason': 'needs class probabilities'}},
        'segmentation': {'miou': 0.7123, 'accuracy': 0.9671, 'pixels': 10, 'reason': None,
                         'iou_by_class': dict(zip(
                             CITYSCAPES_CLASSES, [*np.linspace(0, 1, 18), None], strict=True))},
        'calibration': {'ece': 0.0312, 'adaptive_ece': 0.0299, 'ks': 0.02, 'prr': None,
                        'misclassification_ap': 0.25, 'reliability': [{'pixels': 0}],
                        'reason': 'prr: no wrong label'},
        'latency_ms': {'network': {'p50': 180.0, 'p95': 190.0, 'p99': 195.5, 'max': 200.0},
                       'end_to_end': {'p50': 184.25, 'p95': 195.0, 'p99': 201.0, 'max': 210.0},
                       'frames': 40, 'dropped': 2},
        'run': {'model': 'erfnet.onnx', 'model_sha256': 'ab' * 32,
                'card': {'name': 'erfnet_max_logit', 'network': 'erfnet', 'score': 'max_logit',
                         'classes': list(CITYSCAPES_CLASSES),
                         'palette': [list(c) for c in CITYSCAPES_PALETTE],
                         'score_range': [-9.5, 0.5], 'threshold': -1.5,
                         'input_size_hw': [512, 1024]},
                'settings': {'threshold': -1.0, 'region': 'everywhere'},
                'command': ['anomaly-seg', 'evaluate', 'my model.onnx'], 'data': 'a data set',
                'versions': {'anomaly_seg_ros': '9.8.7'}, 'machine': {'cores': 2}}}


def frame(frame_id, kind, seed=0):
    """Return a grey frame with one true anomaly and one void band."""
    rng = np.random.default_rng(seed)
    image = rng.integers(100, 140, (360, 720, 3), np.uint8)
    truth = np.zeros((360, 720), np.uint8)
    truth[100:200, 300:400] = 1
    truth[300:] = 255
    heat = np.full_like(image, 30)
    return FramePicture(frame_id, 'AP 0.5', kind, image, image // 2, heat,
                        (truth == 1).astype(np.uint8) * 255, truth)


def full_report():
    """Return data for a report with every section."""
    frames = [frame(f'seq/{i:03}', kind, i)
              for i, kind in enumerate(('best', 'best', 'worst', 'random'))]
    return ReportData('A drive', full_metrics(), CURVES, frames,
                      {'end_to_end': np.random.default_rng(0).gamma(9, 20, 40).tolist()},
                      Reliability([0.75, 0.95], [0.5, 1.0], [0.25, 0.75]))


class Page(HTMLParser):
    """Tags, texts and pictures of a page; fails on tags that are not closed in order."""

    VOID = frozenset({'meta', 'img', 'br'})

    def __init__(self, path):
        super().__init__()
        self.tags, self.texts, self.images, self.ids, self.open = [], [], [], set(), []
        self.source = path.read_text(encoding='utf-8')
        self.feed(self.source)
        assert not self.open, f'not closed: {self.open}'

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == 'img':
            self.images.append(dict(attrs))
        if 'id' in dict(attrs):
            self.ids.add(dict(attrs)['id'])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if 'style' not in self.open:
            self.texts.append(' '.join(data.split()))

    @property
    def text(self):
        return ' '.join(t for t in self.texts if t)

    def pictures(self):
        """Return the WebP pictures decoded, RGB."""
        prefix = 'data:image/webp;base64,'
        return [cv2.imdecode(np.frombuffer(base64.b64decode(i['src'][len(prefix):]), np.uint8),
                             cv2.IMREAD_COLOR)[..., ::-1]
                for i in self.images if i['src'].startswith(prefix)]


@pytest.fixture(scope='module')
def page(tmp_path_factory):
    """Return the full report."""
    path = tmp_path_factory.mktemp('report') / 'report.html'
    write_report(path, full_report())
    return Page(path)


def test_headlines_tables_and_run_are_there(page):
    for text in ('A drive', 'Average precision 0.412', 'FPR at 95 % recall 0.158',
                 'Mean IoU 0.712', 'Latency, median 184.2 ms p99 201.0 ms', 'Frames 40 2 dropped',
                 'average precision (AP) 0.4123', 'scored pixels 1,234,567',
                 'recall at FPR 0.01 0.2500', 'F1 at tau 0.75 0.0100',
                 'network 180.0 190.0 195.5 200.0', 'prr: no wrong label',
                 'SegmentMeIfYouCan, components mean F1 over tau 0.1190',
                 'raw mean F1 over score thresholds 0.2500',
                 'relis: not applicable (n/a): needs class probabilities',
                 "anomaly-seg evaluate 'my model.onnx'", 'model sha256 ' + 'ab' * 32,
                 'input size, height x width 512 x 1024', 'anomaly_seg_ros 9.8.7',
                 'road 0.0000', 'bicycle n/a'):
        assert text in page.text, text
    assert 'tau 0.3' not in page.text


def test_the_file_needs_nothing_outside_itself(page):
    for tag, attrs in page.tags:
        assert tag not in ('script', 'link', 'iframe', 'object', 'embed', 'base', 'form')
        assert not any(name.startswith('on') for name in attrs), (tag, attrs)
        for name in ('src', 'href', 'srcset', 'action', 'poster', 'data'):
            if name in attrs:
                assert attrs[name].startswith(('data:image/', '#')), attrs[name][:80]
        if attrs.get('href', '').startswith('#'):
            assert attrs['href'][1:] in page.ids
    style = re.search('<style>(.*?)</style>', page.source, re.S).group(1)
    assert 'url(' not in style and '@import' not in style
    policy = next(a['content'] for t, a in page.tags if a.get('http-equiv'))
    assert policy.startswith("default-src 'none'; img-src data:") and 'script' not in policy


def test_every_picture_is_described_and_whole(page):
    assert len(page.images) == 3 + 1 + 2 + 4 * 4
    for image in page.images:
        assert len(image['alt']) > 10
        kind, data = image['src'].split(';base64,')
        if kind == 'data:image/svg+xml':
            ElementTree.fromstring(base64.b64decode(data, validate=True))
    for picture in page.pictures():
        assert picture.shape == (320, 640, 3)


def test_ground_truth_is_outlined_and_void_is_dimmed(page):
    camera, overlay, heat, mask = page.pictures()[:4]
    cyan = np.array((0, 224, 255))
    # The square 100:200 x 300:400 of 360 x 720 begins at row 88.9 and column 266.7 of 320 x 640.
    for picture in (camera, heat, mask):
        edge = picture[130, 266:268].astype(int)
        assert np.abs(edge - cyan).mean() < 60, edge
        assert np.abs(picture[60, 266].astype(int) - cyan).mean() > 60
    assert np.abs(overlay[130, 266].astype(int) - cyan).mean() > 60
    assert camera[300:].mean() < 60 < 100 < camera[:60].mean()
    assert mask[130, 310].mean() > 240 and mask[30, 30].mean() < 15


def test_text_from_outside_is_escaped(tmp_path):
    metrics = full_metrics()
    metrics['run']['data'] = metrics['run']['model'] = HOSTILE
    metrics['run']['command'] = ['anomaly-seg', HOSTILE]
    metrics['run']['problems'] = [HOSTILE]
    metrics['segmentation']['iou_by_class'] = {HOSTILE: 0.5}
    metrics['pixel']['reason'] = HOSTILE
    path = tmp_path / 'report.html'
    write_report(path, ReportData(HOSTILE, metrics, CURVES, [frame(HOSTILE, 'best')]))
    page = Page(path)
    assert not any(tag == 'script' for tag, _ in page.tags)
    assert page.source.count('<script') == 0
    assert page.text.count('<script>alert(1)</script>') >= 6


@pytest.mark.parametrize('metrics', [
    {},
    {'pixel': {'reason': 'no frame has an anomaly mask'}, 'components': {'reason': 'none'},
     'compat': None, 'segmentation': None, 'latency_ms': None, 'run': None},
    {'pixel': {'average_precision': None, 'pixels': 9, 'positives': 0,
               'reason': 'no anomalous pixel'},
     'segmentation': {'miou': None, 'iou_by_class': None, 'reason': 'no labels'},
     'latency_ms': {'frames': 0, 'dropped': 0, 'reason': 'nothing was timed'},
     'run': {'command': 'x', 'card': {}}},
])
def test_what_is_not_there_is_left_out_or_has_its_reason(metrics, tmp_path):
    path = tmp_path / 'report.html'
    write_report(path, ReportData('Nothing', metrics))
    page = Page(path)
    assert not page.images
    for name in ('pixel', 'segmentation', 'latency_ms'):
        if 'reason' in (metrics.get(name) or {}):
            assert metrics[name]['reason'] in page.text
    assert 'None' not in page.text
    assert 'No pictures were kept' in page.text
    assert 'Calibration' not in page.text


def test_a_histogram_is_drawn_where_only_one_kind_of_pixel_exists(tmp_path):
    nothing = np.empty(0)
    curves = ScoreCurves(nothing, nothing, nothing, nothing, CURVES.histogram_edges,
                         np.zeros(8, int), CURVES.histogram_negatives)
    metrics = full_metrics()
    metrics['pixel'] = {'average_precision': None, 'reason': 'no anomalous pixel'}
    path = tmp_path / 'report.html'
    write_report(path, ReportData('One', metrics, curves))
    assert [i['alt'][:9] for i in Page(path).images] == ['Histogram', 'Bars of t']


def test_an_older_report_survives_a_failed_one(tmp_path):
    path = tmp_path / 'report.html'
    path.write_text('old')
    bad = ReportData('x', full_metrics(), None, [frame('a', 'best')])
    object.__setattr__(bad.frames[0], 'heat_rgb', np.zeros((0, 0, 3), np.uint8))
    with pytest.raises(cv2.error):
        write_report(path, bad)
    assert path.read_text() == 'old'
    assert [p.name for p in tmp_path.iterdir()] == ['report.html']
    with pytest.raises(UserError, match=r'report\.html'):
        write_report(path / 'report.html', ReportData('x', {}))


def test_equal_data_give_equal_bytes(tmp_path):
    for name in ('a', 'b'):
        write_report(tmp_path / name, full_report())
    assert (tmp_path / 'a').read_bytes() == (tmp_path / 'b').read_bytes()


def drawn_lines(svg, colour):
    """Return the lines of a colour in a chart of the unit square, in data coordinates."""
    root = ElementTree.fromstring(svg)

    def points(path):
        return np.array([[float(v) for v in pair.split()] for pair in
                         re.findall(r'[ML] ([-\d.]+ [-\d.]+)', path.get('d'))])

    groups = {g.get('id'): g for g in root.iter('{http://www.w3.org/2000/svg}g')}
    frame_px = points(groups['patch_2'].find('{http://www.w3.org/2000/svg}path'))
    left, top = frame_px.min(0)
    right, bottom = frame_px.max(0)
    lines = [points(path) for path in groups['axes_1'].iter('{http://www.w3.org/2000/svg}path')
             if f'stroke: {colour.lower()}' in (path.get('style') or '') and path.get('clip-path')]
    return [np.stack([(line[:, 0] - left) / (right - left) * 1.02 - 0.01,
                      (bottom - line[:, 1]) / (bottom - top) * 1.03 - 0.01], 1)
            for line in lines]


def test_precision_recall_chart_shows_the_steps_whose_area_is_average_precision():
    line, = drawn_lines(plots.precision_recall(CURVES, 0.02), plots.BLUE)
    area = np.sum(np.diff(line[:, 0]) * line[1:, 1])
    assert area == pytest.approx(0.25 * 1 + 0.25 * 0.5 + 0.5 * 0.125, abs=1e-4)


def test_roc_chart_runs_through_the_operating_points():
    line, = drawn_lines(plots.roc(CURVES, 0.5), plots.BLUE)
    np.testing.assert_allclose(
        line, [(0, 0), (0, 0.25), (0.1, 0.5), (0.75, 1), (1, 1)], atol=1e-4)


def test_reliability_chart_joins_the_bins_that_hold_pixels():
    line, = drawn_lines(plots.reliability([0.75, 0.95], [0.5, 1.0], [0.25, 0.75]), plots.BLUE)
    np.testing.assert_allclose(line, [(0.75, 0.5), (0.95, 1.0)], atol=1e-4)


def test_summary_has_the_headlines_in_words():
    rows = dict(summary_table(full_metrics()))
    assert rows['average precision (AP)'] == '0.4123'
    assert rows['false-positive rate at 95 % recall'] == '0.1579'
    assert rows['component mean F1'] == '0.1230'
    assert rows['mean IoU (mIoU)'] == '0.7123'
    assert rows['end to end, p50 / p95 / p99 ms'] == '184.2 / 195.0 / 201.0'
    assert rows['frames'] == '40' and rows['frames dropped'] == '2'


def test_summary_gives_the_reason_where_there_is_no_ground_truth():
    rows = summary_table({'pixel': {'reason': 'no frame has an anomaly mask'},
                          'latency_ms': None})
    assert rows == [('average precision (AP)', 'n/a (no frame has an anomaly mask)')]


def test_best_worst_and_random_frames_are_distinct():
    rows = [{'frame_id': str(i), 'average_precision': ap, 'score_mean': -i}
            for i, ap in enumerate([0.3, None, 0.9, 0.1, 0.5, None, 0.7, 0.2])]
    chosen = choose_frames(rows, 2)
    assert [(kind, row['frame_id']) for kind, row in chosen if kind != 'random'] == [
        ('best', '2'), ('best', '6'), ('worst', '3'), ('worst', '7')]
    drawn = {row['frame_id'] for kind, row in chosen if kind == 'random'}
    assert len(drawn) == 2 and drawn <= {'0', '1', '4', '5'}
    assert choose_frames(rows, 2) == chosen
    seeds = [{r['frame_id'] for k, r in choose_frames(rows, 2, seed) if k == 'random'}
             for seed in range(20)]
    assert len(set(map(frozenset, seeds))) > 1


def test_without_ground_truth_frames_are_ranked_by_mean_score():
    rows = [{'frame_id': str(i), 'score_mean': mean} for i, mean in enumerate([1.0, 3.0, 2.0])]
    assert [(kind, row['frame_id']) for kind, row in choose_frames(rows, 1)] == [
        ('highest', '1'), ('lowest', '0'), ('random', '2')]


@pytest.mark.parametrize('number', [0, 1, 2, 5])
def test_few_frames_are_each_shown_once(number):
    rows = [{'frame_id': str(i), 'average_precision': i / 10} for i in range(number)]
    shown = [row['frame_id'] for _, row in choose_frames(rows, 3)]
    assert sorted(shown) == [str(i) for i in range(number)]


def test_captions_say_what_a_row_holds():
    assert frame_caption({'average_precision': 0.5, 'fpr95': None, 'pixels': 200,
                          'positives': 3, 'obstacles': 1, 'score_max': -1.234}) == (
        'AP 0.500, 1.5 % of the pixels anomalous, 1 obstacle found, highest score -1.23')
    assert frame_caption({'frame_id': 'x'}) == ''
    assert frame_caption({'pixels': 200, 'positives': 200}) == '100 % of the pixels anomalous'


def test_an_unknown_kind_of_frame_is_refused():
    with pytest.raises(ValueError, match='kind must be one of'):
        frame('a', 'nice')


def test_summaries_need_neither_matplotlib_nor_jinja2():
    code = ('import sys; import anomaly_seg_ros.report as r; r.summary_table({}); '
            'r.choose_frames([]); bad = {"matplotlib", "jinja2"} & set(sys.modules); '
            'sys.exit(str(bad) if bad else 0)')
    subprocess.run([sys.executable, '-c', code], check=True)


def test_in_a_browser_it_fits_a_phone_and_a_desk_and_prints(tmp_path):
    path = tmp_path / 'report.html'
    write_report(path, full_report())
    browser = Browser(path, tmp_path)
    for width in (390, 1280):
        seen = browser.measure(width)
        assert seen['images'] == 22 and seen['broken'] == 0
        assert seen['width'] <= width, f'{seen["width"]} px wide in a window of {width} px'
        assert seen['small_text'] == 0
    phone = browser.screenshot(500, 4000)
    assert (phone[2] == (16, 32, 45)).all(), 'the header does not span the window'
    assert 0.1 < (phone != 255).any(2).mean() < 0.9
    pdf = browser.pdf()
    pages = len(re.findall(rb'/Type\s*/Page\b', pdf))
    assert pdf.startswith(b'%PDF') and 2 <= pages <= 8
