# SPDX-License-Identifier: Apache-2.0
"""
IDD, the India Driving Dataset (Varma et al., WACV 2019): streets unlike Cityscapes'.

A network trained on Cityscapes does not know some of its classes: they are the anomalies of
local out-of-domain detection (de Jorge et al., CVPR 2023, naver/relis, which takes autorickshaw,
guard rail, billboard and bridge/tunnel). Classes that Cityscapes has are in-distribution, the
others void. Label tables: AutoNUE/public-code, helpers/anue_labels.py.
"""

from collections.abc import Iterable
from pathlib import Path

from anomaly_seg_ros.datasets.paired import Codes, IMAGE, Layout, PairedDataset
from anomaly_seg_ros.errors import UserError

# Level-3 id -> train id; 3, 12 and 21 mix classes, so they are nothing that Cityscapes has. 4,
# 20 and 25 hold animals, groups of poles and fallback background beside person, pole and sky.
_LEVEL3_TRAIN = {
    0: 0, 2: 1, 4: 11, 5: 12, 6: 17, 7: 18, 9: 13, 10: 14, 11: 15, 14: 3, 15: 4, 18: 7, 19: 6,
    20: 5, 22: 2, 24: 8, 25: 10}
# Without parking, which shares id 1 with drivable fallback.
_LEVEL3_UNKNOWN = {
    'autorickshaw': (8,), 'curb': (13,), 'guard rail': (16,), 'billboard': (17,),
    'bridge': (23,)}
# Id -> train id, the table's column csTrainId.
_ID_TRAIN = {
    0: 0, 3: 1, 5: 9, 6: 11, 8: 12, 9: 17, 10: 18, 12: 13, 13: 14, 14: 15, 17: 16, 20: 3, 21: 4,
    24: 7, 25: 6, 26: 5, 29: 2, 32: 8, 33: 10}
_ID_UNKNOWN = {
    'parking': (1,), 'animal': (7,), 'autorickshaw': (11,), 'caravan': (15,), 'trailer': (16,),
    'curb': (19,), 'guard rail': (22,), 'billboard': (23,), 'bridge': (30, 31)}

#: Anomalies unless others are named.
UNKNOWN = ('autorickshaw', 'guard rail', 'billboard', 'bridge')

_IMAGE = rf'leftImg8bit/{{split}}/(?P<a>[^/]+)/(?P<b>[^/]+)_leftImg8bit\.{IMAGE}'
_MASK = r'gtFine/{split}/(?P<a>[^/]+)/(?P<b>[^/]+)_gtFine_label'
_TEXT = ('leftImg8bit/SPLIT/DRIVE/FRAME_leftImg8bit.(png|jpg) with '
         'gtFine/SPLIT/DRIVE/FRAME_gtFine_label')


class Idd(PairedDataset):
    """IDD's segmentation, with masks made by AutoNUE's createLabels.py (level3Id or id)."""

    name = 'idd'
    source = ('https://idd.insaan.iiit.ac.in (IDD Segmentation); make the masks with '
              'preperation/createLabels.py --id-type level3Id of AutoNUE/public-code')
    nested = ('IDD_Segmentation', 'idd20kII')
    splits = ('val', 'train')
    layouts = (
        Layout(f'{_TEXT}level3Ids.png', _IMAGE, rf'{_MASK}level3Ids\.(?i:png)',
               ('leftImg8bit', 'gtFine')),
        Layout(f'{_TEXT}ids.png', _IMAGE, rf'{_MASK}ids\.(?i:png)', ('leftImg8bit', 'gtFine')),
    )

    def __init__(self, root: Path | str, *, unknown: str | Iterable[str] = UNKNOWN,
                 split: str | None = None, keep_going: bool = False) -> None:
        """
        Find and pair the files.

        Parameters
        ----------
        root, split, keep_going
            See :class:`PairedDataset`.
        unknown
            Names of the classes that are anomalies, or one text with commas between them.

        Raises
        ------
        UserError
            If a name is unknown, or the masks on disk do not tell that class apart (level-3 masks
            have one code for animals and persons, and one for parking and drivable fallback).

        """
        names = unknown.split(',') if isinstance(unknown, str) else unknown
        unknown = tuple(name.strip() for name in names)
        wrong = [name for name in unknown if name not in _ID_UNKNOWN]
        if wrong or not unknown:
            raise UserError(f'idd: {", ".join(wrong) or "no class"} cannot be the unknown class. '
                            f'Choose from {", ".join(_ID_UNKNOWN)}.')
        super().__init__(root, split=split, keep_going=keep_going)
        level3 = 'level3Ids' in self._pairs[0].mask.name if self._pairs[0].mask else True
        groups = _LEVEL3_UNKNOWN if level3 else _ID_UNKNOWN
        missing = [name for name in unknown if name not in groups]
        if missing:
            raise UserError(f'{root}: masks with level-3 ids do not tell {", ".join(missing)} '
                            'apart. Make masks with createLabels.py --id-type id.')
        train = _LEVEL3_TRAIN if level3 else _ID_TRAIN
        everything = dict.fromkeys([*range(26 if level3 else 40), 255], 255)
        self._codes = Codes(
            anomaly={**everything, **dict.fromkeys(train, 0),
                     **{code: 1 for name in unknown for code in groups[name]}},
            labels={**everything, **train})
