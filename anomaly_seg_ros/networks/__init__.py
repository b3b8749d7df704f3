# SPDX-License-Identifier: Apache-2.0
"""Networks by name: each loader builds the architecture and puts the weights in.

A newcomer adds a network with one module, one loader function and one line in ``NETWORKS``.
Torch is imported by the loaders, never by this module.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from anomaly_seg_ros.classes import CITYSCAPES_CLASSES, CITYSCAPES_DRIVABLE, CITYSCAPES_PALETTE
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.files import sha256_file

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class LoadedNetwork:
    """A network in evaluation mode with what its input and outputs mean.

    Attributes
    ----------
    name
        Name in ``NETWORKS``.
    module
        ``forward`` takes float32 (N, 3, H, W), normalised, and gives logits
        (N, C, H / stride, W / stride) over ``classes``; void channels are already cut off.
    classes, palette, drivable
        As in ``ModelCard``.
    mean, std, channel_order
        Normalisation of values in [0, 1], as in ``ModelCard``.
    size_divisor
        Height and width of the input must be multiples of this.
    void_index
        Channel of the checkpoint that meant "void" and was cut off, if any.
    weights_source, weights_sha256, licence
        Provenance.

    """

    name: str
    module: 'nn.Module'
    weights_source: str
    weights_sha256: str
    licence: str
    classes: tuple[str, ...] = CITYSCAPES_CLASSES
    palette: tuple[tuple[int, int, int], ...] = CITYSCAPES_PALETTE
    drivable: tuple[int, ...] = CITYSCAPES_DRIVABLE
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    channel_order: str = 'rgb'
    size_divisor: int = 1
    void_index: int | None = None


def load_erfnet(weights: Path) -> LoadedNetwork:
    """Load ERFNet with 19 Cityscapes classes, or 20 of which the last is void.

    The void channel's weights are cut off before the network runs: a slice of 20 full-resolution
    logits would cost as much as a convolution.
    """
    from anomaly_seg_ros.networks.checkpoint import fit_state_dict, read_state_dict
    from anomaly_seg_ros.networks.erfnet import ERFNet

    # encoder.output_conv serves the authors' encoder pre-training only.
    state = {key: value for key, value in read_state_dict(weights).items()
             if not key.startswith('encoder.output_conv.')}
    classes = len(CITYSCAPES_CLASSES)
    void_index = None
    bias = state.get('decoder.output_conv.bias')
    if bias is not None and bias.shape not in ((classes,), (classes + 1,)):
        raise UserError(f'{weights}: expected {classes} classes, or {classes + 1} with void last, '
                        f'got {bias.shape[0]}; ERFNet is loaded for the Cityscapes classes only')
    if bias is not None and bias.shape == (classes + 1,):
        void_index = classes
        for key, channel_axis in (('decoder.output_conv.weight', 1),
                                  ('decoder.output_conv.bias', 0)):
            if key in state:
                state[key] = state[key].narrow(channel_axis, 0, classes).clone()
    network = ERFNet(classes)
    fit_state_dict(network, state, weights)
    return LoadedNetwork('erfnet', network.eval(), str(weights.name), sha256_file(weights),
                         'as the weights given', size_divisor=ERFNet.size_divisor,
                         void_index=void_index)


NETWORKS: dict[str, Callable[[Path], LoadedNetwork]] = {
    'erfnet': load_erfnet,
}


def load_network(name: str, weights: Path | str) -> LoadedNetwork:
    """Load the network called ``name`` from ``weights``; an unknown name lists the choices."""
    from anomaly_seg_ros.networks.numerics import settle_vector_math

    settle_vector_math()
    if name not in NETWORKS:
        raise UserError(f'unknown network {name!r}; choose one of {", ".join(sorted(NETWORKS))}')
    return NETWORKS[name](Path(weights))
