# SPDX-License-Identifier: Apache-2.0
"""
A last layer whose every feature pixel decides r x r output pixels, one row of them at a time.

A transposed convolution whose stride is its kernel, or a 1x1 convolution before a pixel shuffle,
gives logits class by class: planes far apart in memory, which labels and score then read across.
As r convolutions whose results are read with the classes last, the logits of a pixel lie side by
side: on a CPU, labels and score then take half the time or less, and nothing is shuffled but they.
Networks that end so have the method ``subpixel_rows`` beside ``forward``.
"""

from torch import nn, Tensor
import torch.nn.functional as F


class SubpixelRows(nn.Module):
    """Logits with the classes last; a module without weights, so that hooks see what it gives."""

    def forward(self, features: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        """
        Return r tensors (h, r * w, C): the logits of output rows i, r + i, 2 r + i, ...

        Parameters
        ----------
        features
            (1, K, h, w).
        weight, bias
            (K, C, r, r) and (C, r, r): row and column of the sub-pixel last.

        """
        channels, height, width = features.shape[1:]
        classes, step = weight.shape[1:3]
        rows = []
        for row in range(step):
            kernel = weight[:, :, row].permute(2, 1, 0).reshape(step * classes, channels, 1, 1)
            logits = F.conv2d(features, kernel, bias[:, row].t().reshape(-1))
            rows.append(classes_last(logits).reshape(height, step * width, classes))
        return tuple(rows)


def classes_last(logits: Tensor) -> Tensor:
    """
    (1, C, h, w) -> (1, h, w, C).

    On all four axes: ONNX Runtime then lets the layer before write in this order, while a
    transposition of three axes is one of its slowest operators.
    """
    return logits.permute(0, 2, 3, 1)
