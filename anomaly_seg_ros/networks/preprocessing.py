# SPDX-License-Identifier: Apache-2.0
"""How a checkpoint wants its images: the ``preprocessor_config.json`` beside its weights."""

from collections.abc import Mapping, Sequence
import json
from pathlib import Path
from typing import Any

from anomaly_seg_ros.errors import UserError

Triple = tuple[float, float, float]


def read_processor(folder: Path) -> dict[str, Any]:
    """Return the settings of a folder's image processor; raises UserError where it has none."""
    if (folder / 'preprocessor_config.json').is_file():
        return read_json(folder / 'preprocessor_config.json', 'preprocessing')
    if (folder / 'processor_config.json').is_file():
        settings = read_json(folder / 'processor_config.json', 'preprocessing')
        return dict(settings.get('image_processor', settings))
    raise UserError(f'{folder}: no preprocessor_config.json, so how to normalise images is not '
                    'known. Save the image processor too: '
                    f'AutoImageProcessor.from_pretrained(...).save_pretrained({str(folder)!r}).')


def normalisation(processor: Mapping[str, Any], folder: Path) -> tuple[Triple, Triple]:
    """Return mean and std for values in [0, 1], whatever the processor rescales by."""
    mean, std = processor.get('image_mean'), processor.get('image_std')
    if not processor.get('do_normalize', True):
        mean, std = [0.0] * 3, [1.0] * 3
    if not (isinstance(mean, list) and isinstance(std, list) and len(mean) == len(std) == 3):
        raise UserError(f'{folder}: expected 3 values of image_mean and image_std in the '
                        f'preprocessing, got {mean} and {std}.')
    factor = processor.get('rescale_factor', 1 / 255) if processor.get('do_rescale', True) else 1
    scale = 255 * float(factor)
    if abs(scale - 1) < 1e-6:
        scale = 1.0
    return _triple(mean, scale), _triple(std, scale)


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
