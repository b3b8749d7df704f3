# SPDX-License-Identifier: Apache-2.0
"""How a checkpoint wants its images: the ``preprocessor_config.json`` beside its weights."""

from collections.abc import Mapping, Sequence
import json
import math
from pathlib import Path
from typing import Any

from anomaly_seg_ros.errors import UserError

Triple = tuple[float, float, float]

_FILES = ('preprocessor_config.json', 'processor_config.json')


def read_processor(folder: Path) -> dict[str, Any]:
    """Return the settings of a folder's image processor; raises UserError where it has none."""
    own, shared = (folder / name for name in _FILES)
    if own.is_file():
        return read_json(own, 'preprocessing')
    if shared.is_file():
        settings = read_json(shared, 'preprocessing')
        return dict(settings.get('image_processor', settings))
    raise UserError(f'{folder}: no preprocessor_config.json, so how to normalise images is not '
                    'known. Save the image processor too: '
                    f'AutoImageProcessor.from_pretrained(...).save_pretrained({str(folder)!r}).')


def processor_file(folder: Path) -> Path:
    """Return where ``read_processor`` finds the settings."""
    return folder / next((name for name in _FILES if (folder / name).is_file()), _FILES[0])


def channel_order(processor: Mapping[str, Any]) -> str:
    """Return in which order the network takes the channels of an image: ``rgb`` or ``bgr``."""
    return 'bgr' if processor.get('do_flip_channel_order') else 'rgb'


def normalisation(processor: Mapping[str, Any], folder: Path) -> tuple[Triple, Triple]:
    """
    Return mean and std for values in [0, 1], whatever the processor rescales by.

    Raises
    ------
    UserError
        If an entry is missing or makes no sense; names it and its file.

    """
    mean: Any = [0.0] * 3
    std: Any = [1.0] * 3
    if processor.get('do_normalize', True):
        mean, std = processor.get('image_mean'), processor.get('image_std')
    factor = processor.get('rescale_factor', 1 / 255) if processor.get('do_rescale', True) else 1
    for entry, value, fits, expected in (
            ('image_mean', mean, _are_three(mean), '3 values'),
            ('image_std', std, _are_three(std) and min(std) > 0, '3 values above 0'),
            ('rescale_factor', factor, _is_number(factor) and factor > 0, 'a number above 0')):
        if not fits:
            raise UserError(f'{processor_file(folder)}: {entry} must be {expected}, got '
                            f'{value!r}. Take what the network was trained with.')
    scale = 255 * float(factor)
    if abs(scale - 1) < 1e-6:
        scale = 1.0
    return _triple(mean, scale), _triple(std, scale)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _are_three(values: Any) -> bool:
    return isinstance(values, list) and len(values) == 3 and all(map(_is_number, values))


def _triple(values: Sequence[float], scale: float) -> Triple:
    red, green, blue = (float(v) / scale for v in values)
    return red, green, blue


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object; ``what`` tells what the file holds, for the UserError."""
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError as error:
        raise UserError(f'{path}: missing; it holds {what}. Give a folder written by '
                        'save_pretrained.') from error
    except (OSError, ValueError) as error:
        raise UserError(f'{path}: not readable as JSON ({error}). Save the checkpoint '
                        'again.') from error
    if not isinstance(content, dict):
        raise UserError(f'{path}: expected a JSON object, got {type(content).__name__}.')
    return content
