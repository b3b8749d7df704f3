# SPDX-License-Identifier: Apache-2.0
"""ACDC (Sakaridis et al., ICCV 2021): Cityscapes' classes in fog, at night, in rain and snow."""

from pathlib import Path

from anomaly_seg_ros.datasets.cityscapes import LABEL_IDS, TRAIN_IDS
from anomaly_seg_ros.datasets.paired import IMAGE, Layout, PairedDataset
from anomaly_seg_ros.errors import UserError

WEATHERS = ('fog', 'night', 'rain', 'snow')

_IMAGE = rf'rgb_anon/(?P<a>{{weather}})/{{split}}/[^/]+/(?P<b>[^/]+)_rgb_anon\.{IMAGE}'
_MASK = r'gt/(?P<a>{weather})/{split}/[^/]+/(?P<b>[^/]+)_gt_'
_TEXT = ('rgb_anon/(fog|night|rain|snow)/SPLIT/SEQUENCE/FRAME_rgb_anon.png with '
         'gt/(fog|night|rain|snow)/SPLIT/SEQUENCE/FRAME_gt_')


class Acdc(PairedDataset):
    """ACDC's adverse images; frame names start with the weather."""

    name = 'acdc'
    source = 'https://acdc.vision.ee.ethz.ch (rgb_anon_trainvaltest, gt_trainval)'
    splits = ('val', 'train')
    layouts = (
        Layout(f'{_TEXT}labelTrainIds.png', _IMAGE, rf'{_MASK}labelTrainIds\.(?i:png)',
               ('rgb_anon', 'gt'), TRAIN_IDS),
        Layout(f'{_TEXT}labelIds.png', _IMAGE, rf'{_MASK}labelIds\.(?i:png)', ('rgb_anon', 'gt'),
               LABEL_IDS),
    )

    def __init__(self, root: Path | str, *, weather: str = 'all', split: str | None = None,
                 keep_going: bool = False) -> None:
        """
        Find and pair the files.

        Parameters
        ----------
        root, split, keep_going
            See :class:`PairedDataset`.
        weather
            ``fog``, ``night``, ``rain``, ``snow`` or ``all``.

        """
        if weather not in (*WEATHERS, 'all'):
            raise UserError(f'acdc has no weather {weather!r}. '
                            f'Choose one of {", ".join(WEATHERS)} or all.')
        self._weather = '|'.join(WEATHERS) if weather == 'all' else weather
        super().__init__(root, split=split, keep_going=keep_going)

    def _variables(self, split: str | None) -> dict[str, str]:
        return {'split': split or '', 'weather': self._weather}
