# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the transformers library for tests: real architectures, random weights."""

from pathlib import Path
from typing import Any

from anomaly_seg_ros.classes import CITYSCAPES_CLASSES
import torch
import transformers
from transformers.models.beit.image_processing_pil_beit import BeitImageProcessorPil
from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil
from transformers.models.eomt.image_processing_pil_eomt import EomtImageProcessorPil
from transformers.models.mask2former.image_processing_pil_mask2former import (
    Mask2FormerImageProcessorPil)
from transformers.models.mobilenet_v2.image_processing_pil_mobilenet_v2 import (
    MobileNetV2ImageProcessorPil)
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

STAGES = ['stage1', 'stage2', 'stage3', 'stage4']
SWIN = {'model_type': 'swin', 'embed_dim': 24, 'depths': [1, 1, 2, 1], 'num_heads': [1, 2, 4, 8],
        'out_features': STAGES}
CONVNEXT = {'model_type': 'convnext', 'hidden_sizes': [16, 32, 64, 128], 'depths': [1, 1, 1, 1],
            'out_features': STAGES}
VIT = {'hidden_size': 32, 'num_hidden_layers': 4, 'num_attention_heads': 4}

# Gain of the weights of the parts that are not left as initialised. Mask2Former looks where its
# own masks are: noise must not decide where that is.
MASK2FORMER_GAINS = {'mask_projection': 1, 'adapter': 1, 'input_projections': 1,
                     'class_predictor': 4, 'mask_embedder': 1.2, 'queries_': 12}
HEAD_GAINS = {'class': 4, 'mask_head': 2, 'upscale_block': 1.5, 'query': 12, 'head.head': 2,
              'decode_head': 1.5}

# Network name -> model class, processor class, a small configuration.
SMALL: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    'segformer': (
        transformers.SegformerForSemanticSegmentation, SegformerImageProcessorPil,
        {'depths': [1] * 4, 'hidden_sizes': [16, 32, 40, 64], 'decoder_hidden_size': 32}),
    'upernet-convnext': (
        transformers.UperNetForSemanticSegmentation, SegformerImageProcessorPil,
        {'hidden_size': 32, 'auxiliary_in_channels': 64, 'auxiliary_channels': 16,
         'backbone_config': CONVNEXT}),
    'upernet-swin': (
        transformers.UperNetForSemanticSegmentation, SegformerImageProcessorPil,
        {'hidden_size': 32, 'auxiliary_in_channels': 96, 'auxiliary_channels': 16,
         'backbone_config': SWIN}),
    'mask2former': (
        transformers.Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessorPil,
        {'hidden_dim': 32, 'mask_feature_size': 32, 'feature_size': 32, 'encoder_layers': 2,
         'encoder_feedforward_dim': 64, 'decoder_layers': 3, 'num_attention_heads': 4,
         'dim_feedforward': 64, 'num_queries': 20, 'backbone_config': SWIN}),
    'eomt': (
        transformers.EomtForUniversalSegmentation, EomtImageProcessorPil,
        {**VIT, 'image_size': 128, 'num_blocks': 2, 'num_queries': 20}),
    'dpt': (
        transformers.DPTForSemanticSegmentation, DPTImageProcessorPil,
        {**VIT, 'intermediate_size': 64, 'image_size': 64, 'backbone_out_indices': [0, 1, 2, 3],
         'neck_hidden_sizes': [16, 16, 32, 32], 'fusion_hidden_size': 32}),
    'beit': (
        transformers.BeitForSemanticSegmentation, BeitImageProcessorPil,
        {**VIT, 'intermediate_size': 64, 'image_size': 64, 'out_indices': [1, 2, 3, 4],
         'use_relative_position_bias': True}),
    'mobilenet_v2_deeplabv3plus': (
        transformers.MobileNetV2ForSemanticSegmentation, MobileNetV2ImageProcessorPil,
        {'depth_multiplier': 0.35, 'output_stride': 8}),
}


def family(case: str) -> str:
    """Return the name of the network: ``upernet-swin`` is a ``upernet``."""
    return case.partition('-')[0]


def build(case: str, classes: tuple[str, ...] = CITYSCAPES_CLASSES,
          settings: dict[str, Any] | None = None) -> Any:
    """
    Make the library's model with random weights that give lively answers.

    ``settings`` replace the small configuration; the library's own initialisation then stays but
    for the last layers, because many random layers on top of each other are chaotic.
    """
    kind, _, small = SMALL[case]
    torch.manual_seed(2)
    config = kind.config_class(id2label=dict(enumerate(classes)),
                               **(small if settings is None else settings))
    model = kind(config).eval()
    gains = {'': 1.5}
    if case == 'mask2former':
        gains = MASK2FORMER_GAINS
    elif settings and not case.startswith('mobilenet'):  # whose initialisation fades to nothing
        gains = HEAD_GAINS
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = next((g for part, g in gains.items() if part in name), None)
            if gain is not None and parameter.ndim > 1:
                parameter.normal_(0, gain / parameter[0].numel() ** 0.5)
            elif '' in gains and ('class' in name or name.endswith('head.4.bias')):
                parameter.normal_(0, 0.3)
        if case == 'eomt':
            model.attn_mask_probs.zero_()  # as at the end of training
    return model


def processor(case: str) -> Any:
    """Make the library's image processor, set to leave the image's size alone."""
    _, kind, _ = SMALL[case]
    options: dict[str, Any] = {'do_resize': False}
    if case == 'eomt':
        options['size'] = {'shortest_edge': 128, 'longest_edge': 128}
    if case.startswith('mobilenet'):
        options['do_center_crop'] = False
    return kind(**options)


def save(case: str, folder: Path, **options: Any) -> Path:
    """Write a checkpoint folder as users have it and return it."""
    build(case, **options).save_pretrained(folder)
    processor(case).save_pretrained(folder)
    return folder
