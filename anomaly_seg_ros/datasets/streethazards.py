# SPDX-License-Identifier: Apache-2.0
"""StreetHazards of the CAOS benchmark (Hendrycks et al., ICML 2022): rendered, with anomalies."""

from typing import ClassVar

from anomaly_seg_ros.datasets.paired import Codes, IMAGE, Layout, PairedDataset

# Codes count from 1: 1 unlabelled (and sky), 2 building, 3 fence, 4 other, 5 pedestrian, 6 pole,
# 7 road line, 8 road, 9 sidewalk, 10 vegetation, 11 car, 12 wall, 13 traffic sign, 14 anomaly
# (create_dataset.py of hendrycks/anomaly-seg). Its evaluation counts all but 14 as
# in-distribution, also the unlabelled pixels.
_CODES = Codes(
    anomaly={0: 255, **dict.fromkeys(range(1, 14), 0), 14: 1},
    labels={0: 255, 1: 255, 2: 2, 3: 4, 4: 255, 5: 11, 6: 5, 7: 0, 8: 0, 9: 1, 10: 8, 11: 13,
            12: 3, 13: 7, 14: 255})

_FOLDERS = {'test': 'test', 'validation': 'train', 'training': 'train'}


class StreetHazards(PairedDataset):
    """StreetHazards: 1,500 test images in two towns; training and validation hold no anomaly."""

    name = 'streethazards'
    source = 'https://github.com/hendrycks/anomaly-seg (streethazards_test.tar, _train.tar)'
    splits = ('test', 'validation', 'training')
    frame_counts: ClassVar[dict[str | None, int]] = {'test': 1500}
    layouts = tuple(
        Layout(f'{folder}/images/{split}/TOWN/N.png with {folder}/annotations/{split}/TOWN/N.png',
               rf'{folder}/images/{split}/(?P<a>[^/]+)/(?P<b>[^/]+)\.{IMAGE}',
               rf'{folder}/annotations/{split}/(?P<a>[^/]+)/(?P<b>[^/]+)\.(?i:png)',
               (f'{folder}/images/{split}', f'{folder}/annotations/{split}'), _CODES,
               splits=(split,))
        for split, folder in _FOLDERS.items())
