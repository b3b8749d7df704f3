# SPDX-License-Identifier: Apache-2.0
"""
The same fused graph in other shapes: half-precision body, and the whole way on the device.

``half_body`` keeps a network's inputs and outputs in float32 and computes everything between in
float16. ``on_device`` puts resizing, channel order, normalisation and upsampling into the graph,
so that a GPU takes the camera's frame as it is and gives answers at its size.
"""

from collections.abc import Sequence
from copy import deepcopy
import time
from typing import Any, TYPE_CHECKING

from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.model_card import ModelCard
from anomaly_seg_ros.resize import bilinear_taps, nearest_taps, smoothing
import numpy as np

if TYPE_CHECKING:
    from torch import nn, Tensor

FLOAT16_MAX = 65504.0


def half_body(module: 'nn.Module') -> 'nn.Module':
    """Return a copy of ``module`` that computes in float16, with float32 inputs and outputs."""
    import torch

    class HalfBody(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.body = deepcopy(module).half()

        def forward(self, image: 'Tensor') -> Any:
            outputs = self.body(image.half())
            if isinstance(outputs, tuple):
                return tuple(output.float() for output in outputs)
            return outputs.float()

    class HalfBodyWithRows(HalfBody):
        def subpixel_rows(self, image: 'Tensor') -> 'tuple[Tensor, ...]':
            return tuple(rows.float() for rows in self.body.subpixel_rows(image.half()))

    kind = HalfBodyWithRows if hasattr(module, 'subpixel_rows') else HalfBody
    return kind().eval()


def on_device(fused: 'nn.Module', card: ModelCard,
              fused_output_hw: tuple[int, int]) -> 'nn.Module':
    """
    Wrap a fused graph so that it takes and answers camera frames.

    Parameters
    ----------
    fused
        float32 (1, 3, h, w) -> labels uint8 (1, h', w'), score float32 (1, h', w').
    card
        Of the ``device`` variant; its sizes, channel orders, mean and std are built in.
    fused_output_hw
        Height and width (h', w') of what ``fused`` gives.

    Returns
    -------
    nn.Module
        uint8 (H, W, 3) -> labels uint8 (1, H, W), score float32 (1, H, W). The network's input is
        that of ``Preprocessor`` but for the rounding of float32.

    """
    import torch
    import torch.nn.functional as F

    if card.frame_size_hw is None:
        raise ValueError('the card of a device graph needs frame_size_hw')
    frame_hw, input_hw = card.frame_size_hw, card.input_size_hw
    swap = card.frame_channel_order != card.channel_order
    smooth = smoothing(frame_hw, input_hw, card.resize)
    kernels = [kernel.tolist() for kernel in smooth.kernels()]
    small_hw = (frame_hw[0] >> smooth.halvings, frame_hw[1] >> smooth.halvings)

    class OnDevice(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.fused = fused
            for axis, name in enumerate(('row', 'column')):
                first, second, weight = bilinear_taps(small_hw[axis], input_hw[axis])
                self.register_buffer(f'{name}_0', torch.from_numpy(first))
                self.register_buffer(f'{name}_1', torch.from_numpy(second))
                self.register_buffer(f'{name}_weight', torch.from_numpy(weight))
                self.register_buffer(f'label_{name}', torch.tensor(
                    nearest_taps(fused_output_hw[axis], frame_hw[axis])))
            self.register_buffer('reverse', torch.tensor([2, 1, 0]))
            for name, values in (('offset', np.array(card.mean) * 255),
                                 ('scale', 1 / (np.array(card.std) * 255))):
                self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(3, 1, 1))

        def forward(self, image: 'Tensor') -> 'tuple[Tensor, Tensor]':
            planes = image.float().permute(2, 0, 1)  # 3, H, W
            if swap:
                planes = planes.index_select(0, self.reverse)
            for _ in range(smooth.halvings):
                planes = (F.avg_pool2d(planes, 2) + 0.5).floor()
            if smooth.blurs:
                planes = _blur(planes, *kernels)
            if small_hw != input_hw:
                planes = self._blend(planes, 1, 'row')
                planes = (self._blend(planes, 2, 'column') + 0.5).floor()
            labels, anomaly = self.fused(((planes - self.offset) * self.scale)[None])
            if fused_output_hw == frame_hw:
                return labels, anomaly
            labels = labels.index_select(1, self.label_row).index_select(2, self.label_column)
            return labels, F.interpolate(anomaly[None], frame_hw, mode='bilinear')[0]

        def _blend(self, planes: 'Tensor', axis: int, name: str) -> 'Tensor':
            """Interpolate along one axis; exact in float32, as the weights are 8-bit fractions."""
            weight = getattr(self, f'{name}_weight')
            weight = weight[:, None] if axis == 1 else weight
            first, second = (planes.index_select(axis, getattr(self, f'{name}_{i}'))
                             for i in (0, 1))
            return first * (1 - weight) + second * weight

    return OnDevice().eval()


def _blur(planes: 'Tensor', along_x: list[int], along_y: list[int]) -> 'Tensor':
    """
    Blur (C, H, W) of whole numbers up to 255 as ``cv2.GaussianBlur`` does, to the bit.

    Weights are in steps of 1 / 256: the sums stay below 2^24, exact in float32. Written as sums of
    shifted images because a convolution may run in TF32.
    """
    import torch.nn.functional as F

    height, width = planes.shape[1:]
    x, y = len(along_x) // 2, len(along_y) // 2
    padded = F.pad(planes[None], (x, x, y, y), mode='replicate')[0]
    rows = sum(weight * padded[:, :, k:k + width] for k, weight in enumerate(along_x))
    total = sum(weight * rows[:, k:k + height] for k, weight in enumerate(along_y))
    return ((total + 32768) / 65536).floor()


def check_half(module: 'nn.Module', inputs: Sequence['Tensor'],
               seconds: float = np.inf) -> tuple[float, list[Any]]:
    """
    Run a module with a float16 body and find overflow.

    Parameters
    ----------
    module
        Gives a tuple of tensors.
    inputs
        What to run it on.
    seconds
        After this time no further input is begun, but for the second one: processors without
        float16 arithmetic take a minute for what others do in a second.

    Returns
    -------
    largest, outputs
        The largest finite magnitude that any layer gave, of which float16 holds 65504, and what
        the module gave for each input that was run.

    Raises
    ------
    UserError
        If a layer gives infinity or NaN; names the first one.

    """
    import torch

    largest = 0.0
    bad: list[str] = []

    def watch(name: str) -> Any:
        def hook(_layer: 'nn.Module', _inputs: Any, outputs: Any) -> None:
            nonlocal largest
            for output in outputs if isinstance(outputs, tuple) else (outputs,):
                if isinstance(output, torch.Tensor) and output.is_floating_point():
                    peak = float(output.abs().amax())
                    if np.isfinite(peak):
                        largest = max(largest, peak)
                    elif not bad:
                        bad.append(name)
        return hook

    outputs: list[Any] = []
    began = time.monotonic()
    handles = [layer.register_forward_hook(watch(name)) for name, layer in module.named_modules()
               if name]
    try:
        with torch.inference_mode():
            for network_input in inputs:
                if len(outputs) >= 2 and time.monotonic() - began > seconds:
                    break
                outputs.append(module(network_input))
                if bad:
                    raise UserError(
                        f'float16 overflows: layer {bad[0]!r} gives infinity or NaN on a check '
                        f'frame (float16 ends at {FLOAT16_MAX:.0f}). Export with --precision '
                        'fp32, or use weights with smaller activations. No file was written.')
    finally:
        for handle in handles:
            handle.remove()
    return largest, outputs
