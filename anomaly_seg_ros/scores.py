# SPDX-License-Identifier: Apache-2.0
"""Anomaly scores: pure functions on logits, higher is more anomalous.

Every function takes ``logits`` float (N, C, H, W), the network's outputs before softmax over the
known classes, and a ``temperature`` > 0 by which they are divided first, and returns float
(N, H, W). They are written so that no intermediate value leaves the range of the dtype: softmax
is never formed where its logarithm is what is needed, and nothing is exponentiated but values
<= 0.

f stands for logits / temperature, p for softmax(f) over the channel dimension.
"""

from collections.abc import Callable
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def msp(logits: 'Tensor', temperature: float = 1.0) -> 'Tensor':
    """Maximum softmax probability: ``1 - max_c p_c``, in [0, 1 - 1/C].

    Hendrycks and Gimpel, A Baseline for Detecting Misclassified and Out-of-Distribution Examples
    in Neural Networks, ICLR 2017. Computed as ``1 - exp(max f - logsumexp f)``.
    """
    scaled = _scale(logits, temperature)
    return -(scaled.amax(dim=1) - scaled.logsumexp(dim=1)).expm1()


def max_logit(logits: 'Tensor', temperature: float = 1.0) -> 'Tensor':
    """Maximum logit: ``-max_c f_c``, unbounded.

    Hendrycks et al., Scaling Out-of-Distribution Detection for Real-World Settings, ICML 2022.
    """
    return -_scale(logits, temperature).amax(dim=1)


def entropy(logits: 'Tensor', temperature: float = 1.0) -> 'Tensor':
    """Entropy of the softmax in nats: ``-sum_c p_c ln p_c``, in [0, ln C].

    Computed as ``logsumexp f - sum_c p_c f_c`` on logits shifted by their maximum, because
    ``p * log p`` is NaN where p underflows.
    """
    scaled = _scale(logits, temperature)
    shifted = scaled - scaled.amax(dim=1, keepdim=True)
    weights = shifted.exp()
    total = weights.sum(dim=1)
    return total.log() - (weights * shifted).sum(dim=1) / total


def energy(logits: 'Tensor', temperature: float = 1.0) -> 'Tensor':
    """Free energy: ``-T logsumexp(f)``, unbounded.

    Liu et al., Energy-based Out-of-distribution Detection, NeurIPS 2020, equation 4.
    """
    return -temperature * _scale(logits, temperature).logsumexp(dim=1)


SCORES: dict[str, Callable[..., 'Tensor']] = {
    'msp': msp,
    'max_logit': max_logit,
    'entropy': entropy,
    'energy': energy,
}


def score_function(name: str) -> Callable[..., 'Tensor']:
    """Return the score called ``name``; an unknown name's error lists the choices."""
    if name not in SCORES:
        raise ValueError(f'unknown score {name!r}; choose one of {", ".join(sorted(SCORES))}')
    return SCORES[name]


def _scale(logits: 'Tensor', temperature: float) -> 'Tensor':
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f'temperature must be a positive number, got {temperature}')
    return logits if temperature == 1.0 else logits / temperature
