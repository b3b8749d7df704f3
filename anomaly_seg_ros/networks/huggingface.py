# SPDX-License-Identifier: Apache-2.0
"""
Segmentation networks of the Hugging Face ``transformers`` library.

Weights come as a folder written by ``save_pretrained``, a model id of huggingface.co
(``owner/name``, optionally ``@revision``), or a state dict of one of the variants in
``VARIANTS``. Whatever their form, they are read by ``read_state_dict`` and never unpickled, no
code that comes with a checkpoint is run, and every key has to fit.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
import hashlib
import math
from pathlib import Path
import re
from typing import Any

from anomaly_seg_ros.classes import CITYSCAPES_CLASSES
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.files import sha256_file
from anomaly_seg_ros.networks import LoadedNetwork
from anomaly_seg_ros.networks.checkpoint import check_finite, check_fit, read_state_dict
from anomaly_seg_ros.networks.class_sets import class_names, class_palette, drivable_classes
from anomaly_seg_ros.networks.preprocessing import (
    channel_order, normalisation, read_json, read_processor, Triple)
from anomaly_seg_ros.networks.variants import VARIANTS
import torch
from torch import nn, Tensor
import transformers
from transformers.models.beit.modeling_beit import BeitRelativePositionBias

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

# Buffers that older versions of the library stored and newer ones compute.
_COMPUTED_KEYS = re.compile(
    r'(relative_position_index|position_ids|num_batches_tracked|criterion\.empty_weight)$')
_MODEL_ID = re.compile(r'[\w.-]+/[\w.-]+(@[\w./-]+)?')
_WEIGHTS_SUFFIXES = ('.pth', '.pt', '.bin', '.safetensors', '.ckpt')


class Logits(nn.Module):
    """The library's model, giving its logits alone."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model = model
        self.options = options

    def forward(self, image: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C, h, w)."""
        logits: Tensor = self.model(pixel_values=image, **self.options).logits
        return logits


class Masks(nn.Module):
    """The library's model, giving class logits and mask logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W) -> class logits (N, Q, C + 1), mask logits (N, Q, h, w)."""
        outputs = self.model(pixel_values=image)
        return outputs.class_queries_logits, outputs.masks_queries_logits


class DptLogits(nn.Module):
    """DPT for rectangular images: the library's own forward takes the patch grid for a square."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C, H, W)."""
        model, patch = self.model, self.model.config.patch_size
        outputs = model.dpt(image, output_hidden_states=True)
        layers = outputs.hidden_states[1:]
        features = [layers[i] for i in model.config.backbone_out_indices]
        logits: Tensor = model.head(
            model.neck(features, image.shape[-2] // patch, image.shape[-1] // patch))
        return logits


class RelativePositionBias(nn.Module):
    """
    BEiT's bias of one block for one grid of patches, looked up in a table.

    The library computes the places in the table anew in each block, from which ONNX Runtime made
    17 GB of constants when it opened a model of eight blocks for 512x1024.
    """

    table: Tensor
    places: Tensor

    def __init__(self, table: Tensor, places: Tensor) -> None:
        super().__init__()
        self.register_buffer('table', table, persistent=False)
        self.register_buffer('places', places, persistent=False)

    @classmethod
    def of(cls, bias: Any, grid_hw: tuple[int, int], places: Tensor) -> 'RelativePositionBias':
        """Return what the library's module ``bias`` computes for ``grid_hw``."""
        with torch.no_grad():
            values = bias(grid_hw)[0]  # (heads, N, N), where N = h w + 1
        table = values.new_empty(len(values), int(places.max()) + 1)
        table[:, places.long()] = values
        return cls(table, places)

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        """Return (1, heads, N, N); the arguments are the library's, and fixed here."""
        # A Gather, which int32 suffices for.
        values = self.table.index_select(1, self.places.flatten())
        return values.reshape(1, len(self.table), *self.places.shape)


def _segmenter(model: Any, size_hw: tuple[int, int] | None) -> nn.Module:
    if getattr(model, 'auxiliary_head', None) is not None:
        model.auxiliary_head = None  # serves training only
    return Logits(model)


def _beit(model: Any, size_hw: tuple[int, int] | None) -> nn.Module:
    model.auxiliary_head = None
    if size_hw is not None:
        patch = model.config.patch_size
        grid_hw = (size_hw[0] // patch, size_hw[1] // patch)
        biases = [(name, module) for name, module in model.named_modules()
                  if isinstance(module, BeitRelativePositionBias)]
        if biases:
            places = biases[0][1].generate_relative_position_index(grid_hw).int()
        for name, bias in biases:
            model.set_submodule(name, RelativePositionBias.of(bias, grid_hw, places))
    return Logits(model, interpolate_pos_encoding=model.config.use_absolute_position_embeddings)


def _dpt(model: Any, size_hw: tuple[int, int] | None) -> nn.Module:
    if model.config.is_hybrid:
        raise UserError('DPT with a convolutional backbone is not supported; use a plain-ViT one')
    return DptLogits(model)


def _mask2former(model: Any, size_hw: tuple[int, int] | None) -> nn.Module:
    return Masks(model)


def _eomt(model: Any, size_hw: tuple[int, int] | None) -> nn.Module:
    """
    Fit EoMT to an input size, and fix which blocks mask their attention.

    Position embeddings are interpolated bicubically, as in the ViT it is made from. The
    probability with which a block masks its attention is annealed from 1 to 0 in training; only
    these two ends are deterministic.
    """
    probabilities = tuple(float(p) for p in model.attn_mask_probs)
    if any(p not in (0.0, 1.0) for p in probabilities):
        raise UserError(f'EoMT checkpoint from the middle of its mask annealing '
                        f'({probabilities}): its answers would be random. Train it to the end.')
    del model.attn_mask_probs  # a buffer, whose values a traced graph could not branch on
    model.attn_mask_probs = probabilities
    if size_hw is not None:
        patch = model.config.patch_size
        grid = (size_hw[0] // patch, size_hw[1] // patch)
        old = model.embeddings.position_embeddings.weight.detach()
        embeddings = old.T.reshape(1, -1, *model.grid_size)
        if grid != model.grid_size:
            embeddings = nn.functional.interpolate(embeddings, size=grid, mode='bicubic',
                                                   align_corners=False)
        flat = embeddings.flatten(2)[0].T.contiguous()
        model.embeddings.position_embeddings = nn.Embedding.from_pretrained(flat)
        model.embeddings.position_ids = torch.arange(len(flat))[None]
        model.grid_size = grid
    return Masks(model)


@dataclass(frozen=True)
class Family:
    """
    One architecture of the library.

    Attributes
    ----------
    model, config
        Names of the classes in ``transformers``.
    outputs
        What the adapted model gives: ``logits`` or ``masks``.
    adapt
        Turns the library's model, at an input size, into a module that gives these.
    class_bias
        Key of the bias of the layer that gives the classes.
    normalisation
        Mean and std that a state dict without configuration is taken to expect.
    patch
        Input sizes must be multiples of the configuration's patch size.
    fixed_size
        The adapted model serves one input size.
    mask_size_hw
        Size to which the library resizes mask logits before combining them.
    from_state
        Entries of the configuration that a state dict tells: name -> (key, function of its
        shape).

    """

    model: str
    config: str
    class_bias: str
    outputs: str = 'logits'
    adapt: Callable[[Any, tuple[int, int] | None], nn.Module] = _segmenter
    normalisation: tuple[Triple, Triple] = IMAGENET
    patch: bool = False
    fixed_size: bool = False
    mask_size_hw: tuple[int, int] | None = None
    from_state: dict[str, tuple[str, Callable[[Sequence[int]], int]]] = field(
        default_factory=dict)


def _first(shape: Sequence[int]) -> int:
    return shape[0]


FAMILIES: dict[str, Family] = {
    'segformer': Family('SegformerForSemanticSegmentation', 'SegformerConfig',
                        'decode_head.classifier.bias'),
    'upernet': Family('UperNetForSemanticSegmentation', 'UperNetConfig',
                      'decode_head.classifier.bias'),
    'mask2former': Family('Mask2FormerForUniversalSegmentation', 'Mask2FormerConfig',
                          'class_predictor.bias', 'masks', _mask2former,
                          mask_size_hw=(384, 384), from_state={'num_queries': (
                              'model.transformer_module.queries_embedder.weight', _first)}),
    'eomt': Family('EomtForUniversalSegmentation', 'EomtConfig', 'class_predictor.bias', 'masks',
                   _eomt, patch=True, fixed_size=True, from_state={
                       'num_queries': ('query.weight', _first),
                       'image_size': ('embeddings.position_embeddings.weight',
                                      lambda shape: 16 * math.isqrt(shape[0]))}),
    # The published ADE20K checkpoint has batch normalisation in its fusion stage, others do not.
    'dpt': Family('DPTForSemanticSegmentation', 'DPTConfig', 'head.head.4.bias', adapt=_dpt,
                  normalisation=HALF, patch=True, from_state={
                      'use_batch_norm_in_fusion_residual': (
                          'neck.fusion_stage.layers.0.residual_layer2.batch_norm1.weight',
                          lambda shape: True)}),
    'beit': Family('BeitForSemanticSegmentation', 'BeitConfig', 'decode_head.classifier.bias',
                   adapt=_beit, normalisation=HALF, patch=True, fixed_size=True),
    'mobilenet_v2_deeplabv3plus': Family(
        'MobileNetV2ForSemanticSegmentation', 'MobileNetV2Config',
        'segmentation_head.classifier.convolution.bias', normalisation=HALF),
}


@dataclass(frozen=True)
class _Checkpoint:
    """What a checkpoint holds, before it is put into a network."""

    config: Any
    classes: tuple[str, ...]
    state: dict[str, Tensor]
    normalisation: tuple[Triple, Triple]
    channel_order: str
    source: str
    sha256: str
    licence: str


def load_huggingface(name: str, weights: Path | str,
                     input_size_hw: tuple[int, int] | None = None) -> LoadedNetwork:
    """
    Load a network of ``FAMILIES`` or ``VARIANTS``.

    Parameters
    ----------
    name
        Key of either table. A family needs weights that come with their configuration.
    weights
        Folder, model id, or state dict.
    input_size_hw
        Height and width at which the network will run; None for the configuration's own, where
        the network serves one size only.

    Raises
    ------
    UserError
        If the weights cannot be had or do not fit, or the network cannot run at that size.

    """
    family_name, variant = VARIANTS.get(name, (name, None))
    family = FAMILIES[family_name]
    checkpoint = _read(family_name, family, variant, weights)
    config = checkpoint.config
    size_divisor = config.patch_size if family.patch else 1
    own_size = config.image_size if family.fixed_size else None
    size_hw = input_size_hw or (own_size and (own_size, own_size)) or None
    if size_hw is not None:
        _check_size(name, size_hw, size_divisor)
    model = _build(family, checkpoint)
    classes = checkpoint.classes
    return LoadedNetwork(
        name, family.adapt(model, size_hw).eval(), checkpoint.source, checkpoint.sha256,
        checkpoint.licence, classes=classes, palette=class_palette(classes),
        drivable=drivable_classes(classes), mean=checkpoint.normalisation[0],
        std=checkpoint.normalisation[1], channel_order=checkpoint.channel_order,
        size_divisor=size_divisor, input_size_hw=size_hw if family.fixed_size else None,
        outputs=family.outputs, upsample=True, mask_size_hw=family.mask_size_hw)


def _read(family_name: str, family: Family, variant: Mapping[str, Any] | None,
          weights: Path | str) -> _Checkpoint:
    path = Path(weights)
    if path.is_dir():
        return _read_folder(family_name, path, str(weights), 'as the weights given')
    if path.is_file() or path.suffix in _WEIGHTS_SUFFIXES:
        return _read_state_dict(family_name, family, variant, path)
    if _MODEL_ID.fullmatch(str(weights)):
        folder = _download(str(weights))
        model_id = str(weights).partition('@')[0]
        # A snapshot's folder is named after its commit.
        return _read_folder(family_name, folder, f'{model_id}@{folder.name}',
                            f'see https://huggingface.co/{model_id}')
    raise UserError(f'{weights}: no such file or folder, and no model id (owner/name). Give a '
                    'folder written by save_pretrained, a model id, or a state dict.')


def _download(weights: str) -> Path:
    """Return the local snapshot of a model id, downloaded where it is not in the cache."""
    from huggingface_hub import snapshot_download

    model_id, _, revision = weights.partition('@')
    try:
        for pattern in ('*.safetensors', 'pytorch_model*.bin'):
            folder = Path(snapshot_download(model_id, revision=revision or None,
                                            allow_patterns=['*.json', pattern]))
            if list(folder.glob(pattern)):
                return folder
    except Exception as error:  # many kinds: no network, no such model, gated, no disk space
        reason = (str(error).splitlines() or [''])[0]
        raise UserError(
            f'{weights}: no such file or folder here, and as a model of huggingface.co it could '
            f'not be downloaded ({type(error).__name__}: {reason}). Check the name and the '
            'network; or download it elsewhere ("hf download '
            f'{model_id} --local-dir FOLDER") and give the folder.') from error
    raise UserError(f'{weights}: holds neither .safetensors nor pytorch_model.bin. Choose a '
                    'model with PyTorch weights.')


def _read_folder(family_name: str, folder: Path, source: str, licence: str) -> _Checkpoint:
    settings = read_json(folder / 'config.json', "the network's configuration")
    given = settings.get('model_type')
    if given != _model_type(family_name):
        known = {_model_type(key): key for key in FAMILIES}
        remedy = (f'Export it as {known[given]!r}.' if given in known
                  else f'Supported are {", ".join(known)}.')
        raise UserError(f'{folder / "config.json"}: a checkpoint of model type {given!r}, not '
                        f'{_model_type(family_name)!r}. {remedy}')
    try:
        config = _config_class(family_name).from_dict(settings)
    except Exception as error:  # whatever the library's checks raise
        raise UserError(f'{folder / "config.json"}: not a valid configuration '
                        f'({type(error).__name__}: {error}).') from error
    classes = class_names(config.id2label, folder / 'config.json')
    processor = read_processor(folder)
    mean_std = normalisation(processor, folder)
    state: dict[str, Tensor] = {}
    files = _weights_files(folder)
    for file in files:
        state.update(read_state_dict(file))
    digests = [sha256_file(file) for file in files]
    digest = digests[0] if len(digests) == 1 else hashlib.sha256(
        ''.join(digests).encode()).hexdigest()
    return _Checkpoint(config, classes, state, mean_std, channel_order(processor), source, digest,
                       licence)


def _weights_files(folder: Path) -> list[Path]:
    for name in ('model.safetensors', 'pytorch_model.bin'):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f'{name}.index.json'
        if index.is_file():
            names = read_json(index, 'the list of weights files').get('weight_map', {}).values()
            return [folder / Path(shard).name for shard in sorted(set(names))]
    raise UserError(f'{folder}: neither model.safetensors nor pytorch_model.bin. Give a folder '
                    'written by save_pretrained.')


def _read_state_dict(family_name: str, family: Family, variant: Mapping[str, Any] | None,
                     path: Path) -> _Checkpoint:
    if variant is None:
        names = ', '.join(sorted(k for k, (f, _) in VARIANTS.items() if f == family_name))
        raise UserError(f'{path}: a state dict does not tell its architecture. Name the variant '
                        f'({names}), or give a folder written by save_pretrained.'
                        if names else f'{path}: {family_name} needs a folder written by '
                        'save_pretrained, or a model id.')
    state = read_state_dict(path)
    bias = state.get(family.class_bias)
    if bias is None:
        raise UserError(f'{path}: no weights of {family_name}: key {family.class_bias!r} is '
                        f'missing (the file has {", ".join(sorted(state)[:3])}, ...). Give a '
                        "state dict of the transformers library's model.")
    classes = bias.numel() - (family.outputs == 'masks')
    if classes != len(CITYSCAPES_CLASSES):
        raise UserError(f'{path}: {classes} classes, but a state dict without configuration is '
                        f'taken for the {len(CITYSCAPES_CLASSES)} Cityscapes classes. Give a '
                        'folder written by save_pretrained, whose config.json names the classes.')
    told = {entry: read(state[key].shape)
            for entry, (key, read) in family.from_state.items() if key in state}
    config = _config_class(family_name)(
        id2label=dict(enumerate(CITYSCAPES_CLASSES)), **{**variant, **told})
    return _Checkpoint(config, CITYSCAPES_CLASSES, state, family.normalisation, 'rgb', path.name,
                       sha256_file(path), 'as the weights given')


def _build(family: Family, checkpoint: _Checkpoint) -> Any:
    """Put the weights into the library's model, which also converts older names of keys."""
    check_finite(checkpoint.state, checkpoint.source)
    state = {key: value for key, value in checkpoint.state.items()
             if not _COMPUTED_KEYS.search(key)}
    config = checkpoint.config
    # Plain operations for every part: what the exporter and every run time know.
    config._attn_implementation = 'eager'
    with _quiet():
        model, info = getattr(transformers, family.model).from_pretrained(
            None, config=config, state_dict=state, dtype=torch.float32,
            attn_implementation='eager', ignore_mismatched_sizes=True, output_loading_info=True)
    for part in model.modules():
        if hasattr(getattr(part, 'config', None), '_attn_implementation'):
            part.config._attn_implementation = 'eager'
    missing, unexpected = (
        [key for key in info[what] if not _serves_training(key)]
        for what in ('missing_keys', 'unexpected_keys'))
    wrong = [(key, own, given) for key, given, own in info['mismatched_keys']
             if not _serves_training(key)]
    check_fit(family.model, checkpoint.source, missing, unexpected, wrong)
    return model


def _serves_training(key: str) -> bool:
    return key.startswith('auxiliary_head.') or bool(_COMPUTED_KEYS.search(key))


def _check_size(name: str, size_hw: tuple[int, int], divisor: int) -> None:
    least = max(32, divisor)
    if any(v < least or v % divisor for v in size_hw):
        near = 'x'.join(str(max(-(-least // divisor), round(v / divisor)) * divisor)
                        for v in size_hw)
        multiples = f' that are multiples of {divisor}' if divisor > 1 else ''
        raise UserError(f'{name} needs an input height and width of at least {least}{multiples}, '
                        f'got {size_hw[0]}x{size_hw[1]}; the nearest possible is {near}')


def _model_type(family_name: str) -> str:
    return 'mobilenet_v2' if family_name == 'mobilenet_v2_deeplabv3plus' else family_name


def _config_class(family_name: str) -> Any:
    return getattr(transformers, FAMILIES[family_name].config)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's own reports on keys and its progress bars off the terminal."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
