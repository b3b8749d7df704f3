# SPDX-License-Identifier: Apache-2.0
"""The graph that is exported: network, labels and anomaly score in one module."""

from functools import partial
from typing import TYPE_CHECKING

from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.networks import LoadedNetwork
from anomaly_seg_ros.networks.class_sets import void_class
from anomaly_seg_ros.scores import SAMPLE_SCORES, score_function, SCORES, TABLES

if TYPE_CHECKING:
    from torch import nn

# Scores of one network that need several opinions; dropout gives them.
MONTE_CARLO_SCORES = tuple(name for name in SAMPLE_SCORES if name not in SCORES)
PASSES = 8


def fuse(network: LoadedNetwork, score: str, temperature: float, passes: int = PASSES,
         seed: int = 0) -> 'nn.Module':
    """
    Return a module: image (1, 3, H, W) -> labels uint8 (1, h, w), score float32 (1, h, w).

    Parameters
    ----------
    network
        What to fuse the score into.
    score
        Name of a score that applies to it.
    temperature
        Divides the class logits before the score is taken.
    passes, seed
        Of Monte Carlo dropout: number of masks and seed of their generator.

    Raises
    ------
    UserError
        If there is no such score or it does not apply to this network; lists those that do.

    """
    from anomaly_seg_ros.networks import heads

    applicable = applicable_scores(network)
    if score not in applicable:
        try:
            score_function(score)
        except ValueError as error:
            raise UserError(str(error)) from error
        raise UserError(f'score {score!r} does not apply to {network.name}, which '
                        f'{_what_it_gives(network)}; choose one of {", ".join(applicable)}')
    if network.outputs == 'masks':
        return heads.MasksHead(
            network.module, score_function(score, 'masks'), network.upsample,
            network.mask_size_hw, temperature).eval()
    body, outputs = network.module, network.outputs
    if outputs == 'logits' and score in MONTE_CARLO_SCORES:
        body, outputs = heads.monte_carlo(body, _image_shape(network), passes, seed), 'samples'
    function = partial(score_function(score, outputs), temperature=temperature)
    if outputs == 'samples':
        return heads.SamplesHead(body, function, network.upsample, temperature).eval()
    if score != 'void':
        return heads.LogitsHead(body, function, network.upsample).eval()
    if network.module_with_void is not None:
        return heads.LogitsHead(network.module_with_void, partial(function, channel=-1),
                                network.upsample, hidden_channel=True).eval()
    return heads.LogitsHead(body, partial(function, channel=void_class(network.classes)),
                            network.upsample).eval()


def applicable_scores(network: LoadedNetwork) -> tuple[str, ...]:
    """Return the names of the scores that can be fused into ``network``, sorted."""
    names = set(TABLES[network.outputs])
    if network.outputs == 'logits':
        if network.module_with_void is None and void_class(network.classes) is None:
            names.discard('void')
        if _has_dropout(network):
            names.update(MONTE_CARLO_SCORES)
    if len(network.classes) < 2:
        names.discard('polito_msp')  # it drops one class
    return tuple(sorted(names))


def score_parameters(network: LoadedNetwork, score: str) -> dict[str, float]:
    """Return the parameters of ``fuse`` that the card should hold for this score."""
    if network.outputs == 'logits' and score in MONTE_CARLO_SCORES:
        return {'passes': PASSES, 'seed': 0}
    return {}


def _has_dropout(network: LoadedNetwork) -> bool:
    from anomaly_seg_ros.networks.heads import is_dropout
    return any(is_dropout(module) for module in network.module.modules())


def _image_shape(network: LoadedNetwork) -> tuple[int, ...]:
    side = -(-64 // network.size_divisor) * network.size_divisor
    return (1, 3, *(network.input_size_hw or (side, side)))


def _what_it_gives(network: LoadedNetwork) -> str:
    if network.outputs == 'masks':
        return 'gives masks ' + ('of one class' if len(network.classes) < 2 else 'and classes')
    if network.outputs == 'samples':
        return 'is an ensemble'
    return 'gives logits, ' + ('with' if _has_dropout(network) else 'without') + ' dropout layers'
