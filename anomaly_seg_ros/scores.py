# SPDX-License-Identifier: Apache-2.0
"""
Anomaly scores: pure functions on a network's raw outputs, higher is more anomalous.

What a network gives decides which table applies:

``logits``
    (N, C, H, W), or (P, C) for P pixels, before softmax over the known classes: ``SCORES``.
``masks``
    Class logits (N, Q, C + 1), "no object" last, and mask logits (N, Q, H, W): ``MASK_SCORES``.
``samples``
    Logits (T, C, H, W) of one image, from T networks or T dropout masks: ``SAMPLE_SCORES``.

Every function takes these outputs and a ``temperature`` > 0 by which all class logits are divided
first, and returns float32 (N, H, W), or (P,); N is 1 for samples. Half-precision outputs are
computed on in float32. Nothing is exponentiated but values <= 0, and no probability close to 1 is
subtracted from 1, so that saturated pixels keep their digits and their order.

Those of masks take ``size_hw`` too: the sums over the queries (S and its like) are interpolated to
this size before the score is taken; None leaves them at the masks' size.

f stands for logits / temperature, p for softmax(f) over the classes.
"""

from collections.abc import Callable, Sequence
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def msp(logits: 'Tensor', temperature: float = 1.0) -> 'Tensor':
    """
    Maximum softmax probability: ``1 - max_c p_c``, in [0, 1 - 1/C].

    Hendrycks and Gimpel, A Baseline for Detecting Misclassified and Out-of-Distribution Examples
    in Neural Networks, ICLR 2017.
    """
    _, _, rest = _exponentials(logits, temperature)
    return rest / (1 + rest)


def max_logit(logits: 'Tensor', temperature: float = 1.0) -> 'Tensor':
    """
    Maximum logit: ``-max_c f_c``, unbounded.

    Hendrycks et al., Scaling Out-of-Distribution Detection for Real-World Settings, ICML 2022.
    """
    return -_scale(logits.amax(dim=1), temperature)


def entropy(logits: 'Tensor', temperature: float = 1.0) -> 'Tensor':
    """
    Entropy of the softmax in nats: ``-sum_c p_c ln p_c``, in [0, ln C].

    Computed as ``logsumexp f - sum_c p_c f_c`` on logits shifted by their maximum, because
    ``p * log p`` is NaN where p underflows.
    """
    shifted, weights, rest = _exponentials(logits, temperature)
    return _log1p(rest) - (weights * shifted).sum(dim=1) / (1 + rest)


def energy(logits: 'Tensor', temperature: float = 1.0) -> 'Tensor':
    """
    Free energy: ``-T logsumexp(f)``, unbounded.

    Liu et al., Energy-based Out-of-distribution Detection, NeurIPS 2020, equation 4.
    """
    return -_logsumexp(logits, temperature)


def void(logits: 'Tensor', temperature: float = 1.0, *, channel: int) -> 'Tensor':
    """
    Posterior of the void or background class: ``p_channel``, in [0, 1].

    ``logits`` include that class. Blum et al., The Fishyscapes Benchmark, IJCV 2021 (void
    classifier); Hendrycks et al., ICML 2022 (background class).
    """
    weights = _shifted(logits, temperature).exp()
    return weights[:, channel] / weights.sum(dim=1)


def class_scores(class_logits: 'Tensor', mask_logits: 'Tensor', temperature: float = 1.0,
                 size_hw: Sequence[int] | None = None) -> 'Tensor':
    """
    Per-pixel class scores of a mask network: S (N, C, H, W), each >= 0, not normalised over C.

    ``S_c(x) = sum_q softmax(cls_q / T)_c sigmoid(m_q(x))`` with "no object" dropped: Cheng et al.,
    Masked-attention Mask Transformer for Universal Image Segmentation, CVPR 2022 (semantic
    inference). The label of a pixel is the class of largest S.
    """
    return _mix(_scale(class_logits, temperature).softmax(dim=-1)[..., :-1], mask_logits,
                size_hw)


def mask_msp(class_logits: 'Tensor', mask_logits: 'Tensor', temperature: float = 1.0,
             size_hw: Sequence[int] | None = None) -> 'Tensor':
    """
    Maximum class score: ``1 - max_c S_c``, at most 1, negative where masks overlap.

    The form used for mask networks by Nayal et al. (RbA, ICCV 2023) and Rai et al.
    (Mask2Anomaly, ICCV 2023).
    """
    return 1 - class_scores(class_logits, mask_logits, temperature, size_hw).amax(dim=1)


def mask_max_logit(class_logits: 'Tensor', mask_logits: 'Tensor', temperature: float = 1.0,
                   size_hw: Sequence[int] | None = None) -> 'Tensor':
    """
    Maximum mask-weighted class logit: ``-max_c sum_q (cls_qc / T) sigmoid(m_q)``, unbounded.

    "No object" is dropped. The form of the PoliTo study of ERFNet and EoMT.
    """
    return -_mix(_scale(class_logits, temperature)[..., :-1], mask_logits, size_hw).amax(dim=1)


def mask_entropy(class_logits: 'Tensor', mask_logits: 'Tensor', temperature: float = 1.0,
                 size_hw: Sequence[int] | None = None) -> 'Tensor':
    """Entropy in nats of S normalised over the classes: ``H[S_c / sum_k S_k]``, in [0, ln C]."""
    return _entropy_of(class_scores(class_logits, mask_logits, temperature, size_hw))


def mask_energy(class_logits: 'Tensor', mask_logits: 'Tensor', temperature: float = 1.0,
                size_hw: Sequence[int] | None = None) -> 'Tensor':
    """
    Free energy of the class scores: ``-logsumexp_c S_c``, at most -ln C.

    S in the place of logits, as Nayal et al. evaluate energy on Mask2Former.
    """
    return -_logsumexp(class_scores(class_logits, mask_logits, temperature, size_hw), 1.0)


def rba(class_logits: 'Tensor', mask_logits: 'Tensor', temperature: float = 1.0,
        size_hw: Sequence[int] | None = None) -> 'Tensor':
    """
    Rejected by all: ``-sum_c tanh(S_c)``, in (-C, 0].

    Nayal et al., RbA: Segmenting Unknown Regions Rejected by All, ICCV 2023, equation 5.
    """
    return -class_scores(class_logits, mask_logits, temperature, size_hw).tanh().sum(dim=1)


def polito_msp(class_logits: 'Tensor', mask_logits: 'Tensor', temperature: float = 1.0,
               size_hw: Sequence[int] | None = None) -> 'Tensor':
    """
    MSP as the PoliTo study's script has it: ``1 - max_{c < C-1} S_c / sum_k S_k``, in [0, 1].

    S is normalised over all C >= 2 classes, then the last real class is dropped as if it were
    "no object". For comparison with that study only.
    """
    scores = _normalised(class_scores(class_logits, mask_logits, temperature, size_hw))
    return 1 - scores[:, :-1].amax(dim=1)


def polito_rba(class_logits: 'Tensor', mask_logits: 'Tensor', temperature: float = 1.0,
               size_hw: Sequence[int] | None = None) -> 'Tensor':
    """
    Uncertainty of the queries, averaged over their masks, in [0, 1]: the PoliTo study's "RbA".

    ``sum_q (1 - max_{c < C} softmax(cls_q / T)_c) sigmoid(m_q) / sum_q sigmoid(m_q)``; not the RbA
    of Nayal et al. For comparison with that study only.
    """
    certainty = _scale(class_logits, temperature).softmax(dim=-1)[..., :-1].amax(dim=-1)
    masks = _memberships(mask_logits)
    weighted = ((1 - certainty)[..., None, None] * masks).sum(dim=1, keepdim=True)
    total = masks.sum(dim=1, keepdim=True)
    return (resize(weighted, size_hw) / resize(total, size_hw).clamp_min(_TINY))[:, 0]


def mean_msp(logits: 'Tensor', temperature: float = 1.0) -> 'Tensor':
    """
    Maximum probability of the mean posterior: ``1 - max_c mean_t p_tc``, in [0, 1 - 1/C].

    Lakshminarayanan et al., Simple and Scalable Predictive Uncertainty Estimation using Deep
    Ensembles, NeurIPS 2017.
    """
    _, rest = _ratios(mean_posterior(logits, temperature))
    return rest / (1 + rest)


def mean_max_logit(logits: 'Tensor', temperature: float = 1.0) -> 'Tensor':
    """Maximum logit of the mean logits: ``-max_c mean_t f_tc``, unbounded."""
    return max_logit(logits.float().mean(dim=0, keepdim=True), temperature)


def mean_energy(logits: 'Tensor', temperature: float = 1.0) -> 'Tensor':
    """Free energy of the mean logits: ``-T logsumexp_c mean_t f_tc``, unbounded."""
    return energy(logits.float().mean(dim=0, keepdim=True), temperature)


def predictive_entropy(logits: 'Tensor', temperature: float = 1.0) -> 'Tensor':
    """
    Entropy in nats of the mean posterior: ``H[mean_t p_t]``, in [0, ln C].

    Gal, Uncertainty in Deep Learning, PhD thesis 2016, equation 3.21; Mukhoti and Gal, Evaluating
    Bayesian Deep Learning Methods for Semantic Segmentation, 2018.
    """
    return _entropy_of(mean_posterior(logits, temperature))


def mutual_information(logits: 'Tensor', temperature: float = 1.0) -> 'Tensor':
    """
    Disagreement of the samples: ``H[mean_t p_t] - mean_t H[p_t]`` in nats, in [0, ln C].

    Gal 2016, equation 3.24. The difference of two entropies: its error is that of an entropy,
    whatever its size.
    """
    own = sum(entropy(one, temperature) for one in logits.split(1))
    return (predictive_entropy(logits, temperature) - own / len(logits)).clamp_min(0)


def variance(logits: 'Tensor', temperature: float = 1.0) -> 'Tensor':
    """
    Variance of the posterior over the samples, mean over classes: ``mean_c Var_t p_tc``.

    In [0, 1/4]. Hendrycks et al., ICML 2022 (MC dropout).
    """
    mean = mean_posterior(logits, temperature)
    squares = sum(((_scale(one, temperature).softmax(dim=1) - mean) ** 2)
                  for one in logits.split(1))
    return (squares / len(logits)).mean(dim=1)


def mean_posterior(logits: 'Tensor', temperature: float = 1.0) -> 'Tensor':
    """Mean over the samples of softmax(f): (1, C, H, W). Its largest class is the label."""
    # One sample at a time: T posteriors at full resolution would not fit a small machine.
    total: Tensor = sum(_scale(one, temperature).softmax(dim=1) for one in logits.split(1))
    return total / len(logits)


SCORES: dict[str, Callable[..., 'Tensor']] = {
    'msp': msp,
    'max_logit': max_logit,
    'entropy': entropy,
    'energy': energy,
    'void': void,
}

MASK_SCORES: dict[str, Callable[..., 'Tensor']] = {
    'msp': mask_msp,
    'max_logit': mask_max_logit,
    'entropy': mask_entropy,
    'energy': mask_energy,
    'rba': rba,
    'polito_msp': polito_msp,
    'polito_rba': polito_rba,
}

SAMPLE_SCORES: dict[str, Callable[..., 'Tensor']] = {
    'msp': mean_msp,
    'max_logit': mean_max_logit,
    'entropy': predictive_entropy,
    'energy': mean_energy,
    'predictive_entropy': predictive_entropy,
    'mutual_information': mutual_information,
    'variance': variance,
}

TABLES = {'logits': SCORES, 'masks': MASK_SCORES, 'samples': SAMPLE_SCORES}

_TINY = 1.2e-38  # just above float32's smallest normal number


def score_function(name: str, outputs: str | None = None) -> Callable[..., 'Tensor']:
    """
    Return the score called ``name`` for networks that give ``outputs``.

    ``outputs`` is a key of ``TABLES``; None takes the first table that has the name, which tells
    whether there is such a score at all.

    Raises
    ------
    ValueError
        If there is no such score, or none for such networks; lists those that there are.

    """
    everything = {key: function for table in reversed(TABLES.values())
                  for key, function in table.items()}
    if name not in everything:
        raise ValueError(f'unknown score {name!r}; choose one of '
                         f'{", ".join(sorted(everything))}')
    if outputs is None:
        return everything[name]
    if name not in TABLES[outputs]:
        raise ValueError(f'score {name!r} does not apply to a network that gives {outputs}; '
                         f'choose one of {", ".join(sorted(TABLES[outputs]))}')
    return TABLES[outputs][name]


def resize(x: 'Tensor', size_hw: Sequence[int] | None) -> 'Tensor':
    """Resize (N, C, h, w) bilinearly with half-pixel centres; None leaves the size as it is."""
    from torch.nn.functional import interpolate

    if size_hw is None or tuple(x.shape[-2:]) == tuple(size_hw):
        return x
    return interpolate(x, size=tuple(size_hw), mode='bilinear', align_corners=False)


def _scale(values: 'Tensor', temperature: float) -> 'Tensor':
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f'temperature must be a positive number, got {temperature}')
    values = values.float()
    return values if temperature == 1.0 else values / temperature


def _shifted(logits: 'Tensor', temperature: float) -> 'Tensor':
    """Return f - max f; subtracted before the division, which would round large logits."""
    logits = logits.float()
    return _scale(logits - logits.amax(dim=1, keepdim=True), temperature)


def _exponentials(logits: 'Tensor', temperature: float) -> 'tuple[Tensor, Tensor, Tensor]':
    """
    Return f - max f, its exponential, and the sum of the exponentials but for one maximum.

    That sum is what 1 - max p is made of; taken as (sum of all) - 1 it would lose every digit
    where the network is sure of itself.
    """
    shifted = _shifted(logits, temperature)
    weights = shifted.exp()
    # 0 at a maximum and 1 elsewhere; half the time of a comparison and a where.
    below = (shifted * -1e38).clamp(max=1)
    return shifted, weights, _sum_of_others(weights, weights * below)


def _logsumexp(logits: 'Tensor', temperature: float) -> 'Tensor':
    """``T ln sum_c exp(logits_c / T)``, faster than ONNX Runtime's own operator."""
    total = _shifted(logits, temperature).exp().sum(dim=1)
    return logits.float().amax(dim=1) + temperature * total.log()


def _memberships(mask_logits: 'Tensor') -> 'Tensor':
    """
    ``sigmoid(m)`` by its definition, with all its digits also where no mask claims a pixel.

    ONNX Runtime's own operator is an approximation on the CPU: 6e-3 off at -12 and exactly 0 from
    -18 down. Held from -80 on, below which exponentials would leave float32.
    """
    logits = mask_logits.float()
    smaller = (-logits.abs()).clamp_min(-80.0).exp()
    return smaller.where(logits < 0, 1.0) / (1 + smaller)


def _mix(class_values: 'Tensor', mask_logits: 'Tensor',
         size_hw: Sequence[int] | None) -> 'Tensor':
    """``sum_q class_values_qc sigmoid(m_q)``: (N, Q, C), (N, Q, h, w) -> (N, C, H, W)."""
    masks = _memberships(mask_logits)
    mixed = class_values.transpose(1, 2) @ masks.flatten(2)
    return resize(mixed.unflatten(2, tuple(masks.shape[2:])), size_hw)


def _normalised(scores: 'Tensor') -> 'Tensor':
    return scores / scores.sum(dim=1, keepdim=True).clamp_min(_TINY)


def _entropy_of(shares: 'Tensor') -> 'Tensor':
    """``-sum_c p_c ln p_c`` of p = shares / their sum."""
    # As in ``entropy``, for near 1 the logarithm of a rounded p would have no digits.
    others, rest = _ratios(shares)
    return _log1p(rest) - (others * others.clamp_min(_TINY).log()).sum(dim=1) / (1 + rest)


def _ratios(shares: 'Tensor') -> 'tuple[Tensor, Tensor]':
    """Return shares / max shares with 0 at a maximum, and the sum of all ratios but for one 1."""
    largest = shares.amax(dim=1, keepdim=True)
    ratios = shares / largest.clamp_min(_TINY)
    # By the shares themselves: OpenVINO's ratio of a number to itself is not always 1.
    others = ratios.where(shares < largest, 0.0)
    return others, _sum_of_others(ratios, others).clamp_min(0)  # -1 where all shares are 0


def _sum_of_others(weights: 'Tensor', others: 'Tensor') -> 'Tensor':
    """Return the sum of weights <= 1 but for one that is 1; ``others`` has 0 for these."""
    rest = others.sum(dim=1)
    return rest + (weights.sum(dim=1) - 1 - rest).round()  # further classes that share it


def _log1p(x: 'Tensor') -> 'Tensor':
    """
    ``ln(1 + x)`` for x > -1, with all the digits of a small x.

    ONNX has no log1p, and ONNX Runtime no artanh on GPUs. So Kahan's, in which the rounding of the
    sum cancels out.
    """
    total = 1 + x
    rounded = total - 1
    return x.where(rounded == 0, x * total.log() / rounded)
