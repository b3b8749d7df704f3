# SPDX-License-Identifier: Apache-2.0
"""The command line as a user meets it: real processes, exit codes, messages."""

from collections.abc import Iterable
from dataclasses import asdict
import hashlib
import json
from pathlib import Path
import subprocess
import sys
from typing import Any

from anomaly_seg_ros import export
from anomaly_seg_ros.backends import open_backend
from anomaly_seg_ros.cli import cli
from anomaly_seg_ros.datasets import DATASETS, open_dataset
from anomaly_seg_ros.engine import EngineKey, record_path
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.model_file import load_model_file, write_model_file
from anomaly_seg_ros.pipeline import Pipeline
import cards
from click.testing import CliRunner
import cv2
import numpy as np
import pytest

WEIGHTS = Path(__file__).resolve().parent.parent / 'models' / 'demo_weights.safetensors'


def run(*arguments: object) -> 'subprocess.CompletedProcess[str]':
    """Run ``anomaly-seg`` in a process of its own."""
    return subprocess.run([sys.executable, '-m', 'anomaly_seg_ros.cli', *map(str, arguments)],
                          capture_output=True, text=True, check=False, timeout=600)


def test_every_command_explains_itself() -> None:
    """Each command has a help page, with a sentence of what it does."""
    for name, command in cli.commands.items():
        result = CliRunner().invoke(cli, [name, '--help'])
        assert result.exit_code == 0
        assert command.help and len(command.help) > 20, name
        for parameter in command.params:
            if parameter.param_type_name == 'option':
                assert parameter.help, f'{name} {parameter.opts}'


def test_designed_commands_are_there() -> None:
    """The commands of the design exist."""
    assert {'demo', 'export', 'build-engine', 'inspect', 'evaluate', 'metrics', 'make-bag',
            'replay', 'calibrate', 'bench', 'compare', 'doctor', 'fetch'} <= set(cli.commands)


EXPORT = ['export', '--weights', 'w', '--output', 'o']
BENCHMARK = ['evaluate', 'm.onnx', '--root', '.', '--output', 'o', '--dataset']


@pytest.mark.parametrize('arguments, said', [
    (['no-such-command'], 'no-such-command'), (['evaluate'], 'MODEL'),
    (['evaluate', 'm.onnx', '--limit', '0'], '--limit'),
    ([*BENCHMARK, 'acdc', '--threads', '257'], '0<=x<=256'),
    (['bench', 'm', '--threads', '257'], '0<=x<=256'),
    (['export', 'erfnet', '--weights', 'w', '--output', 'o', '--input-size', '512'], '512'),
    ([*EXPORT, 'erfnet', '--temperature', 'nan'], 'finite'),
    ([*EXPORT, 'erfnet', '--precision', 'int8', '--maximum-drop', 'nan'], 'finite'),
    ([*EXPORT, 'onnx', '--mean', '0,nan,0'], 'three numbers'),
    ([*EXPORT, 'erfnet', '--mean', '0.5,0.5,0.5', '--classes', '/nonexistent', '--void-index',
      '3', '--upsample'], '--mean, --classes, --void-index, --upsample only with NETWORK onnx'),
    ([*EXPORT, 'erfnet', '--frame-size', '10x20'], 'only with --input-variant device'),
    ([*EXPORT, 'erfnet', '--frame-channel-order', 'bgr'], 'only with --input-variant device'),
    ([*EXPORT, 'onnx', '--int8-for', 'openvino'], '--int8-for only with --precision int8'),
    (['calibrate', 'm', '--dataset', 'acdc', '--root', 'r', '--output', 'o', '--criterion',
      'best-f1', '--rate', '0.5'], 'best-f1 takes no rate'),
    (['export', 'unet', '--weights', 'w', '--output', 'o'], 'erfnet, roadnet'),
    (['calibrate', 'm', '--dataset', 'unknown', '--root', 'r', '--output', 'o'], 'streethazards'),
    (['make-bag', '--output', 'bag'], '--video'),
    (['calibrate', 'm', '--output', 'o'], 'give one of --images and --dataset'),
    (['calibrate', 'm', '--images', 'i', '--dataset', 'acdc', '--output', 'o'], 'give one of'),
    (['calibrate', 'm', '--images', 'i', '--root', 'r', '--output', 'o'], 'belong to --dataset'),
    (['calibrate', 'm', '--dataset', 'acdc', '--output', 'o'], '--dataset needs --root'),
    ([*BENCHMARK, 'no_such_set'], 'road_anomaly_21, road_obstacle_21'),
    ([*BENCHMARK, 'acdc', '--option', 'fog'], 'KEY=VALUE'),
    ([*BENCHMARK, 'acdc', '--option', 'wether=fog'], 'it has split, weather'),
    ([*BENCHMARK, 'acdc', '--threshold', 'nan'], 'finite'),
    ([*BENCHMARK, 'acdc', '--workers', '0'], '--workers'),
    (['compare', 'a', 'b', '--output', 'o', '--seed', '-1'], '--seed'),
    (['compare', 'a', 'b', '--output', 'o', '--level', 'nan'], 'finite'),
    ([*BENCHMARK, 'acdc', '--option', 'keep_going=no'], 'no option keep_going'),
    (['demo', '--seed', '-1'], '--seed'),
    (['replay', 'bag', '--output', 'o', '--realtime'], '--through-node'),
    (['replay', 'bag', '--output', 'o', '--result-topics', 'mask'], 'obstacle_mask')])
def test_wrong_usage_exits_2(arguments: list[str], said: str) -> None:
    """Usage errors are told apart from failed runs, and say what would be right."""
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2
    assert said in ' '.join(result.stderr.split())


@pytest.mark.parametrize('topic', ['front camera', '', 'a//b', '/a/', '1a', '{x}/y'])
def test_a_topic_that_ros_does_not_take_is_wrong_usage(topic: str) -> None:
    pytest.importorskip('rclpy')
    result = CliRunner().invoke(cli, ['doctor', '--image', topic])
    assert result.exit_code == 2
    assert f"--image: '{topic}'" in ' '.join(result.stderr.split())


def test_a_file_that_the_system_refuses_is_named(tmp_path: Path) -> None:
    """Whichever it is: no traceback, exit code 1."""
    video = tmp_path / ('x' * 300)
    result = run('make-bag', '--video', video, '--output', tmp_path / 'bag')
    assert result.returncode == 1
    assert f'error: {video}: File name too long' in result.stderr
    assert 'Traceback' not in result.stderr


@pytest.mark.parametrize('arguments, said', [
    (['--rate', '1e10'], 'rate_hz'), (['--rate', '1e-9'], 'rate_hz'), (['--rate', 'nan'], 'nan'),
    (['--rate', 'inf'], 'inf'), (['--root', 'r'], 'belong to --dataset'),
    (['--split', 'val'], 'belong to --dataset'), (['--option', 'a=b'], 'belong to --dataset'),
    (['--image-topic', '/ground_truth/anomaly_mask'], 'topics of their own'),
    (['--image-topic', 'camera image'], '/camera/image_raw')])
def test_wrong_usage_of_make_bag(arguments: list[str], said: str, tmp_path: Path) -> None:
    """What cannot be recorded is wrong usage; no bag is written."""
    cv2.imwrite(str(tmp_path / '0.png'), np.zeros((4, 6, 3), np.uint8))
    result = CliRunner().invoke(cli, ['make-bag', '--images', str(tmp_path), '--output',
                                      str(tmp_path / 'bag'), *arguments])
    assert result.exit_code == 2
    assert said in ' '.join(result.stderr.split())
    assert not (tmp_path / 'bag').exists()


@pytest.mark.parametrize('name', ['b[red]x', 'b[/x]', 'b:car:x'])
def test_names_are_printed_as_they_are(tmp_path: Path, name: str) -> None:
    """What is markup to rich is part of the name."""
    parent = tmp_path / name
    parent.mkdir(parents=True)
    cv2.imwrite(str(parent / '0.png'), np.zeros((4, 6, 3), np.uint8))
    result = run('make-bag', '--images', parent, '--output', parent / 'bag')
    assert result.returncode == 0, result.stderr
    assert f'{parent}/bag: 1 frames' in result.stdout


def test_long_paths_stay_on_one_line(tiny_model: Path, small_benchmark: Path,
                                     tmp_path: Path) -> None:
    """So that they can be copied, and found in a log."""
    for name, arguments in (
            ('e.onnx', ['export', 'erfnet', '--weights', tiny_model.parent / 'weights.pth',
                        '--input-size', '64x128']),
            ('c.onnx', ['calibrate', tiny_model, '--dataset', 'road_anomaly_21', '--root',
                        small_benchmark])):
        output = tmp_path / ('x' * 80) / name
        result = run(*arguments, '--output', output)
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith(f'{output}: '), result.stdout


@pytest.mark.parametrize(('precision', 'most'), [('fp32', 20), ('int8', 64)])
def test_a_folder_of_frames_is_spread_over(precision: str, most: int, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """Every export sees its first and its last image, and reads only those that it uses."""
    for index in range(127):
        cv2.imwrite(str(tmp_path / f'{index}.png'), np.full((2, 2, 3), index, np.uint8))
    seen: list[int] = []

    def export_model(request: object, output: Path, frames: Iterable[np.ndarray],
                     gate: object) -> None:
        seen.extend(int(frame[0, 0, 0]) for frame in frames)
        raise UserError('enough')
    monkeypatch.setattr(export, 'export_model', export_model)
    result = CliRunner().invoke(cli, [
        'export', 'erfnet', '--weights', 'w', '--output', 'o', '--frames', str(tmp_path),
        '--precision', precision])
    assert result.exit_code == 1
    assert seen == export.spread(127, most)
    assert seen[-1] == 126


def test_exit_codes_of_the_process() -> None:
    """What click reports arrives as the exit code of the real process."""
    for arguments, code in ((['--version'], 0), (['datasets'], 0), (['inspect', 'gone.onnx'], 1),
                            (['no-such-command'], 2)):
        result = run(*arguments)
        assert result.returncode == code, result.stderr
        assert 'Traceback' not in result.stderr


def test_data_sets_are_listed_in_full() -> None:
    """Splits and addresses are not cut off at 80 characters."""
    said = run('datasets').stdout
    for name, adapter in DATASETS.items():
        assert name in said and ', '.join(adapter.splits) in said and adapter.source in said


def test_bench_prints_every_figure_at_80_characters(tiny_model: Path, tmp_path: Path) -> None:
    """The figures are those of the JSON; a backend that is not there says why."""
    result = run('bench', tiny_model, '--backend', 'cpu', '--backend', 'cuda', '--frames', 2,
                 '--warm-up', 0, '--frame-size', '64x128', '--json', tmp_path / 'bench.json')
    assert result.returncode == 0, result.stderr
    assert all(len(line) <= 80 for line in result.stdout.splitlines() if '│' in line)
    for measured in json.loads((tmp_path / 'bench.json').read_text())['results']:
        assert measured['name'] in result.stdout
        if measured['reason'] is None:
            assert f'{measured["frames_per_second"]:.1f}' in result.stdout
        else:
            assert f'{measured["name"]}: not measured: {measured["reason"]}' in result.stdout


def test_bench_fails_where_nothing_was_measured(tiny_model: Path, tmp_path: Path) -> None:
    """A script that asked for one backend must not take silence for a result."""
    report = tmp_path / 'bench.json'
    result = run('bench', tiny_model, '--backend', 'tensorrt', '--json', report)
    assert result.returncode == 1
    assert 'tensorrt: not measured: ' in result.stdout
    assert 'nothing was measured' in result.stderr
    assert json.loads(report.read_text())['results'][0]['reason']


@pytest.mark.parametrize('arguments', [
    ['demo', '--output', 'o'], ['replay', 'bag', '--output', 'o', '--through-node']])
def test_without_ros_the_extra_is_named(arguments: list[str],
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is rendered or read."""
    monkeypatch.setitem(sys.modules, 'rclpy', None)
    result = CliRunner().invoke(cli, arguments)
    assert isinstance(result.exception, UserError)
    assert 'pip install ".[ros]"' in str(result.exception)


STOPPED = """
import os, signal, sys
from anomaly_seg_ros.cli import main
from anomaly_seg_ros.datasets import PairedDataset
number = getattr(signal, sys.argv.pop(1))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it
read = PairedDataset.__getitem__
def stop(self, index):
    if index == 2:
        os.kill(os.getpid(), number)
    return read(self, index)
PairedDataset.__getitem__ = stop
main()
"""


@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM'])
def test_a_stopped_run_says_what_it_keeps_and_leaves_no_scraps(
        tiny_model: Path, small_benchmark: Path, tmp_path: Path, name: str) -> None:
    """Score maps stay, with the command for them; the half of a bag goes."""
    data = ['--dataset', 'road_anomaly_21', '--root', small_benchmark, '--output']
    for arguments, said in ((['evaluate', tiny_model, *data, tmp_path / 'out'],
                             f'anomaly-seg metrics {tmp_path}/out/scores'),
                            (['make-bag', *data, tmp_path / 'bag'], 'stopped')):
        result = subprocess.run([sys.executable, '-c', STOPPED, name, *map(str, arguments)],
                                capture_output=True, text=True, check=False, timeout=600)
        assert result.returncode == 1, result.stderr
        assert said in result.stderr and 'Traceback' not in result.stderr
    assert sorted(path.name for path in (tmp_path / 'out' / 'scores').iterdir()) == [
        '0.npy', '1.npy']
    assert sorted(path.name for path in tmp_path.iterdir()) == ['benchmark', 'out']


def test_missing_model_exits_1_with_name_and_remedy(tmp_path: Path) -> None:
    """No traceback, but the file's name and what to do."""
    result = run('inspect', tmp_path / 'gone.onnx')
    assert result.returncode == 1
    assert 'gone.onnx' in result.stderr and 'anomaly-seg export' in result.stderr
    assert 'Traceback' not in result.stderr


def test_inspect_prints_the_card(tiny_model: Path) -> None:
    """The card as JSON has the score and the size that were exported."""
    result = run('inspect', tiny_model, '--json')
    assert result.returncode == 0, result.stderr
    card = json.loads(result.stdout)
    assert card['score'] == 'max_logit'
    assert card['input_size_hw'] == [64, 128]


def test_inspect_shows_ports_and_whole_digests(tmp_path: Path) -> None:
    """At 80 characters, where long words are folded, not cut."""
    path = cards.identity_model(tmp_path / 'm.onnx').path
    result = run('inspect', path)
    assert result.returncode == 0, result.stderr
    cells = [line.split('│')[2].strip() for line in result.stdout.splitlines() if '│' in line]
    text = ''.join(cells)
    assert 'image float32 1x3x24x40' in text and 'anomaly float32 1x24x40' in text
    assert hashlib.sha256(path.read_bytes()).hexdigest() in text and '…' not in text


def test_bench_takes_the_frames_that_a_device_model_is_made_for(tmp_path: Path) -> None:
    """The title says so; another size is refused."""
    path = cards.device_model(tmp_path / 'm.onnx').path
    options = ['bench', str(path), '--backend', 'cpu', '--frames', '1', '--warm-up', '0']
    result = CliRunner().invoke(cli, options)
    assert result.exit_code == 0, result.output
    assert f'{path}, frames of 40x24\n' in result.output
    result = CliRunner().invoke(cli, [*options, '--frame-size', '48x80'])
    assert isinstance(result.exception, UserError)


def test_inspect_shows_the_card_also_where_it_does_not_run(tmp_path: Path) -> None:
    """Of an engine without its GPU, and of a file whose graph is not as its card says."""
    engine = engine_file(tmp_path / 'm.engine')
    result = run('inspect', engine)
    assert result.returncode == 0, result.stderr
    assert 'max_logit' in result.stdout and 'does not run here' in result.stdout
    graph = cards.identity_graph().SerializeToString()
    write_model_file(tmp_path / 'm.onnx', graph, cards.card((32, 64)))
    result = run('inspect', tmp_path / 'm.onnx')
    assert result.returncode == 1
    assert 'max_logit' in result.stdout and 'm.onnx' in result.stderr


def test_a_model_is_calibrated_on_images_alone(tmp_path: Path) -> None:
    """As the README has it: every pixel of the folder counts as in-distribution."""
    rng = np.random.default_rng(0)
    (tmp_path / 'frames').mkdir()
    images = rng.integers(0, 256, (4, 24, 40, 3), dtype=np.uint8)
    for number, image in enumerate(images):
        cv2.imwrite(str(tmp_path / 'frames' / f'{number}.png'), image)
    model = cards.identity_model(tmp_path / 'm.onnx').path
    result = run('calibrate', model, '--images', tmp_path / 'frames', '--output',
                 tmp_path / 'o.onnx')
    assert result.returncode == 0, result.stderr
    card = load_model_file(tmp_path / 'o.onnx').card
    scores = -(images.max(-1) / np.float32(255))  # of the identity model, which takes 0 to 1
    assert 0.008 < np.mean(scores >= card.threshold - 1e-6) <= 0.012
    assert 'of frames, 4 frames' in card.threshold_source


def test_an_engine_is_not_calibrated(tmp_path: Path, small_benchmark: Path) -> None:
    """Said before any frame is run, with what to do."""
    engine = engine_file(tmp_path / 'm.engine')
    result = run('calibrate', engine, '--dataset', 'road_anomaly_21', '--root', small_benchmark,
                 '--temperature', 'keep', '--backend', 'tensorrt', '--output', tmp_path / 'o')
    assert result.returncode == 1
    assert 'Calibrate the .onnx' in result.stderr
    assert not (tmp_path / 'o').exists()


def engine_file(path: Path) -> Path:
    """Write what looks like an engine, with its record."""
    data = b'ftrtplan' + bytes(100)
    path.write_bytes(data)
    key = EngineKey(model_sha256='0' * 64, tensorrt='10.16', gpu='X', compute_capability='9.0',
                    hardware_compatibility='none', precision='fp32', ports=('a',))
    record_path(path).write_text(json.dumps(
        {'key': asdict(key), 'card': asdict(cards.card()), 'layer_precisions': {},
         'engine_sha256': hashlib.sha256(data).hexdigest()}))
    return path


def test_class_names_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    """The file, and what it should be."""
    (tmp_path / 'classes.txt').write_bytes('straße\n'.encode('latin-1'))
    result = run('export', 'onnx', '--weights', tmp_path / 'n.onnx', '--classes',
                 tmp_path / 'classes.txt', '--output', tmp_path / 'o.onnx')
    assert result.returncode == 1
    assert 'classes.txt: expected UTF-8' in result.stderr


def test_benchmark_to_bag_to_metrics(tiny_model: Path, small_benchmark: Path,
                                     tmp_path: Path) -> None:
    """evaluate, make-bag, replay and metrics agree to the last digit."""
    data = ['--dataset', 'road_anomaly_21', '--root', small_benchmark]
    for arguments in (
            ['evaluate', tiny_model, *data, '--output', tmp_path / 'a', '--save-scores'],
            ['make-bag', *data, '--output', tmp_path / 'bag', '--storage', 'sqlite3'],
            ['replay', tmp_path / 'bag', '--model', tiny_model, '--output', tmp_path / 'b'],
            ['metrics', tmp_path / 'a' / 'scores', tmp_path / 'a' / 'masks', '--output',
             tmp_path / 'c', '--workers', '2']):
        result = run(*arguments)
        assert result.returncode == 0, result.stderr
    written = [json.loads((tmp_path / name / 'metrics.json').read_text()) for name in 'abc']
    assert written[0]['pixel'] == written[1]['pixel'] == written[2]['pixel']
    assert written[0]['pixel']['average_precision'] > 0


def bad_benchmark(root: Path) -> dict[str, str]:
    """Spoil frames 1 to 4 of a benchmark, each in its own way: file -> what is said of it."""
    images, masks = root / 'images', root / 'labels_masks'
    (masks / '1.png').rename(masks / '01.png')
    (images / '2.png').write_bytes((images / '2.png').read_bytes()[:-500])
    mask = cv2.imread(str(masks / '3.png'), cv2.IMREAD_UNCHANGED)
    cv2.imwrite(str(masks / '3.png'), np.where(mask == 1, 2, mask).astype(np.uint8))
    cv2.imwrite(str(masks / '4.png'), np.zeros((10, 10), np.uint8))
    return {'images/1.png': 'no mask', 'labels_masks/01.png': 'no image',
            'images/2.png': 'cut off', 'labels_masks/3.png': 'has also 2',
            'labels_masks/4.png': '10x10'}


def test_all_that_is_wrong_is_listed_and_nothing_is_scored(
        tiny_model: Path, small_benchmark: Path, tmp_path: Path) -> None:
    """Unpaired, damaged and foreign files: one list, exit code 1; the rest only if asked for."""
    root = small_benchmark
    wrong = bad_benchmark(root)
    arguments = ['evaluate', tiny_model, '--dataset', 'road_anomaly_21', '--root', root,
                 '--output', tmp_path / 'out']
    result = run(*arguments)
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    for name, reason in wrong.items():
        assert any(f'{root}/{name}: ' in line and reason in line for line in lines), name
    assert '--keep-going' in lines[-1]
    assert not (tmp_path / 'out').exists()

    result = run(*arguments, '--keep-going')
    assert result.returncode == 0
    lines = result.stderr.splitlines()
    written = json.loads((tmp_path / 'out' / 'metrics.json').read_text())
    for name, reason in wrong.items():
        for said in (lines, written['run']['problems']):
            assert any(name in line and reason in line for line in said), name
    assert written['latency_ms']['frames'] == 1
    mask = cv2.imread(str(root / 'labels_masks' / '0.png'), cv2.IMREAD_UNCHANGED)
    assert written['pixel']['positives'] == np.count_nonzero(mask == 1)


def test_a_full_disk_ends_the_run_and_keeps_what_fits(
        tiny_model: Path, small_benchmark: Path, tmp_path: Path) -> None:
    """On a file system that is really full: exit code 1, whole score maps only, no metrics."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=250k', 'tmpfs', str(disk)],
                             capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f'cannot mount a small file system here: {mounted.stderr.strip()}')
    try:
        result = run('evaluate', tiny_model, '--dataset', 'road_anomaly_21', '--root',
                     small_benchmark, '--output', disk / 'out')
        assert result.returncode == 1
        assert 'Traceback' not in result.stderr
        assert f'{disk}/out/' in result.stderr and 'Free disk space' in result.stderr
        assert not (disk / 'out' / 'metrics.json').exists()
        kept = sorted((disk / 'out' / 'scores').iterdir())
        assert 1 <= len(kept) < 5
        assert f'scores of the {len(kept)} frames so far are kept' in ' '.join(
            result.stderr.split())
        for path in kept:
            image = cv2.imread(str(small_benchmark / 'images' / f'{path.stem}.png'))
            assert np.load(path).shape == image.shape[:2]
        again = run('metrics', disk / 'out' / 'scores', disk / 'out' / 'masks', '--output',
                    tmp_path / 'again', '--keep-going')
        assert again.returncode == 0, again.stderr
    finally:
        subprocess.run(['umount', str(disk)], check=True)


def test_a_bag_with_a_damaged_frame_keeps_the_frames_before_it(
        tiny_model: Path, small_benchmark: Path, tmp_path: Path) -> None:
    """A message whose step does not fit its width: named, exit code 1, earlier scores kept."""
    from anomaly_seg_ros import bags
    made = bags._image_message

    def damaged(pixels: np.ndarray, encoding: str, stamp_ns: int, frame_id: str) -> Any:
        message = made(pixels, encoding, stamp_ns, frame_id)
        if encoding == 'rgb8' and stamp_ns == bags.START_NS + 300_000_000:
            message.step -= 1
        return message

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bags, '_image_message', damaged)
        bags.make_bag(open_dataset('road_anomaly_21', small_benchmark), tmp_path / 'bag')
    result = run('replay', tmp_path / 'bag', '--model', tiny_model, '--output', tmp_path / 'out')
    assert result.returncode == 1
    assert 'Traceback' not in result.stderr
    said = ' '.join(result.stderr.split())
    assert 'frame 3' in said and 'step' in said and '3 frames so far are kept' in said
    assert len(list((tmp_path / 'out' / 'scores').iterdir())) == 3
    assert not (tmp_path / 'out' / 'metrics.json').exists()


def test_masks_of_another_size_in_a_bag(tiny_model: Path, small_benchmark: Path,
                                        tmp_path: Path) -> None:
    """Ground truth that does not lie on its image ends the replay with its name."""
    source = open_dataset('road_anomaly_21', small_benchmark)
    from anomaly_seg_ros import bags
    made = bags._image_message

    def cropped(pixels: np.ndarray, encoding: str, stamp_ns: int, frame_id: str) -> Any:
        return made(np.ascontiguousarray(pixels[:-1]) if encoding == 'mono8' else pixels,
                    encoding, stamp_ns, frame_id)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bags, '_image_message', cropped)
        bags.make_bag(source, tmp_path / 'bag')
    result = run('replay', tmp_path / 'bag', '--model', tiny_model, '--output', tmp_path / 'out')
    assert result.returncode == 1
    assert 'Traceback' not in result.stderr
    assert '/ground_truth/anomaly_mask' in result.stderr and '160x95' in result.stderr


def test_nan_in_stored_scores_names_the_file(tmp_path: Path) -> None:
    """A score map with NaN is refused by name, exit code 1."""
    for folder in ('scores', 'masks'):
        (tmp_path / folder).mkdir()
    scores = np.zeros((8, 8), np.float32)
    scores[3, 3] = np.nan
    np.save(tmp_path / 'scores' / 'x.npy', scores)
    np.save(tmp_path / 'masks' / 'x.npy', np.eye(8, dtype=np.uint8))
    result = run('metrics', tmp_path / 'scores', tmp_path / 'masks', '--output', tmp_path / 'o')
    assert result.returncode == 1
    assert 'x.npy' in result.stderr


def test_wrong_weights_exit_1_and_leave_no_file(real_data: Path, tmp_path: Path) -> None:
    """Weights of another network: the keys are named and nothing is written."""
    import torch
    torch.save({'layer.weight': torch.zeros(3)}, tmp_path / 'other.pth')
    result = run('export', 'erfnet', '--weights', tmp_path / 'other.pth', '--output',
                 tmp_path / 'm.onnx')
    assert result.returncode == 1
    assert 'layer.weight' in result.stderr and 'decoder.' in result.stderr
    assert not (tmp_path / 'm.onnx').exists()


def test_compare_prints_and_writes_the_figures_of_both_runs(tmp_path: Path) -> None:
    """The first run is the baseline; runs over other frames are refused with their names."""
    rng = np.random.default_rng(5)
    for method, frames in ('a', 4), ('b', 4), ('c', 3):
        scores, masks = tmp_path / method / 'scores', tmp_path / method / 'masks'
        scores.mkdir(parents=True)
        masks.mkdir()
        for index in range(frames):
            mask = np.zeros((32, 32), np.uint8)
            mask[4:20, 4:20] = 1
            noise = rng.normal(size=mask.shape) * (0.5 if method == 'a' else 2.0)
            np.save(scores / f'{index}.npy', (mask + noise).astype(np.float32))
            np.save(masks / f'{index}.npy', mask)
        result = run('metrics', scores, masks, '--output', tmp_path / f'run_{method}')
        assert result.returncode == 0, result.stderr
    result = run('compare', tmp_path / 'run_a', tmp_path / 'run_b', '--output', tmp_path / 'both',
                 '--resamples', '200')
    assert result.returncode == 0, result.stderr
    aps = [json.loads((tmp_path / f'run_{method}' / 'metrics.json').read_text())['pixel'][
        'average_precision'] for method in 'ab']
    for figure in (*(f'{ap:.4f}' for ap in aps), f'{aps[1] - aps[0]:+.4f}', 'run_a (baseline)'):
        assert figure in result.stdout
    assert all(len(line.rstrip()) <= 80 for line in result.stdout.splitlines()[:20])
    assert (tmp_path / 'both' / 'comparison.csv').stat().st_size > 100
    assert 'run_b' in (tmp_path / 'both' / 'comparison.html').read_text()
    result = run('compare', tmp_path / 'run_a', tmp_path / 'run_c', '--output', tmp_path / 'no')
    assert result.returncode == 1
    assert 'run_c' in result.stderr and 'different frames' in ' '.join(result.stderr.split())


def test_image_ood_tells_a_domain_by_its_frames(tiny_model: Path, small_benchmark: Path,
                                                tmp_path: Path) -> None:
    """The AUROC printed and written is scikit-learn's of the columns of per_frame.csv."""
    from sklearn.metrics import roc_auc_score
    other = tmp_path / 'other'
    (other / 'images').mkdir(parents=True)
    (other / 'labels_masks').mkdir()
    for path in (small_benchmark / 'images').iterdir():
        cv2.imwrite(str(other / 'images' / path.name), cv2.blur(cv2.imread(str(path)), (9, 9)))
    for path in (small_benchmark / 'labels_masks').iterdir():
        (other / 'labels_masks' / path.name).write_bytes(path.read_bytes())
    for root, name in (small_benchmark, 'in'), (other, 'out'):
        assert run('evaluate', tiny_model, '--dataset', 'road_anomaly_21', '--root', root,
                   '--output', tmp_path / name).returncode == 0
    result = run('image-ood', tmp_path / 'in', tmp_path / 'out', '--output', tmp_path / 'o.json')
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / 'o.json').read_text())
    assert written['in_domain_frames'] == written['out_of_domain_frames'] == 5
    for name, auroc in written['auroc'].items():
        values = [np.genfromtxt(tmp_path / run_name / 'per_frame.csv', delimiter=',', names=True,
                                deletechars='')[f'score_{name}'] for run_name in ('in', 'out')]
        assert auroc == pytest.approx(roc_auc_score([0] * 5 + [1] * 5, np.concatenate(values)))
        assert f'{auroc:.4f}' in result.stdout
    assert set(written['auroc']) == {'mean', 'max', 'quantile_0.5', 'quantile_0.9',
                                     'quantile_0.99'}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ray_gives_the_same_bits(tiny_model: Path, small_benchmark: Path, tmp_path: Path) -> None:
    """``--ray local`` on evaluate and metrics: every figure as without it."""
    pytest.importorskip('ray', reason='ray is not installed: pip install ".[ray]"')
    data = ['--dataset', 'road_anomaly_21', '--root', small_benchmark]
    for arguments in (
            ['evaluate', tiny_model, *data, '--output', tmp_path / 'a', '--save-scores'],
            ['evaluate', tiny_model, *data, '--output', tmp_path / 'b', '--ray', 'local'],
            ['metrics', tmp_path / 'a' / 'scores', tmp_path / 'a' / 'masks', '--output',
             tmp_path / 'c', '--ray', 'local']):
        result = run(*arguments)
        assert result.returncode == 0, result.stderr
    written = [json.loads((tmp_path / name / 'metrics.json').read_text()) for name in 'abc']
    for part in ('pixel', 'components', 'compat'):
        assert written[0][part] == written[1][part] == written[2][part]


def test_ray_address_without_a_cluster_fails_at_once(tmp_path: Path) -> None:
    """Nobody listens there: exit code 1 within seconds, with the address and what to do."""
    pytest.importorskip('ray', reason='ray is not installed: pip install ".[ray]"')
    for folder in ('scores', 'masks'):
        (tmp_path / folder).mkdir()
    np.save(tmp_path / 'scores' / 'x.npy', np.eye(8, dtype=np.float32))
    np.save(tmp_path / 'masks' / 'x.npy', np.eye(8, dtype=np.uint8))
    result = run('metrics', tmp_path / 'scores', tmp_path / 'masks', '--output', tmp_path / 'o',
                 '--ray', '127.0.0.1:1')
    assert result.returncode == 1
    assert 'no Ray cluster at 127.0.0.1:1' in result.stderr and 'ray start' in result.stderr
    assert 'Traceback' not in result.stderr


def test_export_for_a_camera_that_sends_bgr(tmp_path: Path) -> None:
    """The card says so, and frames of both orders give the same answer."""
    pytest.importorskip('onnxscript')
    path = tmp_path / 'm.onnx'
    result = CliRunner().invoke(cli, [
        'export', 'roadnet', '--weights', str(WEIGHTS),
        '--input-size', '64x96', '--input-variant', 'device', '--frame-size', '60x100',
        '--frame-channel-order', 'bgr', '--output', str(path)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    model = load_model_file(path)
    assert model.card.frame_channel_order == 'bgr'
    frame = np.random.default_rng(0).integers(0, 256, (60, 100, 3), np.uint8)
    with open_backend(model, 'cpu') as backend:
        pipeline = Pipeline(backend)
        rgb = pipeline(frame, 'rgb').copy()
        bgr = pipeline(np.ascontiguousarray(frame[..., ::-1]), 'bgr')
        np.testing.assert_array_equal(rgb.anomaly, bgr.anomaly)
        assert (pipeline(frame, 'bgr').anomaly != rgb.anomaly).any()
