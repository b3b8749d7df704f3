# SPDX-License-Identifier: Apache-2.0
"""Cityscapes (Cordts et al., CVPR 2016): labels of street scenes, no anomalies."""

from anomaly_seg_ros.datasets.paired import Codes, IMAGE, Layout, PairedDataset

#: Train id -> label id of the 19 evaluated classes (cityscapesScripts, helpers/labels.py).
TRAIN_TO_LABEL_ID: tuple[int, ...] = (
    7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
LABEL_IDS = Codes(labels={**dict.fromkeys(range(34), 255),
                          **{code: train for train, code in enumerate(TRAIN_TO_LABEL_ID)}})
TRAIN_IDS = Codes(labels={255: 255, **{train: train for train in range(19)}})

_IMAGE = rf'leftImg8bit/{{split}}/[^/]+/(?P<a>[^/]+)_leftImg8bit\.{IMAGE}'
_FLAT = rf'(?P<a>[^/]+)_leftImg8bit\.{IMAGE}'


class Cityscapes(PairedDataset):
    """Cityscapes' fine annotations as label ids or as train ids."""

    name = 'cityscapes'
    source = 'https://www.cityscapes-dataset.com (leftImg8bit_trainvaltest, gtFine_trainvaltest)'
    splits = ('val', 'train', 'test')
    layouts = (
        Layout('leftImg8bit/SPLIT/CITY/FRAME_leftImg8bit.png with '
               'gtFine/SPLIT/CITY/FRAME_gtFine_labelIds.png', _IMAGE,
               r'gtFine/{split}/[^/]+/(?P<a>[^/]+)_gtFine_labelIds\.(?i:png)',
               ('leftImg8bit', 'gtFine'), LABEL_IDS),
        Layout('leftImg8bit/SPLIT/CITY/FRAME_leftImg8bit.png with '
               'gtFine/SPLIT/CITY/FRAME_gtFine_labelTrainIds.png', _IMAGE,
               r'gtFine/{split}/[^/]+/(?P<a>[^/]+)_gtFine_labelTrainIds\.(?i:png)',
               ('leftImg8bit', 'gtFine'), TRAIN_IDS),
        Layout('FRAME_leftImg8bit.png beside FRAME_gtFine_labelIds.png', _FLAT,
               r'(?P<a>[^/]+)_gtFine_labelIds\.(?i:png)', ('.',), LABEL_IDS),
        Layout('FRAME_leftImg8bit.png beside FRAME_gtFine_labelTrainIds.png', _FLAT,
               r'(?P<a>[^/]+)_gtFine_labelTrainIds\.(?i:png)', ('.',), TRAIN_IDS),
    )
