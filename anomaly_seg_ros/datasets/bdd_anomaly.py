# SPDX-License-Identifier: Apache-2.0
"""
BDD-Anomaly of the CAOS benchmark (Hendrycks et al., ICML 2022), derived from BDD100K.

Train, motorcycle and bicycle are anomalies: the test split is every frame of BDD100K's training
and validation images with one of them in it, the other splits are the frames without
(create_bdd_dataset.py of hendrycks/anomaly-seg): 6,280 training, 910 validation, 810 test frames.
"""

from typing import ClassVar

from anomaly_seg_ros.datasets.paired import (
    Codes, Found, IMAGE, keep_by_codes, Layout, Pair, PairedDataset)

_ANOMALIES = (16, 17, 18)
_TRAIN_IDS = Codes(
    anomaly={255: 255, **{train: int(train in _ANOMALIES) for train in range(19)}},
    labels={255: 255, **{train: train for train in range(19)}})
# The benchmark's own copies of the labels: train id + 2, and 1 for void.
_SHIFTED = Codes(
    anomaly={1: 255, **{train + 2: int(train in _ANOMALIES) for train in range(19)}},
    labels={1: 255, **{train + 2: train for train in range(19)}})

_SEG_IMAGE = rf'seg/images/{{folder}}/(?P<a>[^/]+)\.{IMAGE}'


class BddAnomaly(PairedDataset):
    """BDD-Anomaly; which frames belong to a split is read from the masks (8,000 small files)."""

    name = 'bdd_anomaly'
    source = ('https://bdd-data.berkeley.edu (10K images, segmentation labels) or the labels of '
              'https://github.com/hendrycks/anomaly-seg')
    splits = ('test', 'validation', 'train')
    frame_counts: ClassVar[dict[str | None, int]] = {
        'test': 810, 'validation': 910, 'train': 6280}
    nested = ('bdd100k',)
    layouts = (
        Layout('seg/images/(train|val)/NAME.jpg with seg/train_labels/(train|val)/'
               'NAME_train_id.png (train id + 2)', _SEG_IMAGE,
               r'seg/train_labels/{folder}/(?P<a>[^/]+)_train_id\.(?i:png)',
               ('seg/images', 'seg/train_labels'), _SHIFTED),
        Layout('seg/images/(train|val)/NAME.jpg with seg/labels/(train|val)/NAME_train_id.png',
               _SEG_IMAGE, r'seg/labels/{folder}/(?P<a>[^/]+)_train_id\.(?i:png)',
               ('seg/images', 'seg/labels'), _TRAIN_IDS),
        Layout('images/10k/(train|val)/NAME.jpg with labels/sem_seg/masks/(train|val)/NAME.png',
               rf'images/10k/{{folder}}/(?P<a>[^/]+)\.{IMAGE}',
               r'labels/sem_seg/masks/{folder}/(?P<a>[^/]+)\.(?i:png)',
               ('images/10k', 'labels/sem_seg/masks'), _TRAIN_IDS),
    )

    def _variables(self, split: str | None) -> dict[str, str]:
        folders = {'train': 'train', 'validation': 'val'}
        return {'folder': folders.get(split or '', '(?:train|val)')}

    def _select(self, found: Found) -> list[Pair]:
        anomaly = found.layout.codes.anomaly or {}
        wanted = {code for code, meaning in anomaly.items() if meaning == 1}
        return keep_by_codes(
            found, lambda codes: wanted.isdisjoint(codes) == (found.split != 'test'))
