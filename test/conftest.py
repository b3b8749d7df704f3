# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by all tests."""

import os
from pathlib import Path
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_sessionfinish() -> None:
    """Free the shared memory of programs that were killed: 400 MB a run; others keep theirs."""
    beside = Path(sys.executable).parent
    tool = shutil.which('fastdds', path=f'{beside}{os.pathsep}{os.environ.get("PATH", "")}')
    if tool is not None:
        subprocess.run([tool, 'shm', 'clean'], capture_output=True, check=False)


@pytest.fixture(scope='session')
def real_data() -> Path:
    """Folder of the real weights and benchmark images; skips where they are absent."""
    folder = Path(os.environ.get('ANOMALY_SEG_DATA', ROOT.parent / 'shared' / 'data'))
    if not folder.is_dir():
        pytest.skip(f'no real data: {folder} is not a folder; set ANOMALY_SEG_DATA')
    return folder


@pytest.fixture(scope='session')
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an ERFNet with random weights, exported at 64x128 with max_logit."""
    from anomaly_seg_ros.export import export_model, ExportRequest
    from anomaly_seg_ros.networks.erfnet import ERFNet
    import torch

    folder = tmp_path_factory.mktemp('tiny_model')
    torch.manual_seed(7)
    torch.save(ERFNet(19).state_dict(), folder / 'weights.pth')
    frames = np.random.default_rng(7).integers(0, 256, (2, 96, 160, 3), dtype=np.uint8)
    export_model(ExportRequest('erfnet', folder / 'weights.pth', input_size_hw=(64, 128)),
                 folder / 'tiny.onnx', frames=list(frames))
    return folder / 'tiny.onnx'


@pytest.fixture
def small_benchmark(tmp_path: Path) -> Path:
    """Return a folder in the layout of RoadAnomaly21 with five frames of three sizes."""
    root = tmp_path / 'benchmark'
    (root / 'images').mkdir(parents=True)
    (root / 'labels_masks').mkdir()
    rng = np.random.default_rng(3)
    for index in range(5):
        height, width = ((96, 160), (80, 128), (120, 160))[index % 3]
        coarse = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        mask = np.zeros((height, width), np.uint8)
        mask[20:50, 30 + 5 * index:70] = 1
        mask[:8] = 255
        cv2.imwrite(str(root / 'images' / f'{index}.png'), image)
        cv2.imwrite(str(root / 'labels_masks' / f'{index}.png'), mask)
    return root


@pytest.fixture(scope='module')
def one_thread():
    """Threads do nothing for small tensors, and cost much where cores are shared."""
    import torch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
