# SPDX-License-Identifier: Apache-2.0
"""RoadNet: its shapes, its receptive field, half precision, and its batch independence."""

import numpy as np
import pytest

torch = pytest.importorskip('torch', reason='RoadNet needs torch: pip install .[export]')
roadnet = pytest.importorskip('anomaly_seg_ros.networks.roadnet')
parameter_count, RoadNet = roadnet.parameter_count, roadnet.RoadNet


@pytest.fixture(scope='module')
def network():
    torch.manual_seed(0)
    net = RoadNet()
    # Untrained batch statistics would make every layer the identity's neighbour.
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return net.eval()


@pytest.mark.parametrize('size', [(288, 512), (32, 64), (384, 640)])
def test_logits_have_half_the_size(network, size):
    with torch.inference_mode():
        logits = network(torch.randn(2, 3, *size))
    assert logits.shape == (2, 19, size[0] // 2, size[1] // 2)
    assert RoadNet.output_stride == 2


def test_rows_are_the_logits(network):
    image = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        logits, rows = network(image), network.subpixel_rows(image)
    assert [tuple(x.shape) for x in rows] == [(16, 48, 19)] * 2
    for index, got in enumerate(rows):
        torch.testing.assert_close(got, logits[0, :, index::2].permute(1, 2, 0),
                                   rtol=1e-5, atol=1e-5)


def test_size(network):
    counted = sum(int(np.prod(p.shape)) for p in network.state_dict().values()
                  if p.ndim == 4) + sum(2 * m.num_features for m in network.modules()
                                        if isinstance(m, torch.nn.BatchNorm2d)) + 19 * 4
    assert parameter_count(network) == counted < 700_000


def test_images_of_a_batch_do_not_mix(network):
    x = torch.randn(3, 3, 64, 96)
    with torch.inference_mode():
        together = network(x)
        alone = torch.cat([network(x[k:k + 1]) for k in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_output_is_aligned_with_the_input(network):
    x = torch.zeros(1, 3, 128, 256, requires_grad=True)
    row, col = 20, 90
    network(x)[0, :, row, col].sum().backward()
    strength = x.grad.abs().sum((0, 1))
    rows = (strength.sum(1) * torch.arange(128)).sum() / strength.sum()
    cols = (strength.sum(0) * torch.arange(256)).sum() / strength.sum()
    # Output cell (row, col) covers input pixels 2 row and 2 row + 1; what it sees is about them.
    assert abs(rows - (2 * row + 0.5)) < 12 and abs(cols - (2 * col + 0.5)) < 8


def test_half_precision_is_finite_and_close(network):
    x = torch.randn(1, 3, 64, 128)
    with torch.inference_mode():
        full = network(x)
        half = RoadNet().eval()
        half.load_state_dict(network.state_dict())
        low = half.half()(x.half()).float()
    assert torch.isfinite(low).all()
    assert (low - full).abs().max() < 0.02 * full.abs().max()
