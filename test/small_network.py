# SPDX-License-Identifier: Apache-2.0
"""A network of two convolutions that exports in a second, for tests of what surrounds networks."""

from pathlib import Path

from anomaly_seg_ros.export import export_model, ExportRequest
from anomaly_seg_ros.files import sha256_file
from anomaly_seg_ros.networks import LoadedNetwork, NETWORKS
import cv2
import numpy as np
import pytest
import torch
from torch import nn

CLASSES = ('road', 'car', 'sky', 'pole')
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build(gain: float = 1.0) -> nn.Module:
    """Return the network: stride 2, four classes, random weights times ``gain``."""
    torch.manual_seed(3)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(),
                            nn.Conv2d(8, len(CLASSES), 3, padding=1))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter *= gain
    return network.eval()


def load(name: str, weights: Path, input_size_hw: tuple[int, int] | None = None) -> LoadedNetwork:
    """Load it from a state dict."""
    network = build()
    network.load_state_dict(torch.load(weights, weights_only=True))
    return LoadedNetwork(name, network, weights.name, sha256_file(weights), 'test',
                         classes=CLASSES, palette=((0, 0, 0),) * 4, drivable=(0,), mean=MEAN,
                         std=STD, channel_order='bgr', size_divisor=2)


def frames(count: int = 2, size_hw: tuple[int, int] = (45, 76)) -> list[np.ndarray]:
    """Return smooth random RGB frames."""
    coarse = np.random.default_rng(4).integers(0, 256, (count, 6, 10, 3), dtype=np.uint8)
    return [cv2.resize(x, size_hw[::-1], interpolation=cv2.INTER_CUBIC) for x in coarse]


@pytest.fixture
def small_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the network known as ``small`` and return its weights."""
    monkeypatch.setitem(NETWORKS, 'small', load)
    folder = tmp_path / 'weights'
    folder.mkdir()
    torch.save(build().state_dict(), folder / 'small.pth')
    return folder / 'small.pth'


@pytest.fixture(scope='session')
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the network exported at 32x64 with max_logit, its weights beside it."""
    folder = tmp_path_factory.mktemp('small_model')
    torch.save(build().state_dict(), folder / 'small.pth')
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETWORKS, 'small', load)
        export_model(ExportRequest('small', folder / 'small.pth', input_size_hw=(32, 64)),
                     folder / 'small.onnx', frames())
    return folder / 'small.onnx'
