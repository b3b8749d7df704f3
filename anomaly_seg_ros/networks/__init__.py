# SPDX-License-Identifier: Apache-2.0
"""
Networks by name: each loader builds the architecture and puts the weights in.

A newcomer adds a network with one module, one loader function and one line in ``NETWORKS``.
Torch is imported by the loaders, never by this module.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from anomaly_seg_ros.classes import CITYSCAPES_CLASSES, CITYSCAPES_DRIVABLE, CITYSCAPES_PALETTE
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.extras import how_to_install
from anomaly_seg_ros.files import sha256_file
from anomaly_seg_ros.networks.variants import FAMILY_NAMES, VARIANTS

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class LoadedNetwork:
    """
    A network in evaluation mode with what its input and outputs mean.

    Attributes
    ----------
    name
        Name in ``NETWORKS``.
    module
        ``forward`` takes float32 (N, 3, H, W), normalised, and gives what ``outputs`` says, over
        ``classes``; void channels are already cut off.
    outputs
        ``logits`` (N, C, h, w); ``masks``, a pair of class logits (N, Q, C + 1) and mask logits
        (N, Q, h, w); or ``samples``, logits (T, C, h, w) of one image.
    upsample
        Labels and score are taken at the input's size, from interpolated outputs, as the
        network's own library does; else at the network's stride.
    mask_size_hw
        With masks and ``upsample``: size to which mask logits are resized, None for the input's.
    module_with_void
        The network with its void channel left in, as the last of C + 1 logits.
    classes, palette, drivable
        As in ``ModelCard``.
    mean, std, channel_order
        Normalisation of values in [0, 1], as in ``ModelCard``.
    resize
        How training images were scaled, as in ``ModelCard``.
    size_divisor
        Height and width of the input must be multiples of this.
    input_size_hw
        The one input size that ``module`` serves; None where it serves all.
    void_index
        Channel of the checkpoint that meant "void" and was cut off, if any; None of an ensemble
        whose members differ in it.
    weights_source, weights_sha256, licence
        Provenance; of an ensemble, that of all members, joined with " + ", each licence once.

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
    resize: str = 'antialiased'
    size_divisor: int = 1
    void_index: int | None = None
    outputs: str = 'logits'
    upsample: bool = False
    mask_size_hw: tuple[int, int] | None = None
    input_size_hw: tuple[int, int] | None = None
    module_with_void: 'nn.Module | None' = None

    def transformed(self, function: 'Callable[[nn.Module], nn.Module]') -> 'LoadedNetwork':
        """Return the same network with ``function`` applied to its modules."""
        void = self.module_with_void
        return replace(self, module=function(self.module),
                       module_with_void=None if void is None else function(void))


def load_erfnet(name: str, weights: Path | str,
                input_size_hw: tuple[int, int] | None = None) -> LoadedNetwork:
    """
    Load ERFNet with 19 Cityscapes classes, or 20 of which the last is void.

    The void channel's weights are cut off before the network runs: a slice of 20 full-resolution
    logits would cost as much as a convolution.
    """
    from anomaly_seg_ros.networks.checkpoint import fit_state_dict, read_state_dict
    from anomaly_seg_ros.networks.erfnet import ERFNet

    # encoder.output_conv serves the authors' encoder pre-training only.
    state = {key: value for key, value in read_state_dict(weights).items()
             if not key.startswith('encoder.output_conv.')}
    classes = len(CITYSCAPES_CLASSES)
    bias = state.get('decoder.output_conv.bias')
    if bias is not None and bias.shape not in ((classes,), (classes + 1,)):
        raise UserError(f'{weights}: expected {classes} classes, or {classes + 1} with void last, '
                        f'got {bias.numel()}; ERFNet is loaded for the Cityscapes classes only')
    has_void = bias is not None and len(bias) == classes + 1
    network = ERFNet(classes + has_void).eval()
    fit_state_dict(network, state, weights)
    with_void = None
    if has_void:
        with_void, network = network, ERFNet(classes).eval()
        network.encoder, network.decoder.layers = with_void.encoder, with_void.decoder.layers
        head = with_void.decoder.output_conv.state_dict()
        network.decoder.output_conv.load_state_dict(
            {'weight': head['weight'][:, :classes], 'bias': head['bias'][:classes]})
    return LoadedNetwork(name, network, Path(weights).name, sha256_file(weights),
                         'as the weights given', size_divisor=ERFNet.size_divisor,
                         void_index=classes if has_void else None, module_with_void=with_void)


def load_roadnet(name: str, weights: Path | str,
                 input_size_hw: tuple[int, int] | None = None) -> LoadedNetwork:
    """Load RoadNet, the bundled model's network; widths are read from the weights' shapes."""
    from anomaly_seg_ros.networks.checkpoint import fit_state_dict, read_state_dict
    from anomaly_seg_ros.networks.roadnet import RoadNet

    state = read_state_dict(weights)
    keys = ('stem.0.weight', 'down4.0.weight', 'down8.0.weight', 'down16.0.weight')
    if any(key not in state for key in keys):
        raise UserError(f'{weights}: no weights of RoadNet: keys {", ".join(keys)} are missing')
    network = RoadNet(len(CITYSCAPES_CLASSES), tuple(state[key].shape[0] for key in keys)).eval()
    fit_state_dict(network, state, weights)
    return LoadedNetwork(name, network, Path(weights).name, sha256_file(weights), 'Apache-2.0',
                         mean=RoadNet.mean, std=RoadNet.std, channel_order=RoadNet.channel_order,
                         resize=RoadNet.resize, size_divisor=RoadNet.size_divisor)


def load_transformers(name: str, weights: Path | str,
                      input_size_hw: tuple[int, int] | None = None) -> LoadedNetwork:
    """Load a network of the Hugging Face library; see ``huggingface.load_huggingface``."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(f'network {name!r} needs the transformers library ({error}): '
                        f'{how_to_install("networks")}') from error
    from anomaly_seg_ros.networks.huggingface import load_huggingface
    return load_huggingface(name, weights, input_size_hw)


def load_smp(name: str, weights: Path | str,
             input_size_hw: tuple[int, int] | None = None) -> LoadedNetwork:
    """Load a network of segmentation-models-pytorch; see ``smp.load_segmentation_models``."""
    try:
        import segmentation_models_pytorch  # noqa: F401
    except Exception as error:  # torchvision, where it does not fit torch, raises RuntimeError
        raise UserError(f'network {name!r} needs segmentation-models-pytorch and a torchvision '
                        f'that fits this torch ({type(error).__name__}: {error}). Install both, '
                        'or use a network of the transformers library.') from error
    from anomaly_seg_ros.networks.smp import load_segmentation_models
    return load_segmentation_models(name, weights)


Loader = Callable[[str, Path | str, tuple[int, int] | None], LoadedNetwork]

NETWORKS: dict[str, Loader] = {
    'erfnet': load_erfnet,
    'roadnet': load_roadnet,
    'smp': load_smp,
    **{family: load_transformers for family in FAMILY_NAMES},
    **{variant: load_transformers for variant in VARIANTS},
}


def load_network(name: str, weights: Path | str | Sequence[Path | str],
                 input_size_hw: tuple[int, int] | None = None) -> LoadedNetwork:
    """
    Load the network called ``name``.

    Parameters
    ----------
    name
        Key of ``NETWORKS``.
    weights
        File, folder or model id; which of them is for the network to say. Several make an
        ensemble in one graph.
    input_size_hw
        Height and width in pixels at which it will run. Networks that are built for one size need
        it where that is not their configuration's.

    Raises
    ------
    UserError
        If there is no such network (lists the choices), the weights cannot be read or do not fit,
        or the network cannot run at that size.

    """
    from anomaly_seg_ros.networks.numerics import settle_vector_math

    settle_vector_math()
    if name not in NETWORKS:
        raise UserError(f'unknown network {name!r}; choose one of {", ".join(NETWORKS)}')
    load = NETWORKS[name]
    if isinstance(weights, (str, Path)):
        return load(name, weights, input_size_hw)
    if not weights:
        raise UserError(f'no weights for {name}; give a file, a folder or a model id')
    members = [load(name, one, input_size_hw) for one in weights]
    return members[0] if len(members) == 1 else _ensemble(members)


def _ensemble(members: Sequence[LoadedNetwork]) -> LoadedNetwork:
    """Join networks of equal classes and preprocessing into one that gives samples."""
    from anomaly_seg_ros.networks.heads import Ensemble, MasksAsLogits

    first = members[0]
    for member in members[1:]:
        for what in ('classes', 'mean', 'std', 'channel_order', 'resize'):
            if getattr(member, what) != getattr(first, what):
                raise UserError(f'{member.weights_source}: its {what} are not those of '
                                f'{first.weights_source}; an ensemble takes networks that agree '
                                'in classes and preprocessing')
    modules = [MasksAsLogits(member.module, member.mask_size_hw)
               if member.outputs == 'masks' else member.module for member in members]
    same_void = len({member.void_index for member in members}) == 1
    return replace(
        first, module=Ensemble(modules).eval(), module_with_void=None, outputs='samples',
        void_index=first.void_index if same_void else None,
        licence=' + '.join(dict.fromkeys(member.licence for member in members)),
        weights_source=' + '.join(member.weights_source for member in members),
        weights_sha256=' + '.join(member.weights_sha256 for member in members))
