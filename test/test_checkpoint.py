# SPDX-License-Identifier: Apache-2.0
"""Weights files: what is accepted, what is refused, and that nothing in them is executed."""

import contextlib
import os
from pathlib import Path
import pickle
import zipfile

from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.networks.checkpoint import fit_state_dict, read_state_dict
import pytest
from safetensors.torch import save_file
import torch


@pytest.fixture
def small():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))


@pytest.mark.parametrize('wrap', [
    lambda state: state,
    lambda state: {f'module.{key}': value for key, value in state.items()},
    lambda state: {'state_dict': state, 'epoch': 3},
    lambda state: {'model': state},
    lambda state: {'state_dict': {f'module.{key}': value for key, value in state.items()}},
])
def test_accepted_forms(small, tmp_path, wrap):
    path = tmp_path / 'weights.pth'
    torch.save(wrap(small.state_dict()), path)
    state = read_state_dict(path)
    assert state.keys() == small.state_dict().keys()
    for key, value in small.state_dict().items():
        assert torch.equal(state[key], value)


def test_safetensors(small, tmp_path):
    path = tmp_path / 'weights.safetensors'
    save_file(small.state_dict(), path)
    state = read_state_dict(path)
    assert torch.equal(state['0.weight'], small[0].weight)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r'weights\.safetensors: not a readable weights file'):
        read_state_dict(path)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r'none\.pth: no such weights file.*Give the path'):
        read_state_dict(tmp_path / 'none.pth')


@pytest.mark.parametrize('content', [b'', b'garbage that is no checkpoint', b'PK\x03\x04 zip?',
                                     b'<html>', b'\xbc\x00' * 500])
def test_garbage(tmp_path, content):
    path = tmp_path / 'weights.pth'
    path.write_bytes(content)
    with pytest.raises(UserError, match=r'weights\.pth: not a (readable )?weights file') as caught:
        read_state_dict(path)
    assert 'weights_only' not in str(caught.value), 'advice to execute the file'


@pytest.mark.parametrize('keep', [0.1, 0.5, 0.99])
def test_truncated_file(small, tmp_path, keep):
    path = tmp_path / 'weights.pth'
    torch.save(small.state_dict(), path)
    data = path.read_bytes()
    path.write_bytes(data[:int(keep * len(data))])
    with pytest.raises(UserError, match=r'weights\.pth: .*(again|damaged)'):
        read_state_dict(path)


@pytest.mark.parametrize('content', [
    [torch.zeros(2)], {}, {'a': 1.0}, {3: torch.zeros(2)}, torch.zeros(2)])
def test_not_a_state_dict(tmp_path, content):
    path = tmp_path / 'weights.pth'
    torch.save(content, path)
    with pytest.raises(UserError, match=r'weights\.pth: expected a state dict'):
        read_state_dict(path)


@pytest.mark.filterwarnings('ignore')
def test_torchscript_is_refused(tmp_path):
    path = tmp_path / 'weights.pt'
    torch.jit.save(torch.jit.script(torch.nn.Conv2d(1, 1, 1)), path)
    with pytest.raises(UserError, match=r'weights\.pt: not a weights file.*not exec') as caught:
        read_state_dict(path)
    assert 'weights_only' not in str(caught.value), 'advice to execute the file'


def test_whole_module_is_refused(small, tmp_path):
    path = tmp_path / 'weights.pth'
    torch.save(small, path)
    with pytest.raises(UserError, match=r'weights\.pth: holds more than tensors \(torch\.nn\.modul'
                                        r'es\.container\.Sequential\)') as caught:
        read_state_dict(path)
    assert 'weights_only' not in str(caught.value), 'advice to execute the file'


class Malicious:
    """Unpickling this runs a shell command."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.system, (f'touch {self.trace}',)


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
@pytest.mark.parametrize('form', ['plain pickle', 'torch zip', 'torch legacy'])
def test_malicious_pickle_is_never_executed(tmp_path, form):
    trace, path = tmp_path / 'trace', tmp_path / 'weights.pth'
    content = {'state_dict': {'weight': torch.zeros(1), 'extra': Malicious(trace)}}
    if form == 'plain pickle':
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == 'torch zip')
    before = set(tmp_path.iterdir())
    with pytest.raises(UserError, match=r'weights\.pth: .*not executed'):
        read_state_dict(path)
    assert set(tmp_path.iterdir()) == before
    # The same file does run its command where it is unpickled: the test above can fail.
    with contextlib.suppress(Exception):
        if form == 'plain pickle':
            pickle.loads(path.read_bytes())
        else:
            torch.load(path, weights_only=False)
    assert trace.exists()


def test_pickle_hidden_in_a_zip_with_another_name(tmp_path):
    """torch.load finds the pickle by its name inside the archive; neither name may run."""
    trace, path = tmp_path / 'trace', tmp_path / 'weights.bin'
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('archive/data.pkl', pickle.dumps(Malicious(trace), protocol=2))
        archive.writestr('archive/version', '3\n')
    with pytest.raises(UserError):
        read_state_dict(path)
    assert not trace.exists()


def test_keys_that_do_not_fit_are_named(small):
    state = small.state_dict()
    del state['0.bias']
    state['head.weight'] = torch.zeros(1)
    state['0.weight'] = torch.zeros(4, 3, 5, 5)
    with pytest.raises(UserError) as caught:
        fit_state_dict(small, state, 'w.pth')
    message = str(caught.value)
    assert message.startswith('w.pth: ')
    assert '1 missing (0.bias)' in message
    assert '1 unexpected (head.weight)' in message
    assert '0.weight: expected (4, 3, 3, 3), got (4, 3, 5, 5)' in message


def test_long_lists_of_keys_are_cut(small):
    state = {f'layer{i:02}': torch.zeros(1) for i in range(40)}
    with pytest.raises(UserError, match=r'40 unexpected \(layer00, .*and 36 more\)'):
        fit_state_dict(small, state, 'w.pth')


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_weights_that_are_not_finite(small, value):
    state = small.state_dict()
    state['0.weight'] = torch.full_like(state['0.weight'], value)
    before = small[0].weight.detach().clone()
    with pytest.raises(UserError, match=r'w\.pth: weights with NaN or infinity \(0\.weight\)'):
        fit_state_dict(small, state, 'w.pth')
    assert torch.equal(small[0].weight, before)
