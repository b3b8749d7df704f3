# SPDX-License-Identifier: Apache-2.0
"""Published sizes of the architectures, for weights that come without a configuration."""

from typing import Any

_STAGES = ['stage1', 'stage2', 'stage3', 'stage4']


def _segformer(depths: list[int], width: int, decoder: int) -> dict[str, Any]:
    return {'depths': depths, 'decoder_hidden_size': decoder,
            'hidden_sizes': [width, 2 * width, 5 * width, 8 * width]}


def _convnext(depths: list[int], width: int) -> dict[str, Any]:
    return {'auxiliary_in_channels': 4 * width, 'backbone_config': {
        'model_type': 'convnext', 'depths': depths, 'out_features': _STAGES,
        'hidden_sizes': [width, 2 * width, 4 * width, 8 * width]}}


def _swin(depths: list[int], width: int, heads: list[int], window: int = 7) -> dict[str, Any]:
    return {'model_type': 'swin', 'depths': depths, 'embed_dim': width, 'num_heads': heads,
            'window_size': window, 'out_features': _STAGES}


_SWIN = {
    'tiny': _swin([2, 2, 6, 2], 96, [3, 6, 12, 24]),
    'small': _swin([2, 2, 18, 2], 96, [3, 6, 12, 24]),
    'base': _swin([2, 2, 18, 2], 128, [4, 8, 16, 32], 12),
    'large': _swin([2, 2, 18, 2], 192, [6, 12, 24, 48], 12),
}

# Architectures of the transformers library; their weights come with a configuration.
FAMILY_NAMES = ('segformer', 'upernet', 'mask2former', 'eomt', 'dpt', 'beit',
                'mobilenet_v2_deeplabv3plus')
# Those that give masks and a class for each, and so no logits of single pixels.
MASK_FAMILIES = ('mask2former', 'eomt')

# Variant -> family and the configuration by which it differs from the family's default.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    'segformer_b0': ('segformer', _segformer([2, 2, 2, 2], 32, 256)),
    'segformer_b1': ('segformer', _segformer([2, 2, 2, 2], 64, 256)),
    'segformer_b2': ('segformer', _segformer([3, 4, 6, 3], 64, 768)),
    'segformer_b3': ('segformer', _segformer([3, 4, 18, 3], 64, 768)),
    'segformer_b4': ('segformer', _segformer([3, 8, 27, 3], 64, 768)),
    'segformer_b5': ('segformer', _segformer([3, 6, 40, 3], 64, 768)),
    'upernet_convnext_tiny': ('upernet', _convnext([3, 3, 9, 3], 96)),
    'upernet_convnext_small': ('upernet', _convnext([3, 3, 27, 3], 96)),
    'upernet_convnext_base': ('upernet', _convnext([3, 3, 27, 3], 128)),
    'upernet_convnext_large': ('upernet', _convnext([3, 3, 27, 3], 192)),
    **{f'upernet_swin_{size}': ('upernet', {
        'backbone_config': swin, 'auxiliary_in_channels': 4 * swin['embed_dim']})
       for size, swin in _SWIN.items()},
    **{f'mask2former_swin_{size}': ('mask2former', {'backbone_config': swin})
       for size, swin in _SWIN.items()},
    'eomt_small': ('eomt', {'hidden_size': 384, 'num_hidden_layers': 12,
                            'num_attention_heads': 6, 'num_blocks': 3}),
    'eomt_base': ('eomt', {'hidden_size': 768, 'num_hidden_layers': 12,
                           'num_attention_heads': 12, 'num_blocks': 3}),
    'eomt_large': ('eomt', {}),
    'dpt_large': ('dpt', {'hidden_size': 1024, 'num_hidden_layers': 24,
                          'num_attention_heads': 16, 'intermediate_size': 4096,
                          'backbone_out_indices': [5, 11, 17, 23],
                          'neck_hidden_sizes': [256, 512, 1024, 1024]}),
    'beit_base': ('beit', {'image_size': 640, 'use_relative_position_bias': True,
                           'out_indices': [3, 5, 7, 11]}),
    'beit_large': ('beit', {'image_size': 640, 'use_relative_position_bias': True,
                            'hidden_size': 1024, 'num_hidden_layers': 24,
                            'num_attention_heads': 16, 'intermediate_size': 4096,
                            'out_indices': [7, 11, 15, 23]}),
}
