# SPDX-License-Identifier: Apache-2.0
"""DeepLabv3+, UPerNet, PSPNet and others of the segmentation-models-pytorch library."""

import json
from pathlib import Path
from typing import Any

from anomaly_seg_ros.classes import CITYSCAPES_CLASSES
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.files import sha256_file
from anomaly_seg_ros.networks import LoadedNetwork
from anomaly_seg_ros.networks.checkpoint import fit_state_dict, read_state_dict
from anomaly_seg_ros.networks.class_sets import class_palette, drivable_classes
import segmentation_models_pytorch
from torch import nn


def load_segmentation_models(name: str, weights: Path | str) -> LoadedNetwork:
    """
    Load a folder written by the library's ``save_pretrained``.

    ``config.json`` there names the architecture and its encoder; the encoder's name tells the
    normalisation. Classes are those of an entry ``classes_names`` (a list of names) if there is
    one, else the 19 of Cityscapes.

    Raises
    ------
    UserError
        If files are missing, the architecture is unknown, or classes or weights do not fit.

    """
    folder = Path(weights)
    try:
        config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
        architecture = config.pop('_model_class')
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f'{folder}: not a folder of segmentation-models-pytorch ({error!r}). Give '
                        'one written by model.save_pretrained(FOLDER).') from error
    kind = getattr(segmentation_models_pytorch, str(architecture), None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise UserError(f'{folder / "config.json"}: unknown architecture {architecture!r}')
    classes = tuple(config.pop('classes_names', CITYSCAPES_CLASSES))
    if config.get('classes') != len(classes):
        raise UserError(f'{folder / "config.json"}: {config.get("classes")} classes, but '
                        f'{len(classes)} names. Add "classes_names", a list with one name a '
                        'class.')
    encoder = config.get('encoder_name', 'resnet34')
    preprocessing: dict[str, Any] = segmentation_models_pytorch.encoders.get_preprocessing_params(
        encoder, config.get('encoder_weights') or 'imagenet')
    # The checkpoint holds the encoder's weights; nothing is downloaded.
    network = kind(**{**config, 'encoder_weights': None}).eval()
    file = folder / 'model.safetensors'
    fit_state_dict(network, read_state_dict(file), file)
    scale = 255.0 if preprocessing['input_range'] == [0, 255] else 1.0
    return LoadedNetwork(
        name, network, folder.name, sha256_file(file), 'as the weights given', classes=classes,
        palette=class_palette(classes), drivable=drivable_classes(classes),
        mean=tuple(v / scale for v in preprocessing['mean']),
        std=tuple(v / scale for v in preprocessing['std']),
        channel_order=preprocessing['input_space'].lower(), size_divisor=32, upsample=True)
