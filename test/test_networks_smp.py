# SPDX-License-Identifier: Apache-2.0
"""Networks of segmentation-models-pytorch, where it and its torchvision are installed."""

from importlib.util import find_spec, module_from_spec
import json
import sys
from types import ModuleType

from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.fused import fuse
from anomaly_seg_ros.networks import load_network
import pytest
from safetensors.torch import save_file
import torch

try:
    import segmentation_models_pytorch as smp
except Exception:  # torchvision, where it does not fit torch, raises RuntimeError
    smp = None

needs_smp = pytest.mark.skipif(smp is None, reason='segmentation-models-pytorch or a torchvision '
                               'that fits this torch is not installed')


def save(folder, architecture='PSPNet', processor=None, **settings):
    torch.manual_seed(0)
    model = getattr(smp, architecture)(
        **{'encoder_name': 'resnet18', 'encoder_weights': None, 'classes': 19, **settings}).eval()
    model.save_pretrained(folder)
    (folder / 'preprocessor_config.json').write_text(json.dumps(
        processor or {'image_mean': [0.4, 0.5, 0.6], 'image_std': [0.1, 0.2, 0.3]}))
    return model


@needs_smp
@pytest.mark.parametrize('architecture, encoder', [
    ('DeepLabV3Plus', 'mobilenet_v2'), ('UPerNet', 'resnet18'), ('PSPNet', 'resnet18')])
def test_answers_are_those_of_the_library(architecture, encoder, tmp_path):
    model = save(tmp_path, architecture, encoder_name=encoder)
    network = load_network('smp', tmp_path)
    image = torch.rand(1, 3, 64, 96)
    with torch.inference_mode():
        labels, anomaly = fuse(network, 'max_logit', 1.0)(image)
        logits = model(image)
    assert torch.equal(labels, logits.argmax(dim=1).to(torch.uint8))
    torch.testing.assert_close(anomaly, -logits.amax(dim=1))
    assert network.mean == (0.4, 0.5, 0.6)
    assert network.std == (0.1, 0.2, 0.3)


@needs_smp
def test_classes_and_bad_folders(tmp_path):
    processor = {'image_mean': [0.5] * 3, 'image_std': [0.5] * 3,
                 'id2label': {'1': 'road', '0': 'void', '2': 'car'}}
    save(tmp_path, classes=3, processor=processor)
    network = load_network('smp', tmp_path)
    assert network.classes == ('void', 'road', 'car')
    assert network.drivable == (1,)
    config = json.loads((tmp_path / 'config.json').read_text())
    for changes, message in (({'classes': 4}, '4 classes, but 3 names'),
                             ({'activation': 'softmax2d'}, 'activation and aux_params must be'),
                             ({'_model_class': 'Resnet'}, "'Resnet' is no architecture")):
        (tmp_path / 'config.json').write_text(json.dumps({**config, **changes}))
        with pytest.raises(UserError, match=message):
            load_network('smp', tmp_path)
    (tmp_path / 'preprocessor_config.json').unlink()
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(UserError, match='how to normalise images is not known'):
        load_network('smp', tmp_path)


class Net(torch.nn.Conv2d):
    """An architecture that needs no library."""

    def __init__(self, classes, encoder_weights):
        super().__init__(3, classes, 1)


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Return a function that loads ``Net`` with such entries of preprocessor_config.json."""
    library = ModuleType('segmentation_models_pytorch')
    library.Net = Net
    monkeypatch.setitem(sys.modules, library.__name__, library)
    spec = find_spec('anomaly_seg_ros.networks.smp')
    module = module_from_spec(spec)  # not into sys.modules: the true library may be there
    spec.loader.exec_module(module)
    save_file(Net(3, None).state_dict(), tmp_path / 'model.safetensors')
    (tmp_path / 'config.json').write_text(json.dumps({'_model_class': 'Net', 'classes': 3}))

    def load_with(**entries):
        names = {'0': 'road', '1': 'car', '2': 'sky'}
        (tmp_path / 'preprocessor_config.json').write_text(json.dumps(
            {'image_mean': [0.1, 0.2, 0.3], 'image_std': [1, 1, 1], 'id2label': names, **entries}))
        return module.load_segmentation_models('smp', tmp_path)
    return load_with


@pytest.mark.parametrize('entries, order', [
    ({}, 'rgb'), ({'do_flip_channel_order': False}, 'rgb'),
    ({'do_flip_channel_order': True}, 'bgr')])
def test_channels_come_in_the_order_of_training(entries, order, load):
    assert load(**entries).channel_order == order


def test_classes_are_numbered_from_0(load):
    assert load(id2label={'2': 'sky', '0': 'road', '1': 'car'}).classes == ('road', 'car', 'sky')
    for ids in ('123', '013', 'abc'):
        with pytest.raises(UserError, match=r'preprocessor_config\.json: id2label must number the '
                                            rf'3 classes from 0 to 2, got {", ".join(ids)}'):
            load(id2label=dict(zip(ids, ('road', 'car', 'sky'), strict=True)))


@pytest.mark.skipif(smp is not None, reason='segmentation-models-pytorch is installed')
def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(UserError, match=r"'smp' needs segmentation-models-pytorch and a torchvisio"
                                        r'n that fits'):
        load_network('smp', tmp_path)
