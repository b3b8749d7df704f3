# SPDX-License-Identifier: Apache-2.0
"""Networks of the transformers library: loading, preprocessing, labels, sizes, bad checkpoints."""

import json
import math
import os
from pathlib import Path
import shutil

from anomaly_seg_ros.classes import CITYSCAPES_CLASSES, CITYSCAPES_PALETTE
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.export import export_model, ExportRequest
from anomaly_seg_ros.files import sha256_file
from anomaly_seg_ros.fused import applicable_scores, fuse
from anomaly_seg_ros.networks import load_network
from anomaly_seg_ros.networks.heads import FixedDropout
from anomaly_seg_ros.networks.variants import FAMILY_NAMES, MASK_FAMILIES, VARIANTS
import cv2
import numpy as np
import pytest
import torch

transformers = pytest.importorskip('transformers', reason='needs pip install .[networks]')

from anomaly_seg_ros.networks.huggingface import (  # noqa: E402, I100
    FAMILIES, RelativePositionBias)
from segmenters import build, family, processor, save, SMALL  # noqa: E402, I100

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
pytestmark = pytest.mark.usefixtures('one_thread')


def size_of(case):
    """Return a size at which the library itself runs this network: for two of them, a square."""
    return {'eomt': (128, 128), 'dpt': (96, 96)}.get(case, (96, 160))


def picture(size_hw, seed=0):
    """Make an RGB image of soft blobs."""
    noise = np.random.default_rng(seed).integers(0, 256, (10, 16, 3), dtype=np.uint8)
    return cv2.resize(noise, size_hw[::-1], interpolation=cv2.INTER_CUBIC)


def as_input(image, network):
    """Normalise as the card says, in float64."""
    values = (image / 255.0 - np.array(network.mean)) / np.array(network.std)
    return torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1)[None]


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """Give the folder of a case's checkpoint, written once."""
    root = tmp_path_factory.mktemp('checkpoints')

    def folder(case):
        path = root / case
        return path if path.is_dir() else save(case, path)
    return folder


@pytest.mark.parametrize('case', SMALL)
def test_labels_are_those_of_the_library(case, folders):
    """save_pretrained, load, and compare with the library's own pre- and post-processing."""
    folder, size = folders(case), size_of(case)
    image = picture(size)
    network = load_network(family(case), folder, size)
    with torch.inference_mode():
        labels, anomaly = fuse(network, 'msp', 1.0)(as_input(image, network))
    model = SMALL[case][0].from_pretrained(folder).eval()
    pixels = processor(case)(images=image, return_tensors='pt')['pixel_values']
    pixels = torch.stack(pixels) if isinstance(pixels, list) else pixels
    with torch.inference_mode():
        outputs = model(pixel_values=pixels)
    finish = processor(case if hasattr(processor(case), 'post_process_semantic_segmentation')
                       else 'segformer')
    want = finish.post_process_semantic_segmentation(outputs, target_sizes=[size])[0].numpy()
    counts = np.bincount(want.ravel())
    assert (counts > 20).sum() >= 2, 'the library gives one label only: nothing is compared'
    assert labels.shape == anomaly.shape == (1, *size)
    assert (labels[0].numpy() == want).mean() >= 0.999
    assert torch.isfinite(anomaly).all()


@pytest.mark.parametrize('case', SMALL)
def test_every_applicable_score_runs(case, folders):
    size = (64, 96)
    network = load_network(family(case), folders(case), size)
    image = as_input(picture(size), network)
    for score in applicable_scores(network):
        with torch.inference_mode():
            labels, anomaly = fuse(network, score, 1.3)(image)
        assert labels.shape == anomaly.shape == (1, *size), score
        assert torch.isfinite(anomaly).all(), score
        assert anomaly.std() > 0, score


@pytest.mark.parametrize('case, score', [('segformer', 'entropy'), ('eomt', 'rba')])
def test_export(case, score, folders, tmp_path):
    """A rectangular export agrees with PyTorch; the card holds what the checkpoint says."""
    size = (96, 128)
    frames = [picture((120, 200), seed) for seed in range(2)]
    card = export_model(ExportRequest(family(case), folders(case), score, size),
                        tmp_path / 'model.onnx', frames=frames)
    assert card.parity['max_score_error'] <= 1e-4
    assert card.parity['label_mismatch'] <= 1e-4
    assert card.output_size_hw == size
    assert card.classes == CITYSCAPES_CLASSES
    assert card.palette == CITYSCAPES_PALETTE
    assert card.drivable == (0,)
    assert card.mean == pytest.approx((0.485, 0.456, 0.406))
    assert card.weights_sha256 == sha256_file(folders(case) / 'model.safetensors')
    assert run_pipeline(tmp_path / 'model.onnx', frames[0]).anomaly.shape == (120, 200)


def run_pipeline(path, image):
    from anomaly_seg_ros.backends import open_backend
    from anomaly_seg_ros.model_file import load_model_file
    from anomaly_seg_ros.pipeline import Pipeline

    with open_backend(load_model_file(path), 'cpu') as backend:
        detection = Pipeline(backend)(image).copy()
    assert np.isfinite(detection.anomaly).all()
    return detection


# Parameters in millions as published: Xie et al. (SegFormer, table 1), Liu et al. (Swin and
# ConvNeXt with UPerNet), Cheng et al. (Mask2Former, tables), Kerssies et al. (EoMT, table).
PUBLISHED_MILLIONS = {
    'segformer_b0': 3.8, 'segformer_b1': 13.7, 'segformer_b2': 27.5, 'segformer_b3': 47.3,
    'segformer_b4': 64.1, 'segformer_b5': 84.7,
    'upernet_convnext_tiny': 60, 'upernet_convnext_small': 82, 'upernet_convnext_base': 122,
    'upernet_convnext_large': 235, 'upernet_swin_tiny': 60, 'upernet_swin_small': 81,
    'upernet_swin_base': 121, 'upernet_swin_large': 234,
    'mask2former_swin_tiny': 47, 'mask2former_swin_small': 69, 'mask2former_swin_base': 107,
    'mask2former_swin_large': 215, 'eomt_small': 24, 'eomt_base': 93, 'eomt_large': 317,
    'dpt_large': 343}


@pytest.mark.parametrize('variant', PUBLISHED_MILLIONS)
def test_variants_have_the_published_size(variant):
    from anomaly_seg_ros.networks.huggingface import FAMILIES

    family_name, settings = VARIANTS[variant]
    config = getattr(transformers, FAMILIES[family_name].config)(num_labels=19, **settings)
    with torch.device('meta'):
        model = getattr(transformers, FAMILIES[family_name].model)(config)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert millions == pytest.approx(PUBLISHED_MILLIONS[variant], rel=0.03)


def test_names_without_torch_are_those_with_it():
    from anomaly_seg_ros.networks.huggingface import FAMILIES

    assert tuple(FAMILIES) == FAMILY_NAMES
    assert {name for name, one in FAMILIES.items() if one.outputs == 'masks'} \
        == set(MASK_FAMILIES)
    assert {family_name for family_name, _ in VARIANTS.values()} <= set(FAMILIES)


def test_state_dict_of_a_variant(folders, tmp_path, monkeypatch):
    """A bare state dict gives the same answers as its folder, with the family's preprocessing."""
    for case, told in (('segformer', ()), ('eomt', ('num_queries', 'image_size'))):
        settings = {k: v for k, v in SMALL[case][2].items() if k not in told}
        monkeypatch.setitem(VARIANTS, f'{case}_tiny', (case, settings))
        path = tmp_path / f'{case}.pth'
        torch.save(build(case).state_dict(), path)
        from anomaly_seg_ros import networks
        monkeypatch.setitem(networks.NETWORKS, f'{case}_tiny', networks.load_transformers)
        loaded, expected = (load_network(name, weights, (96, 128)) for name, weights in
                            ((f'{case}_tiny', path), (case, folders(case))))
        assert (loaded.mean, loaded.std) == (expected.mean, expected.std)
        assert loaded.classes == CITYSCAPES_CLASSES
        image = as_input(picture((96, 128)), loaded)
        with torch.inference_mode():
            got, want = (fuse(network, 'msp', 1.0)(image) for network in (loaded, expected))
        torch.testing.assert_close(got, want)
        with pytest.raises(UserError, match=rf'does not tell its architecture.*{case}_'):
            load_network(case, path)


def test_state_dict_with_batch_normalisation(tmp_path, monkeypatch):
    """As in the published DPT of ADE20K: the state dict tells."""
    from anomaly_seg_ros import networks

    monkeypatch.setitem(VARIANTS, 'dpt_tiny', ('dpt', SMALL['dpt'][2]))
    monkeypatch.setitem(networks.NETWORKS, 'dpt_tiny', networks.load_transformers)
    model = build('dpt', settings={**SMALL['dpt'][2], 'use_batch_norm_in_fusion_residual': True})
    torch.save(model.state_dict(), tmp_path / 'dpt.pth')
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        got = load_network('dpt_tiny', tmp_path / 'dpt.pth', (64, 64)).module(image)
        torch.testing.assert_close(got, model(pixel_values=image).logits, rtol=1e-4, atol=1e-4)


def test_state_dict_of_another_class_count(tmp_path):
    path = tmp_path / 'b0.pth'
    torch.save({'decode_head.classifier.bias': torch.zeros(150)}, path)
    with pytest.raises(UserError, match=r'b0\.pth: 150 classes.*19 Cityscapes.*config\.json'):
        load_network('segformer_b0', path)
    torch.save({'something.else': torch.zeros(150)}, path)
    with pytest.raises(UserError, match=r'b0\.pth: no weights of segformer.*something\.else'):
        load_network('segformer_b0', path)


ADE = ('wall', 'building', 'sky', 'floor', 'tree', 'ceiling', 'road', 'bed')
MAPILLARY = ('Bird', 'Road', 'Lane Marking - General', 'Sky', 'Car', 'Unlabeled')


@pytest.mark.parametrize('classes, drivable', [
    (ADE, (6,)), (MAPILLARY, (1, 2)), (('robot', 'shelf'), ())])
def test_other_class_sets(classes, drivable, tmp_path):
    network = load_network('segformer', save('segformer', tmp_path / 'c', classes=classes))
    assert network.classes == classes
    assert network.drivable == drivable
    assert len(set(network.palette)) == len(classes)
    if 'sky' in classes:
        assert network.palette[classes.index('sky')] == (70, 130, 180)
    assert ('void' in applicable_scores(network)) == (classes is MAPILLARY)
    with torch.inference_mode():
        labels, _ = fuse(network, 'msp', 1.0)(torch.zeros(1, 3, 64, 64))
    assert labels.max() < len(classes)


def test_void_class_by_name(tmp_path):
    """Where void is one of the classes, its posterior is the score and it stays a label."""
    network = load_network('segformer', save('segformer', tmp_path / 'c', classes=MAPILLARY))
    image = as_input(picture((64, 64)), network)
    with torch.inference_mode():
        _, anomaly = fuse(network, 'void', 2.0)(image)
        logits = network.module(image)
        want = torch.nn.functional.interpolate(logits, (64, 64), mode='bilinear')
    torch.testing.assert_close(anomaly, (want / 2).softmax(dim=1)[:, 5], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('changes, mean, std', [
    ({'do_normalize': False}, 0.0, 1.0),
    ({'image_mean': [10.0] * 3, 'image_std': [20.0] * 3, 'do_rescale': False}, 10 / 255, 20 / 255),
    ({'image_mean': [0.5] * 3, 'image_std': [0.25] * 3, 'rescale_factor': 1 / 127.5},
     0.25, 0.125)])
def test_preprocessing_of_the_checkpoint(changes, mean, std, folders, tmp_path):
    folder = copy_of(folders('segformer'), tmp_path)
    edit(folder / 'preprocessor_config.json', **changes)
    network = load_network('segformer', folder)
    assert network.mean == pytest.approx((mean,) * 3)
    assert network.std == pytest.approx((std,) * 3)
    pixels = transformers.models.segformer.image_processing_pil_segformer \
        .SegformerImageProcessorPil.from_pretrained(folder)(
            images=picture((32, 32)), return_tensors='pt')['pixel_values']
    torch.testing.assert_close(as_input(picture((32, 32)), network), pixels.float(),
                               rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('case', ['eomt', 'dpt', 'beit'])
def test_sizes_that_are_refused(case, folders, tmp_path):
    with pytest.raises(UserError, match=rf'{case} needs .*multiples of 16, got 100x130; '
                                        r'the nearest possible is 96x128'):
        load_network(case, folders(case), (100, 130))
    output = tmp_path / 'out' / 'model.onnx'
    output.parent.mkdir()
    with pytest.raises(UserError, match=r'multiples of 16'):
        export_model(ExportRequest(case, folders(case), 'msp', (100, 130)), output)
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize('case', ['segformer', 'upernet-convnext', 'upernet-swin', 'mask2former',
                                  'mobilenet_v2_deeplabv3plus'])
def test_sizes_of_any_kind(case, folders):
    network = load_network(family(case), folders(case), (75, 101))
    with torch.inference_mode():
        labels, _ = fuse(network, 'max_logit', 1.0)(torch.zeros(1, 3, 75, 101))
    assert labels.shape == (1, 75, 101)
    with pytest.raises(UserError, match=r'at least 32, got 16x64; the nearest possible is 32x64'):
        load_network(family(case), folders(case), (16, 64))


def test_eomt_position_embeddings_at_their_own_size_are_untouched(folders):
    network = load_network('eomt', folders('eomt'), (128, 128))
    model = SMALL['eomt'][0].from_pretrained(folders('eomt')).eval()
    image = as_input(picture((128, 128)), network)
    with torch.inference_mode():
        classes, masks = network.module(image)
        want = model(pixel_values=image)
    torch.testing.assert_close(masks, want.masks_queries_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(classes, want.class_queries_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('shared', [False, True])
def test_beit_looks_up_what_the_library_computes(shared):
    """The relative positions of every block, bit for bit, also at another size than trained."""
    small = {**SMALL['beit'][2], 'use_relative_position_bias': not shared,
             'use_shared_relative_position_bias': shared}
    model = build('beit', settings=small)
    biases = {name: module for name, module in model.named_modules()
              if hasattr(module, 'relative_position_bias_table')}
    assert len(biases) == (1 if shared else small['num_hidden_layers'])
    for bias in biases.values():
        torch.nn.init.normal_(bias.relative_position_bias_table)
    with torch.inference_mode():
        want = {name: bias((6, 10), True, dim_size=61) for name, bias in biases.items()}
        FAMILIES['beit'].adapt(model, (96, 160))
        for name, values in want.items():
            found = model.get_submodule(name)
            assert isinstance(found, RelativePositionBias)
            assert torch.equal(found((6, 10), True, dim_size=61), values)


@pytest.mark.parametrize('probability, message', [(1.0, None), (0.5, 'mask annealing')])
def test_eomt_masks_its_attention_as_trained(probability, message, tmp_path):
    model = build('eomt')
    with torch.no_grad():
        model.attn_mask_probs.fill_(probability)
    folder = tmp_path / 'eomt'
    model.save_pretrained(folder)
    processor('eomt').save_pretrained(folder)
    if message:
        with pytest.raises(UserError, match=message):
            load_network('eomt', folder)
        return
    network = load_network('eomt', folder)
    image = as_input(picture((128, 128)), network)
    with torch.inference_mode():
        _, masks = network.module(image)
        want = model(pixel_values=image).masks_queries_logits
        model.attn_mask_probs.zero_()
        unmasked = model(pixel_values=image).masks_queries_logits
    torch.testing.assert_close(masks, want, rtol=1e-4, atol=1e-4)
    assert (masks - unmasked).abs().max() > 0.1


def copy_of(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / 'checkpoint'))


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite_weights(folder, change):
    from safetensors.torch import load_file, save_file
    state = load_file(folder / 'model.safetensors')
    change(state)
    save_file(state, folder / 'model.safetensors')


@pytest.mark.parametrize('case', ['segformer', 'beit', 'dpt'])
def test_dropout_inside_the_blocks(case, folders, tmp_path):
    """Passes that are not what each is alone are refused: never mixed, and no traceback."""
    folder = copy_of(folders(case), tmp_path)
    edit(folder / 'config.json', hidden_dropout_prob=0.1)
    network = load_network(case, folder, (96, 128))
    image = as_input(picture((96, 128)), network)
    if case != 'dpt':
        with pytest.raises(UserError, match=r'layers of this network \(model\..*dropout, .*'
                                            r'Set hidden_dropout_prob to 0 in config\.json'):
            fuse(network, 'variance', 1.0)
        return
    fused = fuse(network, 'variance', 1.0, passes=3)
    layers = [m for m in fused.modules() if isinstance(m, FixedDropout)]
    masks = [layer.masks for layer in layers]
    with torch.inference_mode():
        together = fused.body(image)
        for t in range(3):
            for layer, every in zip(layers, masks, strict=True):
                layer.masks = every[t:t + 1]
            error = (fused.body(image) - together[t:t + 1]).abs().mean()
            assert error < 1e-4 * together.std(dim=0).mean()


def test_keys_that_do_not_fit(folders, tmp_path):
    folder = copy_of(folders('segformer'), tmp_path)

    def change(state):
        state.pop('decode_head.linear_fuse.weight')
        state['decode_head.new'] = torch.zeros(1)
        state['decode_head.batch_norm.weight'] = torch.zeros(5)
    rewrite_weights(folder, change)
    with pytest.raises(UserError) as caught:
        load_network('segformer', folder)
    message = str(caught.value)
    assert '1 missing (decode_head.linear_fuse.weight)' in message
    assert '1 unexpected (decode_head.new)' in message
    assert 'decode_head.batch_norm.weight: expected (32,), got (5,)' in message


def test_class_count_that_does_not_fit(folders, tmp_path):
    folder = copy_of(folders('segformer'), tmp_path)
    edit(folder / 'config.json', id2label={'0': 'road', '1': 'rest'},
         label2id={'road': 0, 'rest': 1})
    with pytest.raises(UserError, match=r'classifier\.bias: expected \(2,\), got \(19,\)'):
        load_network('segformer', folder)


def test_weights_that_are_not_finite(folders, tmp_path):
    folder = copy_of(folders('segformer'), tmp_path)
    rewrite_weights(folder, lambda state: state['decode_head.classifier.bias'].fill_(np.nan))
    with pytest.raises(UserError, match=r'NaN or infinity \(decode_head\.classifier\.bias\)'):
        load_network('segformer', folder)


@pytest.mark.parametrize('damage, message', [
    (lambda f: (f / 'config.json').unlink(), r'config\.json: missing'),
    (lambda f: (f / 'config.json').write_text('{'), r'config\.json: not readable as JSON'),
    (lambda f: (f / 'config.json').write_text('[]'), r'config\.json: expected a JSON object'),
    (lambda f: edit(f / 'config.json', depths='many'), r'config\.json: not a valid config'),
    (lambda f: edit(f / 'config.json', model_type='upernet'),
     r"model type 'upernet', not 'segformer'. Export it as 'upernet'"),
    (lambda f: edit(f / 'config.json', model_type='bert'), r"'bert'.*Supported are.*segformer"),
    (lambda f: (f / 'preprocessor_config.json').unlink(),
     r'no preprocessor_config\.json.*AutoImageProcessor'),
    (lambda f: edit(f / 'config.json', id2label=dict(enumerate(CITYSCAPES_CLASSES, 1))),
     r'config\.json: id2label must number the 19 classes from 0 to 18, got 1, 2, 3'),
    *((lambda f, key=key, value=value: edit(f / 'preprocessor_config.json', **{key: value}),
       rf'preprocessor_config\.json: {key} must be .*, got ')
      for key, value in (('image_mean', [0.5]), ('image_mean', ['a', 'b', 'c']),
                         ('image_mean', None), ('image_std', [0, 0, 0]), ('image_std', 0.5),
                         ('rescale_factor', 0), ('rescale_factor', None),
                         ('rescale_factor', 'x'), ('rescale_factor', math.nan))),
    (lambda f: (f / 'model.safetensors').unlink(), r'neither model\.safetensors nor pytorch_mod'),
    (lambda f: (f / 'model.safetensors').write_bytes(b'no'), r'model\.safetensors: not a read'),
])
def test_damaged_folders(damage, message, folders, tmp_path):
    folder = copy_of(folders('segformer'), tmp_path)
    damage(folder)
    output = tmp_path / 'out' / 'model.onnx'
    output.parent.mkdir()
    with pytest.raises(UserError, match=message):
        export_model(ExportRequest('segformer', folder, 'msp', (64, 64)), output)
    assert list(output.parent.iterdir()) == []


def test_shards(folders, tmp_path):
    folder = tmp_path / 'sharded'
    build('segformer').save_pretrained(folder, max_shard_size='200KB')
    processor('segformer').save_pretrained(folder)
    assert not (folder / 'model.safetensors').exists()
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        got, want = (load_network('segformer', f).module(image)
                     for f in (folder, folders('segformer')))
    assert torch.equal(got, want)


class Malicious:
    """Unpickling this makes a file."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def test_pickled_code_in_a_folder_is_never_executed(folders, tmp_path):
    folder = copy_of(folders('segformer'), tmp_path)
    (folder / 'model.safetensors').unlink()
    torch.save({**build('segformer').state_dict(), 'x': Malicious(tmp_path / 'trace')},
               folder / 'pytorch_model.bin')
    with pytest.raises(UserError, match=r'pytorch_model\.bin: .*was not executed'):
        load_network('segformer', folder)
    assert not (tmp_path / 'trace').exists()


def test_code_that_comes_with_a_checkpoint_is_never_imported(folders, tmp_path):
    folder = copy_of(folders('segformer'), tmp_path)
    (folder / 'evil.py').write_text(f'import os\nos.mkdir({str(tmp_path / "trace")!r})\n'
                                    'class Config: pass\nclass Model: pass\n')
    edit(folder / 'config.json', auto_map={
        'AutoConfig': 'evil.Config', 'AutoModelForSemanticSegmentation': 'evil.Model'})
    edit(folder / 'preprocessor_config.json', auto_map={'AutoImageProcessor': 'evil.Model'})
    load_network('segformer', folder)
    assert not (tmp_path / 'trace').exists()


def test_pickled_weights_without_code(folders, tmp_path):
    folder = copy_of(folders('segformer'), tmp_path)
    (folder / 'model.safetensors').unlink()
    torch.save(build('segformer').state_dict(), folder / 'pytorch_model.bin')
    image = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        got, want = (load_network('segformer', f).module(image)
                     for f in (folder, folders('segformer')))
    assert torch.equal(got, want)


def test_model_id_without_network(tmp_path, monkeypatch):
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
    monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', 'http://127.0.0.1:9')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'cache'))
    output = tmp_path / 'out' / 'model.onnx'
    output.parent.mkdir()
    with pytest.raises(UserError, match=r'nobody/nothing: .*could not be downloaded.*hf download '
                                        r'nobody/nothing --local-dir'):
        export_model(ExportRequest('segformer', 'nobody/nothing', 'msp', (64, 64)), output)
    assert list(output.parent.iterdir()) == []
    with pytest.raises(UserError, match=r'no such weights file'):
        load_network('segformer_b0', tmp_path / 'none.pth')
    with pytest.raises(UserError, match=r'no such file or folder, and no model id'):
        load_network('segformer', tmp_path / 'none')


def test_model_id_in_the_cache(folders, tmp_path, monkeypatch):
    """A model that was downloaded before works without network; the card names its commit."""
    commit = 'a' * 40
    cache = tmp_path / 'cache' / 'models--somebody--segformer'
    shutil.copytree(folders('segformer'), cache / 'snapshots' / commit)
    (cache / 'refs').mkdir()
    (cache / 'refs' / 'main').write_text(commit)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr('huggingface_hub._snapshot_download.constants.HF_HUB_CACHE',
                        str(tmp_path / 'cache'))
    for weights in ('somebody/segformer', Path('somebody/segformer'),
                    f'somebody/segformer@{commit}'):
        network = load_network('segformer', weights)
        assert network.weights_source == f'somebody/segformer@{commit}'
        assert network.licence == 'see https://huggingface.co/somebody/segformer'
