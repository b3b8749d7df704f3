# SPDX-License-Identifier: Apache-2.0
"""The command line as a user meets it: real processes, exit codes, messages."""

import json
from pathlib import Path
import subprocess
import sys

from anomaly_seg_ros.cli import cli
from click.testing import CliRunner
import numpy as np
import pytest


def run(*arguments: object) -> 'subprocess.CompletedProcess[str]':
    """Run ``anomaly-seg`` in a process of its own."""
    return subprocess.run([sys.executable, '-m', 'anomaly_seg_ros.cli', *map(str, arguments)],
                          capture_output=True, text=True, check=False, timeout=250)


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


@pytest.mark.parametrize('arguments', [
    ['no-such-command'], ['evaluate'], ['evaluate', 'm.onnx', '--limit', '0'],
    ['export', 'erfnet', '--weights', 'w', '--output', 'o', '--input-size', '512'],
    ['make-bag', '--output', 'bag']])
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    """Usage errors are told apart from failed runs."""
    result = run(*arguments)
    assert result.returncode == 2
    assert 'Traceback' not in result.stderr


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
