# SPDX-License-Identifier: Apache-2.0
"""Read weights from files without ever executing what is in them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
import re
from typing import TYPE_CHECKING

from anomaly_seg_ros.errors import UserError

if TYPE_CHECKING:
    from torch import nn, Tensor


def read_state_dict(path: Path | str) -> 'dict[str, Tensor]':
    """
    Read a state dict from ``.safetensors``, ``.pth``, ``.pt`` or ``.bin``.

    Checkpoints that keep the state dict under ``state_dict`` or ``model`` are accepted, and so is
    the ``module.`` prefix of DataParallel. Pickled code is never executed: torch reads with
    ``weights_only=True``.

    Raises
    ------
    UserError
        If the file is missing, unreadable, or holds anything but tensors by name.

    """
    import torch

    path = Path(path)
    if not path.is_file():
        raise UserError(f'{path}: no such weights file. Give the path of a state dict '
                        '(.pth, .pt, .safetensors).')
    try:
        if path.suffix == '.safetensors':
            from safetensors.torch import load_file
            state = load_file(path)
        else:
            state = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # torch and safetensors raise many kinds for damaged files
        if found := re.search(r'GLOBAL ([\w.]+)', str(error)):
            raise UserError(
                f'{path}: holds more than tensors ({found[1]}), and was not executed. Where you '
                'trust its source, have it saved again with torch.save(model.state_dict(), ...) '
                'or as .safetensors.') from error
        if 'weights_only' in str(error):  # torch's advice to execute the file
            raise UserError(f'{path}: not a weights file, or damaged; it was not executed. Give a '
                            'state dict (.pth, .pt, .safetensors), or download it '
                            'again.') from error
        raise UserError(f'{path}: not a readable weights file '
                        f'({type(error).__name__}: {_first_line(error)}). Download or '
                        'save it again.') from error
    for key in ('state_dict', 'model'):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(
            isinstance(key, str) and isinstance(value, torch.Tensor)
            for key, value in state.items()):
        raise UserError(f'{path}: expected a state dict (names and tensors), got '
                        f'{type(state).__name__}. Save it with '
                        'torch.save(model.state_dict(), ...).')
    if all(key.startswith('module.') for key in state):
        state = {key.removeprefix('module.'): value for key, value in state.items()}
    return state


def fit_state_dict(network: 'nn.Module', state: 'Mapping[str, Tensor]', path: Path | str) -> None:
    """
    Load ``state`` into ``network``; an error says which keys do not fit.

    Counts of the batches seen serve training only; files of PyTorch before 0.4.1 have none.
    """
    own, state = (
        {key: value for key, value in one.items() if not key.endswith('num_batches_tracked')}
        for one in (network.state_dict(), state))
    check_fit(type(network).__name__, path,
              missing=own.keys() - state.keys(), unexpected=state.keys() - own.keys(),
              wrong=[(key, own[key].shape, state[key].shape)
                     for key in own.keys() & state.keys() if own[key].shape != state[key].shape])
    check_finite(state, path)
    network.load_state_dict(state, strict=False)


def check_fit(network: str, path: Path | str, missing: Iterable[str], unexpected: Iterable[str],
              wrong: Iterable[tuple[str, Sequence[int], Sequence[int]]]) -> None:
    """
    Raise UserError if any key is missing, unexpected or of another shape.

    ``wrong`` holds (key, the network's shape, the file's shape).
    """
    shapes = [f'{key}: expected {tuple(own)}, got {tuple(given)}' for key, own, given in wrong]
    parts = [f'{len(keys)} {what} ({_some(sorted(keys))})' for keys, what in
             ((list(missing), 'missing'), (list(unexpected), 'unexpected'),
              (shapes, 'of another shape')) if keys]
    if parts:
        raise UserError(f'{path}: weights do not fit {network}: keys {"; ".join(parts)}. Give the '
                        'weights of this network, or name the network they belong to.')


def check_finite(state: 'Mapping[str, Tensor]', path: Path | str) -> None:
    """Raise UserError if any weight is NaN or infinite."""
    import torch

    bad = sorted(key for key, value in state.items()
                 if value.is_floating_point() and not torch.isfinite(value).all())
    if bad:
        raise UserError(f'{path}: weights with NaN or infinity ({_some(bad)}). Use another '
                        'checkpoint.')


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ['no details'])[0]


def _some(keys: list[str]) -> str:
    return ', '.join(keys[:4]) + (f', and {len(keys) - 4} more' if len(keys) > 4 else '')
