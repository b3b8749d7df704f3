# SPDX-License-Identifier: Apache-2.0
"""What follows a network's body in the exported graph: labels and score, samples, ensembles."""

from collections.abc import Callable, Sequence
from copy import deepcopy

from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.networks.subpixel import classes_last
from anomaly_seg_ros.scores import class_scores, mean_posterior, resize
import torch
from torch import nn, Tensor

Score = Callable[..., Tensor]


class LogitsHead(nn.Module):
    """
    Labels and score of per-pixel logits.

    Parameters
    ----------
    body
        Image (1, 3, H, W) -> logits (1, C, h, w).
    score
        A function on logits.
    upsample
        Interpolate the logits bilinearly to (H, W) first.
    hidden_channel
        Channel that is no class: seen by the score, never a label. It must be the last one.

    Attributes
    ----------
    by_rows
        Take the logits from the body's ``subpixel_rows``, where it has that, and not from its
        ``forward``: the same in less time.

    """

    def __init__(self, body: nn.Module, score: Score, upsample: bool,
                 hidden_channel: bool = False) -> None:
        super().__init__()
        self.by_rows = hasattr(body, 'subpixel_rows') and not upsample
        self.body = body
        self.score = score
        self.upsample = upsample
        self.hidden_channel = hidden_channel

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return labels uint8 (1, h, w) and score float32 (1, h, w)."""
        answers = [self._answer(logits) for logits in self._rows(image)]
        labels, anomaly = (torch.stack(rows, dim=1).flatten(0, 1)[None]
                           for rows in zip(*answers, strict=True))
        return labels, anomaly

    def _rows(self, image: Tensor) -> tuple[Tensor, ...]:
        """
        Return r tensors (h / r, w, C), the logits of every r-th row.

        Labels and score then read memory from front to back; see ``subpixel``.
        """
        if self.by_rows:
            rows: tuple[Tensor, ...] = self.body.subpixel_rows(image)
            return rows
        logits = self.body(image).float()
        if self.upsample:
            logits = resize(logits, image.shape[-2:])
        return (classes_last(logits).flatten(0, 1),)

    def _answer(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return labels and score, (h, w) each, of logits (h, w, C)."""
        size_hw = logits.shape[:2]
        pixels = logits.float().reshape(-1, logits.shape[-1])
        known = pixels[:, :-1] if self.hidden_channel else pixels
        return (known.argmax(dim=1).to(torch.uint8).reshape(size_hw),
                self.score(pixels).reshape(size_hw))


class MasksHead(nn.Module):
    """
    Labels and score of mask classification.

    Parameters
    ----------
    body
        Image (1, 3, H, W) -> class logits (1, Q, C + 1), mask logits (1, Q, h, w).
    score
        A function on class logits, mask logits, temperature and size.
    upsample
        Resize as the library does, mask logits to ``mask_size_hw`` and class scores to (H, W),
        before label and score are taken.
    mask_size_hw
        None for (H, W).
    temperature
        Divides the class logits; it can move the label, the class of largest score.

    """

    def __init__(self, body: nn.Module, score: Score, upsample: bool,
                 mask_size_hw: tuple[int, int] | None, temperature: float) -> None:
        super().__init__()
        self.body = body
        self.score = score
        self.upsample = upsample
        self.mask_size_hw = mask_size_hw
        self.temperature = temperature

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return labels uint8 (1, h, w) and score float32 (1, h, w)."""
        class_logits, mask_logits = (output.float() for output in self.body(image))
        size_hw = image.shape[-2:] if self.upsample else None
        if self.upsample:
            mask_logits = resize(mask_logits, self.mask_size_hw or size_hw)
        given = (class_logits, mask_logits, self.temperature, size_hw)
        return class_scores(*given).argmax(dim=1).to(torch.uint8), self.score(*given)


class SamplesHead(nn.Module):
    """
    Labels and score of several opinions on one image.

    Parameters
    ----------
    body
        Image (1, 3, H, W) -> logits (T, C, h, w).
    score
        A function on such samples.
    upsample
        Interpolate the logits bilinearly to (H, W) first.
    temperature
        Divides the logits; it can move the label, the class of largest mean posterior.

    """

    def __init__(self, body: nn.Module, score: Score, upsample: bool, temperature: float) -> None:
        super().__init__()
        self.body = body
        self.score = score
        self.upsample = upsample
        self.temperature = temperature

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return labels uint8 (1, h, w) and score float32 (1, h, w)."""
        logits = self.body(image).float()
        if self.upsample:
            logits = resize(logits, image.shape[-2:])
        labels = mean_posterior(logits, self.temperature).argmax(dim=1)
        return labels.to(torch.uint8), self.score(logits)


class Ensemble(nn.Module):
    """Several networks' logits, one after the other along the batch axis."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, image: Tensor) -> Tensor:
        """Image (1, 3, H, W) -> logits (T, C, h, w)."""
        return torch.cat([member(image) for member in self.members])


class MasksAsLogits(nn.Module):
    """A mask network as one of per-pixel logits ln S_c, whose softmax is S normalised."""

    def __init__(self, body: nn.Module, mask_size_hw: tuple[int, int] | None) -> None:
        super().__init__()
        self.body = body
        self.mask_size_hw = mask_size_hw

    def forward(self, image: Tensor) -> Tensor:
        """Image (1, 3, H, W) -> logits (1, C, H, W)."""
        class_logits, mask_logits = self.body(image)
        size_hw = image.shape[-2:]
        mask_logits = resize(mask_logits.float(), self.mask_size_hw or size_hw)
        return class_scores(class_logits, mask_logits, 1.0, size_hw).clamp_min(1.2e-38).log()


class FixedDropout(nn.Module):
    """
    Dropout of whole channels with T masks drawn once, one for each sample of the batch.

    Parameters
    ----------
    masks
        (T, C): 0, or 1 / (1 - p).

    """

    def __init__(self, masks: Tensor) -> None:
        super().__init__()
        self.register_buffer('masks', masks)

    def forward(self, x: Tensor) -> Tensor:
        """(1 or T, C, H, W) or (1 or T, L, C) -> the same with T samples."""
        masks = self.masks[:, :, None, None] if x.ndim == 4 else self.masks[:, None]
        return x * masks.to(x.dtype)


def monte_carlo(body: nn.Module, image_shape: tuple[int, ...], passes: int,
                seed: int) -> nn.Module:
    """
    Return a copy of ``body`` whose dropout layers act, with ``passes`` fixed masks each.

    The layers before the first dropout run once for all passes. Every layer drops whole channels,
    also those that drop single elements in training: masks of single elements would be as large
    as the activations. The masks are part of the graph, so equal frames give equal scores.

    Parameters
    ----------
    body
        Network in evaluation mode.
    image_shape
        Shape of an input that it takes; used to find the layers' widths.
    passes, seed
        Number of masks and seed of their generator.

    Raises
    ------
    UserError
        If the network does not take the passes for samples of a batch: transformers reshape by the
        batch they began with, and some use one layer at several widths.

    """
    body = deepcopy(body)
    layers = {name: module for name, module in body.named_modules() if is_dropout(module)}
    channels: dict[str, int] = {}

    def note(name: str, x: Tensor) -> None:
        channels[name] = x.shape[1 if x.ndim == 4 else -1]

    hooks = [module.register_forward_pre_hook(lambda _, inputs, name=name: note(name, inputs[0]))
             for name, module in layers.items()]
    with torch.inference_mode():
        body(torch.zeros(image_shape))
    for hook in hooks:
        hook.remove()
    generator = torch.Generator().manual_seed(seed)
    for name, width in channels.items():
        keep = 1 - layers[name].p
        masks = (torch.rand(passes, width, generator=generator) < keep).float() / keep
        parent, _, leaf = name.rpartition('.')
        setattr(body.get_submodule(parent), leaf, FixedDropout(masks))
    if not _passes_are_samples(body.eval(), torch.rand(image_shape, generator=generator), passes):
        names = ', '.join([*layers][:3]) + (', ...' if len(layers) > 3 else '')
        raise UserError(f'the dropout layers of this network ({names}) cannot act for several '
                        'passes at once, because some lie inside the blocks of a transformer. Set '
                        'hidden_dropout_prob to 0 in config.json, so that dropout before the last '
                        'layer alone acts, where there is any; or take an ensemble (several '
                        '--weights) or another score.')
    return body


def _passes_are_samples(body: nn.Module, image: Tensor, passes: int) -> bool:
    """Tell whether the last pass is what it is without the others."""
    layers = [module for module in body.modules() if isinstance(module, FixedDropout)]
    masks = [layer.masks for layer in layers]
    with torch.inference_mode():
        try:
            together = body(image)
        except (RuntimeError, ValueError):  # shapes that do not fit each other
            return False
        for layer in layers:
            layer.masks = layer.masks[-1:]
        alone = body(image)
        for layer, every in zip(layers, masks, strict=True):
            layer.masks = every
    if together.shape != (passes, *alone.shape[1:]):
        return False
    error = (together[-1:] - alone).abs().mean()  # rounding; of mixed passes, their differences
    return bool(error <= 1e-3 * alone.abs().mean())


def is_dropout(module: nn.Module) -> bool:
    """Tell whether ``module`` drops activations in training."""
    return isinstance(module, (nn.Dropout, nn.Dropout2d)) and module.p > 0
