# SPDX-License-Identifier: Apache-2.0
"""Scores against float64 numpy references written from the papers' equations."""

import math

from anomaly_seg_ros.networks.numerics import settle_vector_math
from anomaly_seg_ros.scores import (
    class_scores, MASK_SCORES, mean_posterior, SAMPLE_SCORES, score_function, SCORES)
import cv2
import numpy as np
import pytest
import torch

settle_vector_math()
TINY = float(np.finfo(np.float32).tiny)
TEMPERATURES = (1.0, 0.5, 2.5)


def softmax(f, axis=1):
    e = np.exp(f - f.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def logsumexp(f, axis=1):
    m = f.max(axis=axis, keepdims=True)
    return np.squeeze(m, axis) + np.log(np.exp(f - m).sum(axis=axis))


def plogp(p):
    return np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0)


def entropy_of(p):
    """-sum p ln p; near 1, ln p of the largest class is taken from what the others leave of it."""
    ordered = np.sort(p, axis=1)
    others = ordered[:, :-1].sum(axis=1)
    ln_largest = np.where(others < 0.5, np.log1p(-others), np.log(ordered[:, -1]))
    return -plogp(ordered[:, :-1]).sum(axis=1) - ordered[:, -1] * ln_largest


def reference(name, logits, temperature, channel=None):
    """Score by its definition, in float64; logits (N, C, H, W)."""
    f = np.asarray(logits, np.float64) / temperature
    if name == 'msp':
        # The sum of all probabilities but the largest: 1 - max p without its cancellation.
        return np.sort(softmax(f), axis=1)[:, :-1].sum(axis=1)
    if name == 'max_logit':
        return -f.max(axis=1)
    if name == 'energy':
        return -temperature * logsumexp(f)
    if name == 'void':
        return softmax(f)[:, channel]
    return entropy_of(softmax(f))


def check(name, values, temperature=1.0, rtol=1e-5, **parameters):
    """Compare with the reference: ``rtol`` of the score, or of the logits it is a sum of."""
    got = SCORES[name](values, temperature, **parameters)
    want = reference(name, values.double().numpy(), temperature, **parameters)
    assert got.dtype == torch.float32
    assert got.shape == (values.shape[0], *values.shape[2:])
    scale = np.abs(want)
    if name == 'energy':  # -(max + ln sum): rounds like its summands, near 0 too
        scale = np.maximum(scale, np.abs(values.double().numpy()).max(axis=1))
    error = np.abs(got.double().numpy() - want)
    assert np.isfinite(got.numpy()).all()
    assert (error <= rtol * scale + TINY).all(), \
        f'{name} T={temperature}: largest relative error {(error / (scale + TINY)).max():.2e}'


@pytest.fixture(scope='module')
def random_logits():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 19, 37, 41, generator=generator) * 6


@pytest.mark.parametrize('temperature', TEMPERATURES)
@pytest.mark.parametrize('name', ['msp', 'max_logit', 'entropy', 'energy'])
def test_random_logits(name, temperature, random_logits):
    check(name, random_logits, temperature)


@pytest.mark.parametrize('temperature', TEMPERATURES)
@pytest.mark.parametrize('name', ['msp', 'max_logit', 'entropy', 'energy'])
@pytest.mark.parametrize('size', [20.0, 80.0, 1e4])
def test_saturated_logits(name, temperature, size):
    generator = torch.Generator().manual_seed(4)
    signs = torch.randint(0, 2, (1, 19, 32, 32), generator=generator) * 2 - 1.0
    check(name, signs * size, temperature)  # many classes share the maximum
    one = torch.full((1, 19, 32, 32), -size)
    one[:, 5] = size
    check(name, one, temperature)
    check(name, one + torch.rand(one.shape, generator=generator), temperature)


@pytest.mark.parametrize('name', ['msp', 'max_logit', 'entropy', 'energy'])
def test_equal_logits(name):
    for value in (0.0, -1e4, 1e4, 1e-42):
        check(name, torch.full((1, 19, 2, 2), value))
    assert SCORES['msp'](torch.zeros(1, 19, 1, 1)).item() == pytest.approx(1 - 1 / 19, rel=1e-6)
    assert SCORES['entropy'](torch.zeros(1, 19, 1, 1)).item() == pytest.approx(math.log(19))


@pytest.mark.parametrize('temperature', TEMPERATURES)
@pytest.mark.parametrize('name', ['msp', 'max_logit', 'entropy', 'energy'])
def test_half_precision_logits(name, temperature, random_logits):
    """On half-precision logits the score is exact too; only the logits were rounded."""
    check(name, random_logits.half(), temperature)
    largest = torch.full((1, 19, 4, 4), 65504.0, dtype=torch.float16)
    check(name, largest, temperature)
    largest[:, 1:] = -65504.0
    check(name, largest, temperature)
    largest[:, 1] = 65472.0
    check(name, largest, temperature)


@pytest.mark.parametrize('name', ['msp', 'max_logit', 'entropy', 'energy'])
def test_rounding_of_the_logits_to_half_precision(name, random_logits):
    """The stated limit for logits of at most 32: 0.02 on any score."""
    small = random_logits.clamp(-32, 32)
    error = (SCORES[name](small.half()) - SCORES[name](small)).abs().max().item()
    assert 0 < error <= 0.02


def test_void_class(random_logits):
    for temperature in TEMPERATURES:
        check('void', random_logits, temperature, channel=18)
    saturated = torch.full((1, 20, 1, 3), -80.0)
    saturated[:, 19, :, 0] = 80.0
    saturated[:, 3, :, 1] = 80.0
    check('void', saturated, channel=19)


@pytest.fixture(scope='module')
def erfnet_logits(real_data):
    from anomaly_seg_ros.networks import load_network

    network = load_network('erfnet', real_data / 'weights' / 'erfnet_cityscapes_20ch.pth')
    image = cv2.imread(str(real_data / 'anomaly' / 'road_anomaly_21' / 'images' / '0.png'))
    if image is None:
        image = cv2.imread(str(sorted(
            (real_data / 'anomaly' / 'road_anomaly_21' / 'images').iterdir())[0]))
    image = cv2.resize(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), (512, 256))
    with torch.inference_mode():
        return network.module(torch.from_numpy(image / 255.0).float().permute(2, 0, 1)[None])


@pytest.mark.parametrize('name', ['msp', 'max_logit', 'entropy', 'energy'])
def test_real_logits(name, erfnet_logits):
    assert erfnet_logits.shape == (1, 19, 256, 512)
    for temperature in TEMPERATURES:
        check(name, erfnet_logits, temperature)
    check(name, erfnet_logits.half())


def mask_reference(name, class_logits, mask_logits, temperature):
    a = np.asarray(class_logits, np.float64) / temperature
    sigmoid = 1 / (1 + np.exp(-np.asarray(mask_logits, np.float64)))
    s = np.einsum('nqc,nqhw->nchw', softmax(a, axis=-1)[..., :-1], sigmoid)
    p = s / s.sum(axis=1, keepdims=True)
    if name == 'msp':
        return 1 - s.max(axis=1)
    if name == 'max_logit':
        return -np.einsum('nqc,nqhw->nchw', a[..., :-1], sigmoid).max(axis=1)
    if name == 'entropy':
        return entropy_of(p)
    if name == 'energy':
        return -np.log(np.exp(s).sum(axis=1))
    if name == 'rba':
        return -np.tanh(s).sum(axis=1)
    if name == 'polito_msp':
        return 1 - p[:, :-1].max(axis=1)
    weight = 1 - softmax(a, axis=-1)[..., :-1].max(axis=-1)
    return (weight[..., None, None] * sigmoid).sum(axis=1) / sigmoid.sum(axis=1)


@pytest.mark.parametrize('scale', [0.1, 3.0, 30.0])
@pytest.mark.parametrize('name', sorted(MASK_SCORES))
def test_mask_scores(name, scale):
    generator = torch.Generator().manual_seed(5)
    class_logits = torch.randn(1, 50, 20, generator=generator) * scale
    mask_logits = torch.randn(1, 50, 24, 40, generator=generator) * scale
    for temperature in TEMPERATURES:
        got = MASK_SCORES[name](class_logits, mask_logits, temperature).double().numpy()
        want = mask_reference(name, class_logits, mask_logits, temperature)
        assert got.shape == want.shape == (1, 24, 40)
        # Sums over 50 queries that partly cancel: relative to the largest score of the frame.
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * max(1, np.abs(want).max()))


@pytest.mark.parametrize('name', sorted(MASK_SCORES))
def test_mask_scores_where_no_mask_is(name):
    class_logits = torch.randn(1, 10, 20, generator=torch.Generator().manual_seed(6))
    mask_logits = torch.full((1, 10, 2, 2), -1e4)
    values = MASK_SCORES[name](class_logits, mask_logits)
    assert torch.isfinite(values).all()
    # Half-precision logits at the end of their range.
    values = MASK_SCORES[name](class_logits.half() * 1e4, mask_logits.clamp(-6e4).half())
    assert values.dtype == torch.float32
    assert torch.isfinite(values).all()


def test_rejected_pixels_score_higher():
    """A pixel that no mask claims must be more anomalous than one that a sure query claims."""
    class_logits = torch.full((1, 2, 20), -10.0)
    class_logits[0, 0, 3] = class_logits[0, 1, 7] = 10.0
    mask_logits = torch.tensor([[[[9.0, -9.0, -9.0]], [[-9.0, 9.0, -9.0]]]])
    labels = class_scores(class_logits, mask_logits).argmax(dim=1)
    assert labels[0, 0, :2].tolist() == [3, 7]
    for name in ('msp', 'max_logit', 'energy', 'rba'):
        claimed, _, rejected = MASK_SCORES[name](class_logits, mask_logits)[0, 0].tolist()
        assert rejected > claimed + 0.05, name


def sample_reference(name, logits, temperature):
    f = np.asarray(logits, np.float64) / temperature
    p = softmax(f)
    mean = p.mean(axis=0, keepdims=True)
    if name == 'msp':
        return np.sort(mean, axis=1)[:, :-1].sum(axis=1)
    if name == 'max_logit':
        return -f.mean(axis=0, keepdims=True).max(axis=1)
    if name == 'energy':
        return -temperature * logsumexp(f.mean(axis=0, keepdims=True))
    if name == 'variance':
        return p.var(axis=0, keepdims=True).mean(axis=1)
    predictive = entropy_of(mean)
    if name == 'mutual_information':
        return predictive - entropy_of(p).mean(axis=0, keepdims=True)
    return predictive


@pytest.mark.parametrize('scale', [1.0, 8.0, 1e3])
@pytest.mark.parametrize('name', sorted(SAMPLE_SCORES))
def test_sample_scores(name, scale):
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(1, 19, 16, 24, generator=generator) * scale \
        + torch.randn(6, 19, 16, 24, generator=generator)
    for temperature in TEMPERATURES:
        got = SAMPLE_SCORES[name](logits, temperature).double().numpy()
        want = sample_reference(name, logits, temperature)
        assert got.shape == want.shape == (1, 16, 24)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * max(1, np.abs(want).max()))


def test_samples_that_agree_carry_no_information(random_logits):
    same = random_logits[:1].expand(5, -1, -1, -1)
    assert SAMPLE_SCORES['mutual_information'](same).abs().max() < 2e-6
    assert SAMPLE_SCORES['variance'](same).max() < 1e-12
    torch.testing.assert_close(SAMPLE_SCORES['predictive_entropy'](same),
                               SCORES['entropy'](same[:1]), rtol=1e-5, atol=1e-6)
    assert torch.equal(mean_posterior(same).argmax(dim=1), same[:1].argmax(dim=1))


def sure_samples():
    """Make samples that are ever surer, up to a posterior of 1 - 1e-37; one pixel is a tie."""
    logits = torch.zeros(3, 19, 1, 81)
    logits[:, 4] = torch.linspace(5, 85, 81) + torch.tensor([0., 0.5, 1])[:, None, None]
    logits[:, 7, :, 3] = logits[:, 4, :, 3]
    return logits


def test_sure_samples_keep_their_order():
    logits = sure_samples()
    got = SAMPLE_SCORES['msp'](logits).double().numpy()
    np.testing.assert_allclose(got, sample_reference('msp', logits, 1.0), rtol=1e-5)
    torch.testing.assert_close(SAMPLE_SCORES['msp'](logits[:1]), SCORES['msp'](logits[:1]),
                               rtol=1e-5, atol=TINY)
    equal = SAMPLE_SCORES['msp'](torch.zeros(2, 19, 1, 1)).item()
    assert equal == pytest.approx(1 - 1 / 19, rel=1e-6)


def margins():
    """Make samples in which one class wins by 0 to 40, the first pixels being ties of classes."""
    logits = torch.randn(4, 19, 1, 401, generator=torch.Generator().manual_seed(16)) * 0.5
    logits[:, 3] += torch.linspace(0, 40, 401)
    logits[:, :, 0, :3] = 0.0
    logits[:, 5:7, 0, 1] = 30.0
    logits[:, 5:8, 0, 2] = 30.0
    return logits


def test_entropies_of_sure_pixels_keep_their_digits():
    """Of samples and of masks, to 1e-5 of their value however small it is."""
    logits = margins()
    for temperature in TEMPERATURES:
        want = sample_reference('entropy', logits, temperature)
        got = SAMPLE_SCORES['predictive_entropy'](logits, temperature).double().numpy()
        np.testing.assert_allclose(got, want, rtol=1e-5)
        information = SAMPLE_SCORES['mutual_information'](logits, temperature).double().numpy()
        error = np.abs(information - sample_reference('mutual_information', logits, temperature))
        assert (error <= 1e-5 * want).all()
    assert sample_reference('entropy', logits, 1.0).min() < 1e-14
    # Query c says class c to the last digit, so that S is given by the masks alone.
    classes = torch.full((1, 19, 20), -1e4)
    classes[0].fill_diagonal_(0.0)
    got = MASK_SCORES['entropy'](classes, logits[:1] - 20).double().numpy()
    want = mask_reference('entropy', classes, logits[:1] - 20, 1.0)
    assert want.min() < 1e-6
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize('temperature', [0.0, -1.0, math.nan, math.inf])
def test_temperature_must_be_positive(temperature):
    for score in SCORES.values():
        parameters = {'channel': 0} if score is SCORES['void'] else {}
        with pytest.raises(ValueError, match='temperature must be a positive number'):
            score(torch.zeros(1, 3, 1, 1), temperature, **parameters)


def test_unknown_and_inapplicable_scores_list_the_choices():
    with pytest.raises(ValueError, match=r"unknown score 'odin'.*max_logit.*mutual_inf.*rba"):
        score_function('odin')
    with pytest.raises(ValueError, match=r"'rba' does not apply.*logits.*choose.*entropy.*msp"):
        score_function('rba', 'logits')
    with pytest.raises(ValueError, match=r"'void' does not apply.*masks.*energy.*polito_msp"):
        score_function('void', 'masks')
    assert score_function('rba') is MASK_SCORES['rba']
    assert score_function('msp') is SCORES['msp']
    assert score_function('msp', 'masks') is MASK_SCORES['msp']
