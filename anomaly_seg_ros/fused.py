# SPDX-License-Identifier: Apache-2.0
"""The graph that is exported: network, labels and anomaly score in one module."""

from typing import TYPE_CHECKING

from anomaly_seg_ros.networks import LoadedNetwork
from anomaly_seg_ros.scores import score_function

if TYPE_CHECKING:
    from torch import nn, Tensor


def fuse(network: LoadedNetwork, score: str, temperature: float) -> 'nn.Module':
    """Return a module: image (1, 3, H, W) -> labels uint8 (1, h, w), score float32 (1, h, w)."""
    import torch

    function = score_function(score)

    class Fused(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network.module

        def forward(self, image: 'Tensor') -> 'tuple[Tensor, Tensor]':
            logits = self.network(image).float()
            labels = logits.argmax(dim=1).to(torch.uint8)
            return labels, function(logits, temperature)

    return Fused().eval()
