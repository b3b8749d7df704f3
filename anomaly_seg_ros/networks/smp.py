# SPDX-License-Identifier: Apache-2.0
"""DeepLabv3+, UPerNet, PSPNet and others of the segmentation-models-pytorch library."""

from pathlib import Path

from anomaly_seg_ros.classes import CITYSCAPES_CLASSES
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.files import sha256_file
from anomaly_seg_ros.networks import LoadedNetwork
from anomaly_seg_ros.networks.checkpoint import fit_state_dict, read_state_dict
from anomaly_seg_ros.networks.class_sets import class_names, class_palette, drivable_classes
from anomaly_seg_ros.networks.preprocessing import (
    channel_order, normalisation, processor_file, read_json, read_processor)
import segmentation_models_pytorch
from torch import nn


def load_segmentation_models(name: str, weights: Path | str) -> LoadedNetwork:
    """
    Load a folder written by the library's ``save_pretrained``.

    ``config.json`` there names the architecture and its encoder. It does not tell how images were
    normalised in training: that is read from a ``preprocessor_config.json`` beside it, with
    ``image_mean`` and ``image_std`` for values in [0, 1], ``id2label`` where the classes are not
    the 19 of Cityscapes, and ``do_flip_channel_order`` where the network takes BGR.

    Raises
    ------
    UserError
        If files are missing, the architecture is unknown, or classes or weights do not fit.

    """
    folder = Path(weights)
    config = read_json(folder / 'config.json', 'the architecture')
    architecture = str(config.pop('_model_class', None))
    kind = getattr(segmentation_models_pytorch, architecture, None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise UserError(f'{folder / "config.json"}: {architecture!r} is no architecture of '
                        'segmentation-models-pytorch. Give a folder written by '
                        'model.save_pretrained(FOLDER).')
    if config.get('activation') is not None or config.get('aux_params') is not None:
        raise UserError(f'{folder / "config.json"}: activation and aux_params must be null; the '
                        'scores need the logits alone')
    processor = read_processor(folder)
    mean, std = normalisation(processor, folder)
    names = processor.get('id2label') or dict(enumerate(CITYSCAPES_CLASSES))
    classes = class_names(names, processor_file(folder))
    if config.get('classes') != len(classes):
        raise UserError(f'{folder / "config.json"}: {config.get("classes")} classes, but '
                        f'{len(classes)} names. Add "id2label" with a name for each class to '
                        'preprocessor_config.json.')
    # The checkpoint holds the encoder's weights; nothing is downloaded.
    network = kind(**{**config, 'encoder_weights': None}).eval()
    file = folder / 'model.safetensors'
    fit_state_dict(network, read_state_dict(file), file)
    return LoadedNetwork(
        name, network, folder.name, sha256_file(file), 'as the weights given', classes=classes,
        palette=class_palette(classes), drivable=drivable_classes(classes), mean=mean, std=std,
        channel_order=channel_order(processor), size_divisor=32, upsample=True)
