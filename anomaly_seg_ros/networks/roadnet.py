# SPDX-License-Identifier: Apache-2.0
"""RoadNet: the small segmentation network of the bundled model, made for inference on CPUs."""

from anomaly_seg_ros.networks.subpixel import SubpixelRows
from torch import nn, Tensor
from torch.nn import functional


class ConvUnit(nn.Sequential):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1,
                 dilation: int = 1, relu: bool = True) -> None:
        layers: list[nn.Module] = [
            nn.Conv2d(inputs, outputs, kernel, stride, dilation * (kernel // 2), dilation,
                      bias=False),
            nn.BatchNorm2d(outputs)]
        if relu:
            layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)


class Residual(nn.Module):
    """Two convolutions and a shortcut (He et al., CVPR 2016)."""

    def __init__(self, width: int, dilation: int = 1) -> None:
        super().__init__()
        self.first = ConvUnit(width, width)
        self.second = ConvUnit(width, width, dilation=dilation, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return an array of the shape of ``x``."""
        return functional.relu(x + self.second(self.first(x)))


class RoadNet(nn.Module):
    """
    A residual encoder to stride 16 and a decoder of lateral sums, logits at stride 2.

    The last convolution works at stride 4 and gives four sub-pixels a cell (Shi et al., CVPR
    2016), so that fine output costs no fine feature map. Plain convolutions throughout: they are
    what CPU inference libraries run best.

    Parameters
    ----------
    classes
        Number of classes.
    widths
        Channels at strides 2, 4, 8 and 16.

    """

    # Normalisation of RGB values in [0, 1] and way of scaling, part of what the weights expect.
    mean = (0.45, 0.45, 0.45)
    std = (0.25, 0.25, 0.25)
    channel_order = 'rgb'
    resize = 'bilinear'
    size_divisor = 32
    output_stride = 2

    def __init__(self, classes: int = 19, widths: tuple[int, int, int, int] = (16, 32, 64, 96)
                 ) -> None:
        super().__init__()
        half, quarter, eighth, sixteenth = widths
        self.stem = ConvUnit(3, half, stride=2)
        self.down4 = ConvUnit(half, quarter, stride=2)
        self.stage4 = Residual(quarter)
        self.down8 = ConvUnit(quarter, eighth, stride=2)
        self.stage8 = nn.Sequential(Residual(eighth), Residual(eighth))
        self.down16 = ConvUnit(eighth, sixteenth, stride=2)
        self.stage16 = nn.Sequential(Residual(sixteenth, 2), Residual(sixteenth, 4))
        self.up16 = ConvUnit(sixteenth, eighth, kernel=1)
        self.fuse8 = Residual(eighth)
        self.up8 = ConvUnit(eighth, quarter, kernel=1)
        self.fuse4 = Residual(quarter)
        self.head = nn.Conv2d(quarter, classes * 4, 1)
        self.shuffle = nn.PixelShuffle(2)
        self.head_rows = SubpixelRows()

    def forward(self, image: Tensor) -> Tensor:
        """
        Return logits (N, classes, H / 2, W / 2).

        ``image`` (N, 3, H, W) is RGB in [0, 1] less ``mean``, divided by ``std``; H and W are
        multiples of 32.
        """
        logits: Tensor = self.shuffle(self.head(self._features(image)))
        return logits

    def subpixel_rows(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the same logits of one image, pixel by pixel; see ``SubpixelRows``."""
        weight = self.head.weight.reshape(-1, 2, 2, self.head.in_channels).permute(3, 0, 1, 2)
        rows: tuple[Tensor, ...] = self.head_rows(self._features(image), weight,
                                                  self.head.bias.reshape(-1, 2, 2))
        return rows

    def _features(self, image: Tensor) -> Tensor:
        """Return what the last convolution works on, at stride 4."""
        at4 = self.stage4(self.down4(self.stem(image)))
        at8 = self.stage8(self.down8(at4))
        at16 = self.stage16(self.down16(at8))
        at8 = self.fuse8(at8 + _double(self.up16(at16)))
        features: Tensor = self.fuse4(at4 + _double(self.up8(at8)))
        return features


def _double(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2.0, mode='bilinear', align_corners=False)


def parameter_count(network: nn.Module) -> int:
    """Return how many numbers the network learns."""
    return sum(p.numel() for p in network.parameters())
