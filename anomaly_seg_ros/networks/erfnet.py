# SPDX-License-Identifier: Apache-2.0
"""
ERFNet, and its published Cityscapes weights.

Romera, Alvarez, Bergasa and Arroyo, ERFNet: Efficient Residual Factorized ConvNet for Real-time
Semantic Segmentation, IEEE T-ITS 2018. Module names follow the authors' checkpoints
(``erfnet_pretrained.pth``), so that their keys fit.

Input: float32 (N, 3, H, W), RGB / 255, H and W divisible by 8. Output: logits (N, C, H, W).
"""

from anomaly_seg_ros.networks.subpixel import SubpixelRows
import torch
from torch import nn, Tensor
import torch.nn.functional as F


class DownsamplerBlock(nn.Module):
    """Halve the resolution: strided convolution beside max pooling, concatenated."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        """Make ``channels_out`` channels, ``channels_in`` of them by pooling."""
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out - channels_in, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(channels_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """(N, c_in, H, W) -> (N, c_out, H/2, W/2)."""
        return F.relu(self.bn(torch.cat([self.conv(x), F.max_pool2d(x, 2, 2)], 1)))


class NonBottleneck1d(nn.Module):
    """Residual block of two factorised 3x3 convolutions, the second dilated."""

    def __init__(self, channels: int, dropout: float, dilation: int) -> None:
        """Keep ``channels``; ``dropout`` acts in training only."""
        super().__init__()
        self.conv3x1_1 = nn.Conv2d(channels, channels, (3, 1), padding=(1, 0))
        self.conv1x3_1 = nn.Conv2d(channels, channels, (1, 3), padding=(0, 1))
        self.bn1 = nn.BatchNorm2d(channels, eps=1e-3)
        self.conv3x1_2 = nn.Conv2d(channels, channels, (3, 1), padding=(dilation, 0),
                                   dilation=(dilation, 1))
        self.conv1x3_2 = nn.Conv2d(channels, channels, (1, 3), padding=(0, dilation),
                                   dilation=(1, dilation))
        self.bn2 = nn.BatchNorm2d(channels, eps=1e-3)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(N, c, H, W) -> (N, c, H, W)."""
        y = F.relu(self.conv3x1_1(x))
        y = F.relu(self.bn1(self.conv1x3_1(y)))
        y = F.relu(self.conv3x1_2(y))
        y = self.dropout(self.bn2(self.conv1x3_2(y)))
        return F.relu(y + x)


class UpsamplerBlock(nn.Module):
    """Double the resolution with a transposed convolution."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        """Go from ``channels_in`` to ``channels_out`` channels."""
        super().__init__()
        self.conv = nn.ConvTranspose2d(channels_in, channels_out, 3, stride=2, padding=1,
                                       output_padding=1)
        self.bn = nn.BatchNorm2d(channels_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """(N, c_in, H, W) -> (N, c_out, 2H, 2W)."""
        return F.relu(self.bn(self.conv(x)))


class Encoder(nn.Module):
    """Three downsamplings with residual blocks between them."""

    def __init__(self) -> None:
        """Build the encoder of the paper's table I."""
        super().__init__()
        self.initial_block = DownsamplerBlock(3, 16)
        layers: list[nn.Module] = [DownsamplerBlock(16, 64)]
        layers += [NonBottleneck1d(64, 0.03, 1) for _ in range(5)]
        layers.append(DownsamplerBlock(64, 128))
        layers += [NonBottleneck1d(128, 0.3, dilation) for dilation in (2, 4, 8, 16) * 2]
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 128, H/8, W/8)."""
        x = self.initial_block(x)
        for layer in self.layers:
            x = layer(x)
        return x


class Decoder(nn.Module):
    """Two upsamplings with residual blocks, then the transposed convolution to the classes."""

    def __init__(self, classes: int) -> None:
        """Give ``classes`` output channels."""
        super().__init__()
        self.layers = nn.ModuleList([
            UpsamplerBlock(128, 64), NonBottleneck1d(64, 0.0, 1), NonBottleneck1d(64, 0.0, 1),
            UpsamplerBlock(64, 16), NonBottleneck1d(16, 0.0, 1), NonBottleneck1d(16, 0.0, 1)])
        self.output_conv = nn.ConvTranspose2d(16, classes, 2, stride=2)
        self.output_rows = SubpixelRows()

    def forward(self, x: Tensor) -> Tensor:
        """(N, 128, H/8, W/8) -> (N, classes, H, W)."""
        logits: Tensor = self.output_conv(self._features(x))
        return logits

    def subpixel_rows(self, x: Tensor) -> tuple[Tensor, ...]:
        """(1, 128, H/8, W/8) -> the logits of even and of odd rows, (H/2, W, classes) each."""
        weight, bias = self.output_conv.weight, self.output_conv.bias
        rows: tuple[Tensor, ...] = self.output_rows(self._features(x), weight,
                                                    bias[:, None, None].expand(-1, 2, 2))
        return rows

    def _features(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class ERFNet(nn.Module):
    """The whole network; see the module's docstring for input and output."""

    size_divisor = 8

    def __init__(self, classes: int = 19) -> None:
        """Make a network with ``classes`` outputs and random weights."""
        super().__init__()
        self.encoder = Encoder()
        self.decoder = Decoder(classes)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (N, classes, H, W) of ``image`` (N, 3, H, W), RGB in [0, 1]."""
        logits: Tensor = self.decoder(self.encoder(image))
        return logits

    def subpixel_rows(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the same logits of one image, pixel by pixel; see ``SubpixelRows``."""
        return self.decoder.subpixel_rows(self.encoder(image))
