# SPDX-License-Identifier: Apache-2.0
"""The PyTorch module that a card describes: what is exported, and what that is held against."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from anomaly_seg_ros.fused import fuse
from anomaly_seg_ros.graph_variants import half_body, on_device
from anomaly_seg_ros.model_card import ModelCard
from anomaly_seg_ros.networks import LoadedNetwork
from anomaly_seg_ros.ports import NetworkOutput
import numpy as np

if TYPE_CHECKING:
    from torch import nn


def build_module(network: LoadedNetwork, card: ModelCard, *, plain: bool = False) -> 'nn.Module':
    """
    Return the PyTorch module that a card describes: precision, score, input variant.

    ``plain`` takes a network's logits from its ``forward`` even where there is a faster way that
    gives the same; exports are held against this one.
    """
    import torch

    if card.precision == 'fp16':
        network = network.transformed(half_body)
    parameters = {name: int(value) for name, value in card.score_parameters.items()}
    fused = fuse(network, card.score, card.temperature, **parameters)
    if plain:
        fused.by_rows = False
    if card.input_variant == 'host':
        return fused
    with torch.inference_mode():
        labels, _ = fused(torch.zeros(1, 3, *card.input_size_hw))
    return on_device(fused, card, tuple(labels.shape[1:]))


def run_torch(module: 'nn.Module', inputs: Iterable[np.ndarray]) -> list[NetworkOutput]:
    """Run a fused module on one input after the other."""
    import torch

    with torch.inference_mode():
        outputs = [module(torch.from_numpy(x)) for x in inputs]
    return [NetworkOutput(labels[0].numpy(), anomaly[0].numpy()) for labels, anomaly in outputs]
