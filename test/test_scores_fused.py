# SPDX-License-Identifier: Apache-2.0
"""Scores inside the exported graph; void, dropout and ensembles."""

from dataclasses import replace
from importlib.util import find_spec
import math

from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.export import OPSET, to_onnx
from anomaly_seg_ros.fused import applicable_scores, fuse, MONTE_CARLO_SCORES, score_parameters
from anomaly_seg_ros.networks import load_network, LoadedNetwork
from anomaly_seg_ros.networks.erfnet import ERFNet
from anomaly_seg_ros.networks.heads import FixedDropout, MasksAsLogits, MasksHead
from anomaly_seg_ros.networks.numerics import settle_vector_math
from anomaly_seg_ros.networks.subpixel import classes_last
from anomaly_seg_ros.scores import _entropy_of, MASK_SCORES, SAMPLE_SCORES, SCORES
import cv2
import numpy as np
import onnxruntime
import pytest
from test_scores import (
    margins, mask_reference, reference, sample_reference, sure_samples, TINY)
import torch

settle_vector_math()
pytestmark = pytest.mark.usefixtures('one_thread')
NAMES = ('msp', 'max_logit', 'entropy', 'energy')


class AllScores(torch.nn.Module):
    """Every score of a table, at two temperatures, as one graph."""

    def __init__(self, table, names):
        super().__init__()
        self.functions = [(table[name], t) for name in names for t in (1.0, 2.5)]

    def forward(self, *outputs):
        """Return the scores in the order of names and temperatures."""
        return tuple(function(*outputs, t) for function, t in self.functions)


# Of those that scores are made of, the operators for which ONNX Runtime has CUDA kernels in float
# (its docs/OperatorKernels.md). One of any other kind and the backend cuda refuses the graph.
ON_CUDA = {
    'Abs', 'Add', 'Cast', 'Clip', 'Concat', 'Div', 'Equal', 'Exp', 'Expand', 'Gather', 'Gemm',
    'Identity', 'Less', 'Log', 'MatMul', 'Max', 'Min', 'Mul', 'Neg', 'Pow', 'ReduceMax',
    'ReduceMean', 'ReduceSum', 'Reshape', 'Round', 'Sigmoid', 'Slice', 'Softmax', 'Split',
    'Sqrt', 'Squeeze', 'Sub', 'Sum', 'Tanh', 'Transpose', 'Unsqueeze', 'Where'}


def in_graph(table, names, inputs, module=AllScores):
    """Export once and return a function that runs the graph on ONNX Runtime."""
    program = torch.onnx.export(module(table, names).eval(), inputs, dynamo=True,
                                opset_version=OPSET, verbose=False)
    assert {node.op_type for node in program.model_proto.graph.node} <= ON_CUDA
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(),
                                           providers=['CPUExecutionProvider'])

    def run(*values):
        feed = {i.name: v.numpy() for i, v in zip(session.get_inputs(), values, strict=True)}
        got = iter(session.run(None, feed))
        return {(name, t): next(got).astype(np.float64) for name in names for t in (1.0, 2.5)}
    return run


class OfPixels(AllScores):
    """The scores of logits (1, C, h, w) with the classes last, as the exported graphs have it."""

    def forward(self, logits):
        """Return the scores in the order of names and temperatures."""
        pixels = classes_last(logits).reshape(-1, logits.shape[1])
        return tuple(x.reshape(1, *logits.shape[2:]) for x in super().forward(pixels))


@pytest.fixture(scope='module', params=[AllScores, OfPixels])
def logits_graph(request):
    return in_graph(SCORES, NAMES, (torch.zeros(1, 19, 64, 128),), request.param)


def compare(got, logits):
    for (name, t), value in got.items():
        want = reference(name, logits.double().numpy(), t)
        scale = np.abs(want)
        if name == 'energy':  # rounds like its summands, near 0 too
            scale = np.maximum(scale, np.abs(logits.double().numpy()).max(axis=1))
        error = np.abs(value - want)
        assert (error <= 1e-5 * scale + TINY).all(), \
            f'{name} T={t}: {(error / (scale + TINY)).max():.1e}'


def test_scores_in_the_graph(logits_graph):
    generator = torch.Generator().manual_seed(8)
    shape = (1, 19, 64, 128)
    compare(logits_graph(torch.randn(shape, generator=generator) * 6), torch.randn(
        shape, generator=torch.Generator().manual_seed(8)) * 6)
    for size in (20.0, 80.0, 1e4, 65504.0):
        signs = (torch.randint(0, 2, shape, generator=generator) * 2 - 1.0) * size
        compare(logits_graph(signs), signs)
        one = torch.full(shape, -size)
        one[:, 7] = size
        compare(logits_graph(one), one)


def test_scores_in_the_graph_on_real_logits(logits_graph, real_data):
    network = load_network('erfnet', real_data / 'weights' / 'erfnet_cityscapes_20ch.pth')
    image = cv2.imread(str(next((real_data / 'anomaly' / 'road_anomaly_21' / 'images').iterdir())))
    image = cv2.resize(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), (128, 64))
    with torch.inference_mode():
        logits = network.module(torch.from_numpy(image / 255.0).float().permute(2, 0, 1)[None])
    compare(logits_graph(logits), logits)


def test_mask_scores_in_the_graph():
    names = tuple(MASK_SCORES)
    run = in_graph(MASK_SCORES, names, (torch.zeros(1, 12, 20), torch.zeros(1, 12, 16, 24)))
    generator = torch.Generator().manual_seed(9)
    for scale in (0.5, 5.0, 50.0):
        classes = torch.randn(1, 12, 20, generator=generator) * scale
        masks = torch.randn(1, 12, 16, 24, generator=generator) * scale
        for (name, t), value in run(classes, masks).items():
            want = mask_reference(name, classes, masks, t)
            np.testing.assert_allclose(value, want, rtol=1e-5,
                                       atol=1e-6 * max(1, np.abs(want).max()), err_msg=name)


def test_pixels_that_no_mask_claims():
    """In the exported graph labels and scores there are those of float64, down to -100."""
    depths = torch.tensor([-10., -12, -14, -17, -18, -20, -30, -50, -75, -100])
    masks = torch.zeros(1, 19, 1, 1) + depths
    masks[:, 5, :, :-1] += 4  # the query of class 5 is the least unsure; the end is out of reach
    classes = torch.randn(1, 19, 20, generator=torch.Generator().manual_seed(14))
    classes[0].fill_diagonal_(9.0)
    image = masks.permute(0, 2, 3, 1).reshape(1, 1, -1, 19).expand(1, 3, -1, -1).contiguous()
    for name in MASK_SCORES:
        head = MasksHead(MasksOfImage(classes), MASK_SCORES[name], False, None, 1.0).eval()
        session = onnxruntime.InferenceSession(to_onnx(head, image),
                                               providers=['CPUExecutionProvider'])
        labels, anomaly = session.run(['labels', 'anomaly'], {'image': image.numpy()})
        assert labels[0, 0, :-1].tolist() == [5] * 9, name
        want = mask_reference(name, classes, masks, 1.0)
        np.testing.assert_allclose(anomaly, want, rtol=1e-5, atol=1e-7, err_msg=name)


class MasksOfImage(torch.nn.Module):
    """A mask network whose mask logits are the image: (1, 3, W, Q) -> (1, Q, 1, W)."""

    def __init__(self, classes):
        super().__init__()
        self.register_buffer('classes', classes)

    def forward(self, image):
        """Return class logits and mask logits."""
        return self.classes, image[:, :1].permute(0, 3, 1, 2)


def test_sample_scores_in_the_graph():
    names = tuple(SAMPLE_SCORES)
    run = in_graph(SAMPLE_SCORES, names, (torch.zeros(4, 19, 16, 24),))
    generator = torch.Generator().manual_seed(10)
    for scale in (1.0, 10.0, 200.0):
        logits = torch.randn(4, 19, 16, 24, generator=generator) * scale
        for (name, t), value in run(logits).items():
            want = sample_reference(name, logits, t)
            np.testing.assert_allclose(value, want, rtol=1e-5,
                                       atol=1e-6 * max(1, np.abs(want).max()), err_msg=name)
    sure = torch.zeros(4, 19, 16, 24)
    sure[:3] = sure_samples()[..., :24]
    sure[3] = sure[2]
    np.testing.assert_allclose(run(sure)['msp', 1.0], sample_reference('msp', sure, 1.0),
                               rtol=1e-5)
    wins = margins()[..., :384].reshape(4, 19, 16, 24)
    for t in (1.0, 2.5):
        want = sample_reference('entropy', wins, t)
        np.testing.assert_allclose(run(wins)['predictive_entropy', t], want, rtol=1e-5)


@pytest.mark.skipif(not find_spec('openvino'), reason='needs openvino')
def test_entropies_in_the_graph_on_openvino():
    """Its divisions and logarithms are its own."""
    import openvino

    class Entropies(torch.nn.Module):
        def forward(self, image):
            return SAMPLE_SCORES['entropy'](image), _entropy_of(image[:1].softmax(dim=1))
    logits = margins()
    model = openvino.Core().read_model(to_onnx(Entropies().eval(), logits))
    compiled = openvino.compile_model(model, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    answers = compiled(logits.numpy())
    np.testing.assert_allclose(answers[0], sample_reference('entropy', logits, 1.0), rtol=1e-5)
    np.testing.assert_allclose(answers[1], reference('entropy', logits[:1], 1.0), rtol=1e-5)


@pytest.fixture(scope='module')
def erfnets(tmp_path_factory):
    """Write two ERFNet checkpoints with 20 outputs and lively answers."""
    paths = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        network = ERFNet(20)
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(module.running_var, 0.02, 0.1)
        path = tmp_path_factory.mktemp('weights') / f'erfnet{seed}.pth'
        torch.save(network.state_dict(), path)
        paths.append(path)
    return paths


@pytest.fixture
def image():
    return torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(11))


def full_network(path):
    network = ERFNet(20).eval()
    network.load_state_dict(torch.load(path, weights_only=True))
    return network


def test_void_score_sees_the_void_channel(erfnets, image):
    loaded = load_network('erfnet', erfnets[0])
    with torch.inference_mode():
        labels, anomaly = fuse(loaded, 'void', 2.0)(image)
        logits = full_network(erfnets[0])(image)
        plain, _ = fuse(loaded, 'msp', 2.0)(image)
    want = reference('void', logits.numpy(), 2.0, channel=19)
    np.testing.assert_allclose(anomaly.numpy(), want, rtol=1e-4, atol=1e-7)
    assert want.max() > 2 * want.min()
    assert torch.equal(labels, plain)
    assert torch.equal(labels, logits[:, :19].argmax(dim=1).to(torch.uint8))


def test_dropout_passes_are_those_of_one_network_at_a_time(erfnets, image):
    """T masks in one batch give what T runs with these masks give."""
    loaded = load_network('erfnet', erfnets[0])
    fused = fuse(loaded, 'mutual_information', 1.0, passes=5, seed=3)
    masks = {name: module.masks for name, module in fused.body.named_modules()
             if isinstance(module, FixedDropout)}
    rates = {name: module.p for name, module in loaded.module.named_modules()
             if isinstance(module, torch.nn.Dropout2d) and module.p > 0}
    assert masks.keys() == rates.keys()
    assert len(masks) == 13
    for name, mask in masks.items():
        assert mask.shape == (5, 64 if rates[name] == 0.03 else 128)
        np.testing.assert_allclose(mask[mask > 0], 1 / (1 - rates[name]), rtol=1e-6)
    dropped = torch.cat([mask.flatten() == 0 for name, mask in masks.items() if rates[name] > 0.1])
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.03)

    runs = []
    for t in range(5):
        hooks = [loaded.module.get_submodule(name).register_forward_hook(
            lambda _, inputs, output, kept=mask[t]: inputs[0] * kept[None, :, None, None])
            for name, mask in masks.items()]
        with torch.inference_mode():
            runs.append(loaded.module(image))
        for hook in hooks:
            hook.remove()
    runs = torch.cat(runs)
    assert (runs - runs[:1]).abs().max() > 0.01
    with torch.inference_mode():
        torch.testing.assert_close(fused.body(image), runs, rtol=1e-5,
                                   atol=1e-5 * runs.abs().max().item())
        for name in MONTE_CARLO_SCORES:
            labels, anomaly = fuse(loaded, name, 1.5, passes=5, seed=3)(image)
            np.testing.assert_allclose(anomaly.numpy(), sample_reference(name, runs, 1.5),
                                       rtol=1e-4, atol=1e-5)
    mean = (runs / 1.5).softmax(dim=1).mean(dim=0, keepdim=True)
    assert (labels == mean.argmax(dim=1)).float().mean() > 0.999


def test_dropout_masks_are_fixed_by_the_seed(erfnets, image):
    loaded = load_network('erfnet', erfnets[0])
    before = loaded.module(image)
    same, again, other = (fuse(loaded, 'variance', 1.0, passes=4, seed=seed)(image)[1]
                          for seed in (0, 0, 1))
    assert torch.equal(same, again)
    assert not torch.allclose(same, other)
    assert torch.equal(loaded.module(image), before), 'the network itself was changed'
    assert score_parameters(loaded, 'variance') == {'passes': 8, 'seed': 0}
    assert score_parameters(loaded, 'msp') == {}


@pytest.mark.parametrize('name', sorted(SAMPLE_SCORES))
def test_ensemble(name, erfnets, image):
    ensemble = load_network('erfnet', erfnets)
    assert ensemble.outputs == 'samples'
    assert ensemble.weights_source == 'erfnet1.pth + erfnet2.pth'
    assert len(ensemble.weights_sha256.split(' + ')) == 2
    with torch.inference_mode():
        labels, anomaly = fuse(ensemble, name, 1.5)(image)
        logits = torch.cat([full_network(path)(image)[:, :19] for path in erfnets])
    np.testing.assert_allclose(anomaly.numpy(), sample_reference(name, logits, 1.5),
                               rtol=1e-4, atol=1e-6)
    mean = (logits / 1.5).softmax(dim=1).mean(dim=0, keepdim=True)
    assert torch.equal(labels, mean.argmax(dim=1).to(torch.uint8))


def test_ensemble_of_one_is_the_network(erfnets):
    assert load_network('erfnet', erfnets[:1]).outputs == 'logits'
    with pytest.raises(UserError, match='no weights for erfnet'):
        load_network('erfnet', [])


def constant_network(**changes):
    """Make a network without dropout whose logits or masks do not depend on the image."""
    return LoadedNetwork('constant', torch.nn.Conv2d(3, 19, 1).eval(), 'none', '', '', **changes)


def test_scores_that_do_not_apply_are_refused_with_those_that_do(erfnets):
    plain = constant_network()
    assert applicable_scores(plain) == ('energy', 'entropy', 'max_logit', 'msp')
    for score in ('void', 'mutual_information', 'rba', 'polito_msp'):
        with pytest.raises(UserError, match=rf"'{score}' does not apply to constant, which gives "
                                            'logits, without dropout layers; choose one of '
                                            'energy, entropy, max_logit, msp$'):
            fuse(plain, score, 1.0)
    with pytest.raises(UserError, match=r"'void' does not apply .* gives masks.*polito_rba, rba$"):
        fuse(replace(plain, outputs='masks'), 'void', 1.0)
    with pytest.raises(UserError, match=r"'polito_msp' does not apply .* gives masks of one cl"):
        fuse(replace(plain, outputs='masks', classes=('road',)), 'polito_msp', 1.0)
    with pytest.raises(UserError, match=r"'rba' does not apply to erfnet, which is an ensemble"):
        fuse(load_network('erfnet', erfnets), 'rba', 1.0)
    with pytest.raises(UserError, match=r"unknown score 'odin'; choose one of"):
        fuse(plain, 'odin', 1.0)
    assert set(applicable_scores(load_network('erfnet', erfnets[0]))) == \
        {*SCORES, *MONTE_CARLO_SCORES}


def test_upsampled_logits(image):
    """The score is taken from interpolated logits, not interpolated itself."""
    torch.manual_seed(0)
    body = torch.nn.Conv2d(3, 5, 4, stride=4).eval()
    network = replace(constant_network(), module=body, upsample=True)
    with torch.inference_mode():
        labels, anomaly = fuse(network, 'max_logit', 1.0)(image)
        logits = torch.nn.functional.interpolate(body(image), (64, 96), mode='bilinear')
        coarse, _ = fuse(replace(network, upsample=False), 'max_logit', 1.0)(image)
    assert torch.equal(labels, logits.argmax(dim=1).to(torch.uint8))
    assert torch.equal(anomaly, -logits.amax(dim=1))
    assert coarse.shape == (1, 16, 24)


class FixedMasks(torch.nn.Module):
    """A mask network that answers what it was told."""

    def __init__(self, classes, masks):
        super().__init__()
        self.classes = classes
        self.masks = masks

    def forward(self, image):
        """Return class logits and mask logits."""
        return self.classes, self.masks


@pytest.mark.parametrize('mask_size_hw', [None, (24, 24)])
@pytest.mark.parametrize('temperature', [1.0, 2.5])
def test_label_and_score_are_of_the_same_class_scores(mask_size_hw, temperature, image):
    """Masks are resized first, then S, of the same temperature, and then both are taken."""
    generator = torch.Generator().manual_seed(12)
    classes = torch.randn(1, 9, 20, generator=generator) * 3
    masks = torch.randn(1, 9, 16, 24, generator=generator) * 3
    network = replace(constant_network(outputs='masks', upsample=True, mask_size_hw=mask_size_hw),
                      module=FixedMasks(classes, masks))

    def interpolate(x, size_hw):
        return torch.nn.functional.interpolate(x, size_hw, mode='bilinear')
    shares = interpolate(interpolate(masks.double(), mask_size_hw or (64, 96)).sigmoid(), (64, 96))
    s = torch.einsum('nqc,nqhw->nchw', (classes.double() / temperature).softmax(-1)[..., :-1],
                     shares)
    for name in MASK_SCORES:
        labels, anomaly = fuse(network, name, temperature)(image)
        assert (labels == s.argmax(dim=1)).float().mean() > 0.999
        # S is linear in the masks' shares of the pixels: interpolating these is the same.
        want = mask_reference(name, classes, shares.logit(), temperature)
        np.testing.assert_allclose(anomaly, want, rtol=1e-4, atol=1e-5, err_msg=name)


def test_an_ensemble_takes_interpolated_class_scores(image):
    """As one mask network does: the logarithm comes behind."""
    generator = torch.Generator().manual_seed(12)
    body = FixedMasks(torch.randn(1, 9, 20, generator=generator) * 3,
                      torch.randn(1, 9, 16, 24, generator=generator) * 3)
    masks = torch.nn.functional.interpolate(body.masks.double(), (24, 24), mode='bilinear')
    shares = torch.nn.functional.interpolate(masks.sigmoid(), (64, 96), mode='bilinear')
    s = torch.einsum('nqc,nqhw->nchw', body.classes.double().softmax(-1)[..., :-1], shares)
    torch.testing.assert_close(MasksAsLogits(body, (24, 24))(image).double(), s.log(),
                               rtol=1e-5, atol=1e-5)


def test_ensemble_of_mask_networks(image):
    from anomaly_seg_ros.networks import _ensemble

    generator = torch.Generator().manual_seed(13)
    members = [replace(constant_network(outputs='masks', upsample=True), module=FixedMasks(
        torch.randn(1, 9, 20, generator=generator) * 3,
        torch.randn(1, 9, 16, 24, generator=generator) * 3)) for _ in range(3)]
    labels, anomaly = fuse(_ensemble(members), 'predictive_entropy', 1.0)(image)
    posteriors = []
    for member in members:
        masks = torch.nn.functional.interpolate(member.module.masks, (64, 96), mode='bilinear')
        s = torch.einsum('nqc,nqhw->nchw', member.module.classes.softmax(-1)[..., :-1],
                         masks.sigmoid()).double()
        posteriors.append(s / s.sum(dim=1, keepdim=True))
    mean = torch.stack(posteriors).mean(dim=0)
    want = -(mean * mean.log()).sum(dim=1)
    torch.testing.assert_close(anomaly.double(), want, rtol=1e-4, atol=1e-5)
    assert (labels == mean.argmax(dim=1)).float().mean() > 0.999
    assert want.max() <= math.log(19)


def test_members_that_claim_nothing_keep_their_opinion():
    masks = torch.full((1, 2, 1, 1), -78.0)
    classes = torch.tensor([[[0., 0, 5, 0], [0, 0, 6, 0]]])
    logits = MasksAsLogits(FixedMasks(classes, masks), None)(torch.zeros(1, 3, 1, 1))
    want = classes.double().softmax(dim=-1)[..., :-1].sum(dim=1)
    torch.testing.assert_close(logits.softmax(dim=1)[..., 0, 0].double(), want / want.sum(),
                               rtol=1e-5, atol=1e-7)


def test_the_card_of_an_ensemble_speaks_of_all_members():
    """Every licence counts, once; void is one channel only where it is the same of all."""
    from anomaly_seg_ros.networks import _ensemble

    members = [replace(constant_network(void_index=19), licence=licence)
               for licence in ('see A', 'see B', 'see A')]
    joined = _ensemble(members)
    assert (joined.licence, joined.void_index) == ('see A + see B', 19)
    for void_index in (None, 0):
        members[1] = replace(members[1], void_index=void_index)
        assert _ensemble(members).void_index is None


def test_ensembles_of_different_kinds_are_refused():
    from anomaly_seg_ros.networks import _ensemble
    with pytest.raises(UserError, match='its mean are not those of'):
        _ensemble([constant_network(), constant_network(mean=(0.5, 0.5, 0.5))])
