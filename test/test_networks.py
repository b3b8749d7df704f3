# SPDX-License-Identifier: Apache-2.0
"""Loading networks by name; ERFNet and its published checkpoint."""

from anomaly_seg_ros.classes import CITYSCAPES_CLASSES
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.files import sha256_file
from anomaly_seg_ros.networks import load_network
from anomaly_seg_ros.networks.erfnet import ERFNet
import pytest
import torch


@pytest.fixture(scope='module')
def erfnet():
    """Make ERFNet with 20 outputs whose batch norms are not the identity."""
    torch.manual_seed(1)
    network = ERFNet(20)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
            torch.nn.init.uniform_(module.running_mean, -0.5, 0.5)
    return network.eval()


def outputs_of(network, state, tmp_path):
    path = tmp_path / 'erfnet.pth'
    torch.save(state, path)
    loaded = load_network('erfnet', path)
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        return loaded, loaded.module(image), network(image)


@pytest.mark.parametrize('prefix', ['', 'module.'])
@pytest.mark.parametrize('outputs', [19, 20])
def test_erfnet_checkpoints(erfnet, tmp_path, prefix, outputs):
    state = dict(erfnet.state_dict())
    if outputs == 19:
        state['decoder.output_conv.weight'] = state['decoder.output_conv.weight'][:, :19].clone()
        state['decoder.output_conv.bias'] = state['decoder.output_conv.bias'][:19].clone()
    # The published file carries the head of the authors' encoder pre-training.
    state['encoder.output_conv.weight'] = torch.zeros(20, 128, 1, 1)
    state['encoder.output_conv.bias'] = torch.zeros(20)
    state = {prefix + key: value for key, value in state.items()}
    loaded, got, want = outputs_of(erfnet, state, tmp_path)
    assert not loaded.module.training
    assert loaded.void_index == (19 if outputs == 20 else None)
    assert loaded.classes == CITYSCAPES_CLASSES
    assert loaded.weights_sha256 == sha256_file(tmp_path / 'erfnet.pth')
    torch.testing.assert_close(got, want[:, :19], rtol=1e-5, atol=1e-6)


def test_erfnet_checkpoint_of_an_old_pytorch(erfnet, tmp_path):
    """As PyTorch before 0.4.1 wrote it, and so the published file: no batch counts, no zip."""
    path = tmp_path / 'erfnet_pretrained.pth'
    torch.save({f'module.{key}': value for key, value in erfnet.state_dict().items()
                if not key.endswith('num_batches_tracked')}, path,
               _use_new_zipfile_serialization=False)
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        got, want = load_network('erfnet', path).module_with_void(image), erfnet(image)
    assert torch.equal(got, want)


def test_erfnet_rows_are_its_logits(erfnet):
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        logits, rows = erfnet(image), erfnet.subpixel_rows(image)
    assert [tuple(x.shape) for x in rows] == [(32, 96, 20)] * 2
    for index, got in enumerate(rows):
        torch.testing.assert_close(got, logits[0, :, index::2].permute(1, 2, 0),
                                   rtol=1e-5, atol=1e-5)


def test_erfnet_refuses_other_weights(erfnet, tmp_path):
    state = dict(erfnet.state_dict())
    del state['encoder.layers.0.conv.weight']
    state['decoder.extra'] = torch.zeros(1)
    path = tmp_path / 'erfnet.pth'
    torch.save(state, path)
    with pytest.raises(UserError, match=r'erfnet\.pth: .*missing \(encoder\.layers\.0\.conv\.we.*'
                                        r'unexpected \(decoder\.extra\)'):
        load_network('erfnet', path)


@pytest.mark.parametrize('classes', [12, 18, 21, 150])
def test_erfnet_refuses_another_class_count(tmp_path, classes):
    path = tmp_path / 'erfnet.pth'
    torch.save(ERFNet(classes).state_dict(), path)
    with pytest.raises(UserError, match=rf'erfnet\.pth: .*19.*20.*{classes}'):
        load_network('erfnet', path)


def test_erfnet_refuses_a_bias_that_is_no_vector(tmp_path):
    path = tmp_path / 'erfnet.pth'
    torch.save({'decoder.output_conv.bias': torch.tensor(3.0)}, path)
    with pytest.raises(UserError, match=r'erfnet\.pth: expected 19 classes.*got 1;'):
        load_network('erfnet', path)


def test_erfnet_published_weights(real_data):
    path = real_data / 'weights' / 'erfnet_cityscapes_20ch.pth'
    loaded = load_network('erfnet', path)
    assert loaded.void_index == 19
    assert sum(p.numel() for p in loaded.module.parameters()) == 2_064_256 - (16 * 4 + 1)


def test_unknown_network_lists_the_choices(tmp_path):
    with pytest.raises(UserError, match=r"unknown network 'unet'; choose one of .*erfnet"):
        load_network('unet', tmp_path / 'w.pth')
